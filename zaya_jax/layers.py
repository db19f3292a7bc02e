"""The small modules every layer shares: linear maps, scales, and the rotary table."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.product import Weight, product
from zaya_jax.config import Rope

INIT = nn.initializers.normal(0.02)


def linear(x: jax.Array, weight: Weight, bias: jax.Array | None = None) -> jax.Array:
    """x [..., in], rounded to the weight's dtype, times weight [out, in]: float32 [..., out].

    Full float32 products where the weight is float32; GPUs would round the operands otherwise.
    """
    out = product(x.astype(weight.dtype), weight)
    return out if bias is None else out + bias.astype(jnp.float32)


class Linear(nn.Module):
    """A linear map with its weight in PyTorch's orientation, [out, in]; the result is in the
    weight's dtype."""

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = parameter(self, "weight", INIT, (self.features, x.shape[-1]))
        bias = (
            self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        )
        return linear(x, weight, bias)


def parameter(module: nn.Module, name: str, init: Any, shape: tuple[int, ...]) -> Any:
    """A parameter that is created with that shape, but may be held in another form
    (`layouts.for_cpu`)."""
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape)


class Scale(nn.Module):
    """Weight of an RMSNorm over the last axis, which an op applies."""

    size: int

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("weight", nn.initializers.ones, (self.size,))


class ResidualScaling(nn.Module):
    """The learned vectors that join a sub-layer's output to the float32 stream: hs, hb, rs, rb of
    (output + hb) * hs + (stream + rb) * rs."""

    size: int

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        shape, scale, bias = (self.size,), nn.initializers.ones, nn.initializers.zeros
        return (
            self.param("hidden_states_scale", scale, shape),
            self.param("hidden_states_bias", bias, shape),
            self.param("residual_scale", scale, shape),
            self.param("residual_bias", bias, shape),
        )


def rotary_table(positions: jax.Array, head_dim: int, rope: Rope) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary embedding: positions int [B, S] -> two float32 [B, S,
    r/2]."""
    rotary = int(head_dim * rope.partial_rotary_factor)
    # Rounded twice, as in PyTorch: a last bit of a frequency turns position 1,000 by 1.5e-5.
    powers = rope.theta ** (np.arange(0, rotary, 2) / rotary)
    frequencies = 1 / powers.astype(np.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)
