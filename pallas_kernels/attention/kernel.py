"""Causal grouped-query attention in Pallas: softmax over blocks of keys as they pass by, and only
the output and the log-sum-exp kept for the backward pass.

Shapes as in `tiles`. A program takes a block of queries of one head.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.attention import backward, decode
from pallas_kernels.attention.tiles import (
    MASKED,
    Places,
    Shape,
    block_of,
    default_for,
    dot,
    dot_transposed,
    ids_at,
    is_seen,
    is_visible,
    key_span,
    limits_of,
    load,
    per_row,
    places,
    segments_of_queries,
    shape_of,
    store,
    visit,
    whole,
)
from pallas_kernels.blocks import Blocks, blocks_for
from pallas_kernels.launch import launch

FORWARD = "attention_forward"
DEFAULTS = Blocks((128, 32)), Blocks((128, 32)), Blocks((64, 16))  # queries, keys


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offsets: jax.Array,
    segment_ids: jax.Array | None = None,
    window: int | jax.Array | None = None,
) -> jax.Array:
    """As `reference.attention`; what keys and values hold where no query sees them is of no
    effect."""
    if q.size == 0:
        return jnp.zeros(q.shape, v.dtype)
    return _attention(q, k, v, places(offsets, segment_ids, window))


@jax.custom_vjp
def _attention(q: jax.Array, k: jax.Array, v: jax.Array, where: Places) -> jax.Array:
    if decode.fits(shape_of(q, k)) and where.segment_ids is None:
        return decode.attend(q, k, v, where)
    return _attend(q, k, v, where)[0]


def _attention_forward(q, k, v, where):
    out, log_sums = _attend(q, k, v, where)
    return out, (q, k, v, where, out, log_sums)


def _attention_backward(saved, of_out):
    q, k, v, where, out, log_sums = saved
    return *backward.gradients(q, k, v, where, out, log_sums, of_out), None


_attention.defvjp(_attention_forward, _attention_backward)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, where: Places) -> tuple[jax.Array, jax.Array]:
    """Outputs, and float32 [B, H, S]: the logarithms to base 2 of the sums of exponentials."""
    shape = shape_of(q, k)
    choice = blocks_for(
        FORWARD, (*shape, where.segment_ids is not None), q.dtype, default_for(DEFAULTS, q, shape)
    )
    sizes = block_of(choice.sizes, shape)
    count = pl.cdiv(shape.length, sizes[0])
    # The last queries see most keys: theirs are the programs to begin with.
    rows = pl.BlockSpec(
        (None, sizes[0], None, shape.width), lambda h, i, b: (b, count - 1 - i, h, 0)
    )
    keys = pl.BlockSpec((None, None, *k.shape[2:]), lambda h, i, b: (b, h // shape.groups, 0, 0))
    segments = segments_of_queries(where, shape.length, sizes)
    return launch(
        partial(_forward, shape=shape, sizes=sizes),
        (
            jax.ShapeDtypeStruct(q.shape, v.dtype),
            jax.ShapeDtypeStruct((shape.batch, shape.heads, shape.length), jnp.float32),
        ),
        name=FORWARD,
        grid=(shape.heads, count, shape.batch),
        in_specs=[
            pl.BlockSpec((1,), lambda h, i, b: (b,)),
            whole(where.window),
            jax.tree.map(partial(per_row, row_axis=2), segments),
            rows,
            keys,
            keys,
        ],
        out_specs=(
            rows,
            pl.BlockSpec((None, None, sizes[0]), lambda h, i, b: (b, h, count - 1 - i)),
        ),
        warps=choice.warps,
        stages=choice.stages,
    )(where.offsets, where.window, segments, q, k, v)


def _forward(
    offset_ref,
    window_ref,
    segment_refs,
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    log_sums_ref,
    *,
    shape: Shape,
    sizes: tuple[int, int],
):
    block = pl.num_programs(1) - 1 - pl.program_id(1)
    limits = limits_of(block, offset_ref, window_ref, segment_refs)
    row = jnp.arange(sizes[0])
    query = block * sizes[0] + row
    real = query < shape.length
    q = load(q_ref, row, shape, real)
    if segment_refs is not None:
        own = ids_at(segment_refs.queries, query, shape.length)

    def step(number, carry, masked):
        most, total, summed = carry
        key = number * sizes[1] + jnp.arange(sizes[1])
        is_real = is_seen(key, limits, shape) if masked else None
        scores = dot_transposed(q, load(k_ref, key, shape, is_real)) * shape.scale
        if masked:
            ids = None
            if segment_refs is not None:
                ids = own[:, None], ids_at(segment_refs.keys, key, shape.keys)[None]
            visible = is_visible(query[:, None], key[None], limits, shape, ids)
            scores = jnp.where(visible, scores, MASKED)
        new_most = jnp.maximum(most, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - new_most[:, None])
        shrink = jnp.exp2(most - new_most)
        total = total * shrink + jnp.sum(weights, axis=1)
        v = load(v_ref, key, shape, is_real)
        return new_most, total, summed * shrink[:, None] + dot(weights.astype(v.dtype), v)

    most, total, summed = visit(
        step,
        key_span(block, sizes, limits, shape),
        (
            jnp.full((sizes[0],), MASKED, jnp.float32),
            jnp.zeros((sizes[0],), jnp.float32),
            jnp.zeros((sizes[0], shape.width), jnp.float32),
        ),
    )
    store(out_ref, row, summed / total[:, None], shape, real)
    triton.store(log_sums_ref.at[row], most + jnp.log2(total), mask=real)
