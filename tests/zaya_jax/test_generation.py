"""Generation against the plain forward pass, and its faults."""

import contextlib
import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ODD, TINY, logits, random_params, random_tokens, run, run_head

from zaya_jax import InputError, Zaya, from_left_padded, init_state
from zaya_jax.generation import engine as generation
from zaya_jax.generation.engine import _request
from zaya_jax.generation.rows import Row
from zaya_jax.generation.sampling import Sampling
from zaya_jax.generation.step import decode_block, insert_rows, prefill_chunk
from zaya_jax.layouts import stack

MODELS = {
    "tiny": Zaya(random_params(TINY), TINY),
    "odd": Zaya(random_params(ODD), ODD),
}
NEVER = dataclasses.replace(TINY, eos_token_ids=(0,), pad_token_id=0)


def rows_of(*budgets, **settings):
    """A core request for rows that may sample so many tokens."""
    samplings = (Sampling(max_new_tokens=n, **settings) for n in budgets)
    return _request([Row(0, i, [3], NEVER, one, None) for i, one in enumerate(samplings)])


PROMPTS = [random_tokens(20 + n, n).tolist() for n in (9, 1, 30)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [16, 512])
def test_greedy_generation_equals_the_full_forward(monkeypatch, name, chunk):
    """Tokens, log-probabilities and experts of rows of different lengths, prefilled in chunks."""
    monkeypatch.setattr(generation, "MAX_CHUNK", chunk)
    model = MODELS[name]
    for prompt, result in zip(
        PROMPTS, model.generate(PROMPTS, max_new_tokens=20, temperature=0), strict=True
    ):
        row = np.array([prompt + result.tokens])
        padded = np.pad(row, ((0, 0), (0, 64 - row.shape[1])))
        out = run(model.params, model.config, padded, new_lengths=np.array(row.shape[1:]))
        predicted = np.asarray(run_head(model.params, model.config, out.hidden)[0])
        start, end = len(prompt) - 1, row.shape[1] - 1
        assert predicted[start:end].argmax(-1).tolist() == result.tokens
        wanted = jax.nn.log_softmax(predicted[start:end])[np.arange(end - start), result.tokens]
        np.testing.assert_allclose(result.logprobs, wanted, atol=1e-3)
        np.testing.assert_array_equal(result.experts, out.experts[0, :end])
        ended = result.tokens[-1] in model.config.eos_token_ids
        assert result.finish_reason == ("stop" if ended else "length")
        assert ended or len(result.tokens) == 20


def test_a_prompts_continuation_does_not_depend_on_its_neighbours():
    model = MODELS["tiny"]
    together = model.generate(PROMPTS, max_new_tokens=12, seed=3)
    crowd = model.generate([*PROMPTS, *PROMPTS], max_new_tokens=12, seed=3)
    assert [r.tokens for r in together] == [r.tokens for r in crowd[:3]]
    assert together[0].tokens == model.generate(PROMPTS[0], max_new_tokens=12, seed=3)[0].tokens
    assert [r.tokens for r in model.generate(PROMPTS, 12, seed=4)] != [r.tokens for r in together]


def test_sampling_settings_reach_the_sampler():
    model = MODELS["tiny"]
    greedy = model.generate(PROMPTS, 12, temperature=0)
    for arguments in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert [r.tokens for r in model.generate(PROMPTS, 12, **arguments)] == [
            r.tokens for r in greedy
        ]
    hot = model.generate(PROMPTS, 12, temperature=5.0)
    assert [r.tokens for r in hot] != [r.tokens for r in greedy]


