"""Attention at the sizes of real models."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.attention import backward, decode, kernel, reference
from pallas_kernels.blocks import Blocks
from pallas_kernels.rocm.cases import TOKENS, Case, Sizes

ROWS, CAPACITY = 8, 32768  # of the decoding cache

CANDIDATES = {
    kernel.FORWARD: [
        Blocks((128, 32)),
        Blocks((128, 32), 4, 2),
        Blocks((128, 16)),
        Blocks((64, 32), 2),
        Blocks((64, 32)),
        Blocks((256, 32), 8),
    ],
    backward.BACKWARD: [
        Blocks((32, 64, 128, 32), 4, 2),
        Blocks((32, 64, 128, 32)),
        Blocks((32, 64, 64, 32)),
        Blocks((16, 64, 128, 64)),
        Blocks((16, 128, 128, 32)),
        Blocks((16, 64, 128, 32)),
        Blocks((16, 64, 64, 32)),
    ],
    decode.DECODE: [
        Blocks((keys, programs), warps)
        for keys, warps in ((32, 2), (32, 4), (64, 4))
        for programs in (512, 1024, 2048)
    ],
}


def cases(sizes: Sizes) -> list[Case]:
    window = sizes.window or TOKENS
    pairs = TOKENS * window - window * (window - 1) // 2
    products = 4.0 * sizes.heads * sizes.head_dim  # of a query and a key, forward
    long = _operands(sizes, 1, TOKENS, TOKENS)
    ids = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
    ours, theirs = (
        partial(f, window=sizes.window) for f in (kernel.attention, reference.attention)
    )
    ascending, anywhere = {4: (1, 9)}, {3: (0, CAPACITY)}
    # Two products forward, five backward; of packed rows as many as if they were one segment.
    training = 3.5 * products * pairs
    seen = ROWS * min(sizes.window or CAPACITY, CAPACITY)
    short = _operands(sizes, ROWS, 1, CAPACITY)
    return [
        Case("attention forward", ours, theirs, long, products * pairs),
        Case.training("attention training", ours, theirs, long, training),
        Case.training("attention packed training", ours, theirs, (*long, ids), training, ascending),
        Case("attention decode", ours, theirs, short, products * seen, integers=anywhere),
    ]


def _operands(sizes: Sizes, batch: int, length: int, keys: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    queries = (batch, length, sizes.heads, sizes.head_dim)
    cache = (batch, sizes.kv_heads, keys, sizes.head_dim)
    floats = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in (queries, cache, cache)]
    return *floats, jax.ShapeDtypeStruct((batch,), jnp.int32)
