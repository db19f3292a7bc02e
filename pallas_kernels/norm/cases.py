"""The fused norm at the sizes of real models."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import Blocks
from pallas_kernels.norm import kernel, reference
from pallas_kernels.rocm.cases import TOKENS, Case, Sizes

CANDIDATES = {
    name: [Blocks((rows,), warps) for rows in (1, 2, 4) for warps in (4, 8)]
    for name in (kernel.FORWARD, kernel.BACKWARD)
}


def cases(sizes: Sizes) -> list[Case]:
    stream = jax.ShapeDtypeStruct((TOKENS, sizes.hidden), jnp.float32)
    vector = jax.ShapeDtypeStruct((sizes.hidden,), jnp.bfloat16)
    args = (stream, stream, *[vector] * 5)
    ours = partial(kernel.scale_residual_and_norm, eps=1e-5)
    theirs = partial(reference.scale_residual_and_norm, eps=1e-5)
    flops = 8.0 * TOKENS * sizes.hidden
    return [
        Case("norm forward", ours, theirs, args, flops),
        Case.training("norm training", ours, theirs, args, 3 * flops),
    ]
