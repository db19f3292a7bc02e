"""Router balancing: what it measures, what it moves, and that it evens out a skewed router."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.router import api as router
from train import balancing
from train.balancing import BalancingConfig
from zaya_jax import ConfigError

LAYERS, EXPERTS, WIDTH, TOKENS = 3, 8, 32, 2048


def skewed_router(key: jax.Array) -> router.Weights:
    """A random router with a component that all tokens share and that favours expert 0."""
    first, second, third = jax.random.split(key, 3)
    scale, shared = WIDTH**-0.5, jnp.ones(WIDTH)
    active = jax.nn.gelu(shared, approximate=False)
    out = scale * jax.random.normal(third, (EXPERTS + 1, WIDTH))
    return router.Weights(
        None,
        shared,
        scale * jax.random.normal(first, (WIDTH, WIDTH)),
        jnp.zeros(WIDTH),
        scale * jax.random.normal(second, (WIDTH, WIDTH)),
        shared,
        out.at[0].add(4 * active / (active @ active)),
    )


def entropies(rate: float, steps: int) -> np.ndarray:
    """Normalised entropy [steps, L] of new random tokens at each step."""
    routers = [skewed_router(key) for key in jax.random.split(jax.random.key(0), LAYERS)]
    optimizer = balancing.optimizer(BalancingConfig(rate=rate))

    @jax.jit
    def step(biases, state, key):
        counts = []
        for layer, weights in enumerate(routers):
            tokens = jax.random.normal(jax.random.fold_in(key, layer), (1, TOKENS, WIDTH))
            _, expert, _ = router.route(tokens, None, weights, biases[layer], 1e-5, None)
            counts.append(jnp.bincount(expert.reshape(-1), length=EXPERTS + 1))
        counts = jnp.stack(counts)
        excess = balancing.pseudo_gradients(biases, counts)
        updates, state = optimizer.update(excess, state, biases)
        return biases + updates, state, balancing.load(counts).entropy

    biases = jnp.zeros((LAYERS, EXPERTS + 1)).at[:, -1].set(-1.0)
    state, seen = optimizer.init(biases), []
    for number in range(steps):
        biases, state, entropy = step(biases, state, jax.random.key(number))
        seen.append(entropy)
    assert (biases[:, -1] == -1).all()
    return np.array(seen)


def test_a_router_that_sends_nearly_all_tokens_to_one_expert_is_evened_out():
    """At the default rate, and it stays even; without balancing nothing changes."""
    balanced = entropies(BalancingConfig().rate, 450)
    assert balanced[0].max() < 0.2
    assert balanced[-50:].min() >= 0.98
    assert entropies(0.0, 50).max() < 0.8


def test_the_pseudo_gradient_is_the_share_of_all_tokens_minus_the_even_one():
    """Skipped tokens count among all; the skip class itself, and a layer without tokens, rest."""
    counts = jnp.array([[6, 2, 2], [0, 0, 4], [0, 0, 0]])
    wanted = np.array([[0.6 - 0.5, 0.2 - 0.5, 0], [-0.5, -0.5, 0], [0, 0, 0]])
    stacked = {"gate": {"balancing_biases": jnp.zeros((3, 3))}}
    got = balancing.pseudo_gradients(stacked, counts)
    np.testing.assert_allclose(got["gate"]["balancing_biases"], wanted, atol=1e-7)
    layers = tuple({"balancing_biases": jnp.zeros(3)} for _ in range(3))
    for layer, row in zip(balancing.pseudo_gradients(layers, counts), wanted, strict=True):
        np.testing.assert_allclose(layer["balancing_biases"], row, atol=1e-7)


def test_decay_draws_biases_to_zero_but_not_that_of_the_skip_class():
    biases = jnp.array([[0.5, -0.5, -1.0]])
    optimizer = balancing.optimizer(BalancingConfig(rate=0.1, decay=0.5))
    updates, _ = optimizer.update(jnp.zeros((1, 3)), optimizer.init(biases), biases)
    np.testing.assert_allclose(updates, [[-0.025, 0.025, 0.0]], rtol=1e-6)


def test_the_load_of_each_layer():
    counts = [
        [5, 5, 5, 5, 0],
        [20, 0, 0, 0, 0],
        [8, 8, 0, 0, 4],
        [5, 5, 5, 5, 80],  # skipped tokens make no layer uneven
        [0, 0, 0, 0, 7],
    ]
    load = balancing.load(jnp.array(counts))
    np.testing.assert_allclose(load.entropy, [1, 0, 0.5, 1, 0], atol=1e-6)
    np.testing.assert_allclose(load.max_over_mean, [1, 4, 2, 1, 0], atol=1e-6)
    np.testing.assert_array_equal(load.dead, [0, 3, 2, 0, 4])
    alone = balancing.load(jnp.array([[7, 1]]))
    assert (alone.entropy[0], alone.max_over_mean[0], alone.dead[0]) == (1, 1, 0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rate", -1e-3, "balancing: rate must be from 0 to below 1, not -0.001"),
        ("rate", "fast", "balancing: rate must be from 0 to below 1, not 'fast'"),
        ("b1", 1.0, "balancing: b1 must be from 0 to below 1"),
        ("eps", float("nan"), "balancing: eps must be"),
        ("eps", 0.0, "balancing: eps must be above 0"),
        ("decay", -1, "balancing: decay must be 0 or more"),
    ],
)
def test_impossible_settings_are_refused_by_name(name, value, message):
    with pytest.raises(ConfigError) as error:
        BalancingConfig(**{name: value})
    assert message in str(error.value)
