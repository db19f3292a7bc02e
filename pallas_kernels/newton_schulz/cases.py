"""One Newton-Schulz iteration at the sizes of real models."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import Blocks
from pallas_kernels.newton_schulz import kernel, reference
from pallas_kernels.rocm.cases import Case, Sizes

_SYMMETRIC = [
    Blocks(sizes, warps, stages)
    for sizes, warps in (((64, 64), 4), ((128, 32), 4), ((128, 64), 4), ((128, 64), 8))
    for stages in (1, 2)
]
_RECTANGULAR = [
    Blocks(sizes, warps, stages)
    for sizes, warps in (
        ((128, 128, 32), 4),
        ((128, 128, 64), 4),
        ((128, 256, 32), 8),
        ((256, 128, 32), 8),
    )
    for stages in (1, 2)
]
CANDIDATES = {
    kernel.GRAM: _SYMMETRIC,
    kernel.POLYNOMIAL: _SYMMETRIC,
    kernel.UPDATE: _RECTANGULAR,
}


def cases(sizes: Sizes) -> list[Case]:
    rows, columns = 2 * sizes.expert_hidden, sizes.hidden
    x = jax.ShapeDtypeStruct((sizes.experts, rows, columns), jnp.bfloat16)
    small, large = sorted((rows, columns))
    # Of the products with symmetric results, half is needed.
    flops = 1.0 * sizes.experts * small * small * (large + small + 2 * large)
    return [
        Case(
            "newton_schulz experts",
            partial(kernel.newton_schulz, steps=1),
            partial(reference.newton_schulz, steps=1),
            (x,),
            flops,
        )
    ]