def test_the_last_token_is_recorded_but_never_forwarded():
    params, config = MODELS["tiny"].params, NEVER
    state = init_state(params, config, 2, 32)
    prompt = random_tokens(1, 2, 4)
    prefill = prefill_chunk(params, config, prompt, np.array([4, 4]), state)
    block = decode_block(params, config, prefill.state, prefill.last_logits, rows_of(3, 8), 5)
    np.testing.assert_array_equal(block.state.lengths, [4 + 2, 4 + 5])
    np.testing.assert_array_equal((np.asarray(block.tokens) >= 0).sum(1), [3, 5])
    assert (np.asarray(block.experts)[0, 2:] == 255).all()
    assert (np.asarray(block.experts)[0, :2] != 255).all()
    np.testing.assert_array_equal(block.request.remaining, [0, 3])


def test_a_snapshot_outlives_the_donated_state_it_was_taken_from():
    params, config = MODELS["tiny"].params, NEVER
    state = init_state(params, config, 1, 32)
    prefill = prefill_chunk(params, config, random_tokens(5, 1, 8), np.array([8]), state)
    request = rows_of(6, temperature=0)
    kept, logits_kept = prefill.state.snapshot(), jnp.copy(prefill.last_logits)
    once = decode_block(params, config, prefill.state, prefill.last_logits, request, 6)
    again = decode_block(params, config, kept, logits_kept, request, 6)
    np.testing.assert_array_equal(once.tokens, again.tokens)
    assert prefill.state.k[0].is_deleted() and (np.asarray(once.tokens) >= 0).all()


def test_blocks_of_any_size_give_the_same_tokens(monkeypatch):
    model = MODELS["tiny"]
    wanted = model.generate(PROMPTS, 10)
    for size in (1, 3, 16):
        monkeypatch.setattr(generation, "BLOCK", size)
        got = model.generate(PROMPTS, 10)
        assert [r.tokens for r in got] == [r.tokens for r in wanted]
        np.testing.assert_allclose(got[2].logprobs, wanted[2].logprobs, atol=1e-4)


def test_rows_can_be_replaced_between_blocks():
    """A finished row's place is taken by another prompt's state, without touching its neighbour."""
    params, config = MODELS["tiny"].params, NEVER
    long, other = random_tokens(2, 1, 8), random_tokens(3, 1, 8)
    length = np.array([8])

    def prefilled(tokens):
        return prefill_chunk(params, config, tokens, length, init_state(params, config, 1, 32))

    a, b = prefilled(long), prefilled(other)
    pair = insert_rows(a.state.repeat(2), [1], b.state)
    both = jnp.concatenate([a.last_logits, b.last_logits])
    together = decode_block(params, config, pair, both, rows_of(6, 6, temperature=0), 6)
    for row, one in ((0, a), (1, b)):
        request = rows_of(6, temperature=0)
        alone = decode_block(params, config, one.state, one.last_logits, request, 6)
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])


@pytest.mark.parametrize("form", ["layers", "stacked"])
def test_nothing_recompiles_after_a_warmup_of_the_bucket(form):
    config = dataclasses.replace(TINY, max_position_embeddings=300)
    params = MODELS["tiny"].params
    model = Zaya(params if form == "layers" else stack(params, config), config)
    model.warmup(batch_size=2, prompt_tokens=32, max_new_tokens=32)
    with compilations() as compiled:
        for lengths in ((17, 3), (32, 32), (18, 1), (4, 5, 6)):
            prompts = [[5] * n for n in lengths]
            model.generate(prompts, 17, temperature=0.5, top_k=3, seed=9, batch_size=2)
            model.generate(prompts, 32, temperature=0, stop_tokens=[7], batch_size=2)
    assert not compiled


@contextlib.contextmanager
def compilations():
    """A list that gets an entry for every program that JAX compiles or reads from its cache."""
    compiled, active = [], True

    def listen(event, _, **__):
        if active and event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield compiled
    active = False


