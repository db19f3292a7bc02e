"""Measures training steps of this package on a checkpoint, as `transformers_training` measures
PyTorch's.

    python -m train.speed_ours CHECKPOINT [--batch 4x256] [--steps 3] [--compute-dtype bfloat16]

A step is that of `zaya train` with AdamW, on float32 weights and always the same tokens. Prints one
JSON object: the median of the steps' seconds, their losses, and the process's peak of memory.
"""

import time
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from train import balancing, optimizer
from train.config import TrainConfig, for_run
from train.data.batch import Batch
from train.data.config import DataConfig
from train.step import compiled, make_step, start, state_shardings
from zaya_jax.benchmark.measuring import measure_steps
from zaya_jax.layouts import stack
from zaya_jax.loading import load
from zaya_jax.sharding import make_mesh


def main(
    checkpoint: tyro.conf.Positional[Path],
    batch: str = "4x256",
    steps: int = 3,
    learning_rate: float = 1e-4,
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16",
) -> None:
    """Measures a checkpoint.

    Args:
      checkpoint: folder.
      batch: rows x tokens of a step.
      steps: timed ones, behind a first one that also compiles.
      learning_rate: of AdamW.
      compute_dtype: of weights and activations in products.
    """
    rows, length = map(int, batch.split("x"))
    rule = optimizer.OptimizerConfig(kind="adamw", learning_rate=learning_rate, schedule="constant")
    config = TrainConfig(
        "pretrain",
        DataConfig(),
        rows=rows,
        context=length,
        compute_dtype=compute_dtype,
        optimizer=rule,
    )
    mesh = make_mesh()
    adamw = optimizer.build(rule, config.steps, mesh=mesh)
    balancer = balancing.optimizer(config.balancing)
    loaded = load(checkpoint, jnp.float32)
    model = for_run(config, loaded.config)
    params = stack(loaded.params, model)
    del loaded
    state = start(params, adamw, balancer)
    del params
    shardings = state_shardings(state, adamw, mesh, False)
    take_step = make_step(config, model, mesh, adamw, balancer, shardings)
    data = one_batch(rows, length, model.vocab_size)
    take_step = compiled(take_step, state, data)

    def step() -> tuple[float, float]:
        nonlocal state
        begin = time.perf_counter()
        state, metrics = take_step(state, data)
        jax.block_until_ready(state)
        return time.perf_counter() - begin, float(metrics.loss)

    measure_steps(f"zaya-jax {compute_dtype}", rows * length, step, steps)


def one_batch(rows: int, length: int, vocabulary: int) -> Batch:
    """The tokens that `transformers_training` draws, each row a segment."""
    tokens = np.random.default_rng(0).integers(3, vocabulary, (rows, length))
    targets = np.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    ones = np.ones((rows, length))
    return Batch(
        tokens.astype(np.int32),
        ones.astype(np.int32),
        targets.astype(np.int32),
        ones.astype(np.float32),
    )


if __name__ == "__main__":
    tyro.cli(main)
