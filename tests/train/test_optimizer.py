"""Which parameter is treated how, AdamW beside PyTorch's, and settings that are refused."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ODD
from safetensors.numpy import load_file

from train.optimizer import (
    GATE_UP,
    MATRIX,
    TABLE,
    VECTOR,
    OptimizerConfig,
    build,
    rule,
    rules,
    schedule,
)
from zaya_jax import ConfigError, ZayaConfig, init
from zaya_jax.layouts import stack

GOLDEN = Path(__file__).parents[1] / "golden" / "training" / "optimizers.safetensors"

WANTED = {
    "embed_tokens/weight": TABLE,
    "input_hidden_states_bias": VECTOR,
    "input_hidden_states_scale": VECTOR,
    "layers/input_layernorm/weight": VECTOR,
    "layers/mlp/experts/down_proj": MATRIX,
    "layers/mlp/experts/gate_up_proj": GATE_UP,
    "layers/mlp/gate/down_proj/bias": VECTOR,
    "layers/mlp/gate/down_proj/weight": MATRIX,
    "layers/mlp/gate/router_mlp/fc1/bias": VECTOR,
    "layers/mlp/gate/router_mlp/fc1/weight": MATRIX,
    "layers/mlp/gate/router_mlp/fc2/bias": VECTOR,
    "layers/mlp/gate/router_mlp/fc2/weight": MATRIX,
    "layers/mlp/gate/router_mlp/norm/weight": VECTOR,
    "layers/mlp/gate/router_mlp/out_proj/weight": MATRIX,
    "layers/mlp/gate/router_states_scale": VECTOR,
    "layers/post_attention_layernorm/weight": VECTOR,
    "layers/post_attention_residual_scale/hidden_states_bias": VECTOR,
    "layers/post_attention_residual_scale/hidden_states_scale": VECTOR,
    "layers/post_attention_residual_scale/residual_bias": VECTOR,
    "layers/post_attention_residual_scale/residual_scale": VECTOR,
    "layers/post_mlp_residual_scale/hidden_states_bias": VECTOR,
    "layers/post_mlp_residual_scale/hidden_states_scale": VECTOR,
    "layers/post_mlp_residual_scale/residual_bias": VECTOR,
    "layers/post_mlp_residual_scale/residual_scale": VECTOR,
    "layers/self_attn/o_proj/weight": MATRIX,
    "layers/self_attn/qk_norm/temp": VECTOR,
    "layers/self_attn/qkv_proj/conv_qk_depthwise/bias": VECTOR,
    "layers/self_attn/qkv_proj/conv_qk_depthwise/weight": VECTOR,
    "layers/self_attn/qkv_proj/conv_qk_grouped/bias": VECTOR,
    "layers/self_attn/qkv_proj/conv_qk_grouped/weight": VECTOR,
    "layers/self_attn/qkv_proj/k_proj/weight": MATRIX,
    "layers/self_attn/qkv_proj/q_proj/weight": MATRIX,
    "layers/self_attn/qkv_proj/v_proj_current/weight": MATRIX,
    "layers/self_attn/qkv_proj/v_proj_delayed/weight": MATRIX,
    "norm/weight": VECTOR,
}
# With attention_bias, and a head of its own with a bias.
WANTED_ODD = WANTED | {
    "layers/self_attn/o_proj/bias": VECTOR,
    "layers/self_attn/qkv_proj/k_proj/bias": VECTOR,
    "layers/self_attn/qkv_proj/q_proj/bias": VECTOR,
    "layers/self_attn/qkv_proj/v_proj_current/bias": VECTOR,
    "layers/self_attn/qkv_proj/v_proj_delayed/bias": VECTOR,
    "lm_head/bias": VECTOR,
    "lm_head/weight": TABLE,
}


def by_path(tree) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def shapes(config: ZayaConfig):
    params = jax.eval_shape(partial(init, config), jax.random.key(0))
    return jax.eval_shape(partial(stack, config=config), params)["params"]


def drawn(config: ZayaConfig) -> dict[str, np.ndarray]:
    """Random parameters by path."""
    rng = np.random.default_rng(0)
    return {
        path: rng.standard_normal(leaf.shape).astype(np.float32)
        for path, leaf in by_path(shapes(config)).items()
    }


# Of plain models, what takes the place of ZAYA's parts.
WANTED_PLAIN = {
    "layers/mlp/gate/out_proj/weight": MATRIX,
    "layers/self_attn/k_proj/weight": MATRIX,
    "layers/self_attn/o_proj/weight": MATRIX,
    "layers/self_attn/q_proj/weight": MATRIX,
    "layers/self_attn/v_proj/weight": MATRIX,
}


def test_leaves_of_plain_models_have_their_rules():
    plain = dataclasses.replace(
        ZayaConfig.preset("nano"), attention="gqa", router="linear", residual_scaling=False
    )
    of_zaya = ("self_attn", "mlp/gate", "residual", "hidden_states")
    kept = {path: found for path, found in WANTED.items() if not any(s in path for s in of_zaya)}
    assert by_path(rules(shapes(plain))) == kept | WANTED_PLAIN


@pytest.mark.parametrize("name", ["nano", "zaya1_8b"])
def test_every_leaf_has_its_rule(name):
    preset = ZayaConfig.preset(name)
    tree = shapes(dataclasses.replace(preset, num_hidden_layers=2, layer_types=()))
    assert by_path(rules(tree)) == WANTED
    assert by_path(rules(shapes(ODD))) == WANTED_ODD


def test_unstacked_layers_have_the_same_rules():
    tree = jax.eval_shape(partial(init, ODD), jax.random.key(0))["params"]
    for path, found in by_path(rules(tree)).items():
        parts = [part for part in path.split("/") if not part.isdecimal()]
        assert found == WANTED_ODD["/".join(parts)]


def test_a_leaf_without_a_rule_is_an_error():
    with pytest.raises(ConfigError, match="no rule for the parameter 'layers/mlp/shared/down'"):
        rule("layers/mlp/shared/down")
    with pytest.raises(ConfigError, match="no rule"):
        build(OptimizerConfig(), 1).init({"layers": {"new_proj": {"weight": jnp.ones((2, 3, 4))}}})


def one_step(config: OptimizerConfig, params, gradients):
    optimizer = build(config, 10)
    updates, state = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    return by_path(updates), state


def test_what_decays_is_matrices_embedding_and_head_by_muon_and_adamw_alike():
    """Without a gradient, decay is all that moves a parameter."""
    paths = ["o_proj/weight", "experts/gate_up_proj", "out_proj/weight", "experts/down_proj"]
    paths += ["embed_tokens/weight", "lm_head/weight", "temp", "conv_qk_grouped/weight", "bias"]
    params = {path: leaf for path, leaf in drawn(ODD).items() if path.endswith(tuple(paths))}
    assert len(params) > len(paths)
    nothing = jax.tree.map(np.zeros_like, params)
    for kind in "muon", "adamw":
        config = OptimizerConfig(
            kind=kind, learning_rate=0.5, weight_decay=0.1, adamw_ratio=0.2, newton_schulz_steps=1
        )
        updates, _ = one_step(config, params, nothing)
        for path, leaf in params.items():
            found = WANTED_ODD[path]
            share = 0.2 if kind == "muon" and found in (TABLE, VECTOR) else 1.0
            wanted = 0.0 if found == VECTOR else -0.5 * 0.1 * share * leaf
            np.testing.assert_allclose(updates[path], wanted + 0 * leaf, rtol=1e-5, atol=1e-7)


def test_adamw_gets_its_part_of_the_rate():
    """The first update of AdamW is the rate, with the gradient's sign."""
    params = {"embed_tokens": {"weight": jnp.zeros((4, 3))}}
    gradients = {"embed_tokens": {"weight": jnp.full((4, 3), -7.0)}}
    config = OptimizerConfig(learning_rate=0.5, adamw_ratio=0.2, weight_decay=0)
    updates, _ = one_step(config, params, gradients)
    np.testing.assert_allclose(updates["embed_tokens/weight"], 0.1, rtol=1e-5)


