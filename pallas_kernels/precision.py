"""How exactly products are computed."""

from typing import Any

import jax
import jax.numpy as jnp

FEWEST_ROWS = 4


def exact(dtype: Any) -> jax.lax.Precision | None:
    """Precision of a product whose operands have that dtype: nothing is rounded away.

    GPUs multiply float32 operands in TF32 or XF32 unless asked for the highest precision.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., in] times weight [out, in], of one dtype: float32 [..., out].

    Fewer than `FEWEST_ROWS` rows of 16-bit numbers are filled up with zeros: XLA's CPU backend
    multiplies a single row in a scalar loop that reads a tenth of what the memory gives.
    """
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if count < FEWEST_ROWS and x.dtype.itemsize == 2:
        rows = jnp.pad(rows, ((0, FEWEST_ROWS - count), (0, 0)))
    out = jax.lax.dot_general(
        rows,
        weight,
        (((1,), (1,)), ((), ())),
        precision=exact(weight.dtype),
        preferred_element_type=jnp.float32,
    )
    return out[:count].reshape(*x.shape[:-1], weight.shape[0])
