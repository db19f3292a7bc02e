"""`zaya bench`: our speed beside that of PyTorch's transformers, and of the machine."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.table import Table
from rich.text import Text

import zaya_jax
from convert.synthetic import DTYPES, Dtype
from zaya_jax.benchmark.comparison import LIMIT, Measurement, Result, Row, cases, fastest, find
from zaya_jax.benchmark.processes import check_reference, checkpoint, run_ours, run_reference
from zaya_jax.cli.output import check_destination, console, messages, write_json
from zaya_jax.config import ZayaConfig
from zaya_jax.errors import CheckpointError, InputError, ZayaError
from zaya_jax.memory import PEAK, available_memory, plan

FULL = "zaya1_8b"
REFERENCE = Path(zaya_jax.__file__).parents[1] / ".venv-oracle" / "bin" / "python"


@dataclasses.dataclass
class Bench:
    """Measure speed and memory on this machine, beside PyTorch's transformers on its CPU.

    Models are random, with balanced routing. Each takes many minutes, as transformers is measured
    in all its variants; other work on the machine spoils the figures.
    """

    presets: tyro.conf.Positional[tuple[str, ...]] = ("small", "medium")
    """Configurations to measure."""
    full: bool = False
    """Also measure zaya1_8b, which needs 18 GB of disk and 21 GB of memory."""
    dtypes: tuple[Dtype, ...] = ("bfloat16", "float32")
    """Of the parameters; zaya1_8b is measured in bfloat16 only."""
    reference: Path | None = None
    """Python interpreter of an environment with torch and transformers; by default that of
    `make oracle`, if it is there."""
    folder: Path | None = None
    """For the random models, which are kept and used again; by default in the user's cache."""
    platform: Literal["cpu", "rocm", "cuda"] = "cpu"
    """What our side runs on; transformers is measured beside the CPU only."""
    repeats: int = 3
    """Timed runs of each case, of which the median counts."""
    json: Path | None = None
    """Also write everything that was measured to this file."""

    def run(self) -> None:
        check_destination(self.json)
        if self.repeats < 1:
            raise InputError(f"repeats must be at least 1, got {self.repeats}")
        presets = dict.fromkeys([*self.presets, *([FULL] if self.full else [])])
        configs = {preset: ZayaConfig.preset(preset) for preset in presets}
        python = self._reference() if self.platform == "cpu" else None
        done: list[dict[str, Any]] = []
        for preset, config in configs.items():
            for dtype in self.dtypes:
                try:
                    _check_memory(preset, config, dtype)
                    _say(f"{preset} {dtype}: preparing the model")
                    model = checkpoint(self.folder or _default_folder(), preset, dtype)
                except CheckpointError as error:
                    _say(f"{preset} {dtype} is skipped: {error}")
                    continue
                measurement = _measure(preset, dtype, model, python, self.repeats, self.platform)
                _show(measurement)
                done.append(measurement.as_json())
                write_json(self.json, done)
        if not done:
            raise ZayaError("nothing was measured")

    def _reference(self) -> Path | None:
        if self.reference is None and not REFERENCE.exists():
            _say("no environment with torch and transformers (`make oracle`): only our figures")
            return None
        python = self.reference or REFERENCE
        check_reference(python)
        return python


def _measure(
    preset: str, dtype: Dtype, model: Path, python: Path | None, repeats: int, platform: str
) -> Measurement:
    """Runs the measuring processes, one after the other."""
    measured = Measurement(preset, dtype)
    arguments = [str(model), "--dtype", dtype, "--repeats", str(repeats)]
    arguments += cases(preset).arguments()

    def into(results: list[Result]) -> Callable[[Result], None]:
        def add(result: Result) -> None:
            results.append(result)
            _say(f"{preset} {dtype}: {_describe(result)}")

        return add

    for module, options, results in (
        ("machine", [], measured.machine),
        ("ours", arguments, measured.ours),
    ):
        problem = run_ours(module, options, into(results), platform)
        if problem is not None:
            raise ZayaError(f"{preset} {dtype}: measuring {module} failed: {problem}")
    if python is not None:
        measured.reference = []
        measured.problem = run_reference(python, arguments, into(measured.reference))
        if measured.problem is not None:
            _say(f"{preset} {dtype}: transformers ended early: {measured.problem}")
    return measured


