"""Attention of few new queries over a long cache in Pallas: the keys of a row are divided among
programs, and their partial results are joined by their log-sum-exps.

Shapes as in `tiles`. A program takes all queries of a key head's group, as rows of one block.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.attention.tiles import (
    MASKED,
    Places,
    Shape,
    dot,
    dot_transposed,
    is_seen,
    is_visible,
    limits_of,
    load,
    seen,
    shape_of,
    whole,
)
from pallas_kernels.blocks import Blocks, blocks_for
from pallas_kernels.launch import launch, power_of_two

DECODE, JOIN = "attention_decode", "attention_decode_join"
DEFAULT = Blocks((64, 1024))  # keys at once, programs at least where the keys suffice for them
ROWS = 64  # of a block, at most
JOINED = 32  # partial results at once


def fits(shape: Shape) -> bool:
    """Whether the queries are few."""
    return shape.length * shape.groups <= ROWS and shape.length < shape.keys


def attend(q: jax.Array, k: jax.Array, v: jax.Array, where: Places) -> jax.Array:
    """Outputs, as of `reference.attention`."""
    shape = shape_of(q, k)
    choice = blocks_for(DECODE, shape, k.dtype, DEFAULT)
    size = power_of_two(max(shape.keys, 16), choice.sizes[0])
    wanted = power_of_two(pl.cdiv(choice.sizes[1], shape.batch * shape.kv_heads), choice.sizes[1])
    splits = min(wanted, pl.cdiv(shape.keys, size))
    group = (shape.length, shape.groups, shape.head_dim)
    keys = pl.BlockSpec((None, None, *k.shape[2:]), lambda i, n, b: (b, n, 0, 0))
    partial_shape = (splits, *q.shape)
    sums, log_sums = launch(
        partial(_decode, shape=shape, size=size),
        (
            jax.ShapeDtypeStruct(partial_shape, jnp.float32),
            jax.ShapeDtypeStruct(partial_shape[:-1], jnp.float32),
        ),
        name=DECODE,
        grid=(splits, shape.kv_heads, shape.batch),
        in_specs=[
            pl.BlockSpec((1,), lambda i, n, b: (b,)),
            whole(where.window),
            pl.BlockSpec((None, *group), lambda i, n, b: (b, 0, n, 0)),
            keys,
            keys,
        ],
        out_specs=(
            pl.BlockSpec((None, None, *group), lambda i, n, b: (i, b, 0, n, 0)),
            pl.BlockSpec((None, None, *group[:2]), lambda i, n, b: (i, b, 0, n)),
        ),
        warps=choice.warps,
        stages=choice.stages,
    )(where.offsets, where.window, q, k, v)
    return _joined(sums, log_sums, shape, v.dtype)


def _joined(sums: jax.Array, log_sums: jax.Array, shape: Shape, dtype: Any) -> jax.Array:
    """The partial results [splits, B, S, H, d] as one; a program takes a query of a head."""
    splits = sums.shape[0]
    query = (None, None, None, shape.width)
    return launch(
        partial(_join, shape=shape, splits=splits),
        jax.ShapeDtypeStruct(sums.shape[1:], dtype),
        name=JOIN,
        grid=(shape.heads, shape.length, shape.batch),
        in_specs=[
            pl.BlockSpec((splits, *query), lambda h, i, b: (0, b, i, h, 0)),
            pl.BlockSpec((splits, None, None, None), lambda h, i, b: (0, b, i, h)),
        ],
        out_specs=pl.BlockSpec(query, lambda h, i, b: (b, i, h, 0)),
    )(sums, log_sums)


def _join(sums_ref, log_sums_ref, out_ref, *, shape: Shape, splits: int):
    def log_sums(rows: jax.Array) -> jax.Array:
        return triton.load(log_sums_ref.at[rows], mask=rows < splits, other=MASKED)

    most = jnp.max(log_sums(jnp.arange(power_of_two(splits, 2 * splits))))

    def step(number, carry):
        total, summed = carry
        rows = number * JOINED + jnp.arange(JOINED)
        shares = jnp.exp2(log_sums(rows) - most)
        sums = load(sums_ref, rows, shape, rows < splits)
        return total + jnp.sum(shares), summed + jnp.sum(sums * shares[:, None], axis=0)

    zeros = jnp.float32(0.0), jnp.zeros((shape.width,), jnp.float32)
    total, summed = jax.lax.fori_loop(0, pl.cdiv(splits, JOINED), step, zeros)
    out = summed / total
    columns = jnp.arange(shape.width)
    triton.store(out_ref.at[columns], out.astype(out_ref.dtype), mask=columns < shape.head_dim)


def _decode(
    offset_ref,
    window_ref,
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    log_sums_ref,
    *,
    shape: Shape,
    size: int,
):
    split, splits = pl.program_id(0), pl.num_programs(0)
    limits = limits_of(split, offset_ref, window_ref, None)
    height = max(power_of_two(shape.length * shape.groups, ROWS), 16)
    row = jnp.arange(height)
    real = row < shape.length * shape.groups
    query, head = row // shape.groups, row % shape.groups
    columns = jnp.arange(shape.width)[None]
    index = query[:, None], head[:, None], columns
    inside = real[:, None] & (columns < shape.head_dim)
    q = triton.load(q_ref.at[index], mask=inside, other=0)

    def step(number, carry):
        most, total, summed = carry
        key = number * size + jnp.arange(size)
        is_real = is_seen(key, limits, shape)
        k, v = (load(ref, key, shape, is_real) for ref in (k_ref, v_ref))
        visible = is_visible(query[:, None], key[None], limits, shape)
        scores = jnp.where(visible, dot_transposed(q, k) * shape.scale, MASKED)
        new_most = jnp.maximum(most, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - new_most[:, None])
        shrink = jnp.exp2(most - new_most)
        total = total * shrink + jnp.sum(weights, axis=1)
        return new_most, total, summed * shrink[:, None] + dot(weights.astype(v.dtype), v)

    # The blocks with keys that are seen, divided evenly: short rows too keep all programs busy.
    low, high = seen(limits, shape)
    first, last = jnp.maximum(low, 0) // size, pl.cdiv(high, size)
    share = pl.cdiv(last - first, splits)
    start = first + split * share
    most, total, summed = jax.lax.fori_loop(
        start,
        jnp.minimum(start + share, last),
        step,
        (
            jnp.full((height,), MASKED, jnp.float32),
            jnp.zeros((height,), jnp.float32),
            jnp.zeros((height, shape.width), jnp.float32),
        ),
    )
    # Of a query that sees none of the program's keys the logarithm is MASKED, or near it, and the
    # others' shares leave nothing of what is summed here.
    some = total > 0
    out = summed / jnp.where(some, total, 1.0)[:, None]
    triton.store(out_ref.at[index], out, mask=inside)
    log_sums = jnp.where(some, most + jnp.log2(jnp.where(some, total, 1.0)), MASKED)
    triton.store(log_sums_ref.at[query, head], log_sums, mask=real)
