"""The LM head's cross-entropy: its reference against all logits at once, and the kernels,
interpreted, against the reference."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import check_against_reference, check_by_differences, distance, gradients

from pallas_kernels.blocks import Blocks
from pallas_kernels.cross_entropy import api, kernel, reference

BOTH = pytest.mark.parametrize("implementation", ["xla", "pallas"])
TOKENS, SIZE, WORDS = 21, 40, 107  # no multiples of a block


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several tiles, splits and chunks, the last of each not full."""
    monkeypatch.setattr(reference, "CHUNK", 500)
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(kernel, "ALIGNMENT", 8)
    monkeypatch.setattr(kernel, "PROGRAMS", 4)
    monkeypatch.setattr(kernel, "DEFAULT", Blocks((16, 32, 16)))


def operands(tokens=TOKENS, size=SIZE, words=WORDS, scale=1.0, seed=0):
    """Hidden states, weight, targets and bias."""
    rng = np.random.default_rng(seed)
    hidden, weight, bias = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((tokens, size), (words, size), (words,))
    )
    return hidden * scale, weight, jnp.asarray(rng.integers(0, words, tokens), jnp.int32), bias


@partial(jax.jit, static_argnames="temperature")
def with_all_logits(hidden, weight, targets, bias=None, *, temperature=1.0):
    """The definition."""
    logits = jnp.einsum("td,vd->tv", hidden, weight, precision="highest")
    logits = (logits + (0 if bias is None else bias)) / temperature
    normalizer = jax.nn.logsumexp(logits, axis=1)
    counted = (targets >= 0) & (targets < len(weight))
    chosen = logits[jnp.arange(len(targets)), jnp.where(counted, targets, 0)]
    results = chosen - normalizer, normalizer
    return reference.CrossEntropy(*(jnp.where(counted, x, 0.0) for x in results))


@functools.cache
def op(implementation, temperature=1.0):
    """Compiled once for each shape."""
    options = {"implementation": implementation, "temperature": temperature}
    return jax.jit(partial(api.cross_entropy, **options))


@BOTH
@pytest.mark.parametrize(
    ("tokens", "size", "words"), [(1, 16, 33), (16, 32, 64), (21, 40, 107), (33, 16, 96)]
)
def test_results_and_gradients_are_those_of_all_logits(implementation, tokens, size, words):
    args = operands(tokens, size, words)[:3]
    check_against_reference(op(implementation), with_all_logits, args)


@BOTH
def test_temperature_and_bias(implementation):
    ours, theirs = op(implementation, temperature=0.7), partial(with_all_logits, temperature=0.7)
    check_against_reference(ours, theirs, operands())


@BOTH
def test_a_temperature_that_changes_needs_no_other_program(implementation):
    args = operands(5, 16, 33)
    ours = jax.jit(partial(api.cross_entropy, implementation=implementation))
    for temperature in (0.5, 1.3):
        found = ours(*args, temperature=jnp.float32(temperature))
        assert distance(found, with_all_logits(*args, temperature=temperature)) < 1e-5
    assert ours._cache_size() == 1


@BOTH
def test_no_tokens(implementation):
    hidden, weight, targets, bias = operands(5, 16, 33)
    args = hidden[:0], weight, targets[:0], bias
    check_against_reference(op(implementation), with_all_logits, args)


@BOTH
def test_targets_at_the_edges_of_tiles_splits_and_chunks(implementation):
    hidden, weight, _, bias = operands(tokens=16)
    edges = [0, 1, 15, 16, 23, 24, 31, 32, 47, 48, 63, 64, 95, 96, WORDS - 2, WORDS - 1]
    args = hidden, weight, jnp.asarray(edges, jnp.int32), bias
    check_against_reference(op(implementation), with_all_logits, args)


@BOTH
def test_tokens_without_a_target_give_zero_and_get_no_gradient(implementation):
    hidden, weight, targets, bias = operands()
    none = jnp.asarray([0, 5, 17, TOKENS - 1])
    args = hidden, weight, targets.at[none].set(jnp.asarray([-1, WORDS, -100, 1 << 30])), bias
    check_against_reference(op(implementation), with_all_logits, args)
    of_hidden = gradients(op(implementation), args)[0]
    for array in (*op(implementation)(*args), of_hidden):
        assert not np.asarray(array)[none].any()
        assert np.asarray(array).any()