def _check_memory(preset: str, config: ZayaConfig, dtype: Dtype) -> None:
    """Raises CheckpointError for what this machine cannot hold."""
    if preset == FULL and dtype != "bfloat16":
        raise CheckpointError("it is measured in bfloat16 only")
    needed = plan(config, 512, max(cases(preset).batch), DTYPES[dtype])[PEAK]
    free = available_memory()
    if free is not None and needed > free:
        raise CheckpointError(
            f"it needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"
        )


def _default_folder() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "zaya-jax" / "benchmark"


def _show(measured: Measurement) -> None:
    """The table of one model, and what one needs to know to read it."""
    table = Table(title=f"{measured.preset}, {measured.dtype}", title_justify="left")
    for column in ("tokens/s", "transformers", "variant", "ours", "ratio", "reach", ""):
        text = column in ("tokens/s", "variant", "")
        table.add_column(column, justify="left" if text else "right", no_wrap=column != "variant")
    for row in measured.table():
        table.add_row(*map(Text, _cells(row)))
    console.print(table)
    for note in _notes(measured):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    console.print()


def _cells(row: Row) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    form = ".0%" if row.case == LIMIT else ",.1f"
    return [
        row.case,
        number(row.reference, form),
        row.variant or "",
        number(row.ours, form),
        number(row.ratio, ".2f"),
        number(row.reach, ".0%" if row.case == LIMIT else ".1f"),
        {True: "met", False: "MISSED", None: ""}[row.met],
    ]


def _notes(measured: Measurement) -> list[str]:
    bandwidth = find(measured.machine, "read bandwidth")["bytes_per_second"]
    products = [
        f"{find(measured.machine, f'{dtype} products')['flops_per_second'] / 1e9:,.0f} in {dtype}"
        for dtype in DTYPES
    ]
    warm_up = sum(result["warm_up"] for result in fastest(measured.ours).values())
    loading = find(measured.ours, "load")["seconds"]
    peaks = [f"{find(measured.ours, 'memory')['peak_rss'] / 1e9:.2f} GB"]
    balances = [find(measured.ours, "balance")["mean"]]
    if best := fastest(measured.reference or ()):
        peaks.append(f"transformers {max(r['peak_rss'] for r in best.values()) / 1e9:.2f} GB")
        balances.append(find(measured.reference or (), "balance")["mean"])
    notes = [
        f"Limit: a token needs {measured.decode_bytes / 1e6:,.0f} MB of weights; the memory gives "
        f"{bandwidth / 1e9:.1f} GB/s (a sum over 512 MiB): {measured.decode_limit:,.1f} tokens/s.",
        f"Products of square matrices: {' and '.join(products)} GFLOP/s.",
        f"Loaded in {loading:.1f} s, compiled and warmed up in {warm_up:.1f} s.",
        f"Peak of memory: ours, with loading, {', '.join(peaks)}.",
        f"Entropy of the routing, 1 is uniform: {', '.join(map(str, balances))}.",
    ]
    if disturbed := measured.disturbed():
        notes.append(f"Other processes were busy during: {', '.join(disturbed)}.")
    if measured.problem is not None:
        notes.append(f"Transformers ended early: {measured.problem}")
    return notes


def _describe(result: Result) -> str:
    """A line of a measuring process as progress."""
    where = ", ".join(result[name] for name in ("variant", "case") if name in result)
    if "tokens_per_second" in result:
        return f"{where}: {result['tokens_per_second']:,.1f} tokens/s"
    values = (f"{k} {v}" for k, v in result.items() if k not in ("variant", "case"))
    return f"{where}: {', '.join(values)}"


def _say(text: str) -> None:
    messages.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
