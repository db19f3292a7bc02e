"""Models with plain parts in place of ZAYA's: they compute what is written here, and only train."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ODD, TINY, assert_close, logits, random_params, random_tokens, run

import zaya_jax
from convert.legacy_config import write_legacy
from convert.mapping import mapping
from zaya_jax import ConfigError, ZayaConfig, forward, head, init, init_state
from zaya_jax.layouts import for_cpu, stack, unstack
from zaya_jax.memory import plan

ALL = {"attention": "gqa", "router": "linear", "residual_scaling": False}
PLAIN, PLAIN_ODD = replace(TINY, **ALL), replace(ODD, **ALL)
CONFIGS = {"plain": PLAIN, "odd": PLAIN_ODD}
PARAMS = {name: random_params(config) for name, config in CONFIGS.items()}
BOTH = pytest.mark.parametrize("name", list(CONFIGS))


def names(config: ZayaConfig) -> set[str]:
    """Of the leaves of the tree, all layers together."""
    tree = jax.eval_shape(partial(init, config), jax.random.key(0))["params"]
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    parts = (jax.tree_util.keystr(path, simple=True, separator="/").split("/") for path, _ in paths)
    return {"/".join(part for part in path if not part.isdecimal()) for path in parts}


def test_each_switch_replaces_its_own_parameters():
    zaya, attention, gate = names(TINY), "layers/self_attn/", "layers/mlp/gate/"

    def starting(found: set[str], start: str) -> set[str]:
        return {name for name in found if name.startswith(start)}

    plain = names(replace(TINY, attention="gqa"))
    assert zaya - plain == starting(zaya, attention) - {f"{attention}o_proj/weight"}
    assert plain - zaya == {f"{attention}{kind}_proj/weight" for kind in "qkv"}
    linear = names(replace(TINY, router="linear"))
    assert zaya - linear == starting(zaya, gate)
    assert linear - zaya == {f"{gate}out_proj/weight"}
    bare = names(replace(TINY, residual_scaling=False))
    scaled = {name for name in zaya if "residual" in name or "hidden_states" in name}
    assert zaya - bare == scaled and len(scaled) == 10 and not bare - zaya
    assert names(PLAIN) == (plain - scaled - starting(zaya, gate)) | {f"{gate}out_proj/weight"}


def by_hand(params, config: ZayaConfig, tokens: np.ndarray) -> np.ndarray:
    """Logits of one row, token by token and head by head, in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    tree, d = params["params"], config.head_dim
    half = int(d * config.rope.partial_rotary_factor) // 2

    def norm(x, weight):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.rms_norm_eps) * weight

    def rotated(x, place):
        angle = place * config.rope.theta ** (-np.arange(half) / half)
        a, b = x[:half], x[half : 2 * half]
        turned = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
        return np.concatenate([*turned, x[2 * half :]])

    def softmax(x):
        return np.exp(x - x.max()) / np.exp(x - x.max()).sum()

    h = tree["embed_tokens"]["weight"][tokens]
    for layer, balancing in zip(tree["layers"], params["balancing"]["layers"], strict=True):
        x = norm(h, layer["input_layernorm"]["weight"])
        q, k, v = (
            (x @ layer["self_attn"][f"{kind}_proj"]["weight"].T).reshape(len(x), -1, d)
            for kind in "qkv"
        )
        mixed = np.zeros_like(q)
        for i in range(len(x)):
            for n in range(config.num_attention_heads):
                group = n // config.groups
                query = rotated(q[i, n], i)
                scores = [query @ rotated(k[j, group], j) / d**0.5 for j in range(i + 1)]
                mixed[i, n] = softmax(np.array(scores)) @ v[: i + 1, group]
        h = h + mixed.reshape(len(x), -1) @ layer["self_attn"]["o_proj"]["weight"].T
        x = norm(h, layer["post_attention_layernorm"]["weight"])
        for i, row in enumerate(x):
            share = softmax(layer["mlp"]["gate"]["out_proj"]["weight"] @ row)
            expert = np.argmax(share + balancing["mlp"]["gate"]["balancing_biases"])
            if expert == config.num_experts:
                continue
            gate, up = np.split(layer["mlp"]["experts"]["gate_up_proj"][expert] @ row, 2)
            hidden = gate / (1 + np.exp(-gate)) * up
            h[i] += share[expert] * (layer["mlp"]["experts"]["down_proj"][expert] @ hidden)
    return norm(h, tree["norm"]["weight"]) @ tree["embed_tokens"]["weight"].T


