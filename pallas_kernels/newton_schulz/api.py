"""Muon's orthogonalisation, by whichever implementation is selected; arguments as in
`reference.newton_schulz`."""

import jax

from pallas_kernels.newton_schulz import kernel, reference
from pallas_kernels.newton_schulz.reference import COEFFICIENTS, EPS, STEPS
from pallas_kernels.selection import select


def newton_schulz(
    x: jax.Array,
    steps: int = STEPS,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = EPS,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """As the reference.

    Raises:
      ValueError: less than one step.
    """
    if steps < 1:
        raise ValueError(f"newton_schulz takes at least 1 step, not {steps}")
    available = {"xla": reference.newton_schulz, "pallas": kernel.newton_schulz}
    return select("newton_schulz", implementation, available)(x, steps, coefficients, eps)
