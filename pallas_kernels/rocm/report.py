"""Compiles every kernel for the MI300X, judges it, and writes the table of docs/kernels.md.

    python -m pallas_kernels.rocm.report            # fails where a kernel spills, or the like
    python -m pallas_kernels.rocm.report --case "moe forward" --sizes 8B    # one, as JSON

Needs the compiler (`make rocm-aot` installs it apart). Nothing is run.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tyro

from pallas_kernels.rocm import hlo, roofline
from pallas_kernels.rocm.cases import MODELS, Case, Name, Sizes, cases, find_case
from pallas_kernels.rocm.code_object import Kernel
from pallas_kernels.rocm.compiler import Program, compile_for
from pallas_kernels.rocm.lowering import Traffic, traffic

DOCS = Path(__file__).parents[2] / "docs"


def examine(case: Case, sizes: Sizes) -> dict[str, Any]:
    """What the compiler made of a case; "problems" is empty if nothing is wrong."""
    program = compile_for(case.kernels, *case.args)
    moves = {kernel.name: kernel for kernel in traffic(case.kernels, *case.args)}
    reference = compile_for(case.reference, *case.args)
    kernels = _ours(program, moves)
    return {
        "case": case.name,
        "sizes": sizes.name,
        "kernels": [
            {
                **kernel._asdict(),
                "waves": kernel.waves,
                "programs": moves[name].programs,
                "moved": moves[name].moved,
                "asked": moves[name].asked,
            }
            for name, kernel in kernels
        ],
        "flops": case.flops,
        "minimum": case.minimum,
        "moved": hlo.Program(program.text).moved(),
        "reference_moved": hlo.Program(reference.text).moved(),
        "temporary": program.temporary,
        "reference_temporary": reference.temporary,
        "problems": _problems(program, moves),
    }


def _ours(program: Program, moves: dict[str, Traffic]) -> list[tuple[str, Kernel]]:
    """Our kernels with the names that they were launched by: a second one of the same name has got
    a number."""
    named = [(re.sub(r"_+\d+$", "", name), kernel) for name, kernel in program.kernels.items()]
    return sorted((name, kernel) for name, kernel in named if name in moves)


def _problems(program: Program, moves: dict[str, Traffic]) -> list[str]:
    """What must not be in our kernels."""
    kernels = _ours(program, moves)
    problems = [f"{name} was not compiled" for name in moves.keys() - {n for n, _ in kernels}]
    for name, kernel in kernels:
        if kernel.spills or kernel.scratch:
            problems.append(f"{name} spills {kernel.spills} registers, {kernel.scratch} bytes")
        if kernel.lds > kernel.room:
            problems.append(f"{name} needs {kernel.lds} bytes of LDS")
        if moves[name].multiplies and not kernel.matrix:
            problems.append(f"{name} multiplies matrices without MFMA")
    return problems


def _in_a_process(case: Case, sizes: Sizes) -> dict[str, Any]:
    """`examine` where XLA has compiled nothing yet, so that every kernel is seen."""
    command = [sys.executable, "-m", "pallas_kernels.rocm.report"]
    options = ["--case", case.name, "--sizes", sizes.name]
    ended = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if ended.returncode:
        last = (ended.stderr.strip() or "no message").splitlines()[-1]
        return {"case": case.name, "sizes": sizes.name, "problems": [f"not compiled: {last}"]}
    return json.loads(ended.stdout)


def write_table(rows: list[dict[str, Any]]) -> None:
    """docs/kernels.json, and docs/kernels.md made of it."""
    (DOCS / "kernels.json").write_text(json.dumps(rows, indent=1) + "\n")
    (DOCS / "kernels.md").write_text(roofline.page(rows))


def main(case: str | None = None, sizes: Name | None = None, op: str | None = None) -> None:
    """Compiles kernels for the MI300X and judges them.

    Args:
      case: one only, as JSON.
      sizes: those of one model, 8B or 74B.
      op: of one folder; the table is not written then.
    """
    chosen = [MODELS[sizes]] if sizes else list(MODELS.values())
    if case is not None:
        print(json.dumps(examine(find_case(case, chosen[0]), chosen[0])))
        return
    pairs = [(one, each) for each in chosen for one in cases(each, op)]
    rows = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(_in_a_process, *zip(*pairs, strict=True)):
            what = "; ".join(row["problems"]) or "sound"
            print(f"{row['case']} {row['sizes']}: {what}", flush=True)
            rows.append(row)
    if sizes is None and op is None:
        write_table(rows)
    sys.exit(any(row["problems"] for row in rows))


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, ModuleNotFoundError) as error:
        sys.exit(str(error))
