"""The ZAYA router: depth averaging, a three-layer MLP and a biased top-1 choice, in float32 XLA
(spec: ZAYA1 report, 2)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.norm.reference import rms_norm
from pallas_kernels.precision import exact

FREE = 255


class Weights(NamedTuple):
    """Parameters of one router, [out, in]; R is the router's width, E the number of experts."""

    depth_scale: jax.Array | None  # [R], gamma of the depth average; the first layer has none
    norm: jax.Array  # [R]
    fc1: jax.Array  # [R, R]
    fc1_bias: jax.Array  # [R]
    fc2: jax.Array  # [R, R]
    fc2_bias: jax.Array  # [R]
    out: jax.Array  # [E + 1, R]


def route(
    states: jax.Array,
    previous: jax.Array | None,
    weights: Weights,
    balancing_biases: jax.Array,
    eps: float,
    forced: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Chooses one of E experts or the skip class (number E) for each token.

    Args:
      states: float32 [..., R], the router's down-projection of the token.
      previous: float32 [..., R], the router state of the layer before, or None in the first layer.
      weights: the router's parameters.
      balancing_biases: float32 [E + 1], added to the probabilities for the choice alone.
      eps: of the RMSNorm.
      forced: uint8 [...], expert to use instead of the choice; 255 leaves the choice free.

    Returns:
      The state for the next layer's router float32 [..., R], the expert int32 [...], and its weight
      float32 [...]: the unbiased probability among E + 1 classes, through which the gradient flows.
    """
    if previous is not None and weights.depth_scale is not None:
        states = states + previous * weights.depth_scale.astype(jnp.float32)
    x = rms_norm(states, weights.norm.astype(jnp.float32), eps)
    x = jax.nn.gelu(
        _linear(x, weights.fc1) + weights.fc1_bias.astype(jnp.float32), approximate=False
    )
    x = jax.nn.gelu(
        _linear(x, weights.fc2) + weights.fc2_bias.astype(jnp.float32), approximate=False
    )
    return states, *choose(_linear(x, weights.out), balancing_biases, forced)


def choose(
    scores: jax.Array, balancing_biases: jax.Array, forced: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The class of each token, and its weight, by scores float32 [..., E + 1]; the other arguments
    and the results as those of `route`."""
    probabilities = jax.nn.softmax(scores, axis=-1)
    biased = jax.lax.stop_gradient(probabilities) + balancing_biases
    expert = jnp.argmax(biased, axis=-1).astype(jnp.int32)
    if forced is not None:
        expert = jnp.where(forced == FREE, expert, forced.astype(jnp.int32))
    weight = jnp.take_along_axis(probabilities, expert[..., None], axis=-1)[..., 0]
    return expert, weight


def _linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., in] times weight [out, in], in full float32."""
    return jax.lax.dot_general(
        x,
        weight.astype(jnp.float32),
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=exact(jnp.float32),
    )
