"""How exactly products are computed."""

from typing import Any

import jax
import jax.numpy as jnp


def exact(dtype: Any) -> jax.lax.Precision | None:
    """Precision of a product whose operands have that dtype: nothing is rounded away.

    GPUs multiply float32 operands in TF32 or XF32 unless asked for the highest precision.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
