"""What the attention kernels share: how they load, multiply, and find the blocks to visit.

Shapes: B rows of S queries with H heads, and of C keys with N heads, of size d. The g = H / N query
heads of one key head are neighbours.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.blocks import Blocks
from pallas_kernels.launch import power_of_two
from pallas_kernels.precision import exact

LOG2_E = 1.4426950408889634  # exponentials and logarithms in the kernels have base 2
MASKED = -1e30
UNBOUNDED = 1 << 30  # a window that is larger than any cache, and may be added to a position


class Shape(NamedTuple):
    """Sizes of the operands."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    keys: int
    head_dim: int

    @property
    def groups(self) -> int:
        return self.heads // self.kv_heads

    @property
    def width(self) -> int:
        """Columns of a block: what the matrix units take at least, or all of `head_dim`."""
        return max(power_of_two(self.head_dim, 2 * self.head_dim), 16)

    @property
    def scale(self) -> float:
        """Of scores, in units of base 2."""
        return self.head_dim**-0.5 * LOG2_E


def shape_of(q: jax.Array, k: jax.Array) -> Shape:
    batch, length, heads, head_dim = q.shape
    return Shape(batch, length, heads, k.shape[1], k.shape[2], head_dim)


class Places(NamedTuple):
    """What decides which keys a query sees.

    Attributes:
      offsets: int32 [B], keys before the first query.
      window: int32 [1], or None where all are seen.
      segment_ids: int32 [B, C] of the keys, or None.
    """

    offsets: jax.Array
    window: jax.Array | None
    segment_ids: jax.Array | None


def places(
    offsets: jax.Array, segment_ids: jax.Array | None, window: int | jax.Array | None
) -> Places:
    if window is not None:
        window = jnp.minimum(jnp.asarray(window, jnp.int32), UNBOUNDED).reshape(1)
    if segment_ids is not None:
        segment_ids = segment_ids.astype(jnp.int32)
    return Places(offsets.astype(jnp.int32), window, segment_ids)


def block_of(sizes: Sequence[int], shape: Shape) -> tuple[int, int]:
    """Queries and keys that a program takes at once: not far more than there are."""
    queries, keys = sizes
    return power_of_two(max(shape.length, 16), queries), power_of_two(max(shape.keys, 16), keys)


def default_for(defaults: Sequence[Blocks], x: jax.Array, shape: Shape) -> Blocks:
    """Of the blocks for heads of up to 256, up to 512 and more bytes: what these take of registers
    and LDS grows with them."""
    size = shape.width * x.dtype.itemsize
    return defaults[(size > 256) + (size > 512)]


def per_row(array: jax.Array, row_axis: int) -> pl.BlockSpec:
    """All that belongs to the row which a program works on, by that axis of the grid."""
    zeros = (0,) * (array.ndim - 1)
    return pl.BlockSpec((None, *array.shape[1:]), lambda *ids: (ids[row_axis], *zeros))


def whole(array: jax.Array | None) -> Any:
    """The array as one block, for every program; None has none."""
    if array is None:
        return None
    return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)


def load(
    ref: Any,
    rows: jax.Array,
    shape: Shape,
    real: jax.Array | None = None,
    head: jax.Array | None = None,
    kv_head: jax.Array | None = None,
) -> jax.Array:
    """Rows of [rows, d], of a head of [rows, heads, d] or of one of [heads, rows, d] as a block
    [len(rows), width].

    Columns beyond `head_dim` are zeros, and so are rows that are not `real` (None: all are).
    """
    columns = jnp.arange(shape.width)[None]
    mask = None if real is None else jnp.broadcast_to(real[:, None], (rows.size, shape.width))
    if shape.width != shape.head_dim:
        inside = jnp.broadcast_to(columns < shape.head_dim, (rows.size, shape.width))
        mask = inside if mask is None else mask & inside
    place = ref.at[_index(rows, shape, head, kv_head)]
    return triton.load(place) if mask is None else triton.load(place, mask=mask, other=0)


def store(
    ref: Any,
    rows: jax.Array,
    block: jax.Array,
    shape: Shape,
    real: jax.Array,
    head: jax.Array | None = None,
    kv_head: jax.Array | None = None,
) -> None:
    """Writes the `real` rows of a block, to where `load` reads them."""
    mask = real[:, None] & (jnp.arange(shape.width)[None] < shape.head_dim)
    place = ref.at[_index(rows, shape, head, kv_head)]
    triton.store(place, block.astype(ref.dtype), mask=mask)