def test_all_that_is_kept_is_float32_and_of_the_parameters_shapes():
    params = drawn(ODD)
    state = build(OptimizerConfig(), 10).init(params)
    kept = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert {leaf.dtype for leaf in kept} == {jnp.dtype("float32")}
    matrices = [path for path, found in WANTED_ODD.items() if found in (MATRIX, GATE_UP)]
    assert len(kept) == len(matrices) + 2 * (len(WANTED_ODD) - len(matrices))


@pytest.mark.parametrize("shape", ["24x40", "40x24", "32x32"])
def test_adamw_is_pytorchs(shape):
    golden = load_file(GOLDEN)
    config = OptimizerConfig(
        kind="adamw", learning_rate=0.02, clip_norm=0, schedule="constant", eps=1e-8, b2=0.95
    )
    optimizer = build(config, 5)
    params = {"q_proj": {"weight": jnp.asarray(golden[shape])}}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in golden[f"{shape}_gradients"]:
        updates, state = update({"q_proj": {"weight": gradient}}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(
        params["q_proj"]["weight"], golden[f"{shape}_adamw"], atol=1e-6, rtol=1e-6
    )


def test_long_gradients_are_scaled_to_the_limit_and_short_ones_are_not():
    """Seen in AdamW's first moment, (1 - b1) times the gradient that it gets."""

    def moment(clip: float, size: float) -> np.ndarray:
        params = {"norm": {"weight": jnp.zeros(4)}, "embed_tokens": {"weight": jnp.zeros((3, 4))}}
        gradients = jax.tree.map(lambda p: jnp.full(p.shape, size), params)
        optimizer = build(OptimizerConfig(clip_norm=clip, b1=0.5), 10)
        _, state = optimizer.update(gradients, optimizer.init(params), params)
        moments = optax.tree.get_all_with_path(state, "mu")
        leaves = [leaf for _, tree in moments for leaf in jax.tree.leaves(tree)]
        return np.concatenate([np.ravel(leaf) for leaf in leaves])

    np.testing.assert_allclose(moment(2.0, 1.0), 0.5 * 2.0 / 4, rtol=1e-6)  # its norm is 4
    np.testing.assert_allclose(moment(5.0, 1.0), 0.5)
    np.testing.assert_allclose(moment(0.0, 100.0), 50.0)


def test_the_rate_follows_the_schedule():
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=3, weight_decay=0.0, clip_norm=0)
    rate, optimizer = schedule(config, 10), build(config, 10)
    params = {"norm": {"weight": jnp.zeros(4)}}
    state = optimizer.init(params)
    for step in range(10):
        updates, state = optimizer.update({"norm": {"weight": jnp.ones(4)}}, state, params)
        np.testing.assert_allclose(updates["norm"]["weight"], -rate(step), rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kind", "sgd", "kind must be one of muon, adamw, not 'sgd'"),
        ("learning_rate", 0.0, "learning_rate must be positive, not 0.0"),
        ("learning_rate", float("nan"), "learning_rate must be positive"),
        ("learning_rate", "1e-3", "learning_rate must be positive"),
        ("adamw_ratio", -1.0, "adamw_ratio must be 0 or more"),
        ("weight_decay", float("inf"), "weight_decay must be 0 or more"),
        ("momentum", 1.0, "momentum must be from 0 to below 1, not 1.0"),
        ("nesterov", 1, "nesterov must be true or false"),
        ("newton_schulz_steps", 0, "newton_schulz_steps must be a whole number of 1 or more"),
        ("newton_schulz_dtype", "float16", "newton_schulz_dtype must be one of bfloat16, float32"),
        ("b2", 1.5, "b2 must be from 0 to below 1"),
        ("eps", 0, "eps must be positive"),
        ("clip_norm", -1, "clip_norm must be 0 or more"),
        ("schedule", "linear", "schedule must be one of constant, cosine, wsd"),
        ("warmup_steps", 1.5, "warmup_steps must be a whole number of 0 or more"),
        ("warmup_steps", True, "warmup_steps must be a whole number"),
        ("final_ratio", 1.1, "final_ratio must be from 0 to 1"),
    ],
)
def test_impossible_settings_are_refused_by_name(name, value, message):
    with pytest.raises(ConfigError) as error:
        OptimizerConfig(**{name: value})
    assert message in str(error.value) and "\n" not in str(error.value)
