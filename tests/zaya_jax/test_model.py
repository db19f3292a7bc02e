"""Properties of the forward pass that hold whatever the weights are."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CONFIGS, ODD, TINY, assert_close, random_params, random_tokens, run
from hypothesis import given, settings
from hypothesis import strategies as st

from zaya_jax import InputError, forward, head, init, init_state
from zaya_jax.config import PRESETS, ZayaConfig
from zaya_jax.layouts import stack, unstack
from zaya_jax.model import parameter_counts

PARAMS = {name: random_params(config) for name, config in CONFIGS.items()}
BOTH = pytest.mark.parametrize("name", CONFIGS)
LENGTH = 48


def whole(name: str, tokens: np.ndarray):
    return run(PARAMS[name], CONFIGS[name], tokens)


@BOTH
@pytest.mark.parametrize("size", [1, 2, 3])
def test_chunks_of_fixed_size_equal_the_whole(name, size):
    tokens = random_tokens(1, 2, 24)
    state = init_state(PARAMS[name], CONFIGS[name], 2, 24)
    hidden = []
    for start in range(0, 24, size):
        chunk = tokens[:, start : start + size]
        out = run(PARAMS[name], CONFIGS[name], chunk, state=state)
        hidden.append(out.hidden)
        state = out.state
    assert_close(np.concatenate(hidden, axis=1), whole(name, tokens).hidden)


@BOTH
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.lists(st.integers(0, 8), min_size=2, max_size=2), min_size=1, max_size=12))
def test_any_split_into_right_padded_chunks_equals_the_whole(name, cuts):
    """Rows advance by different amounts, 0 included, within chunks of one shape."""
    params, config = PARAMS[name], CONFIGS[name]
    tokens = random_tokens(2, 2, 96)
    expected = np.asarray(run(params, config, tokens).hidden)
    state = init_state(params, config, 2, 96)
    for new_lengths in np.array(cuts, np.int32):
        before = np.asarray(state.lengths)
        index = before[:, None] + np.arange(8)
        out = run(
            params,
            config,
            np.take_along_axis(tokens, np.minimum(index, 95), axis=1),
            new_lengths=new_lengths,
            state=state,
        )
        for row in range(2):
            got = np.asarray(out.hidden)[row, : new_lengths[row]]
            want = expected[row, before[row] : before[row] + new_lengths[row]]
            assert np.abs(got - want).max(initial=0) <= 2e-5 * expected.std()
        state = out.state
    np.testing.assert_array_equal(state.lengths, np.sum(cuts, axis=0))


@BOTH
def test_a_row_without_new_tokens_keeps_its_state(name):
    params, config = PARAMS[name], CONFIGS[name]
    state = run(
        params, config, random_tokens(3, 2, 9), state=init_state(params, config, 2, 16)
    ).state
    out = run(params, config, random_tokens(4, 2, 3), new_lengths=np.array([0, 3]), state=state)
    chex.assert_trees_all_equal(out.state.select([0]), state.select([0]))


@BOTH
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_packed_segments_equal_the_segments_alone(name, data):
    """Segments of any length, one token included, padding between and behind them."""
    params, config = PARAMS[name], CONFIGS[name]
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    gaps = data.draw(st.lists(st.integers(0, 3), min_size=len(sizes), max_size=len(sizes)))
    row, ids, parts = [], [], []
    for number, (size, gap) in enumerate(zip(sizes, gaps, strict=True)):
        part = random_tokens(10 * number + size, size)
        room = LENGTH - len(row) - gap
        if room < size:
            break
        parts.append((len(row) + gap, part))
        row += [0] * gap + part.tolist()
        ids += [0] * gap + [number + 1] * size
    padding = LENGTH - len(row)
    tokens, segment_ids = np.array([row + [5] * padding]), np.array([ids + [0] * padding])
    packed = run(params, config, tokens, segment_ids=segment_ids)
    for start, part in parts:
        padded = np.pad(part, (0, 12 - len(part)))[None]
        alone = run(params, config, padded, new_lengths=np.array([len(part)]))
        got = np.asarray(packed.hidden)[0, start : start + len(part)]
        assert (
            np.abs(got - np.asarray(alone.hidden)[0, : len(part)]).max()
            <= 2e-5 * np.asarray(alone.hidden).std()
        )
        np.testing.assert_array_equal(
            packed.experts[0, start : start + len(part)], alone.experts[0, : len(part)]
        )
    assert int(packed.expert_counts.sum()) == config.num_hidden_layers * sum(
        len(p) for _, p in parts
    )


@BOTH
def test_padding_content_does_not_matter(name):
    params, config = PARAMS[name], CONFIGS[name]
    tokens, lengths = random_tokens(5, 2, 20), np.array([20, 7])
    other = tokens.copy()
    other[1, 7:] = 63
    a = run(params, config, tokens, new_lengths=lengths)
    b = run(params, config, other, new_lengths=lengths)
    np.testing.assert_array_equal(a.hidden[1, :7], b.hidden[1, :7])
    np.testing.assert_array_equal(a.expert_counts, b.expert_counts)
    assert (np.asarray(a.experts)[1, 7:] == 255).all()


@BOTH
def test_nan_in_padding_never_leaks(name):
    params, config = PARAMS[name], CONFIGS[name]
    poisoned = jax.tree.map(lambda x: x, params)
    table = params["params"]["embed_tokens"]["weight"].at[63].set(jnp.nan)
    poisoned["params"] = {**params["params"], "embed_tokens": {"weight": table}}
    tokens, lengths = random_tokens(6, 2, 20, vocab=60), np.array([11, 20])
    tokens[0, 11:] = 63
    clean = run(params, config, tokens, new_lengths=lengths).hidden
    dirty = run(poisoned, config, tokens, new_lengths=lengths).hidden
    np.testing.assert_array_equal(clean[0, :11], dirty[0, :11])
    np.testing.assert_array_equal(clean[1], dirty[1])


@BOTH
def test_forcing_the_free_choice_changes_nothing_and_another_choice_does(name):
    params, config = PARAMS[name], CONFIGS[name]
    tokens = random_tokens(7, 2, 20)
    free = run(params, config, tokens)
    forced = run(params, config, tokens, forced_experts=free.experts)
    chex.assert_trees_all_equal(forced, free)
    other = np.asarray(free.experts).copy()
    other[0, 3, 1] = (other[0, 3, 1] + 1) % config.num_experts
    moved = run(params, config, tokens, forced_experts=other)
    np.testing.assert_array_equal(moved.experts[0, 3, :2], other[0, 3, :2])
    assert np.abs(moved.hidden - free.hidden)[0, 3].max() > 1e-3
    half = np.where(np.arange(20)[:, None] < 10, np.asarray(free.experts), 255).astype(np.uint8)
    chex.assert_trees_all_equal(run(params, config, tokens, forced_experts=half), free)


@BOTH
def test_the_router_gets_its_gradient_through_replayed_choices(name):
    params, config = PARAMS[name], CONFIGS[name]
    tokens = random_tokens(8, 1, 12)
    experts = run(params, config, tokens).experts

    def loss(trained, forced):
        variables = {**params, "params": trained}
        out = forward(variables, config, tokens, forced_experts=forced)
        return jnp.sum(out.hidden * jnp.cos(jnp.arange(config.hidden_size)))

    gradient = jax.jit(jax.grad(loss))
    free, replayed = gradient(params["params"], None), gradient(params["params"], experts)
    chex.assert_trees_all_close(free, replayed, rtol=1e-6)
    for layer in replayed["layers"]:
        assert np.abs(layer["mlp"]["gate"]["down_proj"]["weight"]).max() > 0


def test_padding_gives_no_nan_gradient_in_a_fresh_model():
    """Fresh biases are zero, so padded queries and keys have length zero."""
    params = init(TINY, jax.random.key(0))
    tokens = random_tokens(9, 1, 12)

    def loss(trained):
        variables = {**params, "params": trained}
        segments = np.array([[1] * 7 + [0] * 5])
        return jnp.sum(forward(variables, TINY, tokens, segment_ids=segments).hidden[:, :7])

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params["params"])):
        assert np.isfinite(leaf).all()


@BOTH
def test_every_parameter_matters(name):
    """Each leaf's gradient is non-zero, so the other tests see errors in any of them."""
    params, config = PARAMS[name], CONFIGS[name]
    tokens = random_tokens(9, 2, 32)

    def loss(trained):
        variables = {**params, "params": trained}
        out = head(variables, config, forward(variables, config, tokens).hidden)
        return jnp.sum(jnp.sin(out))

    gradient = jax.jit(jax.grad(loss))(params["params"])
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@BOTH
def test_stacked_layers_equal_unstacked_ones(name):
    params, config = PARAMS[name], CONFIGS[name]
    tokens = random_tokens(10, 2, 20)
    stacked = stack(params, config)
    one, other = run(params, config, tokens), run(stacked, config, tokens)
    assert_close(other.hidden, one.hidden)
    np.testing.assert_array_equal(other.experts, one.experts)
    chex.assert_trees_all_equal(unstack(stacked), params)
    state = init_state(stacked, config, 2, 24)
    out = run(stacked, config, tokens[:, :7], state=state)
    out = run(stacked, config, tokens[:, 7:], state=out.state)
    assert_close(out.hidden, one.hidden[:, 7:])


