"""The loss of a batch and its gradients, on a mesh of any sizes.

One `jax.shard_map` over all axes: each device has some rows of the batch and a part of each of
them, and sums over what it has. Differentiated is each device's own part of the loss, before any
sum over devices: the transpose of a `psum` is a `psum` here, which would count gradients once for
each device. They are summed afterwards, straight into the sharding of the optimizer's state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.cross_entropy.api import cross_entropy
from train.data.batch import Batch
from zaya_jax.config import ZayaConfig
from zaya_jax.model import Params, forward
from zaya_jax.parallel import Sharded, gathered, reduce_scatter
from zaya_jax.sharding import (
    AXES,
    BATCH,
    Division,
    check_batch,
    check_mesh,
    divisions,
    parameter_specs,
    state_specs,
)


class Losses(NamedTuple):
    """Of a whole batch; scalars.

    Attributes:
      loss: float32, what is minimised: `nll` and `penalty`.
      nll: float32, the targets' mean negative log-likelihood, in nats.
      penalty: float32, the mean of z_loss log_normalizer^2.
      weight: float32, the sum of the targets' weights, by which the means are weighted.
      tokens: int32, those that are no padding.
    """

    loss: jax.Array
    nll: jax.Array
    penalty: jax.Array
    weight: jax.Array
    tokens: jax.Array


def gradients(
    params: Params,
    config: ZayaConfig,
    batch: Batch,
    mesh: Mesh,
    *,
    accumulate: int = 1,
    compute_dtype: Any = jnp.bfloat16,
    z_loss: float = 0.0,
    full_sharding: bool = False,
) -> tuple[Losses, Any, jax.Array]:
    """Loss, gradients, and the experts' counts of a batch.

    Args:
      params: stacked (`layouts.stack`), float32.
      config: the architecture, with `kernels` and `remat`.
      batch: [B, S]; its rows are spread over data and expert, the sequence over context.
      mesh: over which all of it happens.
      accumulate: micro-batches, one after the other, of each device's rows.
      compute_dtype: to which parameters are rounded. Gradients are summed in float32.
      z_loss: factor of the penalty log_normalizer^2 of each target (0: none).
      full_sharding: the parameters lie as the optimizer's state does, and are gathered layer by
        layer.

    Raises:
      ConfigError: a batch, or experts, that the mesh cannot split evenly.

    Returns:
      `Losses`, the gradients of params["params"] in `sharding.state_specs`, and int32 [L, E + 1],
      how many tokens chose each expert. Gradients are float32, or of the compute dtype where there
      was nothing to sum: they came in it, and would only take more memory.
    """
    check_mesh(config, mesh)
    check_batch(batch.tokens.shape, accumulate, config, mesh)
    plan = divisions(params, mesh)["params"]

    def on_device(params: Params, batch: Batch) -> tuple[Losses, Any, jax.Array]:
        total = jax.lax.psum(jnp.sum(_weights(batch, config)), AXES)

        weights = _placed(params["params"], plan, compute_dtype, full_sharding)

        def objective(weights: Any, rows: Batch) -> tuple[jax.Array, Any]:
            sums = _sums({**params, "params": weights}, config, rows, z_loss)
            means = sums.nll / _nonzero(total), sums.penalty / _nonzero(total)
            return means[0] + means[1], (*means, sums.counts)

        def micro_batch(rows: Batch) -> Any:
            """Gradients, and what else is summed."""
            (_, aside), of_weights = jax.value_and_grad(objective, has_aux=True)(weights, rows)
            return of_weights, aside

        of_weights, aside = _summed(micro_batch, batch, accumulate)
        nll, penalty, counts = jax.lax.psum(aside, AXES)
        tokens = jax.lax.psum(jnp.sum(batch.segment_ids != 0), AXES)
        losses = Losses(nll + penalty, nll, penalty, total, tokens)
        return losses, _reduced(of_weights, plan), counts

    specs = parameter_specs(params, mesh, full_sharding)
    run = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(specs, BATCH),
        out_specs=(P(), state_specs(params, mesh)["params"], P()),
        check_vma=False,  # which kernels know nothing of
    )
    return run(params, batch)


def negative_log_likelihood(
    params: Params,
    config: ZayaConfig,
    batch: Batch,
    mesh: Mesh,
    *,
    compute_dtype: Any = jnp.bfloat16,
    full_sharding: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Of a batch's targets, weighted: the sum in nats, and the sum of the weights. Arguments and
    errors as those of `gradients`."""
    check_mesh(config, mesh)
    check_batch(batch.tokens.shape, 1, config, mesh)
    plan = divisions(params, mesh)["params"]

    def on_device(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        weights = _placed(params["params"], plan, compute_dtype, full_sharding)
        nll = _sums({**params, "params": weights}, config, batch, 0.0).nll
        return jax.lax.psum((nll, jnp.sum(_weights(batch, config))), AXES)

    specs = parameter_specs(params, mesh, full_sharding)
    run = jax.shard_map(
        on_device, mesh=mesh, in_specs=(specs, BATCH), out_specs=(P(), P()), check_vma=False
    )
    return run(params, batch)


def _summed(
    micro_batch: Callable[[Batch], tuple[Any, Any]], batch: Batch, parts: int
) -> tuple[Any, Any]:
    """The sums of gradients and of what else comes of each part of the rows, one after the other:
    those of gradients in float32."""
    if parts == 1:
        return micro_batch(batch)

    def in_float32(rows: Batch) -> tuple[Any, Any]:
        of_weights, aside = micro_batch(rows)
        return jax.tree.map(lambda x: x.astype(jnp.float32), of_weights), aside

    rows = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    shapes = jax.eval_shape(in_float32, jax.tree.map(lambda x: x[0], rows))
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(so_far: Any, rows: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, so_far, in_float32(rows)), None

    return jax.lax.scan(add, start, rows)[0]


class _Sums(NamedTuple):
    """Over a device's tokens."""

    nll: jax.Array
    penalty: jax.Array
    counts: jax.Array  # int32 [L, E + 1]


def _sums(params: Params, config: ZayaConfig, batch: Batch, z_loss: float) -> _Sums:
    ends = {name: leaf for name, leaf in params["params"].items() if name != "layers"}
    ends = gathered(ends)
    lookup = ends["embed_tokens"]["weight"]
    head = ends.get("lm_head", {})
    # Many tokens add up to the gradient of one row, that of a frequent word: in float32.
    ends["embed_tokens"] = {"weight": lookup.astype(jnp.float32)}
    inner = {**params, "params": {**params["params"], **ends}}
    out = forward(inner, config, batch.tokens, segment_ids=batch.segment_ids)
    scores = cross_entropy(
        out.hidden.reshape(-1, config.hidden_size),
        head.get("weight", lookup),
        batch.targets.reshape(-1),
        head.get("bias"),
        implementation=config.kernels,
    )
    weights = _weights(batch, config).reshape(-1)
    nll = -jnp.sum(weights * scores.log_probability)
    penalty = z_loss * jnp.sum(weights * jnp.square(scores.log_normalizer))
    return _Sums(nll, penalty, out.expert_counts)


def _weights(batch: Batch, config: ZayaConfig) -> jax.Array:
    """Of real targets: float32 [B, S]."""
    real = (batch.targets >= 0) & (batch.targets < config.vocab_size) & (batch.segment_ids != 0)
    return jnp.where(real, batch.weights, 0.0).astype(jnp.float32)


def _nonzero(total: jax.Array) -> jax.Array:
    """A batch without targets has no loss, and no gradient."""
    return jnp.where(total == 0, 1.0, total)


def _placed(weights: Any, plan: Any, dtype: Any, full_sharding: bool) -> Any:
    """Rounded; with full sharding, as parts that know of which whole."""

    def place(leaf: jax.Array, how: Division) -> Any:
        if full_sharding and how.dimension is not None:
            return Sharded(leaf, how.dimension - how.stacked, how.axes, dtype)
        return leaf.astype(dtype)

    return jax.tree.map(place, weights, plan)


def _reduced(of_weights: Any, plan: Any) -> Any:
    """Gradients summed over all devices that have the same weights: each gets its part. Where those
    were parts already, they have been summed as they left the layer."""

    def reduce(how: Division, leaf: Any) -> jax.Array:
        if isinstance(leaf, Sharded):
            return leaf.part
        if jax.lax.axis_size(how.axes) == 1:
            return leaf
        return reduce_scatter(leaf.astype(jnp.float32), how.dimension, how.axes)

    return jax.tree.map(reduce, plan, of_weights)
