"""Attention in blocks of queries against plain masked softmax."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from pallas_kernels.attention import reference
from pallas_kernels.attention.api import attention

B, S, H, N, D = 2, 37, 4, 2, 8


def plain(q, k, v, visible):
    """Every pair of tokens at once; visible bool [B, S, C]."""
    k, v = (jnp.repeat(x, H // N, axis=1) for x in (k, v))
    scores = jnp.einsum("bshd,bhcd->bhsc", q, k) * D**-0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhsc,bhcd->bshd", weights, v)


def operands(keys: int):
    q, k, v = (
        np.random.default_rng(0).standard_normal(s)
        for s in ((B, S, H, D), (B, N, keys, D), (B, N, keys, D))
    )
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v))


@pytest.mark.parametrize(
    "budget", [1, B * H * 50 * 8, 1 << 24], ids=["1 query", "8 queries", "all"]
)
@pytest.mark.parametrize("window", [None, 1, 9])
def test_blocks_equal_plain_attention_over_a_cache(monkeypatch, budget, window):
    monkeypatch.setattr(reference, "SCORE_BUDGET", budget)
    q, k, v = operands(50)
    offsets = jnp.array([0, 13])
    query, key = (offsets[:, None] + jnp.arange(S))[:, :, None], jnp.arange(50)
    visible = (key <= query) & (key > query - (window or 1000))
    ours = attention(q, k, v, offsets, None, window)
    assert_close(ours, plain(q, k, v, visible))


@pytest.mark.parametrize("budget", [B * H * S * 8, 1 << 24], ids=["8 queries", "all"])
def test_segments_and_gradients(monkeypatch, budget):
    monkeypatch.setattr(reference, "SCORE_BUDGET", budget)
    q, k, v = operands(S)
    segments = jnp.asarray(np.repeat([[1, 2, 3, 0], [4, 4, 1, 2]], [10, 1, 20, 6], axis=1))
    index = jnp.arange(S)
    visible = (index <= index[:, None]) & (segments[:, :, None] == segments[:, None])

    def loss(f):
        return jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), argnums=(0, 1, 2))(q, k, v)

    ours = loss(lambda *x: attention(*x, jnp.zeros(B, jnp.int32), segments))
    for a, b in zip(ours, loss(lambda *x: plain(*x, visible)), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("budget", [B * H * 50 * 8, 1 << 24], ids=["8 queries", "all"])
def test_queries_that_are_a_part_of_packed_rows_have_the_segments_of_their_places(
    monkeypatch, budget
):
    monkeypatch.setattr(reference, "SCORE_BUDGET", budget)
    q, k, v = operands(50)
    offsets = jnp.array([0, 13])
    ids = jnp.asarray(np.repeat([[1, 2, 3, 0], [4, 4, 1, 2]], [10, 4, 20, 16], axis=1))
    query, key = offsets[:, None] + jnp.arange(S), jnp.arange(50)
    own = jnp.take_along_axis(ids, query, axis=1)
    visible = (key <= query[:, :, None]) & (own[:, :, None] == ids[:, None])
    assert_close(attention(q, k, v, offsets, ids), plain(q, k, v, visible))


def test_no_buffer_grows_with_the_square_of_the_length():
    """Temporary memory of 16K tokens is within a few score blocks and copies of the queries."""
    shapes = [
        jax.ShapeDtypeStruct(s, jnp.float32)
        for s in ((1, 16384, 8, 64), (1, 2, 16384, 64), (1, 2, 16384, 64))
    ]
    compiled = jax.jit(attention).lower(*shapes, jax.ShapeDtypeStruct((1,), jnp.int32)).compile()
    queries = math.prod(shapes[0].shape)
    most = 4 * (6 * reference.SCORE_BUDGET + 2 * queries)
    assert compiled.memory_analysis().temp_size_in_bytes < most < 4 * 16384**2 / 8
