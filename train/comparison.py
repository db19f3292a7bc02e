"""Whether ZAYA's own parts help a small model learn: ZAYA beside a plain model with as many
parameters, on the same tokens.

    python -m train.comparison --json docs/comparison.json --page docs/training.md

The plain model has grouped-query attention, a router of one matrix and plain residual additions. It
gets its parameters back as wider heads; everything else is the same: data and their order,
optimizer, schedule and steps, those of the course's pretraining.
"""

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from train.config import CheckpointConfig, ModelConfig, TrainConfig, new_model
from train.course.data import write
from train.course.phases import HELD_OUT_DOCUMENTS, PHASES
from train.course.report import filled
from train.course.run import configuration
from train.run import Silent, train
from train.settings import build
from zaya_jax.errors import ConfigError
from zaya_jax.model import parameter_counts

ZAYA = ModelConfig(preset="nano", init="fan_in")
PLAIN = dataclasses.replace(
    ZAYA, attention="gqa", router="linear", residual_scaling=False, head_dim=45
)
MODELS = {"ZAYA": ZAYA, "plain": PLAIN}
BEGIN, END = "<!-- comparison: begin -->", "<!-- comparison: end -->"


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one model at one learning rate.

    Attributes:
      model: its name in `MODELS`.
      rate: the peak.
      total: parameters.
      active: those that one token uses, embedding excluded.
      losses: on held-out data behind the last step, in nats a token, of each seed.
      tokens: trained on, of each seed.
      seconds: of each seed's run, compilation included.
    """

    model: str
    rate: float
    total: int
    active: int
    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.losses) / len(self.losses)

    @property
    def spread(self) -> float:
        """From the lowest loss to the highest."""
        return max(self.losses) - min(self.losses)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All results, of runs with so many steps."""

    steps: int
    tokens_per_step: int
    results: tuple[Result, ...]


def compare(folder: Path, steps: int, seeds: int, rates: Sequence[float]) -> Comparison:
    """Trains every model with every seed at every rate, and prints a line for each run.

    Args:
      folder: empty; holds data and runs.
      steps: of each run.
      seeds: how many, of weights and of the order of data.
      rates: peaks of the learning rate.

    Raises:
      ConfigError: no steps, seeds or rates.
      ZayaError: as `train.run.train` does.
    """
    if min(steps, seeds, len(rates)) < 1:
        raise ConfigError(f"there is nothing to compare: steps {steps}, seeds {seeds}, {rates}")
    pretraining = PHASES["pretrain"]
    needed = math.ceil(pretraining.documents * steps / pretraining.steps)
    documents = {"pretrain": max(needed, HELD_OUT_DOCUMENTS), "midtrain": 0, "sft": 0}
    write(folder / "data", 0, documents)
    runs: dict[tuple[str, float], list[tuple[float, int, float]]] = {}
    for seed in range(seeds):  # outermost, so that no model has the machine's best hour
        for rate in rates:
            for name in MODELS:
                config = of_run(name, folder, steps, seed, rate)
                begin = time.perf_counter()
                outcome = train(config, folder / f"{name}-{rate}-{seed}", Silent())
                if not outcome.finished:
                    raise SystemExit("stopped; nothing is kept")
                seconds = time.perf_counter() - begin
                numbers = outcome.metrics
                loss, tokens = numbers["held_out_loss"], int(numbers["tokens"])
                runs.setdefault((name, rate), []).append((loss, tokens, seconds))
                print(
                    f"{name:6} rate {rate:g} seed {seed}: held-out loss {loss:.4f}, "
                    f"{tokens:,} tokens in {seconds:.0f} s",
                    flush=True,
                )
    results = []
    for (name, rate), found in runs.items():
        losses, tokens_of, seconds_of = zip(*found, strict=True)
        total, active = parameter_counts(new_model(of_run(name, folder, steps, 0, rate)))
        results.append(Result(name, rate, total, active, losses, tokens_of, seconds_of))
    return Comparison(steps, config.tokens_per_step, tuple(results))


def of_run(name: str, folder: Path, steps: int, seed: int, rate: float) -> TrainConfig:
    """A model's run: the course's pretraining, with another number of steps and another peak."""
    course = configuration("pretrain", folder, seed=seed)
    optimizer = dataclasses.replace(
        course.optimizer, learning_rate=rate, warmup_steps=min(100, steps // 10)
    )
    return dataclasses.replace(
        course,
        model=MODELS[name],
        steps=steps,
        optimizer=optimizer,
        checkpoint=CheckpointConfig(every=steps, keep=1),
        evaluation=dataclasses.replace(course.evaluation, every=steps),
    )


def save(file: Path, comparison: Comparison) -> None:
    """Writes a comparison as JSON, with the mean and the spread of each result."""
    values: dict[str, Any] = dataclasses.asdict(comparison)
    for value, result in zip(values["results"], comparison.results, strict=True):
        value |= {"mean": result.mean, "spread": result.spread}
    file.write_text(json.dumps(values, indent=2) + "\n")


def load(file: Path) -> Comparison:
    """The comparison that `save` wrote."""
    values = json.loads(file.read_text())
    for row in values["results"]:
        del row["mean"], row["spread"]  # which the losses say
    return build(Comparison, values)


def table(comparison: Comparison) -> str:
    """What was compared, and a Markdown table: a row for each model and rate."""
    seeds = range(len(comparison.results[0].losses))
    most = max(max(result.seconds) for result in comparison.results)
    heads = ["model", "peak rate", "parameters", "active", *(f"seed {seed}" for seed in seeds)]
    lines = [[*heads, "mean", "spread"]]
    lines.append(["---"] * len(lines[0]))
    for result in comparison.results:
        numbers = (*result.losses, result.mean, result.spread)
        counts = f"{result.total:,}", f"{result.active:,}"
        lines.append([result.model, f"{result.rate:g}", *counts, *(f"{x:.4f}" for x in numbers)])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"Held-out loss in nats a token, after {comparison.steps:,} steps of "
        f"{comparison.tokens_per_step:,} tokens; the longest run took {most:.0f} s.\n\n{rows}"
    )


def with_table(page: str, comparison: Comparison) -> str:
    """A page's text with this table between its two markers. Raises InputError without them."""
    return filled(page, BEGIN, END, table(comparison))


def main(
    steps: int = 600,
    seeds: int = 3,
    rates: tuple[float, ...] = (0.01, 0.02),
    json: Path = Path("comparison.json"),
    page: Path | None = None,
) -> None:
    """Trains ZAYA and the plain model, and writes their held-out losses.

    Args:
      steps: of each run.
      seeds: how many.
      rates: peaks of the learning rate; every model is trained at each.
      json: is written.
      page: has the two markers, between which the table is written anew.
    """
    with tempfile.TemporaryDirectory() as folder:
        comparison = compare(Path(folder), steps, seeds, rates)
    save(json, comparison)
    if page is not None:
        page.write_text(with_table(page.read_text(), comparison))
    print(table(comparison))


if __name__ == "__main__":
    tyro.cli(main)
