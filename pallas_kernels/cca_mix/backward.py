"""Gradients of CCA mixing by its inputs and its weights, in Pallas.

Programs compute again what the heads were before their norm, and from the cotangents of the results
those of the convolution's output, `of_mixed`. Some turn these into gradients of q and k, others
into those of the grouped convolution: keeping them between the two would cost more traffic than the
products do. Both kinds are one kernel, as they read the same, and neither fills a large GPU evenly.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.blocks import Blocks, blocks_for
from pallas_kernels.cca_mix.heads import (
    NOWHERE,
    Head,
    Inputs,
    Sizes,
    Tokens,
    consecutive,
    depthwise,
    dot,
    either,
    in_order,
    in_pairs,
    key,
    load,
    load_head,
    load_matrix,
    load_u,
    load_vector,
    mixed,
    pick,
    product,
    query,
    thirds,
    tokens,
    turn,
    unit_scale,
    whole,
)
from pallas_kernels.cca_mix.reference import Weights
from pallas_kernels.launch import launch, power_of_two

BACKWARD = "cca_mix_backward"
# Tokens, and input channels that are multiplied at once: of gradients of projections, of matrices.
DEFAULT = Blocks((64, 16, 16, 32))
# Of the matrices' gradients at most: each has sums of its own in memory, and takes about three
# times as long as one of the projections'.
PROGRAMS = 190
MARK = 2.0**127  # what no gradient is: stands for one that is not finite


class Of(NamedTuple):
    """References to cotangents of the results."""

    q: Any  # [B S, H d]
    k: Any  # [B S, N d]
    tail: Any  # [B T, C]
    lengths: Any  # int32 [B], which tell what `tail` was taken from


class Gradients(NamedTuple):
    """References to gradients, and to sums by each program."""

    q: Any  # [B S, H d]
    k: Any  # [B S, N d]
    tail: Any  # [B T, C]
    sums: Any  # [tiles, k0 + 1, C]: depthwise taps, grouped bias
    temperature: Any  # [tiles, N]
    matrices: Any  # [chunks, H + N, k1, d, d]: tap, output channel, input channel


def of_heads(
    sizes: Sizes,
    inputs: Inputs,
    of_q: jax.Array,
    of_k: jax.Array,
    of_tail: jax.Array,
    new_lengths: jax.Array,
    weights: Weights,
) -> tuple[jax.Array, jax.Array, jax.Array, Weights]:
    """Gradients of q and k [B S, heads d], of the tail [B, T, C], and of the weights but the
    initial value, for cotangents of the same shapes, of the heads and the new tail."""
    rows, channels = sizes.batch * sizes.length, inputs.tail.shape[-1]
    heads = sizes.heads + sizes.kv_heads
    choice = blocks_for(BACKWARD, sizes[2:7], weights.temperature.dtype, DEFAULT)
    block, width, matrix_block, matrix_width = choice.sizes
    least = power_of_two(2 * sizes.tail, 4 * sizes.tail)  # tokens, for half of them to be its own
    block = max(block, least)
    # A program's last tokens are only seen by the taps of those before; the first one begins with
    # the tail.
    own = block - sizes.tail
    tiles = pl.cdiv(sizes.length + sizes.tail, own)
    chunk = pl.cdiv(pl.cdiv(rows * heads, PROGRAMS), matrix_block) * matrix_block
    chunks = pl.cdiv(rows, chunk)
    of_results = Of(
        of_q,
        of_k,
        of_tail.reshape(-1, channels) if sizes.tail else jnp.zeros((1, channels)),
        new_lengths.astype(jnp.int32),
    )
    float32 = Gradients(
        of_q.shape,
        of_k.shape,
        of_results.tail.shape,
        (sizes.batch * tiles, sizes.k0 + 1, channels),
        (sizes.batch * tiles, sizes.kv_heads),
        (chunks, heads, sizes.k1, sizes.head_dim, sizes.head_dim),
    )
    operands = (*inputs, *of_results)
    dq, dk, tail, sums, temperature, matrices = launch(
        partial(
            _backward,
            sizes=sizes,
            chunks=chunks,
            of_matrices=partial(
                _matrices, chunk=chunk, block=matrix_block, width=min(matrix_width, 2 * sizes.lanes)
            ),
            of_inputs=partial(_inputs, tiles=tiles, block=block, width=min(width, 2 * sizes.lanes)),
        ),
        tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in float32),
        name=BACKWARD,
        grid=(chunks * heads + sizes.batch * tiles * sizes.kv_heads,),
        in_specs=[whole(x.shape) for x in operands],
        out_specs=tuple(whole(s) for s in float32),
        warps=choice.warps,
        stages=choice.stages,
    )(*operands)
    tail = tail[: sizes.batch * sizes.tail].reshape(sizes.batch, sizes.tail, channels)
    sums, matrices = jnp.sum(sums, axis=0), jnp.sum(matrices, axis=0)
    # Where it is read, before or after the start of a segment, each tap sees the depthwise bias.
    by_head = sums[sizes.k0].reshape(-1, sizes.head_dim)
    held = weights.grouped.astype(jnp.float32).reshape(*by_head.shape, sizes.head_dim, sizes.k1)
    bias = jnp.einsum("ho,hoik->hi", by_head, held, precision=jax.lax.Precision.HIGHEST)
    gradients = weights._replace(
        depthwise=sums[: sizes.k0].T[:, None],
        depthwise_bias=bias.reshape(-1),
        grouped=matrices.transpose(0, 2, 3, 1).reshape(weights.grouped.shape),
        grouped_bias=sums[sizes.k0],
        temperature=jnp.sum(temperature, axis=0),
    )
    gradients = jax.tree.map(lambda g, w: g.astype(w.dtype), gradients, weights)
    return dq, dk, tail, gradients


def _backward(*refs, sizes, chunks, of_matrices, of_inputs):
    """The longest programs begin."""
    inputs, of_results, outputs = Inputs(*refs[:11]), Of(*refs[11:15]), Gradients(*refs[15:])
    program, number = pl.program_id(0), chunks * (sizes.heads + sizes.kv_heads)
    rest = inputs, of_results, outputs, sizes
    jax.lax.cond(
        program < number,
        lambda: of_matrices(program, *rest),
        lambda: of_inputs(program - number, *rest),
    )


def _inputs(number, inputs, of_results, outputs, sizes, *, tiles, block, width):
    """Gradients by some tokens of the heads of a key head's group."""
    tile, kv_head = number // sizes.kv_heads, number % sizes.kv_heads
    row, own = tile // tiles, block - sizes.tail
    lane = jnp.arange(block)
    here = tokens(inputs.age, sizes, row, (tile - row * tiles) * own - sizes.tail + lane)
    of_mixed = partial(_of_mixed, inputs, of_results, sizes, here=here, width=width)
    put = partial(_put_gradients, inputs, of_results, outputs, tile, sizes, here, lane < own)

    of_key, of_temperature = of_mixed(key(sizes, kv_head))
    outputs.temperature[tile, kv_head] = jnp.sum(jnp.where(lane < own, of_temperature, 0.0))

    def of_next(member, of_queries):
        of_query, _ = of_mixed(query(sizes, kv_head, member))
        return of_query, tuple(s + q for s, q in zip(of_queries, of_query, strict=True))

    def step(number, carried):
        """Half of a head's channels: of the queries one after the other, then of the key, to which
        they all add."""
        member, half = jax.lax.div(number, 2), jax.lax.rem(number, 2)
        is_key = member == sizes.group
        of_head, of_queries = jax.lax.cond(
            half == 0,
            lambda: either(
                is_key, lambda: (of_key, carried[1]), lambda: of_next(member, carried[1])
            ),
            lambda: carried,
        )
        other = jnp.where(is_key, pick(half, of_queries), pick(half, of_key) / sizes.group)
        of_mean = (pick(half, of_head) + other) / 2
        head_number = jnp.where(is_key, sizes.heads + kv_head, kv_head * sizes.group + member)
        put(Head(is_key, head_number, kv_head), half, of_head, of_mean)
        return of_head, of_queries

    zeros = (jnp.zeros_like(of_key[0]),) * 2
    jax.lax.fori_loop(0, 2 * (sizes.group + 1), step, (zeros, zeros))


