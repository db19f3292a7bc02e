"""The tables of docs/kernels.md: what was compiled, and what bounds it on paper."""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

# Of the MI300X: dense bfloat16 and memory at their peaks, and the bandwidth that others measured.
PEAK_FLOPS, PEAK_BANDWIDTH, MEASURED_BANDWIDTH = 1307e12, 5.3e12, 4.33e12
MOST_OF_REFERENCE, MOST_OF_MINIMUM = 0.5, 1.3  # that a fused op should move

Row = dict[str, Any]

_HEAD = """# Kernels, compiled for the MI300X

Written by `make rocm-aot` (`python -m pallas_kernels.rocm.report`). **Nothing here has run on an
AMD GPU**: XLA's compiler for ROCm compiled every kernel for gfx942 on a machine without one.
Registers, LDS and instructions are read from its machine code; bytes are counted, times computed.

## On paper

Of 8,192 tokens (decoding: 8 rows), bfloat16 weights. *Bytes* are those that a kernel's block specs
name, each block once; of the XLA-only program, the operands and results of each of its kernels.
The *least* is every argument and result once, for a gradient twice. *Bound* is the time for the
bytes at 4.33 TB/s, which others measured, or for the products at 1,307 TFLOP/s, whichever is
longer; at the peak of 5.3 TB/s in brackets. Of experts, the XLA-only program is that of the
library's grouped products. A fused op is meant to move at most 0.5 of the XLA-only program's bytes
and 1.3 of the least; what misses that is **bold**.

"""
_MISSES = """
What misses it, and why:

- *norm*: XLA's own fusions move little more than the least, so nothing could move half of that.
- *moe*: the experts' weights are most of the least, and the library reads them once as well.
  Training also writes and reads what its products hand on to each other, gate and up in float32.
- *cross_entropy training*: the gradient of the logits is written in chunks, and read by two
  products. Computing it in both instead would take a third more products, which are the bound.
- *newton_schulz*: each of the three products of an iteration needs all of the one before.
- *router training*: 256 programs write sums of their own for the gradients of the weights.
- *decode*: of a few rows' work, operands are counted whole, those of experts that no row has too;
  and XLA writes nothing large either.
"""


def bound(moved: float, flops: float, bandwidth: float) -> tuple[float, str]:
    """Seconds that bytes and products need at least, and what is waited for then."""
    memory, products = moved / bandwidth, flops / PEAK_FLOPS
    return max((memory, "memory"), (products, "products"))


def page(rows: list[Row]) -> str:
    """docs/kernels.md."""
    compiled = [row for row in rows if "moved" in row]
    parts = [_HEAD, table(_ON_PAPER, compiled), _MISSES, "\n## Machine code\n\n"]
    kernels = [{**row, **kernel} for row in compiled for kernel in row["kernels"]]
    parts += [table(_MACHINE_CODE, kernels), "\n## What is wrong\n\n"]
    parts += [f"- {r['case']} {r['sizes']}: {p}\n" for r in rows for p in r["problems"]] or [
        "Nothing: no kernel spills a register, asks for more than 64 KiB of LDS, or multiplies\n"
        "matrices without MFMA instructions.\n"
    ]
    return "".join(parts)


def table(columns: Mapping[str, Callable[[Any], str]], rows: Sequence[Any]) -> str:
    """In Markdown."""
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[cell(row) for cell in columns.values()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plain_table(rows: Sequence[Mapping[str, str]]) -> str:
    """In Markdown, of rows that are cells by column."""
    return table({name: itemgetter(name) for name in rows[0]}, rows)


def _time(row: Row) -> str:
    seconds, waits = bound(row["moved"], row["flops"], MEASURED_BANDWIDTH)
    best, _ = bound(row["moved"], row["flops"], PEAK_BANDWIDTH)
    return f"{seconds * 1e6:,.0f} us ({best * 1e6:,.0f}), {waits}"


def _ratio(row: Row, of: str, most: float) -> str:
    ratio = row["moved"] / row[of]
    return f"{ratio:.2f}" if ratio <= most else f"**{ratio:.2f}**"


_ON_PAPER: dict[str, Callable[[Row], str]] = {
    "case": lambda r: f"{r['case']}, {r['sizes']}",
    "MB": lambda r: f"{r['moved'] / 1e6:,.1f}",
    "of XLA's": lambda r: _ratio(r, "reference_moved", MOST_OF_REFERENCE),
    "of the least": lambda r: _ratio(r, "minimum", MOST_OF_MINIMUM),
    "GFLOP": lambda r: f"{r['flops'] / 1e9:,.1f}",
    "bound": _time,
    "temporary MB, XLA's": lambda r: (
        f"{r['temporary'] / 1e6:,.1f}, {r['reference_temporary'] / 1e6:,.1f}"
    ),
}
_MACHINE_CODE: dict[str, Callable[[Row], str]] = {
    "kernel": lambda r: f"`{r['name']}`",
    "case": lambda r: f"{r['case']}, {r['sizes']}",
    "VGPR (AGPR)": lambda r: f"{r['vgprs']} ({r['agprs']})",
    "spills": lambda r: str(r["spills"]),
    "LDS": lambda r: f"{r['lds']:,}",
    "warps": lambda r: str(r["warps"]),
    "waves a SIMD": lambda r: f"{r['waves']:.3g}",
    "MFMA": lambda r: ", ".join(f"{n} {k[7:]}" for k, n in r["matrix"].items()) or "none",
    "MB": lambda r: f"{r['moved'] / 1e6:,.1f}",
}
