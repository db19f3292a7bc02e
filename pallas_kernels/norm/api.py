"""RMSNorm and residual scaling, by whichever implementation is selected; arguments as in
`reference`."""

import jax

from pallas_kernels.norm import reference
from pallas_kernels.selection import select


def rms_norm(
    x: jax.Array, weight: jax.Array, eps: float, *, implementation: str | None = None
) -> jax.Array:
    return select("rms_norm", implementation, {"xla": reference.rms_norm})(x, weight, eps)


def scale_residual(
    output: jax.Array,
    residual: jax.Array,
    *scales_and_biases: jax.Array,
    implementation: str | None = None,
) -> jax.Array:
    return select("scale_residual", implementation, {"xla": reference.scale_residual})(
        output, residual, *scales_and_biases
    )
