"""The mixture-of-experts op, by whichever implementation is selected; arguments as in
`reference.moe`."""

import jax

from pallas_kernels.moe import reference
from pallas_kernels.moe.reference import Experts
from pallas_kernels.selection import select

__all__ = ["Experts", "moe"]


def moe(
    x: jax.Array,
    expert: jax.Array,
    weight: jax.Array,
    gate_up: Experts,
    down: Experts,
    *,
    implementation: str | None = None,
) -> jax.Array:
    return select("moe", implementation, {"xla": reference.moe})(x, expert, weight, gate_up, down)
