"""What commands share: tables, JSON files, progress, and one clear line for every error."""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from zaya_jax.errors import ZayaError
from zaya_jax.generation.rows import OnText
from zaya_jax.loading import NANO, load
from zaya_jax.sharding import make_mesh, parse_mesh, simulate_devices
from zaya_jax.zaya import Zaya

console = Console()
messages = Console(stderr=True)


def fail(message: str) -> None:
    """Prints an error as one line and ends the program with exit code 2."""
    messages.print(f"zaya: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)


def show(title: str, values: Mapping[str, Any]) -> None:
    """A two-column table."""
    table = Table(title=Text(title), show_header=False, title_justify="left")
    for name, value in values.items():
        table.add_row(Text(name), Text(str(value)))
    console.print(table)


def check_destination(file: Path | None) -> None:
    """Raises ZayaError now where `write_json` could not write later."""
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise ZayaError(f"{file}: cannot be written (no such folder, or a folder itself)")


def write_json(file: Path | None, values: Any) -> None:
    """Writes what a command printed, where the user asked for it."""
    if file is None:
        return
    try:
        file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ZayaError(f"{file}: cannot be written ({error.strerror})") from None


@contextlib.contextmanager
def working(message: str) -> Iterator[None]:
    """Shows that something is going on: a spinner on a terminal, a plain line elsewhere."""
    if messages.is_terminal:
        with messages.status(message):
            yield
    else:
        messages.print(f"{message} ...", markup=False, highlight=False)
        yield


@contextlib.contextmanager
def progress(message: str) -> Iterator[Callable[[int, int], None]]:
    """A callback that shows how much of a whole is done: a bar on a terminal; elsewhere, a plain
    line at the beginning."""
    if not messages.is_terminal:
        with working(message):
            yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeRemainingColumn(), console=messages, transient=True) as bar:
        task = bar.add_task(message, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def streaming(message: str) -> Iterator[OnText]:
    """A callback that prints text as it comes; until the first of it, shows that work goes on."""
    with contextlib.ExitStack() as waiting:
        waiting.enter_context(working(message))

        def on_text(_: int, piece: str) -> None:
            waiting.close()
            console.file.write(piece)  # as it is: rich would turn ":x:" into pictures
            console.file.flush()

        yield on_text
    console.print()


def find_devices() -> list[jax.Device]:
    """JAX's devices. Raises ZayaError where it cannot start."""
    try:
        return jax.devices()
    except Exception as error:  # JAX raises whatever its plugins raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ZayaError(f"JAX cannot start: {reason}; see JAX_PLATFORMS and XLA_FLAGS") from None


def mesh_of(text: str | None) -> Mesh | None:
    """A mesh written like data=2,expert=4; processors are made to stand for its devices where there
    are no others. None without a text."""
    sizes = parse_mesh(text) if text else {}
    if sizes:
        simulate_devices(math.prod(sizes.values()))
    find_devices()
    return make_mesh(sizes.get("data", 1), sizes.get("expert", 1)) if sizes else None


def load_model(path: str | None, dtype: str | None = None, mesh: str | None = None) -> Zaya:
    """Loads a checkpoint with a progress bar; without a path, the embedded model."""
    devices = mesh_of(mesh)
    source = NANO if path is None else path
    with progress(f"Loading {'the embedded nano model' if path is None else path}") as on_progress:
        return load(source, dtype, devices, layout="decoding", on_progress=on_progress)
