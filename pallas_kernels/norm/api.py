"""Residual scaling and the RMSNorm after it, by whichever implementation is selected; each by
itself is left to XLA. Arguments as in `reference`."""

from collections.abc import Callable

import jax

from pallas_kernels.norm import kernel, reference
from pallas_kernels.norm.reference import rms_norm, scale_residual
from pallas_kernels.selection import select

__all__ = ["rms_norm", "scale_residual", "scale_residual_and_norm"]


def scale_residual_and_norm(
    output: jax.Array,
    residual: jax.Array,
    *scales_biases_and_weight: jax.Array,
    eps: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    available: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
        "xla": reference.scale_residual_and_norm,
        "pallas": kernel.scale_residual_and_norm,
    }
    return select("norm", implementation, available)(
        output, residual, *scales_biases_and_weight, eps=eps
    )
