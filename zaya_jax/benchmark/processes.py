"""Runs the measuring processes, one at a time, on checkpoints of our own making."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from convert.synthetic import Dtype, write_synthetic
from zaya_jax.benchmark.comparison import Result
from zaya_jax.config import ZayaConfig
from zaya_jax.errors import ZayaError
from zaya_jax.loading import read_config

REFERENCE = Path(__file__).with_name("transformers_reference.py")


def checkpoint(folder: Path, preset: str, dtype: Dtype) -> Path:
    """The preset's random model with balanced routing, in that folder; written if it is not there.

    Raises:
      ZayaError: the disk is too small, or something else is there.
    """
    config = ZayaConfig.preset(preset)
    place = folder / f"{preset}-{dtype}"
    if not place.exists():
        unfinished = place.with_name(f"{place.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
        try:
            write_synthetic(config, unfinished, dtype)
            unfinished.rename(place)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    if read_config(place) != config:
        raise ZayaError(f"{place}: holds another model; remove it, or give another --folder")
    return place


def run_ours(
    module: str, arguments: list[str], on_result: Callable[[Result], None], platform: str = "cpu"
) -> str | None:
    """Runs one of our measuring modules on a platform of JAX; see `run`.

    Nothing is taken from the cache of compiled programs, so that warming up takes as long whatever
    ran before.
    """
    command = [sys.executable, "-m", f"zaya_jax.benchmark.{module}", *arguments]
    environment = {"JAX_PLATFORMS": platform, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    return run(command, on_result, environment)


def run_reference(
    python: Path, arguments: list[str], on_result: Callable[[Result], None]
) -> str | None:
    """Runs `transformers_reference` with an interpreter that has PyTorch; see `run`."""
    return run([str(python), str(REFERENCE), *arguments], on_result)


def run(
    command: list[str],
    on_result: Callable[[Result], None],
    environment: dict[str, str] | None = None,
) -> str | None:
    """Runs a process to its end, and gives on each JSON object that it prints.

    Returns None, or in one line why it failed. However this function is left, the process and
    those that it started have ended then.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # a group of its own, out of reach of the terminal's Ctrl-C
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    on_result(json.loads(line))
            process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
        if process.returncode == 0:
            return None
        if process.returncode < 0:
            return f"ended by signal {-process.returncode}, as where memory is short"
        errors.seek(0)
        lines = errors.read().strip().splitlines()
        return lines[-1].strip() if lines else f"ended with code {process.returncode}"


def check_reference(python: Path) -> None:
    """Raises ZayaError unless that interpreter has what `transformers_reference` imports."""
    search = "import sys; from importlib.util import find_spec as find; "
    search += "sys.exit(not (find('torch') and find('transformers')))"
    try:
        found = subprocess.run([python, "-c", search], capture_output=True).returncode == 0
    except OSError as error:
        raise ZayaError(f"{python}: no interpreter ({error.strerror}); see `make oracle`") from None
    if not found:
        raise ZayaError(f"{python}: has no torch and transformers; see `make oracle`")
