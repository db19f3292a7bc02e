"""Thirty AdamW steps beside PyTorch's, from the same weights, with the same data."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import zaya_jax
from train.optimizer import OptimizerConfig, build
from zaya_jax import forward, head
from zaya_jax.layouts import stack

FOLDER = Path(__file__).parents[1] / "golden" / "training"
# Those of tests/oracle/training.py, which wrote the golden curves.
ADAMW = OptimizerConfig(
    kind="adamw",
    learning_rate=2e-3,
    weight_decay=0.1,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    clip_norm=1.0,
    schedule="constant",
)


@pytest.fixture(scope="module")
def golden():
    return load_file(FOLDER / "curves.safetensors")


@pytest.fixture(scope="module")
def train():
    """Losses [steps] and experts [steps, B, S, L] of training on batches in turn, with forced
    experts (255: free)."""
    model = zaya_jax.load(FOLDER, "float32")
    params, config = stack(model.params, model.config), model.config
    optimizer = build(ADAMW, 30)

    def loss_of(weights, batch, experts):
        whole = {**params, "params": weights}
        out = forward(whole, config, batch, forced_experts=experts)
        logits = head(whole, config, out.hidden[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
        return jnp.mean(losses), out.experts

    @jax.jit
    def step(weights, state, batch, experts):
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, used), gradients = gradient(weights, batch, experts)
        updates, state = optimizer.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state, loss, used

    def run(tokens: np.ndarray, forced: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weights = params["params"]
        state, results = optimizer.init(weights), []
        for number, experts in enumerate(forced):
            weights, state, *result = step(weights, state, tokens[number % len(tokens)], experts)
            results.append(result)
        losses, used = zip(*results, strict=True)
        return np.array(losses), np.array(used)

    return run


def test_the_loss_curve_is_pytorchs_where_the_experts_are(golden, train):
    """A tenth of the experts are not those that any router would choose."""
    losses, used = train(golden["tokens"], golden["experts"])
    np.testing.assert_array_equal(used, golden["experts"])
    difference = np.abs(losses - golden["forced"]).max()
    print(f"forced: loss differs by at most {difference:.1e}")
    assert difference < 1e-3 and len(losses) == 30


def test_free_routers_choose_as_pytorchs_do(golden, train):
    """Until rounding tips one of them at a near tie; from there on the models differ."""
    free = np.full_like(golden["experts"], 255)
    losses, used = train(golden["tokens"], free)
    same = np.mean(used == golden["free_experts"], axis=(1, 2, 3))
    difference = np.abs(losses - golden["free"]).max()
    print(f"free: {same.mean():.4%} same experts, loss differs by at most {difference:.1e}")
    assert same[0] == 1 and same.min() > 0.99
    assert difference < 0.01
