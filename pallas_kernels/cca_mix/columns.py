"""The new carry of CCA mixing, in XLA: few columns of large arrays."""

import jax
import jax.numpy as jnp


def take(tail: jax.Array, new: jax.Array, new_lengths: jax.Array) -> jax.Array:
    """The last columns after each row's real tokens, as many as before: `tail` [B, T, C], `new`
    [B, S, C] -> [B, T, C]."""
    count, length = tail.shape[1], new.shape[1]
    if count == 0:
        return tail
    index = new_lengths[:, None] + jnp.arange(count)
    old = jnp.take_along_axis(tail, jnp.minimum(index, count - 1)[..., None], axis=1)
    at = jnp.clip(index - count, 0, length - 1)
    return jnp.where((index < count)[..., None], old, _rows(new, at))


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, index[..., None], axis=1)
