"""The router op, by whichever implementation is selected; arguments as in `reference.route`."""

import jax

from pallas_kernels.router import kernel, reference
from pallas_kernels.router.reference import FREE, Weights, choose
from pallas_kernels.selection import select

__all__ = ["FREE", "Weights", "choose", "route"]


def route(
    states: jax.Array,
    previous: jax.Array | None,
    weights: Weights,
    balancing_biases: jax.Array,
    eps: float,
    forced: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return select("route", implementation, {"xla": reference.route, "pallas": kernel.route})(
        states, previous, weights, balancing_biases, eps, forced
    )