def _index(
    rows: jax.Array, shape: Shape, head: jax.Array | None, kv_head: jax.Array | None
) -> tuple[jax.Array, ...]:
    index = [kv_head, rows[:, None], head, jnp.arange(shape.width)[None]]
    return tuple(i for i in index if i is not None)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """[m, k] times [k, n], summed in float32."""
    return _product(a, b, (1, 0))


def dot_transposed(a: jax.Array, b: jax.Array) -> jax.Array:
    """[m, k] times [n, k]."""
    return _product(a, b, (1, 1))


def _product(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    dtype = jnp.promote_types(a.dtype, b.dtype)
    return jax.lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((axes[0],), (axes[1],)), ((), ())),
        precision=exact(dtype),
        preferred_element_type=jnp.float32,
    )


class Span(NamedTuple):
    """Blocks to visit, start <= inner <= outer <= end: every pair of a query and a key in the
    blocks [inner, outer) is visible, so that nothing is masked there. Where `inner` is `start`
    itself, no program has blocks before `inner`."""

    start: Any
    inner: Any
    outer: Any
    end: Any


def visit[C](step: Callable[..., C], span: Span, carry: C) -> C:
    """`step(block, carry, masked=)` for each block: both edges first, in one loop, as every copy of
    a loop's body takes registers."""
    start, inner, outer, end = span

    def edge(number: jax.Array, carry: C) -> C:
        block = outer + number
        if inner is not start:
            before = inner - start
            block = jnp.where(number < before, start + number, block - before)
        return step(block, carry, masked=True)

    edges = end - outer if inner is start else inner - start + end - outer
    carry = jax.lax.fori_loop(0, edges, edge, carry)
    return jax.lax.fori_loop(inner, outer, partial(step, masked=False), carry)


class Limits(NamedTuple):
    """`Places` of one row, as loaded by a program, with `segments` of its block (`None`, or the two
    limits that segments set)."""

    offset: jax.Array
    window: jax.Array | None
    segments: tuple[jax.Array, jax.Array] | None


def key_span(block: jax.Array, sizes: tuple[int, int], limits: Limits, shape: Shape) -> Span:
    """Of keys, for a block of queries."""
    queries, keys = sizes
    first = limits.offset + block * queries
    last = first + queries - 1
    end = pl.cdiv(jnp.minimum(last + 1, seen(limits, shape)[1]), keys)
    outer = jnp.minimum(first + 1, shape.keys) // keys
    start = inner = jnp.int32(0)
    if limits.window is not None:
        start = jnp.maximum(first - limits.window + 1, 0) // keys
        inner = pl.cdiv(jnp.maximum(last - limits.window + 1, 0), keys)
    if limits.segments is not None:
        start = jnp.maximum(start, limits.segments[0])
        inner = jnp.maximum(inner, limits.segments[1])
    if inner is not start:
        inner = jnp.minimum(inner, outer)
    return Span(start, inner, outer, end)


