"""CCA's mixing against a token-by-token transcription of its definition."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from pallas_kernels.cca_mix.api import Weights, cca_mix, initial_carry

H, N, D, S = 4, 2, 6, 9
C = (H + N) * D


def literal(q, k, current, delayed, w, k0, k1, cos, sin):
    """One sequence: pad once, both convolutions, QK-mean, norm, temperature, RoPE, value shift."""
    u = np.concatenate([q, k], -1)
    padded = np.concatenate([np.zeros((k0 + k1 - 2, C)), u])
    depthwise = np.stack(
        [
            (padded[t : t + k0] * w.depthwise[:, 0].T).sum(0) + w.depthwise_bias
            for t in range(S + k1 - 1)
        ]
    )
    out = np.zeros((S, H + N, D))
    kernel = w.grouped.reshape(H + N, D, D, k1)
    for t in range(S):
        window = depthwise[t : t + k1].reshape(k1, H + N, D)
        out[t] = np.einsum("tgi,goit->go", window, kernel) + w.grouped_bias.reshape(H + N, D)
    q, k = q.reshape(S, H, D), k.reshape(S, N, D)
    mean_q = (q + np.repeat(k, H // N, axis=1)) / 2
    mean_k = mean_q.reshape(S, N, H // N, D).mean(2)
    heads = [out[:, :H] + mean_q, out[:, H:] + mean_k]
    heads = [x * D**0.5 / np.linalg.norm(x, axis=-1, keepdims=True) for x in heads]
    heads[1] = heads[1] * w.temperature[:, None]
    half = cos.shape[-1]
    for x in heads:
        a, b = x[..., :half].copy(), x[..., half : 2 * half].copy()
        x[..., :half] = a * cos[:, None] - b * sin[:, None]
        x[..., half : 2 * half] = b * cos[:, None] + a * sin[:, None]
    previous = np.concatenate([w.initial_value[None], delayed[:-1]])
    return *heads, np.concatenate([current, previous], -1).reshape(S, N, D)


@pytest.mark.parametrize(("k0", "k1"), [(2, 2), (1, 1), (1, 3), (4, 1), (3, 4)])
def test_one_sequence_equals_the_definition(k0, k1):
    rng = np.random.default_rng(k0 * 10 + k1)
    shapes = [(C, 1, k0), (C,), (C, D, k1), (C,), (N,), (N * D // 2,)]
    weights = Weights(*(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes))
    q, k, current, delayed = (
        rng.standard_normal((S, n * D)).astype(np.float32)
        for n in (H, N, N / 2, N / 2)
        for n in [int(n)]
    )
    angles = np.arange(S)[:, None] * np.array([1.0, 0.3])
    cos, sin = np.cos(angles), np.sin(angles)
    expected = literal(q, k, current, delayed, Weights(*map(np.asarray, weights)), k0, k1, cos, sin)
    *ours, carry = cca_mix(
        *(jnp.asarray(x)[None] for x in (q, k, current, delayed)),
        weights,
        initial_carry(weights, 1),
        jnp.array([S]),
        None,
        jnp.asarray(cos, jnp.float32)[None],
        jnp.asarray(sin, jnp.float32)[None],
    )
    for a, b in zip(ours, expected, strict=True):
        assert_close(a[0], b)
    u = np.concatenate([q, k], -1)
    np.testing.assert_array_equal(carry.conv_tail[0], u[S - (k0 + k1 - 2) :])
    np.testing.assert_array_equal(carry.delayed_value[0], delayed[-1])
