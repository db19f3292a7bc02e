"""Router and norms against formulas written out in numpy float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_close

from pallas_kernels.norm.api import rms_norm, scale_residual
from pallas_kernels.router.api import FREE, Weights, route

R, E = 6, 3
RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


WEIGHTS = Weights(draw(R), draw(R), draw(R, R), draw(R), draw(R, R), draw(R), 0.3 * draw(E + 1, R))


def test_rms_norm_and_residual_scaling():
    x, w = draw(5, 8), draw(8)
    expected = np.asarray(x) / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-5) * w
    assert_close(rms_norm(x, w, 1e-5), expected, 1e-6)
    assert rms_norm(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), 1e-5).dtype == jnp.float32
    y, hs, hb, rs, rb = (draw(8) for _ in range(5))
    assert_close(scale_residual(y, x, hs, hb, rs, rb), (y + hb) * hs + (x + rb) * rs, 1e-6)


def test_route_follows_the_equations():
    states, previous = draw(40, R), draw(40, R)

    def gelu(x):
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    w = Weights(*(np.asarray(x, np.float64) for x in WEIGHTS))
    r = np.asarray(states, np.float64) + w.depth_scale * previous
    x = r / np.sqrt((r**2).mean(-1, keepdims=True) + 1e-5) * w.norm
    x = gelu(gelu(x @ w.fc1.T + w.fc1_bias) @ w.fc2.T + w.fc2_bias) @ w.out.T
    p = np.exp(x - x.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    biases = jnp.asarray(-p.mean(0), jnp.float32)  # spreads the choices
    chosen = (p + biases).argmax(-1)
    state, expert, weight = route(states, previous, WEIGHTS, biases, 1e-5)
    assert_close(state, r, 1e-6)
    np.testing.assert_array_equal(expert, chosen)
    assert_close(weight, p[np.arange(40), chosen], 1e-5)
    assert len(set(chosen.tolist())) == E + 1


def test_forced_experts_keep_their_own_probability_and_biases_get_no_gradient():
    states, biases = draw(4, R), jnp.zeros(E + 1)
    forced = jnp.array([0, 1, E, FREE], jnp.uint8)
    _, expert, weight = route(states, None, WEIGHTS, biases, 1e-5, forced)
    free = route(states, None, WEIGHTS, biases, 1e-5)
    np.testing.assert_array_equal(expert[:3], [0, 1, E])
    assert expert[3] == free[1][3] and weight[3] == free[2][3]
    gradient = jax.grad(lambda b: jnp.sum(route(states, None, WEIGHTS, b, 1e-5)[2]))(biases)
    np.testing.assert_array_equal(gradient, 0)