def query_span(block: jax.Array, sizes: tuple[int, int], limits: Limits, shape: Shape) -> Span:
    """Of queries, for a block of keys."""
    queries, keys = sizes
    first = block * keys - limits.offset  # the number of the query at the first key
    last = first + keys - 1
    start, inner = jnp.maximum(first, 0) // queries, pl.cdiv(jnp.maximum(last, 0), queries)
    outer, end = jnp.int32(shape.length // queries), jnp.int32(pl.cdiv(shape.length, queries))
    if limits.window is not None:
        outer = jnp.minimum(outer, jnp.maximum(first + limits.window, 0) // queries)
        end = jnp.minimum(end, pl.cdiv(jnp.maximum(last + limits.window, 0), queries))
    if limits.segments is not None:
        outer = jnp.minimum(outer, limits.segments[0])
        end = jnp.minimum(end, limits.segments[1])
    inner = jnp.maximum(jnp.minimum(inner, end), start)
    return Span(start, inner, jnp.maximum(jnp.minimum(outer, end), inner), end)


def seen(limits: Limits, shape: Shape) -> tuple[jax.Array, jax.Array]:
    """The keys [low, high) of the row that any query sees; what others hold may be NaN."""
    low = jnp.int32(0) if limits.window is None else limits.offset - limits.window + 1
    return low, jnp.minimum(limits.offset + shape.length, shape.keys)


def is_seen(key: jax.Array, limits: Limits, shape: Shape) -> jax.Array | None:
    """Whether any query sees these keys, a block of them; None where all are seen."""
    # Of packed rows every key is a token.
    if limits.segments is not None and shape.keys % key.size == 0:
        return None
    low, high = seen(limits, shape)
    return key < high if limits.window is None else (key >= low) & (key < high)


def exists(query: jax.Array, shape: Shape) -> jax.Array | None:
    """Whether there are these queries, a block of them; None where all exist."""
    return None if shape.length % query.size == 0 else query < shape.length


def is_visible(
    query: jax.Array,
    key: jax.Array,
    limits: Limits,
    shape: Shape,
    ids: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Whether numbers of queries see keys; these are broadcast, and so are their segments' ids."""
    key = jnp.where(key < shape.keys, key, 2 * UNBOUNDED - 1)
    before = limits.offset + query - key
    # One comparison, as the results of each take registers: what is not visible is negative, and
    # as an unsigned number larger than any window.
    if ids is not None:
        difference = ids[0] ^ ids[1]
        before |= difference | -difference
    if limits.window is None:
        return before >= 0
    return before.astype(jnp.uint32) < limits.window.astype(jnp.uint32)


class Segments(NamedTuple):
    """Ids of tokens, and what they mean for the blocks of one side.

    Attributes:
      queries: int32 [B, S], ids of the queries.
      keys: int32 [B, C], those of the keys.
      first, second: int32 [B, blocks]: for blocks of queries, the first block of keys with one of
        their ids, and the one after which all keys up to the queries have their id; for blocks of
        keys, the end of queries all of which have their id, and the end of those with one of their
        ids.
    """

    queries: jax.Array
    keys: jax.Array
    first: jax.Array
    second: jax.Array


def segments_of_queries(where: Places, length: int, sizes: tuple[int, int]) -> Segments | None:
    if where.segment_ids is None:
        return None
    ids = _ids(where, length)
    some, every, query, key = _shared(*ids, where.offsets, sizes)
    causal = key < (query + 1) // sizes[1]
    inner = jnp.max(jnp.where(causal & ~every, key + 1, 0), axis=2)
    return Segments(*ids, jnp.argmax(some, axis=2).astype(jnp.int32), inner)


def segments_of_keys(where: Places, length: int, sizes: tuple[int, int]) -> Segments | None:
    if where.segment_ids is None:
        return None
    ids = _ids(where, length)
    some, every, query, key = _shared(*ids, where.offsets, sizes)
    block = jax.lax.broadcasted_iota(jnp.int32, some.shape, 1)
    causal = query >= (key + 1) * sizes[1] - 1
    outer = jnp.min(jnp.where(causal & ~every, block, some.shape[1]), axis=1)
    return Segments(*ids, outer, jnp.max(jnp.where(some, block + 1, 0), axis=1))


def _ids(where: Places, length: int) -> tuple[jax.Array, jax.Array]:
    """Of queries [B, S], each where it stands, and of keys [B, C]."""
    assert where.segment_ids is not None
    at = where.offsets[:, None] + jnp.arange(length)
    return jnp.take_along_axis(where.segment_ids, at, axis=1, mode="clip"), where.segment_ids


def _shared(
    queries: jax.Array, keys: jax.Array, offsets: jax.Array, sizes: tuple[int, int]
) -> tuple[jax.Array, ...]:
    """Of blocks of queries and of keys [B, queries, keys]: which may share an id, and which have no
    other id; where the first query of each stands, and the number of the block of keys."""

    def extremes(ids: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        blocks = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % size)), mode="edge")
        blocks = blocks.reshape(ids.shape[0], -1, size)
        return jnp.min(blocks, axis=2), jnp.max(blocks, axis=2)

    (low, high), (key_low, key_high) = extremes(queries, sizes[0]), extremes(keys, sizes[1])
    low, high = low[:, :, None], high[:, :, None]
    key_low, key_high = key_low[:, None], key_high[:, None]
    some = (low <= key_high) & (key_low <= high)
    every = (low == key_high) & (key_low == high)
    query, key = (jax.lax.broadcasted_iota(jnp.int32, some.shape, axis) for axis in (1, 2))
    return some, every, offsets[:, None, None] + query * sizes[0], key


def limits_of(
    block: jax.Array, offset_ref: Any, window_ref: Any, segment_refs: Segments | None
) -> Limits:
    """Loads what there is."""
    window = None if window_ref is None else window_ref[0]
    segments = None
    if segment_refs is not None:
        segments = segment_refs.first[block], segment_refs.second[block]
    return Limits(offset_ref[0], window, segments)


def ids_at(ids: Any, index: jax.Array, length: int) -> jax.Array:
    """Ids of the tokens at these numbers; beyond the last, 0."""
    return triton.load(ids.at[index], mask=index < length, other=0)
