"""CCA mixing at the sizes of real models."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import Blocks
from pallas_kernels.cca_mix import backward, kernel, reference, value_shift
from pallas_kernels.cca_mix.reference import Carry, Weights
from pallas_kernels.rocm.cases import TOKENS, Case, Sizes

TAPS = 2, 2  # of the depthwise and the grouped convolution
ROTARY_PAIRS = 32
DECODED = 8  # rows


def _blocks(*choices: tuple[int, int, int]) -> list[Blocks]:
    """Of tokens, input channels and warps."""
    return [Blocks((tokens, width), warps) for tokens, width, warps in choices]


CANDIDATES = {
    kernel.FORWARD: _blocks((32, 32, 2), (32, 64, 2), (64, 16, 4), (64, 32, 4), (128, 32, 8)),
    kernel.DECODE: _blocks((16, 32, 2), (16, 64, 2), (16, 32, 4), (16, 64, 4), (16, 128, 4)),
    backward.BACKWARD: [
        Blocks((tokens, width, *matrices))
        for tokens, width in ((32, 16), (64, 16), (64, 32))
        for matrices in ((16, 32), (16, 64), (32, 32))
    ],
    value_shift.VALUES: [Blocks((tokens,), warps) for tokens, warps in ((16, 2), (32, 4), (64, 4))],
}


def cases(sizes: Sizes) -> list[Case]:
    ours, theirs = (_of_positions(f) for f in (kernel.cca_mix, reference.cca_mix))
    long, short = _args(sizes, 1, TOKENS, packed=True), _args(sizes, DECODED, 1, packed=False)
    channels = (sizes.heads + sizes.kv_heads) * sizes.head_dim
    # Behind twelve arrays: the lengths, the ages of packed rows, and the positions.
    every, rows = {12: (TOKENS, TOKENS + 1), 14: (0, TOKENS)}, {12: (1, 2), 13: (0, TOKENS)}
    flops = 2.0 * channels * (TAPS[1] * sizes.head_dim + TAPS[0])  # of a token
    return [
        Case("cca_mix forward", ours, theirs, long, TOKENS * flops, integers=every),
        Case.training("cca_mix training", ours, theirs, long, 3 * TOKENS * flops, every),
        Case("cca_mix decode", ours, theirs, short, DECODED * flops, integers=rows),
    ]


def _of_positions(mix: Callable[..., Any]) -> Callable[..., Any]:
    """With the angles of rotation for an argument: the tables have no gradient."""

    def run(*args: Any) -> Any:
        *rest, positions = args
        angles = positions[..., None] * jnp.arange(ROTARY_PAIRS) / ROTARY_PAIRS
        return mix(*rest, jnp.cos(angles), jnp.sin(angles))

    return run


def _args(sizes: Sizes, batch: int, length: int, packed: bool) -> tuple[Any, ...]:
    d, half = sizes.head_dim, sizes.kv_heads * sizes.head_dim // 2
    channels = (sizes.heads + sizes.kv_heads) * d

    def float32(*shape: int) -> Any:
        return jax.ShapeDtypeStruct((batch, *shape), jnp.float32)

    def bfloat16(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def integer(*shape: int) -> Any:
        return jax.ShapeDtypeStruct((batch, *shape), jnp.int32)

    weights = Weights(
        bfloat16(channels, 1, TAPS[0]),
        bfloat16(channels),
        bfloat16(channels, d, TAPS[1]),
        bfloat16(channels),
        bfloat16(sizes.kv_heads),
        bfloat16(half),
    )
    projections = (float32(length, n) for n in (sizes.heads * d, sizes.kv_heads * d, half, half))
    carry = Carry(float32(sum(TAPS) - 2, channels), float32(half))
    age = integer(length) if packed else None
    return (*projections, weights, carry, integer(), age, integer(length))
