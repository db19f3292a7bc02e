"""RMSNorm and learned residual scaling, in XLA.

Gradients keep the arguments alone: all else is computed again faster than it is written and read.
"""

import jax
import jax.numpy as jnp


@jax.checkpoint
def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation of the last axis, [..., D] -> float32 [..., D].

    PyTorch's model rounds to the weight's dtype before and within the norm; in bfloat16 that costs
    routing agreement with the float32 model, so nothing is rounded here.
    """
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * weight.astype(jnp.float32)


@jax.checkpoint
def scale_residual(
    output: jax.Array,
    residual: jax.Array,
    output_scale: jax.Array,
    output_bias: jax.Array,
    residual_scale: jax.Array,
    residual_bias: jax.Array,
) -> jax.Array:
    """Adds a sub-layer's output to the stream, each with its learned scale and bias (vectors of
    size D).

    `output` [..., D] in any float dtype, `residual` float32 [..., D]; the sum is float32, because
    over 80 sub-layers the product of the released scales has median 7e-6 and a bfloat16 stream
    would lose the early layers.
    """
    output, output_scale, output_bias, residual_scale, residual_bias = (
        a.astype(jnp.float32)
        for a in (output, output_scale, output_bias, residual_scale, residual_bias)
    )
    return (output + output_bias) * output_scale + (residual + residual_bias) * residual_scale


@jax.checkpoint
def scale_residual_and_norm(
    output: jax.Array,
    residual: jax.Array,
    output_scale: jax.Array,
    output_bias: jax.Array,
    residual_scale: jax.Array,
    residual_bias: jax.Array,
    weight: jax.Array,
    *,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    """`scale_residual`, and `rms_norm` of the sum: both float32 [..., D]."""
    stream = scale_residual(
        output, residual, output_scale, output_bias, residual_scale, residual_bias
    )
    return stream, rms_norm(stream, weight, eps)