def test_the_plain_model_is_what_one_would_write_by_hand():
    tokens = random_tokens(1, 1, 20)
    experts = np.asarray(run(PARAMS["plain"], PLAIN, tokens).experts)
    assert set(np.unique(experts)) == set(range(PLAIN.num_experts + 1))
    found = logits(PARAMS["plain"], PLAIN, tokens)
    assert_close(found[0], by_hand(PARAMS["plain"], PLAIN, tokens[0]), 1e-4)


@BOTH
def test_packed_segments_equal_the_segments_alone(name):
    """With padding between and behind them, and segments of one token."""
    params, config = PARAMS[name], CONFIGS[name]
    ids = np.repeat([1, 2, 0, 3, 4, 0], [7, 1, 2, 11, 9, 2])[None]
    tokens = random_tokens(2, *ids.shape)
    packed = run(params, config, tokens, segment_ids=ids)
    for segment in (1, 2, 3, 4):
        (place,) = np.nonzero(ids[0] == segment)
        padded = np.pad(tokens[0, place], (0, 12 - len(place)))[None]
        alone = run(params, config, padded, new_lengths=np.array([len(place)]))
        assert_close(packed.hidden[0, place], alone.hidden[0, : len(place)])
        np.testing.assert_array_equal(packed.experts[0, place], alone.experts[0, : len(place)])


@BOTH
def test_stacked_layers_equal_unstacked_ones(name):
    params, config = PARAMS[name], CONFIGS[name]
    tokens, stacked = random_tokens(3, 2, 20), stack(params, config)
    one, other = run(params, config, tokens), run(stacked, config, tokens)
    assert_close(other.hidden, one.hidden)
    np.testing.assert_array_equal(other.experts, one.experts)
    chex.assert_trees_all_equal(unstack(stacked), params)


@BOTH
def test_every_parameter_has_a_gradient_and_padding_gives_no_nan(name):
    config = CONFIGS[name]
    params, tokens = stack(PARAMS[name], config), random_tokens(4, 2, 24)
    ids = np.repeat([[1, 2, 0]], [8, 13, 3], axis=1).repeat(2, axis=0)

    def loss(trained):
        variables = {**params, "params": trained}
        out = head(variables, config, forward(variables, config, tokens, segment_ids=ids).hidden)
        return jnp.sum(jnp.where(ids[..., None] != 0, jnp.sin(out), 0))

    gradient = jax.jit(jax.grad(loss))(params["params"])
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("switch", ALL)
def test_what_only_a_zaya_can_do_is_refused_in_a_line_that_names_the_switch(switch, tmp_path):
    config = replace(TINY, **{switch: ALL[switch]})
    params = init(config, jax.random.key(0))
    model = zaya_jax.Zaya(params, config)
    refused = {
        "config": config.to_hf,
        "legacy config": partial(write_legacy, config),
        "conversion": partial(mapping, config),
        "saving": partial(model.save, tmp_path / "saved"),
        "generation": partial(model.generate, [3, 4], 2),
        "form for CPUs": partial(for_cpu, params, config),
        "decoding": partial(init_state, params, config, 1, 8),
        "plan of memory": partial(plan, config, 8, 1, jnp.float32),
    }
    for call in refused.values():
        with pytest.raises(ConfigError, match=rf"^{switch} is .*, ZAYA's is .*can be trained"):
            call()
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ConfigError, match=f"unknown field '{switch}'"):
        ZayaConfig.from_hf({switch: ALL[switch]})


def test_a_state_of_a_zaya_is_refused():
    state = init_state(random_params(TINY), TINY, 1, 8)
    with pytest.raises(ConfigError, match="attention is 'gqa'"):
        forward(PARAMS["plain"], PLAIN, random_tokens(1, 1, 4), state=state)


def test_bad_switches_are_named():
    for name, value in {"attention": "mha", "router": "hash"}.items():
        with pytest.raises(ConfigError, match=f"{name} must be .* or .*: '{value}'"):
            replace(TINY, **{name: value})
    with pytest.raises(ConfigError, match="residual_scaling has the wrong type: 0"):
        replace(TINY, residual_scaling=0)