def test_a_full_context_ends_the_answer():
    config = dataclasses.replace(NEVER, max_position_embeddings=16)
    model = Zaya(MODELS["tiny"].params, config)
    (result,) = model.generate([[3] * 10], max_new_tokens=50)
    assert result.finish_reason == "context" and len(result.tokens) == 6


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "prompt 0 is empty"),
        ([[3], []], "prompt 1 is empty"),
        ([[3, 64]], "prompt 0 has token 64, outside the vocabulary of 64"),
        ([[3, -1]], "prompt 0 has token -1, outside"),
        ([[3.5]], "prompt 0 has tokens that are no integers"),
        ([[[3]]], "prompt 0 is empty or no flat list"),
        ([[3] * 512], "prompt 0 has 512 tokens, which leaves no room in the context of 512"),
        ([[[3], [3, 4]]], "prompt 0 is empty or no flat list"),
        (None, "prompts must be text, token ids or conversations, got None"),
        ({"role": "user"}, "prompts must be text"),
        (b"text", "prompts must be text"),
        ([None], "prompt 0 is empty or no flat list"),
        (["text"], "no tokenizer: give prompts as token ids"),
        ([[{"role": "user", "content": "hi"}]], "no tokenizer"),
    ],
)
def test_bad_prompts_are_named(prompts, message):
    with pytest.raises(InputError, match=message):
        MODELS["tiny"].generate(prompts)


@pytest.mark.parametrize("kind", [list, tuple, np.array, jnp.array], ids=lambda k: k.__name__)
def test_one_row_of_ids_is_one_prompt_in_any_form(kind):
    (result,) = MODELS["tiny"].generate(kind([3, 4, 5]), 2)
    (wanted,) = MODELS["tiny"].generate([[3, 4, 5]], 2)
    assert result.tokens == wanted.tokens


def test_text_features_need_a_tokenizer():
    with pytest.raises(InputError, match="no tokenizer, so no stop strings"):
        MODELS["tiny"].generate([[3]], stop="x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": [3, 4]}, r"tokens must be \[B, S\]"),
        ({"tokens": [[3], [3, 4]]}, "pad rows of different lengths"),
        ({"tokens": [[3.0]]}, "tokens must be an array of integers"),
        ({"tokens": [[64]]}, r"tokens must lie in 0 \.\. 63"),
        ({"tokens": np.array([[2**32 + 3]])}, "tokens has values that do not fit 32 bits"),
        ({"tokens": [[3, 4]], "lengths": [2**32 + 1]}, "lengths has values that do not fit"),
        ({"tokens": [[3] * 600]}, "tokens has rows of 600, the context is 512"),
        ({"tokens": [[3, 4]], "lengths": [3]}, r"lengths must be 1 numbers in 0 \.\. 2"),
        ({"tokens": [[3, 4]], "lengths": [1, 1]}, "lengths must be 1 numbers"),
        (
            {"tokens": [[3, 4]], "segment_ids": [[1]]},
            r"segment_ids must be non-negative and \[1, 2\]",
        ),
        (
            {"tokens": [[3, 4, 5]], "segment_ids": [[1, 2, 1]]},
            "uses an id for two separate segments",
        ),
        ({"tokens": [[3, 4]], "lengths": [2], "segment_ids": [[1, 1]]}, "exclude each other"),
    ],
)
def test_bad_logits_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        MODELS["tiny"].logits(**arguments)


def test_left_padding_is_turned_right():
    tokens, lengths = from_left_padded([[0, 0, 5, 6], [1, 2, 3, 4]], [[0, 0, 1, 1], [1, 1, 1, 1]])
    assert tokens[0, :2].tolist() == [5, 6] and lengths.tolist() == [2, 4]
    with pytest.raises(InputError, match="row 1 is not left-padded"):
        from_left_padded([[1, 2], [1, 2]], [[0, 1], [1, 0]])
    with pytest.raises(InputError, match=r"must be two equal \[B, S\]"):
        from_left_padded([[1, 2]], [1, 1])


def test_logits_are_traced_once_per_shape():
    chex.clear_trace_counter()
    model, before = MODELS["tiny"], logits._cache_size()
    for seed in range(3):
        logits(model.params, model.config, random_tokens(seed, 3, 5))
    assert logits._cache_size() == before + 1
