"""Converts a random checkpoint of full size there and back, and measures time and memory.

    python -m convert.full_size FOLDER [--preset zaya1_8b] [--layers N]

The folder is for scratch and gets about 36 GB. Times are held against copying the same files, with
fsync, each from a cold cache; nothing is compressed. Ends with code 1 where a bound is missed.
"""

import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import tyro

from convert.conversion import plan
from convert.folder import CHECKSUMS
from zaya_jax.errors import CheckpointError, ZayaError

MOST_TIME = 1.5  # of copying
BASE_MEMORY = 1.5e9  # bytes, beside twice the largest tensor
_BLOCK = 1 << 26


def cool(folder: Path) -> None:
    """Takes a folder's files out of the page cache, where the system lets us."""
    for file in folder.rglob("*"):
        if file.is_file() and hasattr(os, "posix_fadvise"):
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def copy(source: Path, target: Path) -> float:
    """Seconds to copy a folder's files to the disk itself."""
    cool(source)
    target.mkdir()
    begin = time.perf_counter()
    for file in sorted(source.iterdir()):
        with open(file, "rb") as reads, open(target / file.name, "wb") as writes:
            while block := reads.read(_BLOCK):
                writes.write(block)
            writes.flush()
            os.fsync(writes.fileno())
    return time.perf_counter() - begin


def run(*arguments: object) -> tuple[float, float]:
    """Seconds and peak resident bytes of a `zaya` command in a process of its own."""
    command = [sys.executable, "-m", "zaya_jax.cli.main", *map(str, arguments)]
    begin = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise ZayaError(f"zaya {' '.join(map(str, arguments))} failed")
    return time.perf_counter() - begin, usage.ru_maxrss * 1024


def measure(folder: Path, preset: str, layers: int | None) -> list[str]:
    """Measures and prints; the bounds that were missed."""
    source, orbax, back = (folder / name for name in ("source", "orbax", "back"))
    options = [] if layers is None else ["--layers", str(layers)]
    script = [sys.executable, "-m", "convert.synthetic", preset, str(source), *options]
    subprocess.run(script, check=True)
    planned = plan(source, "orbax")
    largest = max(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in planned.leaves.values())
    bound = BASE_MEMORY + 2 * largest
    if planned.nbytes * 2.1 > (free := shutil.disk_usage(folder).free) + planned.nbytes:
        raise CheckpointError(f"{folder}: two checkpoints do not fit, {free / 1e9:.1f} GB are free")
    print(f"{planned.nbytes / 1e9:.1f} GB; the largest tensor {largest / 1e9:.2f} GB", flush=True)
    missed: list[str] = []

    def convert(what: str, start: Path, end: Path, to: str) -> None:
        cool(start)
        seconds, peak = run("convert", start, end, "--to", to)
        text = f"{what}: {seconds:.1f} s, {seconds / copied:.2f} x copying, {peak / 1e9:.2f} GB"
        print(text, flush=True)
        if seconds > MOST_TIME * copied or peak > bound:
            missed.append(f"{text}; allowed are {MOST_TIME} x and {bound / 1e9:.2f} GB")

    copied = copy(source, folder / "copy")
    shutil.rmtree(folder / "copy")
    print(f"copying with fsync: {copied:.1f} s", flush=True)
    convert("Hugging Face -> Orbax", source, orbax, "orbax")
    shutil.rmtree(source)
    convert("Orbax -> Hugging Face", orbax, back, "hf")
    if (orbax / CHECKSUMS).read_bytes() != (back / CHECKSUMS).read_bytes():
        missed.append("the values that came back are not those that went")
    for name in ("orbax", "back"):
        seconds, peak = run(
            *("generate", "What is 21 + 34?", "--model", folder / name, "--max-new-tokens", 8)
        )
        print(f"loading {name} and 8 tokens: {seconds:.1f} s, peak {peak / 1e9:.2f} GB", flush=True)
    return missed


def main(
    folder: tyro.conf.Positional[Path], preset: str = "zaya1_8b", layers: int | None = None
) -> None:
    """Converts a random checkpoint of full size there and back, and measures.

    Args:
      folder: for scratch, new or empty; removed in the end.
      preset: name of the configuration.
      layers: the first so many only.
    """
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder}: is not empty")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        missed = measure(folder, preset, layers)
    except (ZayaError, subprocess.CalledProcessError) as error:
        sys.exit(str(error))
    finally:
        shutil.rmtree(folder)
    for line in missed:
        print(f"MISSED: {line}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    tyro.cli(main)