def test_positions_move_the_rotary_embedding_only():
    """A shift of all positions leaves relative ones, and so the output, as they were."""
    tokens = random_tokens(11, 1, 16)
    shifted = run(PARAMS["tiny"], TINY, tokens, positions=np.arange(100, 116)[None])
    assert_close(shifted.hidden, whole("tiny", tokens).hidden, 1e-4)
    stretched = run(PARAMS["tiny"], TINY, tokens, positions=3 * np.arange(16)[None])
    assert np.abs(stretched.hidden - shifted.hidden).max() > 1e-2


def test_state_operations_move_whole_rows():
    params, config = PARAMS["odd"], ODD
    prompt, tokens = random_tokens(12, 2, 10), random_tokens(13, 4, 1)
    state = run(params, config, prompt, state=init_state(params, config, 2, 16)).state
    wide = state.repeat(2)
    got = run(params, config, tokens, state=wide)
    for row in range(4):
        want = run(params, config, tokens[row : row + 1], state=state.select([row // 2]))
        assert_close(got.hidden[row], want.hidden[0])
    replaced = wide.insert_rows([3], state.select([0]))
    got = run(params, config, tokens, state=replaced)
    want = run(params, config, tokens[3:], state=state.select([0]))
    assert_close(got.hidden[3], want.hidden[0])


def test_init_gives_unit_temperatures_and_a_frozen_skip_class():
    params = init(TINY, jax.random.key(0), jnp.bfloat16)
    for layer, balancing in zip(
        params["params"]["layers"], params["balancing"]["layers"], strict=True
    ):
        np.testing.assert_array_equal(layer["self_attn"]["qk_norm"]["temp"], 1)
        assert layer["mlp"]["experts"]["down_proj"].dtype == jnp.bfloat16
        biases = balancing["mlp"]["gate"]["balancing_biases"]
        assert biases.dtype == jnp.float32
        np.testing.assert_array_equal(biases, [0] * TINY.num_experts + [-1])


def test_parameter_counts():
    assert parameter_counts(ZayaConfig.preset("zaya1_8b")) == (8_840_488_784, 753_608_528)
    total, active = parameter_counts(ZayaConfig.preset("zaya1_74b_preview"))
    assert round(total / 1e9, 1) == 74.8 and 3.9e9 < active < 4.4e9
    for name in PRESETS:
        config = ZayaConfig.preset(name)
        if config.num_hidden_layers <= 8:
            params = jax.eval_shape(lambda c=config: init(c, jax.random.key(0)))["params"]
            assert parameter_counts(config)[0] == sum(x.size for x in jax.tree.leaves(params))


def test_forward_is_traced_once_per_shape():
    chex.clear_trace_counter()
    counted = jax.jit(chex.assert_max_traces(forward, n=1), static_argnums=1)
    for seed in range(3):
        counted(PARAMS["tiny"], TINY, random_tokens(seed, 2, 6))
    equal = ZayaConfig.from_hf(TINY.to_hf())
    counted(PARAMS["tiny"], equal, random_tokens(9, 2, 6))


def test_segments_cannot_be_combined_with_a_state():
    tokens = random_tokens(1, 1, 4)
    with pytest.raises(InputError, match="segment_ids"):
        forward(PARAMS["tiny"], TINY, tokens, segment_ids=tokens, new_lengths=np.array([4]))


def test_what_compiled_code_cannot_refuse_becomes_nan():
    """A row that overflows its state, and a forced expert that does not exist; other rows go on."""
    state = init_state(PARAMS["tiny"], TINY, 2, 4)
    tokens, counts = random_tokens(2, 2, 6), np.array([6, 4])
    hidden = run(PARAMS["tiny"], TINY, tokens, new_lengths=counts, state=state).hidden
    assert np.isnan(hidden[0]).all() and np.isfinite(hidden[1, :4]).all()
    forced = np.full((2, 6, 2), 255, np.uint8)
    forced[0, 3, 0] = TINY.num_experts + 1
    hidden = run(PARAMS["tiny"], TINY, tokens, forced_experts=forced).hidden
    assert np.isnan(hidden[0, 3]).all() and np.isfinite(hidden[1]).all()
