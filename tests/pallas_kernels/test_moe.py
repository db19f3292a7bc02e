"""The mixture of experts against a loop over tokens, for every kind of routing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from pallas_kernels.moe.api import moe
from pallas_kernels.product import streamed, swapped

D, F, E = 12, 10, 4


def naive(x, expert, weight, gate_up, down):
    out = jnp.zeros((x.shape[0], down.shape[1]))
    for e in range(E):
        gate, up = jnp.split(x @ gate_up[e].T, 2, axis=-1)
        y = (jax.nn.silu(gate) * up) @ down[e].T
        out = jnp.where((expert == e)[:, None], weight[:, None] * y, out)
    return out


def operands(tokens: int, routing: str):
    rng = np.random.default_rng(tokens)
    expert = {
        "random": rng.integers(0, E, tokens),
        "one": np.full(tokens, 2),
        "none": np.full(tokens, E),
        "with skip and padding": rng.choice([0, 3, E, 255], tokens),
    }[routing]
    draws = [
        0.4 * rng.standard_normal(s) for s in ((tokens, D), (tokens,), (E, 2 * F, D), (E, D, F))
    ]
    x, weight, gate_up, down = (jnp.asarray(a, jnp.float32) for a in draws)
    return x, jnp.asarray(expert, jnp.int32), weight, gate_up, down


@pytest.mark.parametrize("routing", ["random", "one", "none", "with skip and padding"])
@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
def test_outputs_and_gradients_equal_the_loop(tokens, routing):
    """No token is dropped, however skewed the routing."""
    x, expert, weight, gate_up, down = operands(tokens, routing)

    def loss(f):
        def of(x, weight, gate_up, down):
            return jnp.sum(jnp.sin(f(x, expert, weight, gate_up, down)))

        return jax.jit(jax.value_and_grad(of, argnums=(0, 1, 2, 3)))(x, weight, gate_up, down)

    ours, theirs = (
        jax.jit(moe)(x, expert, weight, gate_up, down),
        naive(x, expert, weight, gate_up, down),
    )
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    for a, b in zip(jax.tree.leaves(loss(moe)), jax.tree.leaves(loss(naive)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, float(jnp.abs(b).max())))


@pytest.mark.parametrize("routing", ["random", "one", "none", "with skip and padding"])
@pytest.mark.parametrize("tokens", [1, 8, 9, 100])
def test_wide_streamed_experts_equal_the_loop(tokens, routing):
    """Experts of more than 1,024 columns take their tokens in tiles of 8 and 32."""
    _, expert, weight, _, _ = operands(tokens, routing)
    size, rng = 1056, np.random.default_rng(tokens)
    shapes = (tokens, size), (E, 2 * size, size), (E, size, size)
    x, gate_up, down = (jnp.asarray(rng.standard_normal(s) / 33, jnp.bfloat16) for s in shapes)
    split = [tuple(map(streamed, array)) for array in (gate_up, down)]
    assert all(swapped(part) for part in (*split[0], *split[1]))
    ours = jax.jit(moe)(x, expert, weight, *split)
    x, gate_up, down = (array.astype(jnp.float32) for array in (x, gate_up, down))
    theirs = naive(x, expert, weight, gate_up, down)
    np.testing.assert_allclose(ours, theirs, atol=1e-2 * max(float(jnp.abs(theirs).max()), 1e-3))


def test_nan_in_tokens_without_expert_does_not_leak():
    x, expert, weight, gate_up, down = operands(64, "with skip and padding")
    lost = (expert >= E)[:, None]
    clean = moe(jnp.where(lost, 0, x), expert, weight, gate_up, down)
    dirty = moe(jnp.where(lost, jnp.nan, x), expert, weight, gate_up, down)
    np.testing.assert_array_equal(clean, dirty)


def test_bfloat16_is_close_to_float32():
    x, expert, weight, gate_up, down = operands(64, "random")
    low = moe(
        *(a.astype(jnp.bfloat16) for a in (x,)),
        expert,
        weight,
        *(a.astype(jnp.bfloat16) for a in (gate_up, down)),
    )
    assert_close(low, naive(x, expert, weight, gate_up, down), 0.1)


def test_an_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="'cuda': one of xla"):
        moe(*operands(2, "random"), implementation="cuda")
