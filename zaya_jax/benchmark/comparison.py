"""What is measured of a model, what is to be reached, and whether it was."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from zaya_jax.config import ZayaConfig
from zaya_jax.model import parameter_counts

Result = dict[str, Any]  # one line of a measuring process

LIMIT = "decode 1 / limit"
BUSY = 0.1  # cores that other processes may use before a figure is doubted


@dataclasses.dataclass(frozen=True)
class Cases:
    """What is measured: decoding of `new` tokens at each batch size, and prefills."""

    batch: tuple[int, ...] = (1, 8)
    new: int = 128
    prefill: tuple[str, ...] = ("1x512", "4x512")

    def names(self) -> list[str]:
        return [f"decode {rows}" for rows in self.batch] + [f"prefill {p}" for p in self.prefill]

    def arguments(self) -> list[str]:
        """As the measuring processes take them."""
        batch = map(str, self.batch)
        return ["--batch", *batch, "--new", str(self.new), "--prefill", *self.prefill]


_FEWER = {"zaya1_8b": Cases((1,), 32, ("1x512",))}

# In bfloat16: tokens per second over those of transformers, or the part of `decode_limit`.
_SMALL = {"decode 1": 2.5, "decode 8": 2.0, "prefill 1x512": 1.3, "prefill 4x512": 1.3}
_REACH = {
    "small": _SMALL,
    "medium": _SMALL,
    "zaya1_8b": {"decode 1": 1.6, LIMIT: 0.7, "prefill 1x512": 1.7},
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
      case: its name.
      reference, ours: tokens per second, or parts of the limit; None where there is no figure.
      variant: of transformers, the fastest in this case.
      ratio: ours over the reference's.
      reach: what the ratio, or our part of the limit, is to reach.
      met: whether it does; None where nothing is to be reached or nothing was compared.
    """

    case: str
    reference: float | None
    variant: str | None
    ours: float | None
    ratio: float | None
    reach: float | None
    met: bool | None


@dataclasses.dataclass
class Measurement:
    """Everything measured of one preset in one dtype.

    Attributes:
      machine, ours, reference: what the measuring processes printed; `reference` is None where
        there is none to compare with.
      problem: why the reference ended early, if it did.
    """

    preset: str
    dtype: str
    machine: list[Result] = dataclasses.field(default_factory=list)
    ours: list[Result] = dataclasses.field(default_factory=list)
    reference: list[Result] | None = None
    problem: str | None = None

    @property
    def decode_bytes(self) -> int:
        """Of the weights that one token needs: the active ones and the head."""
        config = ZayaConfig.preset(self.preset)
        _, active = parameter_counts(config)
        itemsize = 2 if self.dtype == "bfloat16" else 4
        return (active + config.vocab_size * config.hidden_size) * itemsize

    @property
    def decode_limit(self) -> float:
        """Tokens per second of one row at which reading those takes all of the bandwidth."""
        bandwidth: int = find(self.machine, "read bandwidth")["bytes_per_second"]
        return bandwidth / self.decode_bytes

    def table(self) -> list[Row]:
        ours, theirs = fastest(self.ours), fastest(self.reference or ())
        reach = _REACH.get(self.preset, {}) if self.dtype == "bfloat16" else {}
        rows = []
        for case in cases(self.preset).names():
            rows.append(compare(case, theirs.get(case), ours.get(case), reach.get(case)))
            if case == "decode 1":
                rows.append(part_of_limit(rows[-1], self.decode_limit, reach.get(LIMIT)))
        return rows

    def disturbed(self) -> list[str]:
        """The cases in the table during which other processes kept the machine busy."""
        sides = {"zaya-jax": self.ours, "transformers": self.reference or ()}
        return [
            f"{side} {case}"
            for side, results in sides.items()
            for case, result in fastest(results).items()
            if result["other_processes"] > BUSY
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "decode_bytes": self.decode_bytes,
            "decode_limit": self.decode_limit,
            "table": [dataclasses.asdict(row) for row in self.table()],
        }


def cases(preset: str) -> Cases:
    return _FEWER.get(preset, Cases())


def compare(case: str, reference: Result | None, ours: Result | None, reach: float | None) -> Row:
    """A row of speeds, of the results that there are."""
    reference, ours = reference or {}, ours or {}
    theirs, mine = (result.get("tokens_per_second") for result in (reference, ours))
    ratio = mine / theirs if mine and theirs else None
    met = None if reach is None or theirs is None else ratio is not None and ratio >= reach
    return Row(case, theirs, reference.get("variant"), mine, ratio, reach, met)


def part_of_limit(row: Row, limit: float, reach: float | None) -> Row:
    """The speeds of a row as parts of a limit."""
    theirs, mine = (None if speed is None else speed / limit for speed in (row.reference, row.ours))
    met = None if reach is None else mine is not None and mine >= reach
    return Row(LIMIT, theirs, row.variant, mine, None, reach, met)


def fastest(results: Iterable[Result]) -> dict[str, Result]:
    """Of each case, the result of the best variant by the median of its runs."""
    speeds = [result for result in results if "tokens_per_second" in result]
    return {r["case"]: r for r in sorted(speeds, key=lambda r: r["tokens_per_second"])}


def find(results: Iterable[Result], case: str) -> Result:
    return next(result for result in results if result["case"] == case)
