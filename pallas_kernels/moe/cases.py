"""The mixture of experts at the sizes of real models."""

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import Blocks
from pallas_kernels.moe import backward, dispatch, forward, kernel, ragged
from pallas_kernels.rocm.cases import TOKENS, Case, Sizes

DECODED = 8  # tokens of a decoding step
_PRODUCT = [  # of many rows, then of few
    Blocks((128, 128, 64), 4, 2),
    Blocks((128, 128, 64), 4, 1),
    Blocks((128, 256, 64), 8, 2),
    Blocks((256, 128, 64), 8, 2),
    Blocks((64, 128, 64), 4, 2),
    Blocks((16, 32, 256), 4, 2),
    Blocks((16, 32, 256), 4, 1),
    Blocks((16, 16, 512), 2, 1),
]
_WEIGHT_GRADIENT = [
    Blocks((128, 128, 32), 4, 2),
    Blocks((128, 128, 64), 4, 2),
    Blocks((128, 128, 64), 4, 1),
    Blocks((128, 128, 32), 8, 1),
    Blocks((128, 256, 32), 8, 2),
    Blocks((256, 128, 32), 8, 2),
]
_HIDDEN = [
    Blocks((128, 64, 64), 4, 2),
    Blocks((128, 64, 64), 4, 1),
    Blocks((128, 64, 64), 8, 2),
    Blocks((128, 128, 64), 8, 2),
    Blocks((128, 128, 32), 8, 2),
    Blocks((256, 64, 64), 8, 2),
    Blocks((64, 64, 64), 4, 2),
    Blocks((16, 32, 128), 4, 2),
    Blocks((16, 16, 256), 4, 1),
    Blocks((16, 32, 128), 2, 1),
    Blocks((16, 16, 256), 2, 1),
]
CANDIDATES = {
    dispatch.SORT: [
        Blocks((128,), 4),
        Blocks((256,), 4),
        Blocks((256,), 8),
        Blocks((512,), 8),
    ],
    forward.HIDDEN: _HIDDEN,
    forward.KEEPING_HIDDEN: _HIDDEN,
    forward.OUTPUT: _PRODUCT,
    forward.INPUT_GRADIENT: _PRODUCT,
    backward.HIDDEN_GRADIENT: [
        Blocks((64, 128, 64), 8, 2),
        Blocks((64, 128, 64), 4, 1),
        Blocks((64, 128, 32), 4, 2),
        Blocks((128, 64, 32), 8, 2),
        Blocks((128, 64, 64), 8, 2),
        Blocks((64, 64, 64), 8, 2),
        Blocks((32, 128, 64), 4, 1),
        Blocks((16, 32, 256), 4, 1),
        Blocks((16, 32, 128), 4, 2),
    ],
    backward.GATE_UP_GRADIENT: _WEIGHT_GRADIENT,
    backward.DOWN_GRADIENT: _WEIGHT_GRADIENT,
}


def cases(sizes: Sizes) -> list[Case]:
    experts, size, hidden = sizes.experts, sizes.hidden, sizes.expert_hidden

    def args(tokens: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        return (
            jax.ShapeDtypeStruct((tokens, size), jnp.bfloat16),
            jax.ShapeDtypeStruct((tokens,), jnp.int32),
            jax.ShapeDtypeStruct((tokens,), jnp.float32),
            jax.ShapeDtypeStruct((experts, 2 * hidden, size), jnp.bfloat16),
            jax.ShapeDtypeStruct((experts, size, hidden), jnp.bfloat16),
        )

    chosen = {1: (0, experts + 1)}  # the skip class too
    of_a_token = 2.0 * 3 * size * hidden
    ours, theirs = kernel.moe, ragged.moe  # XLA's best on GPUs
    return [
        Case("moe forward", ours, theirs, args(TOKENS), TOKENS * of_a_token, integers=chosen),
        Case.training("moe training", ours, theirs, args(TOKENS), 3 * TOKENS * of_a_token, chosen),
        Case("moe decode", ours, theirs, args(DECODED), DECODED * of_a_token, integers=chosen),
    ]
