"""The mixture of experts by `jax.lax.ragged_dot_general`, a grouped product of hipBLASLt on AMD
GPUs.

Shapes: T tokens of D channels, E experts of F hidden channels.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.moe import reference
from pallas_kernels.moe.reference import Experts
from pallas_kernels.precision import exact

# Rows [T, K] of groups with weights [E, N, K] -> [T, N].
ROWS_BY_WEIGHTS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)


def moe(
    x: jax.Array, expert: jax.Array, weight: jax.Array, gate_up: Experts, down: Experts
) -> jax.Array:
    """As `reference.moe`, which also computes experts in separate arrays: a form for CPUs.

    Products are rounded to x's dtype: a float32 result would take ROCm to a product of all tokens
    with all experts.
    """
    if isinstance(gate_up, tuple) or isinstance(down, tuple):
        return reference.moe(x, expert, weight, gate_up, down)
    tokens, experts = expert.size, gate_up.shape[0]
    real = (expert >= 0) & (expert < experts)
    expert = jnp.where(real, expert, experts)
    order = jnp.argsort(expert, stable=True)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(tokens), unique_indices=True)
    sizes = jnp.bincount(expert, length=experts + 1)[:experts].astype(jnp.int32)
    in_group = jnp.arange(tokens) < jnp.sum(sizes)

    def product(rows: jax.Array, weights: jax.Array) -> jax.Array:
        out = jax.lax.ragged_dot_general(
            rows,
            weights,
            sizes,
            ROWS_BY_WEIGHTS,
            precision=exact(x.dtype),
            preferred_element_type=x.dtype,
        )
        # Rows beyond the groups are undefined on GPUs.
        return jnp.where(in_group[:, None], out, 0).astype(jnp.float32)

    rows = reference.permute(x, order, in_group, inverse, real)
    gate, up = jnp.split(product(rows, gate_up), 2, axis=-1)
    out = product((jax.nn.silu(gate) * up).astype(x.dtype), down)
    out = reference.permute(out, inverse, real, order, in_group)
    return jnp.where(real, weight, 0.0)[:, None] * out
