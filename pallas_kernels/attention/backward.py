"""Gradients of attention in Pallas: scores are computed again from the log-sum-exp.

Shapes as in `tiles`. Some programs own a block of keys and pass over the queries that see them,
others own a block of queries of a head and pass over the keys that they see; so nothing is added
across programs. Both kinds are one kernel: a key head has so few blocks of keys, and of such
different work, that they alone would leave a large GPU half idle.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.attention.tiles import (
    Places,
    Shape,
    block_of,
    default_for,
    dot,
    dot_transposed,
    exists,
    ids_at,
    is_seen,
    is_visible,
    key_span,
    limits_of,
    load,
    per_row,
    query_span,
    segments_of_keys,
    segments_of_queries,
    shape_of,
    store,
    visit,
    whole,
)
from pallas_kernels.blocks import Blocks, blocks_for
from pallas_kernels.launch import launch

BACKWARD = "attention_backward"
# Of programs that own keys: queries, keys; of those that own queries: queries, keys.
DEFAULTS = Blocks((16, 64, 128, 32)), Blocks((16, 32, 64, 32)), Blocks((16, 32, 32, 16))

HEADROOM = 6  # of powers of two: sums over the values of a head are larger than cotangents

Sizes = tuple[int, int]


def gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    where: Places,
    out: jax.Array,
    log_sums: jax.Array,
    of_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of q, k and v."""
    shape = shape_of(q, k)
    kind = *shape, where.segment_ids is not None
    choice = blocks_for(BACKWARD, kind, q.dtype, default_for(DEFAULTS, q, shape))
    of_keys, of_queries = (block_of(choice.sizes[i : i + 2], shape) for i in (0, 2))
    row = partial(per_row, row_axis=1)
    key_programs = shape.kv_heads * pl.cdiv(shape.keys, of_keys[1])
    query_programs = shape.heads * pl.cdiv(shape.length, of_queries[0])
    wide = of_out.astype(jnp.float32)
    projected = jnp.sum(out.astype(jnp.float32) * wide, axis=-1)
    operands = (
        where.offsets,
        where.window,
        _unit(jnp.max(jnp.abs(wide), axis=-1)),
        segments_of_keys(where, shape.length, of_keys),
        segments_of_queries(where, shape.length, of_queries),
        q,
        k,
        v,
        of_out,
        log_sums,
        projected.swapaxes(1, 2),
    )

    return launch(
        partial(
            _backward,
            shape=shape,
            of_keys=of_keys,
            of_queries=of_queries,
            key_programs=key_programs,
        ),
        tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)),
        name=BACKWARD,
        grid=(key_programs + query_programs, shape.batch),
        in_specs=[
            pl.BlockSpec((1,), lambda _, b: (b,)),
            whole(where.window),
            pl.BlockSpec((2,), lambda _, b: (0,)),
            *jax.tree.map(row, operands[3:]),
        ],
        out_specs=(row(q), row(k), row(v)),
        warps=choice.warps,
        stages=choice.stages,
    )(*operands)


def _backward(
    offset_ref,
    window_ref,
    unit_ref,
    key_segments,
    query_segments,
    *refs,
    shape: Shape,
    of_keys: Sizes,
    of_queries: Sizes,
    key_programs: int,
):
    """The longest programs of either kind begin."""
    program = pl.program_id(0)

    @pl.when(program < key_programs)
    def _():
        head, block = program % shape.kv_heads, program // shape.kv_heads
        limits = limits_of(block, offset_ref, window_ref, key_segments)
        _own_keys(head, block, limits, unit_ref, key_segments, refs, shape, of_keys)

    @pl.when(program >= key_programs)
    def _():
        number = program - key_programs
        last = pl.cdiv(shape.length, of_queries[0]) - 1
        head, block = number % shape.heads, last - number // shape.heads
        limits = limits_of(block, offset_ref, window_ref, query_segments)
        _own_queries(head, block, limits, unit_ref, query_segments, refs, shape, of_queries)


def _unit(largest: jax.Array) -> jax.Array:
    """A power of two and its inverse [2], which brings the gradients of scores into the range of
    float16, for the largest cotangents of some outputs, whatever those are that no score depends
    on."""
    largest = jnp.max(jnp.where(jnp.isfinite(largest), largest, 0.0), initial=0.0)
    _, exponent = jnp.frexp(jnp.maximum(largest, 1e-30))
    exponent += HEADROOM
    return jnp.ldexp(jnp.float32(1.0), jnp.stack([exponent, -exponent]))


