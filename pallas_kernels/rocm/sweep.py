"""Chooses block sizes by compiling all candidates: `python -m pallas_kernels.rocm.sweep`.

Nothing is run, so the choice is by what the machine code tells. Of the candidates without spills,
whose LDS fits, those that leave room for two wavefronts on a SIMD come first; of these, the one
whose programs take most at once reads least again; and of equals, the one with fewest instructions.
Adds to pallas_kernels/blocks.json, which `blocks.blocks_for` reads; remove its lines to choose
again.
"""

import importlib
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, Literal

import jax
import tyro

from pallas_kernels.blocks import TABLE, Blocks, read_table, recording, trying
from pallas_kernels.rocm.cases import MODELS, Name, cases, find_case
from pallas_kernels.rocm.code_object import Kernel
from pallas_kernels.rocm.compiler import compile_for
from pallas_kernels.rocm.lowering import traffic
from pallas_kernels.rocm.toolchain import GPUS

_lock = Lock()


def sweep_case(name: str, sizes: Name, architecture: str) -> dict[str, Any]:
    """The best blocks of each kernel in a case that the table does not hold yet, by the key under
    which they are looked up."""
    case = find_case(name, MODELS[sizes])
    candidates = importlib.import_module(f"pallas_kernels.{name.split()[0]}.cases").CANDIDATES
    with recording() as asked:
        traffic(case.kernels, *case.args)
    chosen = {}
    for kernel, kind in dict.fromkeys(asked):
        key = f"{architecture} {kind}"
        if key in read_table():
            continue
        found = []
        for blocks in candidates.get(kernel, []):
            with trying(kernel, blocks):
                jax.clear_caches()  # else what was traced with other blocks is compiled
                try:
                    program = compile_for(case.kernels, *case.args, architecture=architecture)
                except Exception as error:  # whatever the compiler refuses
                    print(f"{kernel} {blocks}: {str(error).splitlines()[0]:.100}", file=sys.stderr)
                    continue
            if kernel in program.kernels:  # else these blocks came to the same code as others
                found.append((_rank(program.kernels[kernel], blocks), blocks))
        sound = [(rank, blocks) for rank, blocks in found if rank is not None]
        if sound:
            _, chosen[key] = min(sound)
    return chosen


def _rank(kernel: Kernel, blocks: Blocks) -> tuple[float, ...] | None:
    """Small is good; None where the kernel is no good at all."""
    if kernel.spills or kernel.scratch or kernel.lds > kernel.room:
        return None
    few_waves = kernel.waves < 2
    return few_waves, -math.prod(blocks.sizes), kernel.instructions


def main(
    case: str | None = None,
    sizes: Name = "8B",
    architecture: Literal["gfx942", "gfx950"] = "gfx942",
) -> None:
    """Compiles all candidates of kernels that the table lacks; half an hour for all of them.

    Args:
      case: one only, as JSON.
      sizes: of the one case, 8B or 74B.
      architecture: for the one case.
    """
    if case is not None:
        print(json.dumps(sweep_case(case, sizes, architecture)))
        return
    models = [(target, each) for target in GPUS for each in MODELS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failed = sum(pool.map(_sweep_model, models))
    sys.exit(f"{failed} cases failed" if failed else None)


def _sweep_model(model: tuple[str, Name]) -> int:
    """Each case in a process, where XLA has compiled nothing yet; how many of them failed."""
    (target, sizes), failed = model, 0
    for case in cases(MODELS[sizes]):
        command = [sys.executable, "-m", "pallas_kernels.rocm.sweep", "--case", case.name]
        options = ["--sizes", sizes, "--architecture", target]
        ended = subprocess.run([*command, *options], stdout=subprocess.PIPE, text=True, check=False)
        failed += ended.returncode != 0
        found = json.loads(ended.stdout) if ended.returncode == 0 else {}
        with _lock:
            table = {**read_table(), **found}
            rows = (f"  {json.dumps(key)}: {json.dumps(table[key])}" for key in sorted(table))
            TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n")
        print(f"{case.name}, {sizes}, {target}: {len(found)} kernels", flush=True)
    return failed


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, ModuleNotFoundError) as error:
        sys.exit(str(error))
