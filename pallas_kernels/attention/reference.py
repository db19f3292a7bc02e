"""Causal grouped-query attention in blocks of queries, in XLA: nothing of size S x S is stored."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.precision import exact

# Scores held at once, in elements: 4 MiB of float32, which stays in the caches of a CPU.
SCORE_BUDGET = 1 << 20
MASKED = -1e30


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offsets: jax.Array,
    segment_ids: jax.Array | None = None,
    window: int | jax.Array | None = None,
) -> jax.Array:
    """Softmax attention of new queries over a row's keys, scale d^-0.5, softmax in float32.

    Query i of row b stands at key index offsets[b] + i and sees the keys up to itself: the last
    `window` of them, and those of its own segment. What it sees is never empty, as it sees itself.

    Args:
      q: [B, S, H, d].
      k, v: [B, N, C, d], H a multiple of N; C is the cache length, or S.
      offsets: int [B], keys in the row before the first query.
      segment_ids: int [B, C], of the keys; a query has that of the key where it stands.
      window: keys seen, the query's own included; None sees all.

    Returns:
      [B, S, H, d] in the dtype of v.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    if q.size == 0:
        return jnp.zeros(q.shape, v.dtype)
    grouped = q.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    if batch * heads * length * keys <= SCORE_BUDGET:
        out = _attend(grouped, k, v, offsets, 0, segment_ids, window)
    else:
        rows = grouped, k, v, offsets, segment_ids
        out = jax.lax.map(lambda row: _attend_in_blocks(row, window), rows)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def _attend_in_blocks(
    row: tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None],
    window: int | jax.Array | None,
) -> jax.Array:
    """The queries of one row [N, g, S, d], some at a time, each time with about the keys that they
    see: of the [C] keys the first C, C/2, C/4, ... that are enough."""
    q, k, v, offset, segment_ids = row
    kv_heads, groups, length, head_dim = q.shape
    keys = k.shape[1]
    block = min(_query_block(kv_heads * groups * keys), length)
    blocks = -(-length // block)
    extents = [keys]
    while extents[0] > block:
        extents.insert(0, -(-extents[0] // 2))

    def attend(start: jax.Array, queries: jax.Array, extent: int) -> jax.Array:
        ids = None if segment_ids is None else segment_ids[None]
        near = k[None, :, :extent], v[None, :, :extent]
        return _attend(queries[None], *near, offset[None], start, ids, window)[0]

    # Recomputing a block's scores in the backward pass keeps training within the same memory.
    @jax.checkpoint
    def step(task: tuple[jax.Array, jax.Array]) -> jax.Array:
        start, queries = task
        enough = jnp.sum(offset + start + block > jnp.array(extents[:-1], jnp.int32))
        return jax.lax.switch(enough, [partial(attend, extent=e) for e in extents], start, queries)

    q = jnp.pad(q, ((0, 0), (0, 0), (0, blocks * block - length), (0, 0)))
    q = jnp.moveaxis(q.reshape(kv_heads, groups, blocks, block, head_dim), 2, 0)
    out = jax.lax.map(step, (jnp.arange(blocks) * block, q))
    return jnp.moveaxis(out, 0, 2).reshape(kv_heads, groups, -1, head_dim)[:, :, :length]


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offsets: jax.Array,
    start: jax.Array | int,
    segment_ids: jax.Array | None,
    window: int | jax.Array | None,
) -> jax.Array:
    """Queries [B, N, g, s, d], the first of them number `start`, with all keys [B, N, C, d] at
    once: outputs of the queries' shape."""
    batch, kv_heads, groups, size, head_dim = q.shape
    keys = k.shape[2]
    visible = _visible(start + jnp.arange(size), offsets, keys, segment_ids, window)
    # Group and query as one axis: XLA's CPU backend has no bfloat16 product for the five-axis form.
    scores = jnp.einsum(
        "bnsd,bncd->bnsc",
        q.reshape(batch, kv_heads, groups * size, head_dim),
        k,
        precision=exact(k.dtype),
        preferred_element_type=jnp.float32,
    )
    scores = scores.reshape(batch, kv_heads, groups, size, keys) * head_dim**-0.5
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum(
        "bnsc,bncd->bnsd",
        weights.reshape(batch, kv_heads, groups * size, keys),
        v,
        precision=exact(v.dtype),
        preferred_element_type=jnp.float32,
    )
    return out.reshape(batch, kv_heads, groups, size, head_dim).astype(v.dtype)


def _query_block(scores_per_query: int) -> int:
    """The most queries whose scores fit the budget: a power of two."""
    return 1 << (max(SCORE_BUDGET // scores_per_query, 1).bit_length() - 1)


def _visible(
    index: jax.Array,
    offsets: jax.Array,
    keys: int,
    segment_ids: jax.Array | None,
    window: int | jax.Array | None,
) -> jax.Array:
    """Which keys queries number `index` see: bool [B, queries, C]."""
    query, key = (offsets[:, None] + index)[:, :, None], jnp.arange(keys)
    visible = key <= query
    if window is not None:
        visible &= key > query - window
    if segment_ids is not None:
        own = jnp.take_along_axis(segment_ids, query[:, :, 0], axis=1, mode="clip")
        visible &= own[:, :, None] == segment_ids[:, None, :keys]
    return visible
