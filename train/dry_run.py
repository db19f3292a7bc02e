"""What a run would be, without running it."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from train.config import ModelConfig, TrainConfig
from train.optimizer import schedule
from train.setup import Setup
from zaya_jax.model import forward, parameter_counts

GB = 1e9


def describe(setup: Setup) -> dict[str, str]:
    """Parameters, mesh, memory of each device, tokens a step, and the schedule, ready to print."""
    config, model = setup.config, setup.model
    total, active = parameter_counts(model)
    steps, rate = config.steps, schedule(config.optimizer, config.steps)
    points = sorted({0, min(config.optimizer.warmup_steps, steps), steps // 2, steps - 1})
    memory = device_memory(setup)
    return {
        "phase": f"{config.phase}, from {config.start_from or 'new weights'}",
        "parameters": f"{total:,}; {active:,} for each token, embedding and untied head excluded",
        "mesh": ", ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items())
        + f": {setup.mesh.size} devices",
        "tokenizer": config.tokenizer or config.start_from or _embedded(config),
        "rotary base": f"{model.rope.theta:g}",
        "rows x context": f"{config.rows} x {config.context:,}, in {config.accumulate} parts",
        "tokens a step": f"{config.tokens_per_step:,}",
        "tokens in all": f"{config.tokens_per_step * steps:,} in {steps:,} steps",
        "learning rate": ", ".join(f"step {at}: {float(rate(at)):.2e}" for at in points),
        **{f"GB a device, {name}": f"{size / GB:.3f}" for name, size in memory.items()},
        "GB a device, sum": f"{sum(memory.values()) / GB:.3f}, and what single ops need meanwhile",
    }


def _embedded(config: TrainConfig) -> str:
    own = config.model.preset == ModelConfig.preset
    return "the embedded model's" if own else "none: `tokenizer` must name one"


def device_memory(setup: Setup) -> dict[str, int]:
    """Bytes of one device that a step needs, by purpose."""
    config, like = setup.config, setup.like
    weights = like.params["params"]
    held, state = _shard_bytes(like.params), _shard_bytes((like.optimizer, like.balancer))
    size = jnp.dtype(config.compute_dtype).itemsize
    computed = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * size for leaf in jax.tree.leaves(weights)
    )
    return {
        "parameters": held,
        "optimizer state": state,
        # Parts are summed in float32; one part's come in the compute dtype.
        "gradients": _shard_bytes(weights) if config.accumulate > 1 else computed,
        f"{config.compute_dtype} weights": computed if size != 4 else 0,
        "activations kept for the gradient": activation_bytes(setup),
    }


def activation_bytes(setup: Setup) -> int:
    """Bytes that the forward pass of one device's part of the rows keeps for the gradient, as JAX
    traces it for that many tokens without the exchange between devices."""
    config = setup.config
    mesh = config.mesh
    rows = config.rows // (mesh.data * mesh.expert * config.accumulate)
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(config.compute_dtype)), setup.like.params
    )

    def residuals(rows: int, length: int) -> int:
        tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

        def kept(params: Any, tokens: jax.Array) -> Any:
            run = partial(forward, config=setup.model, tokens=tokens, segment_ids=tokens)
            return jax.vjp(lambda p: run(p).hidden, params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(kept, params, tokens))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    return residuals(rows, config.context // mesh.context) - residuals(1, 1)


def _shard_bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
