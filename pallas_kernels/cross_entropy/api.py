"""The LM head and its cross-entropy, by whichever implementation is selected; arguments as in
`reference.cross_entropy`."""

import jax

from pallas_kernels.cross_entropy import kernel, reference
from pallas_kernels.cross_entropy.reference import CrossEntropy
from pallas_kernels.selection import select

__all__ = ["CrossEntropy", "cross_entropy"]


def cross_entropy(
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None = None,
    *,
    temperature: float | jax.Array = 1.0,
    implementation: str | None = None,
) -> CrossEntropy:
    available = {"xla": reference.cross_entropy, "pallas": kernel.cross_entropy}
    f = select("cross_entropy", implementation, available)
    return f(hidden, weight, targets, bias, temperature=temperature)
