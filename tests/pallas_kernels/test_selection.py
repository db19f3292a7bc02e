"""Which implementation runs, and that the model is the same with each."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import distance
from helpers import ODD, TINY, random_params

from pallas_kernels import selection
from pallas_kernels.launch import architecture, compiling_for
from pallas_kernels.moe import api as moe
from pallas_kernels.selection import default_implementation, select
from zaya_jax.layouts import stack
from zaya_jax.model import forward, head, init_state

# Compiling the interpreted kernels takes longest.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
BOTH = {"xla": lambda: "xla", "pallas": lambda: "pallas"}


def test_our_kernels_run_on_amd_gpus_and_xla_elsewhere(monkeypatch):
    monkeypatch.delenv(selection.VARIABLE, raising=False)
    if jax.default_backend() == "cpu":
        assert architecture() is None and default_implementation() == "xla"
    with compiling_for("gfx942"):
        assert architecture() == "gfx942" and default_implementation() == "pallas"
        assert select("op", None, BOTH)() == "pallas"
        assert select("op", "xla", BOTH)() == "xla"
        assert select("op", None, {**BOTH, "library": lambda: "library"}, "library")() == "library"
        assert select("op", "pallas", BOTH, "library")() == "pallas"
    with compiling_for("9.0"):
        assert default_implementation() == "xla"


def test_the_environment_says_otherwise(monkeypatch):
    monkeypatch.setenv(selection.VARIABLE, "pallas")
    assert select("op", None, BOTH)() == "pallas"
    with compiling_for("gfx942"):
        assert select("op", None, BOTH, "library")() == "pallas"
        monkeypatch.setenv(selection.VARIABLE, "xla")
        assert select("op", None, BOTH, "library")() == "xla"
    monkeypatch.setenv(selection.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="ZAYA_JAX_KERNELS is 'cuda': one of xla, pallas"):
        select("op", None, BOTH)
    with pytest.raises(ValueError, match="op has no implementation 'cuda': one of xla, pallas"):
        select("op", "cuda", BOTH)


def test_many_tokens_an_expert_are_left_to_the_library(monkeypatch):
    monkeypatch.delenv(selection.VARIABLE, raising=False)

    def products(tokens: int, implementation: str | None = None) -> str:
        shapes = [(tokens, 8), (tokens,), (tokens,), (2, 16, 8), (2, 8, 8)]
        dtypes = [jnp.bfloat16, jnp.int32, jnp.float32, jnp.bfloat16, jnp.bfloat16]
        args = [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, dtypes, strict=True)]
        f = partial(moe.moe, implementation=implementation)
        return str(jax.make_jaxpr(f)(*args))

    with compiling_for("gfx942"):
        assert "ragged_dot" in products(2 * moe.LIBRARY)
        assert "pallas_call" in products(2 * moe.LIBRARY, "pallas")
        assert "pallas_call" in products(2 * moe.LIBRARY - 1)
        assert "ragged_dot" in products(64, "xla")
    assert "ragged_dot" not in products(2 * moe.LIBRARY)  # slow on CPUs
    assert "ragged_dot" not in products(64, "xla")


@pytest.mark.parametrize("config", [TINY, ODD], ids=["tiny", "odd"])
def test_the_model_is_the_same_with_our_kernels(config):
    """Loss, experts and the gradient of packed rows; a prompt in chunks, then single tokens."""
    params = stack(random_params(config), config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, 20)))
    ids = jnp.asarray([[1] * 5 + [2] * 1 + [3] * 14, [4] * 11 + [5] * 7 + [0] * 2])

    def computed(kernels):
        chosen = dataclasses.replace(config, kernels=kernels)

        def loss(weights):
            out = forward({**params, "params": weights}, chosen, tokens, segment_ids=ids)
            logits = head({**params, "params": weights}, chosen, out.hidden)
            return jnp.sum(jnp.where(ids[..., None] > 0, jnp.sin(logits), 0)), out.experts

        @partial(jax.jit, compiler_options=QUICK)
        def read(tokens, lengths, state):
            return forward(params, chosen, tokens, new_lengths=lengths, state=state)

        training = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
        (value, experts), gradient = training(params["params"])
        state, hidden, chosen_experts = init_state(params, chosen, 2, 24), [], [experts]
        for start, stop in ((0, 9), (9, 18), (18, 19), (19, 20)):
            lengths = jnp.asarray([stop - start, min(stop - start, 4)])
            out = read(tokens[:, start:stop], lengths, state)
            state = out.state
            hidden.append(out.hidden[0])
            chosen_experts.append(out.experts[0])
        return (value, gradient, hidden, state.lengths), chosen_experts

    (ours, our_experts), (theirs, their_experts) = computed("pallas"), computed("xla")
    jax.tree.map(np.testing.assert_array_equal, our_experts, their_experts)
    assert distance(ours, theirs) < 1e-4
