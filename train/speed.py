"""Measures training on the CPU beside PyTorch's transformers: speed, memory, and the same losses.

    python -m train.speed [small medium] [--batch 4x256] [--steps 5] [--rounds 3] [--json FILE]

Both sides train the same random model with balanced routing on the same tokens, with AdamW and
float32 weights. Of transformers, each of `VARIANTS` is measured once; then the fastest of them and
ours take turns, each time in a process of its own, and the medians of those turns are compared.
Both sides run with large pages (`ENVIRONMENT`), which make either of them faster.
"""

import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import tyro

import zaya_jax
from zaya_jax.benchmark.comparison import BUSY, Result
from zaya_jax.benchmark.processes import check_reference, checkpoint, run
from zaya_jax.errors import InputError, ZayaError

PACKAGE = Path(zaya_jax.__file__).parent
PYTHON = PACKAGE.parent / ".venv-oracle" / "bin" / "python"
SCRIPT = PACKAGE / "benchmark" / "transformers_training.py"
# Implementations of the experts, dtypes of products, and whether `torch.compile` has them. Not
# batched_mm, which would copy an expert for each token.
VARIANTS = tuple(
    experts + dtype + mode
    for experts, dtype, mode in itertools.product(
        ("grouped_mm", "eager"), ("+bfloat16", "+float32"), ("", "+compile")
    )
)
REACH = {"small": 2.0, "medium": 1.5}  # our speed over that of transformers
TOLERANCE = 0.1  # of losses: the sides round differently in bfloat16
# glibc then asks for large pages: the system clears the arrays that every step takes anew faster.
ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was measured of one model.

    Attributes:
      preset: its name.
      variants: one result of each variant of transformers; `skipped` says why one has no speed.
      ours, reference: of the turns; the reference is its fastest variant.
    """

    preset: str
    variants: list[Result]
    ours: list[Result]
    reference: list[Result]

    @property
    def ratio(self) -> float:
        """Of the median speeds."""
        return _median(self.ours, "tokens_per_second") / _median(
            self.reference, "tokens_per_second"
        )

    @property
    def memory(self) -> float:
        """Of the medians of the processes' peaks."""
        return _median(self.ours, "peak_rss") / _median(self.reference, "peak_rss")

    @property
    def distance(self) -> float:
        """Of the losses of the same steps, the mean."""
        pairs = zip(self.ours[0]["losses"], self.reference[0]["losses"], strict=True)
        return statistics.fmean(abs(a - b) for a, b in pairs)

    def lines(self) -> list[str]:
        """For people."""
        reach = REACH.get(self.preset)
        mark = "" if reach is None else f" (to reach: {reach})"
        busy = any(turn["other_processes"] > BUSY for turn in (*self.ours, *self.reference))
        return [
            _line("zaya-jax", self.ours),
            _line(f"transformers, {self.reference[0]['variant']}", self.reference),
            f"ratio of speeds {self.ratio:.2f}{mark}, of memory {self.memory:.2f} (at most 1)",
            f"losses differ by {self.distance:.3f} in the mean (allowed: {TOLERANCE})",
            *(["other processes kept the machine busy: not to be relied on"] if busy else []),
        ]

    def as_json(self) -> dict[str, Any]:
        own = {"ratio": self.ratio, "memory": self.memory, "distance": self.distance}
        return {**dataclasses.asdict(self), **own}


def main(
    presets: tyro.conf.Positional[tuple[str, ...]] = ("small", "medium"),
    batch: str = "4x256",
    steps: int = 5,
    rounds: int = 3,
    variants: tuple[str, ...] = VARIANTS,
    reference: Path = PYTHON,
    folder: Path | None = None,
    out: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Measures training steps of both sides.

    Args:
      presets: models.
      batch: rows x tokens of a step.
      steps: timed ones in each process, behind a first one.
      rounds: turns of each side.
      variants: of transformers, of which the fastest counts.
      reference: interpreter of an environment with torch and transformers.
      folder: for the random models, which are kept; by default a temporary one.
      out: also write everything to this file.
    """
    if min(steps, rounds, len(presets), len(variants)) < 1:
        raise InputError("steps, rounds, presets and variants must be at least one each")
    for variant in variants:
        if variant not in VARIANTS:
            raise InputError(f"{variant}: no variant; those are {', '.join(VARIANTS)}")
    check_reference(reference)
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        done = []
        for preset in presets:
            model = checkpoint(place, preset, "float32")
            measured = compare(preset, model, batch, steps, rounds, variants, reference)
            print("\n".join([f"{preset}, {batch}:", *measured.lines()]), flush=True)
            done.append(measured.as_json())
            if out is not None:
                out.write_text(json.dumps(done, indent=2))


def compare(
    preset: str,
    model: Path,
    batch: str,
    steps: int,
    rounds: int,
    variants: tuple[str, ...],
    reference: Path,
) -> Comparison:
    """Measures one model, in a folder; arguments as those of `main`.

    Raises:
      ZayaError: a side fails, or they do not compute the same.
    """
    options = ["--batch", batch, "--steps", str(steps)]

    def theirs(variant: str) -> Result:
        return _measure([str(reference), str(SCRIPT), str(model), *options, variant])

    def ours() -> Result:
        return _measure([sys.executable, "-m", "train.speed_ours", str(model), *options])

    tried = [theirs(variant) for variant in variants]
    speeds = [result for result in tried if "skipped" not in result]
    if not speeds:
        raise ZayaError(f"transformers trains in no variant: {tried[0]['skipped']}")
    best = max(speeds, key=lambda result: result["tokens_per_second"])["variant"]
    turns = [(ours(), theirs(best)) for _ in range(rounds)]
    measured = Comparison(preset, tried, [a for a, _ in turns], [b for _, b in turns])
    if not measured.distance <= TOLERANCE:
        raise ZayaError(f"{preset}: the losses differ by {measured.distance}: not the same model")
    return measured


def _measure(command: list[str]) -> Result:
    """What a process prints, or why it prints nothing."""
    results: list[Result] = []
    problem = run(command, results.append, ENVIRONMENT)
    if results:
        print(_line(results[0]["variant"], results), file=sys.stderr, flush=True)
        return results[0]
    if command[0] == sys.executable:
        raise ZayaError(f"measuring failed: {problem}")
    return {"variant": command[-1], "case": "training", "skipped": problem or "no result"}


def _line(name: str, results: list[Result]) -> str:
    if "skipped" in results[0]:
        return f"{name}: {results[0]['skipped']}"
    speed, memory = (_median(results, key) for key in ("tokens_per_second", "peak_rss"))
    return f"{name}: {speed:.0f} tokens/s, {memory / 1e9:.2f} GB"


def _median(results: list[Result], key: str) -> float:
    return statistics.median(result[key] for result in results)


if __name__ == "__main__":
    tyro.cli(main)
