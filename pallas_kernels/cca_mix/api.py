"""The CCA mixing op, by whichever implementation is selected; arguments as in
`reference.cca_mix`."""

import jax

from pallas_kernels.cca_mix import kernel, reference
from pallas_kernels.cca_mix.reference import Carry, Weights, initial_carry
from pallas_kernels.selection import select

__all__ = ["Carry", "Weights", "cca_mix", "initial_carry"]


def cca_mix(
    q: jax.Array,
    k: jax.Array,
    current: jax.Array,
    delayed: jax.Array,
    weights: Weights,
    carry: Carry,
    new_lengths: jax.Array,
    age: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, Carry]:
    return select("cca_mix", implementation, {"xla": reference.cca_mix, "pallas": kernel.cca_mix})(
        q, k, current, delayed, weights, carry, new_lengths, age, cos, sin
    )