@BOTH
def test_nothing_counts_if_all_tokens_are_masked(implementation):
    hidden, weight, targets, bias = operands()
    args = hidden, weight, jnp.full_like(targets, -1), bias
    for array in (*op(implementation)(*args), *gradients(op(implementation), args)):
        assert not np.asarray(array).any()


@BOTH
@pytest.mark.parametrize(("scale", "shift"), [(2000.0, 0.0), (1.0, -1e4)])
def test_logits_of_ten_thousand_do_not_overflow_or_vanish(implementation, scale, shift):
    hidden, weight, targets, bias = operands(scale=scale)
    args = hidden, weight, targets, bias + shift
    assert float(jnp.abs(hidden @ weight.T + shift).max()) > 1e4
    # A logit's rounding error, 1e-7 of 1e4, is one of its probability.
    check_against_reference(op(implementation), with_all_logits, args, tolerance=1e-2)
    assert distance(op(implementation)(*args), with_all_logits(*args)) < 1e-3


@BOTH
@pytest.mark.parametrize("words", [range(32, 64), range(96, WORDS), range(96)])
def test_words_of_bias_minus_infinity_have_no_probability(implementation, words):
    hidden, weight, _, bias = operands()
    target = next(word for word in (3, 97) if word not in words)
    args = hidden, weight, jnp.full((TOKENS,), target), bias.at[jnp.asarray(words)].set(-jnp.inf)
    check_against_reference(op(implementation), with_all_logits, args)


@BOTH
def test_a_masked_token_of_nan_stays_alone(implementation):
    hidden, weight, targets, bias = operands()
    args = hidden.at[4].set(jnp.nan), weight, targets.at[4].set(-1), bias
    zeroed = hidden.at[4].set(0.0), *args[1:]
    assert distance(op(implementation)(*args), op(implementation)(*zeroed)) == 0.0
    pairs = gradients(op(implementation), args), gradients(op(implementation), zeroed)
    assert distance(*pairs) == 0.0


@BOTH
def test_a_counted_token_of_nan_spoils_no_other_token(implementation):
    hidden, weight, targets, bias = operands()
    args = hidden.at[4].set(jnp.nan), weight, targets, bias
    for array in (*op(implementation)(*args), gradients(op(implementation), args)[0]):
        bad = np.isnan(np.asarray(array)).reshape(TOKENS, -1).any(axis=1)
        assert bad.tolist() == [i == 4 for i in range(TOKENS)]


@BOTH
def test_gradients_by_finite_differences(implementation):
    hidden, weight, targets, bias = operands(tokens=3, size=16, words=20, scale=0.3)
    f = op(implementation, temperature=1.3)
    check_by_differences(lambda h, w, b: f(h, w, targets, b), (hidden, weight, bias))


@BOTH
def test_all_logits_are_never_in_memory(implementation):
    args = operands()
    program = str(jax.make_jaxpr(lambda *a: gradients(op(implementation), a))(*args))
    assert f"[{TOKENS},{WORDS}]" not in program and f"[{WORDS},{TOKENS}]" not in program


def test_blocks_larger_than_the_arrays_and_one_chunk(monkeypatch):
    monkeypatch.undo()
    check_against_reference(kernel.cross_entropy, with_all_logits, operands())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_hidden_states_of_any_dtype_are_rounded_to_a_bfloat16_weight(dtype):
    """As close to the product of the rounded numbers in float32 as XLA's."""
    hidden, weight, targets, bias = operands(tokens=17, size=32, words=64, scale=0.3)
    args = hidden.astype(dtype), weight.astype(jnp.bfloat16), targets, bias
    rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (hidden, weight)]
    for results in (lambda f, a: f(*a), gradients):
        exact = results(with_all_logits, (*rounded, targets, bias))
        for ours, usual, best in zip(
            results(op("pallas"), args), results(op("xla"), args), exact, strict=True
        ):
            assert ours.dtype == usual.dtype
            ours, usual, best = (np.asarray(x, np.float64) for x in (ours, usual, best))
            assert np.std(ours - best) <= 1.05 * np.std(usual - best) + 1e-6 * np.std(best)
            assert np.std(usual - best) < 5e-3 * np.std(best)