def _of_mixed(inputs, of_results, sizes, head: Head, here: Tokens, width):
    """Cotangents of what a head is before its norm, in pairs: float32 [tokens, pairs] twice; and of
    the temperature by each token [tokens]."""
    first, second = mixed(inputs, sizes, head, here, width)
    square, scale = unit_scale(sizes, first, second)
    cos, sin = turn(inputs, sizes, here)
    left, right = (
        load_head(
            of_results.k if head.is_key else of_results.q, sizes, head.place(sizes), here, channels
        )
        for channels in in_pairs(sizes)
    )
    left, right = left * cos + right * sin, right * cos - left * sin
    along = jnp.sum(left * first + right * second, axis=1, keepdims=True)
    of_temperature = jnp.sum(along * scale, axis=1)
    inward = jnp.where(square > sizes.eps**2, along / square, 0.0)
    if head.is_key:
        scale = scale * inputs.temperature[head.kv_head].astype(jnp.float32)
    pairs = ((left, first), (right, second))
    return tuple(scale * (of_part - part * inward) for of_part, part in pairs), of_temperature


def _put_gradients(
    inputs, of_results, outputs, tile, sizes, here, own, head: Head, half, of_mixed, of_mean
):
    """Those of half of a head's projection, and the sums of its taps and its grouped bias."""
    channels = pick(half, in_pairs(sizes))
    column = head.number * sizes.head_dim + channels.number

    def put_sum(which, values):
        at = outputs.sums.at[tile, which, column]
        triton.store(at, jnp.sum(values, axis=0), mask=channels.real)

    # A product, because masks of what products gave are many registers.
    put_sum(sizes.k0, pick(half, of_mixed) * own.astype(jnp.float32)[:, None])
    of_own = here._replace(position=jnp.where(own, here.position, NOWHERE))
    of_column = _of_depthwise(inputs, sizes, head, here, of_mixed, channels)
    u = load_u(inputs, sizes, head, of_own, channels, 0)
    of_u = of_mean
    for back in range(sizes.k0):
        tap = sizes.k0 - 1 - back
        seen_by = _later(here, back, of_column)
        put_sum(tap, seen_by * u)
        of_u = of_u + load_vector(inputs.taps, sizes, head, channels, tap) * seen_by
    _store_gradient(of_results, outputs, sizes, of_own, head, channels, of_u)