def _dot_of_scores(of_scores: jax.Array, heads: jax.Array) -> jax.Array:
    """Gradients of scores times queries or keys: in float16 for bfloat16, as that would round them
    eight times as much as the forward pass needs."""
    dtype = jnp.float16 if heads.dtype == jnp.bfloat16 else heads.dtype
    return dot(of_scores.astype(dtype), heads.astype(dtype))


def _own_keys(kv_head, block, limits, unit_ref, segments, refs, shape, sizes):
    q_ref, k_ref, v_ref, of_out_ref, log_sums_ref, projected_ref, _, of_k_ref, of_v_ref = refs
    span = query_span(block, sizes, limits, shape)
    key = block * sizes[1] + jnp.arange(sizes[1])
    is_real = is_seen(key, limits, shape)
    per_unit = unit_ref[1]
    k, v = (load(ref, key, shape, is_real, kv_head=kv_head) for ref in (k_ref, v_ref))
    if segments is not None:
        own = ids_at(segments.keys, key, shape.keys)

    def step(number, carry, masked, head):
        of_k, of_v = carry
        query = number * sizes[0] + jnp.arange(sizes[0])
        real = exists(query, shape) if masked else None
        q, of_out = (load(ref, query, shape, real, head) for ref in (q_ref, of_out_ref))
        log_sums, projected = (
            _numbers(ref, head, query, real) for ref in (log_sums_ref, projected_ref)
        )
        weights = jnp.exp2(dot_transposed(k, q) * shape.scale - log_sums[None])
        if masked:
            ids = None
            if segments is not None:
                ids = own[:, None], ids_at(segments.queries, query, shape.length)[None]
            visible = is_visible(query[None], key[:, None], limits, shape, ids)
            weights = jnp.where(visible, weights, 0.0)
        of_v += dot(weights.astype(of_out.dtype), of_out)
        of_scores = weights * (dot_transposed(v, of_out) - projected[None])
        return of_k + _dot_of_scores(of_scores * per_unit, q), of_v

    def of_head(number, carry):
        return visit(partial(step, head=kv_head * shape.groups + number), span, carry)

    zeros = jnp.zeros((sizes[1], shape.width), jnp.float32)
    of_k, of_v = jax.lax.fori_loop(0, shape.groups, of_head, (zeros, zeros))
    real = key < shape.keys
    store(of_k_ref, key, of_k * (unit_ref[0] * shape.head_dim**-0.5), shape, real, kv_head=kv_head)
    store(of_v_ref, key, of_v, shape, real, kv_head=kv_head)


def _own_queries(head, block, limits, unit_ref, segments, refs, shape, sizes):
    q_ref, k_ref, v_ref, of_out_ref, log_sums_ref, projected_ref, of_q_ref, _, _ = refs
    kv_head = head // shape.groups
    query = block * sizes[0] + jnp.arange(sizes[0])
    real = query < shape.length
    per_unit = unit_ref[1]
    q, of_out = (load(ref, query, shape, real, head) for ref in (q_ref, of_out_ref))
    log_sums, projected = (
        _numbers(ref, head, query, real) for ref in (log_sums_ref, projected_ref)
    )
    if segments is not None:
        own = ids_at(segments.queries, query, shape.length)

    def step(number, of_q, masked):
        key = number * sizes[1] + jnp.arange(sizes[1])
        is_real = is_seen(key, limits, shape) if masked else None
        k, v = (load(ref, key, shape, is_real, kv_head=kv_head) for ref in (k_ref, v_ref))
        weights = jnp.exp2(dot_transposed(q, k) * shape.scale - log_sums[:, None])
        if masked:
            ids = None
            if segments is not None:
                ids = own[:, None], ids_at(segments.keys, key, shape.keys)[None]
            visible = is_visible(query[:, None], key[None], limits, shape, ids)
            weights = jnp.where(visible, weights, 0.0)
        of_scores = weights * (dot_transposed(of_out, v) - projected[:, None])
        return of_q + _dot_of_scores(of_scores * per_unit, k)

    zeros = jnp.zeros((sizes[0], shape.width), jnp.float32)
    of_q = visit(step, key_span(block, sizes, limits, shape), zeros)
    store(of_q_ref, query, of_q * (unit_ref[0] * shape.head_dim**-0.5), shape, real, head)


def _numbers(ref, head, query, real):
    """One for each query, of a head."""
    if real is None:
        return triton.load(ref.at[head, query])
    return triton.load(ref.at[head, query], mask=real, other=0.0)
