"""`zaya verify`: whether a checkpoint is whole, sound, and the same as another one."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import tyro

from convert.checkpoint import NAMES
from convert.folder import CHECKSUMS, find
from convert.verify import Report, compare, verify
from zaya_jax.cli.output import check_destination, console, progress, write_json
from zaya_jax.errors import ZayaError
from zaya_jax.evaluation.known import check_known_outputs, is_released


@dataclasses.dataclass
class Verify:
    """Read every value of a checkpoint; exit code 0 if it is sound, 1 if values are not what they
    should be, 2 if it cannot be opened or read to its end.

    Checks names, shapes and dtypes, the checksums that `zaya convert` left, and for NaN and
    infinite values, and shows the range of each kind of tensor.
    """

    path: tyro.conf.Positional[str]
    """Checkpoint folder of any layout, or hub id."""
    against: str | None = None
    """Another checkpoint of any layout, to be compared tensor by tensor instead."""
    outputs: bool = False
    """Also run the model, and compare with what is known of the released ZAYA1-8B: always done for
    Zyphra/ZAYA1-8B itself."""
    json: Path | None = None
    """Also write the result to this file."""

    def run(self) -> None:
        check_destination(self.json)
        try:
            result = self._compare() if self.against is not None else self._verify()
        except ZayaError as error:
            write_json(self.json, {"problems": [str(error)], "sound": False})
            raise
        write_json(self.json, result)
        for problem in result["problems"]:
            console.print(problem, style="red", markup=False, highlight=False, soft_wrap=True)
        if not result["sound"]:
            sys.exit(1)
        against = f" and {self.against} hold the same tensors" if self.against else ": sound"
        console.print(f"{self.path}{against}", markup=False, highlight=False, soft_wrap=True)

    def _compare(self) -> dict[str, Any]:
        assert self.against is not None
        with progress("Comparing") as on_progress:
            problems = compare(find(self.path), find(self.against), on_progress)
        return {"problems": problems, "sound": not problems}

    def _verify(self) -> dict[str, Any]:
        with progress("Reading") as on_progress:
            report = verify(find(self.path), on_progress)
        _show(report)
        problems = list(report.problems)
        if self.outputs or is_released(self.path):
            problems += check_known_outputs(self.path)
        return {**_as_json(report), "problems": problems, "sound": not problems}


def _show(report: Report) -> None:
    width = max(map(len, report.ranges))
    lines = [f"{'leaf':{width}} {'least':>10} {'mean':>10} {'greatest':>10} {'not finite':>10}"]
    for kind, r in report.ranges.items():
        numbers = f"{r.least:10.4g} {r.mean:10.4g} {r.most:10.4g} {r.nan + r.infinite:10,}"
        lines.append(f"{kind:{width}} {numbers}")
    leaves = len(report.checkpoint.leaves)
    lines += [
        f"{NAMES[report.checkpoint.layout]}: {leaves:,} leaves, each there once in its shape",
        f"checksum of the values, in whatever layout: {report.checksum}",
        f"{report.compared:,} leaves compared with {CHECKSUMS}"
        if report.compared
        else f"no {CHECKSUMS} to compare with",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _as_json(report: Report) -> dict[str, Any]:
    ranges = {}
    for kind, r in report.ranges.items():
        values = {"least": r.least, "mean": r.mean, "most": r.most} if r.finite else {}
        ranges[kind] = {"count": r.count, "nan": r.nan, "infinite": r.infinite, **values}
    return {
        "layout": report.checkpoint.layout,
        "checksum": report.checksum,
        "compared_with_checksums": report.compared,
        "ranges": ranges,
    }