def _of_depthwise(inputs, sizes, head: Head, here: Tokens, of_mixed, channels):
    """Cotangents of the depthwise convolution's output [tokens, channels]."""

    def step(half, spread):
        out, part = pick(half, in_pairs(sizes)), pick(half, of_mixed)
        return tuple(
            s + product(part, load_matrix(inputs, sizes, head, back, channels, out), 1)
            for back, s in enumerate(spread)
        )

    zeros = jnp.zeros_like(of_mixed[0])
    spread = jax.lax.fori_loop(0, 2, step, (zeros,) * sizes.k1)
    return sum(_later(here, back, s) for back, s in enumerate(spread))


def _later(here: Tokens, back: int, values: jax.Array) -> jax.Array:
    """What the token `back` tokens later has [tokens, channels], or zero if that is in another
    segment; wrong for the last ones. Rows of a value can be moved by a product only, in which zero
    times NaN would spoil all the others."""
    if back == 0:
        return values
    lane = jnp.arange(values.shape[0])
    seen = jnp.where(here.see(back), lane, -1)
    to = lane[:, None] + back == seen[None, :]  # one mask, as masks are many registers
    marked = jnp.where(jnp.abs(values) < jnp.inf, values, MARK)
    high, middle, low = (dot(to.astype(jnp.bfloat16), third) for third in thirds(marked))
    moved = low + middle + high
    return jnp.where(moved == MARK, jnp.nan, moved)


def _store_gradient(of_results, outputs, sizes, here: Tokens, head: Head, channels, values):
    """Into q's or k's, and the tail's for tokens before the chunk; with what comes from the new
    tail, whose last column is the row's last real token."""
    column = head.number * sizes.head_dim + channels.number
    if sizes.tail:
        place = here.position + sizes.tail - of_results.lengths[here.row]
        taken = here.row * sizes.tail + place
        real = ((place >= 0) & (place < sizes.tail))[:, None] & channels.real[None, :]
        values = values + load(of_results.tail, taken, column, real)
    index, inside = here.at(sizes)
    at = index[:, None], (head.place(sizes) * sizes.head_dim + channels.number)[None, :]
    mask = inside[:, None] & channels.real[None, :]
    either(
        head.is_key,
        lambda: triton.store(outputs.k.at[at], values, mask=mask),
        lambda: triton.store(outputs.q.at[at], values, mask=mask),
    )
    if sizes.tail:
        position = here.position + sizes.tail
        at = outputs.tail.at[(here.row * sizes.tail + position)[:, None], column[None, :]]
        real = ((position >= 0) & (position < sizes.tail))[:, None] & channels.real[None, :]
        pl.when(here.first)(lambda: triton.store(at, values, mask=real))


def _matrices(number, inputs, of_results, outputs, sizes, *, chunk, block, width):
    """A head's gradients of its matrices, summed over a chunk of tokens."""
    heads = sizes.heads + sizes.kv_heads
    start, head = number // heads, number % heads
    put = partial(
        _put_matrices, inputs, of_results, outputs.matrices, sizes, start, chunk, block, width
    )
    is_key = head >= sizes.heads
    pl.when(~is_key)(lambda: put(Head(False, head, head // sizes.group)))
    pl.when(is_key)(lambda: put(Head(True, head, head - sizes.heads)))


def _put_matrices(inputs, of_results, sums, sizes, number, chunk, block, width, head: Head):
    """Sums of a query head or of a key head."""
    channels = in_order(sizes, 0, 2 * sizes.lanes)

    def step(start, totals):
        here = consecutive(inputs.age, sizes, number * chunk + start * block, block)
        of_mixed, _ = _of_mixed(inputs, of_results, sizes, head, here, width)
        columns = depthwise(inputs, sizes, head, here, channels)
        return tuple(
            total + dot(part, columns[back], 0, 0)
            for (back, part), total in zip(_each(sizes, of_mixed), totals, strict=True)
        )

    zeros = jnp.zeros((sizes.lanes, 2 * sizes.lanes), jnp.float32)
    totals = jax.lax.fori_loop(0, chunk // block, step, (zeros,) * (2 * sizes.k1))
    for (back, out), total in zip(_each(sizes, in_pairs(sizes)), totals, strict=True):
        place = number, head.number, sizes.k1 - 1 - back
        at = sums.at[*place, out.number[:, None], channels.number[None, :]]
        triton.store(at, total, mask=out.real[:, None] & channels.real[None, :])


def _each(sizes, pair):
    return [(back, part) for back in range(sizes.k1) for part in pair]
