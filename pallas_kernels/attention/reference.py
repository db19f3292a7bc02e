"""Causal grouped-query attention in blocks of queries, in XLA: nothing of size S x S is stored."""

import jax
import jax.numpy as jnp

from pallas_kernels.precision import exact

# Scores held at once, in elements: 16 MiB of float32.
SCORE_BUDGET = 1 << 22
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
      segment_ids: int [B, S], needs C = S and zero offsets.
      window: keys seen, the query's own included; None sees all.

    Returns:
      [B, S, H, d] in the dtype of v.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    groups = heads // kv_heads
    grouped = q.reshape(batch, length, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    block = _query_block(length, batch * heads * keys)

    def attend(start: jax.Array | int, queries: jax.Array) -> jax.Array:
        """Queries [B, N, g, block, d], the first of them number `start`, to outputs of that
        shape."""
        size = queries.shape[3]
        visible = _visible(start + jnp.arange(size), offsets, keys, segment_ids, window)
        # Group and block as one axis: XLA's CPU backend has no bfloat16 product for the five-axis
        # form.
        queries = queries.reshape(batch, kv_heads, groups * size, head_dim)
        scores = jnp.einsum(
            "bnsd,bncd->bnsc",
            queries,
            k,
            precision=exact(k.dtype),
            preferred_element_type=jnp.float32,
        )
        scores = scores.reshape(batch, kv_heads, groups, size, keys) * head_dim**-0.5
        scores = jnp.where(visible[:, None, None], scores, MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        weights = weights.reshape(batch, kv_heads, groups * size, keys)
        out = jnp.einsum(
            "bnsc,bncd->bnsd",
            weights,
            v,
            precision=exact(v.dtype),
            preferred_element_type=jnp.float32,
        )
        return out.reshape(batch, kv_heads, groups, size, head_dim).astype(v.dtype)

    if block == length:
        out = attend(0, grouped)
    else:
        blocks = -(-length // block)
        grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, 0), (0, blocks * block - length), (0, 0)))
        grouped = grouped.reshape(batch, kv_heads, groups, blocks, block, head_dim)
        # Recomputing a block's scores in the backward pass keeps training within the same memory.
        step = jax.checkpoint(lambda x: attend(*x))
        out = jax.lax.map(step, (jnp.arange(blocks) * block, jnp.moveaxis(grouped, 3, 0)))
        out = jnp.moveaxis(out, 0, 3).reshape(batch, kv_heads, groups, blocks * block, head_dim)
        out = out[:, :, :, :length]
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def _query_block(length: int, scores_per_query: int) -> int:
    """The most queries whose scores fit the budget: all of them, or a power of two."""
    fitting = max(SCORE_BUDGET // scores_per_query, 1)
    return length if fitting >= length else 1 << (fitting.bit_length() - 1)


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
        own = jnp.take(segment_ids, index, axis=1, mode="clip")
        visible &= own[:, :, None] == segment_ids[:, None, :]
    return visible
