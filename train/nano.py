"""Trains the embedded nano model from nothing.

    python -m train.nano [--steps N] [--out DIR] [--seed N]

Everything is seeded: problems, their order, and the first weights.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from train.loop import Metrics, Step, TrainState, make_step, optimizer, start
from train.packing import Batch, batches, tokenize
from train.problems import examples
from zaya_jax.config import ZayaConfig
from zaya_jax.evaluation.accuracy import evaluate
from zaya_jax.evaluation.families import FAMILIES, distinct_answers, held_out
from zaya_jax.loading import NANO
from zaya_jax.text.tokenizer import Tokenizer
from zaya_jax.zaya import Zaya

ROWS, LENGTH = 8, 256  # small batches: at this size steps are worth more than tokens
PEAK_RATE = 4e-3
WARMUP = 100
REPORT_EVERY = 50


def main(steps: int = 2500, out: Path = Path("build/nano"), seed: int = 0) -> None:
    """Trains, saves the model in bfloat16, and prints its accuracy on held-out problems.

    Args:
      steps: of 2,048 tokens each.
      out: folder of the checkpoint; replaced if it is one.
      seed: of the problems, their order, and the first weights.
    """
    config = ZayaConfig.preset("nano")
    tokenizer = Tokenizer.from_folder(NANO, config)
    assert tokenizer is not None
    schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, WARMUP, steps)
    rule = optimizer(schedule)
    state = start(config, rule, seed)
    in_bfloat16(state, config, tokenizer).save(out)  # a folder that is refused is refused now
    state = train(make_step(config, rule), state, data(config, tokenizer, seed), steps)
    model = in_bfloat16(state, config, tokenizer)
    model.save(out)
    print(f"saved {out}")
    print_table(model)


def in_bfloat16(state: TrainState, config: ZayaConfig, tokenizer: Tokenizer) -> Zaya:
    """The model as it is shipped; the balancing biases stay float32."""
    weights = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params["params"])
    return Zaya({**state.params, "params": weights}, config, tokenizer)


def data(config: ZayaConfig, tokenizer: Tokenizer, seed: int) -> Iterator[Batch]:
    """Endless packed batches of training examples."""
    (eos,) = config.eos_token_ids
    stream = (tokenize(example, tokenizer, eos) for example in examples(seed))
    return batches(stream, ROWS, LENGTH)


def train(step: Step, state: TrainState, stream: Iterator[Batch], steps: int) -> TrainState:
    """Runs the steps, with a line of progress now and then."""
    begin, tokens = time.perf_counter(), 0
    for number in range(1, steps + 1):
        batch = next(stream)
        tokens += int(np.count_nonzero(batch.segment_ids))
        state, metrics = step(state, batch)
        if number % REPORT_EVERY == 0 or number in (1, steps):
            report(number, tokens, metrics, time.perf_counter() - begin)
    return state


def report(number: int, tokens: int, metrics: Metrics, seconds: float) -> None:
    loss, entropy, norm = (float(value) for value in metrics)
    print(
        f"step {number}  loss {loss:.4f}  balance {entropy:.3f}  gradient {norm:.2f}  "
        f"{tokens:,} tokens  {tokens / seconds:,.0f} tokens/s  {seconds:.0f} s",
        flush=True,
    )


def print_table(model: Zaya, count: int = 200) -> None:
    """Greedy accuracy of every family on its first `count` held-out problems."""
    print(f"{'family':16} {'accuracy':>8} {'constant':>8} {'answers':>8} {'tokens':>8}")
    for family in FAMILIES:
        (result,) = evaluate(model, held_out(family, count))
        print(
            f"{family:16} {result.accuracy:8.3f} {result.constant:8.3f} "
            f"{distinct_answers(family):8,} {result.tokens:8,}",
            flush=True,
        )


if __name__ == "__main__":
    tyro.cli(main)
