"""The sampler: what each filter keeps, and that a row's randomness is its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zaya_jax import InputError
from zaya_jax.generation.sampling import Request, Sampling, sample

VOCAB = 12
draw = jax.jit(sample)


def request(batch, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seed=0, ids=None):
    def full(value, dtype):
        return jnp.full(batch, value, dtype)

    return Request(
        jnp.arange(batch) if ids is None else jnp.asarray(ids),
        full(seed, jnp.uint32),
        full(temperature, jnp.float32),
        full(top_p, jnp.float32),
        full(top_k, jnp.int32),
        full(min_p, jnp.float32),
        full(-1, jnp.int32)[:, None],
        full(1, jnp.int32),
    )


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.integers(-6, 6), min_size=VOCAB, max_size=VOCAB, unique=False),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    top_k=st.integers(0, VOCAB),
    min_p=st.sampled_from([0.0, 0.1, 0.7]),
)
def test_only_kept_tokens_are_drawn_and_both_log_probabilities_are_theirs(
    logits, temperature, top_p, top_k, min_p
):
    """Against top-k, then top-p, then min-p written out for one row."""
    values = np.array(logits) + np.linspace(0, 0.5, VOCAB)  # no ties
    p = np.exp(values / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[: top_k or VOCAB]
    q = p[kept] / p[kept].sum()
    kept = kept[(np.cumsum(q) - q < top_p - 1e-9) | (top_p == 1)]
    kept = kept[p[kept] >= min_p * p.max()]
    rows = 64
    out = draw(
        jnp.tile(jnp.asarray(values, jnp.float32), (rows, 1)),
        request(rows, temperature, top_p, top_k, min_p),
        jnp.zeros(rows, jnp.int32),
    )
    token = np.asarray(out.token)
    close = np.isclose(np.cumsum(q) - q, top_p, atol=1e-5).any()
    assert close or set(token.tolist()) <= set(kept.tolist())
    np.testing.assert_allclose(out.logprob, np.log(p[token]), atol=1e-4)
    if not close:
        np.testing.assert_allclose(out.sampled_logprob, np.log(p[token] / p[kept].sum()), atol=1e-4)


def test_frequencies_follow_the_probabilities():
    rows, p = 4000, np.array([0.5, 0.3, 0.2])
    out = draw(
        jnp.tile(jnp.log(jnp.asarray(p, jnp.float32)), (rows, 1)),
        request(rows),
        jnp.zeros(rows, jnp.int32),
    )
    np.testing.assert_allclose(np.bincount(out.token) / rows, p, atol=0.03)


def test_a_rows_token_depends_on_its_seed_request_and_position_alone():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((4, VOCAB)), jnp.float32)
    positions = jnp.array([3, 9, 3, 7])
    out = draw(logits, request(4, ids=[5, 6, 7, 8]), positions)
    rows = jnp.array([2, 0, 3, 1])
    moved = draw(logits[rows], request(4, ids=[7, 5, 8, 6]), positions[rows])
    np.testing.assert_array_equal(np.asarray(out.token)[rows], moved.token)
    # A neighbour with filters changes nothing either.
    mixed = request(4, ids=[5, 6, 7, 8])._replace(top_k=jnp.array([0, 0, 0, 1]))
    np.testing.assert_array_equal(draw(logits, mixed, positions).token[:3], out.token[:3])

    def tokens(seed, start):
        wide = jnp.zeros((64, VOCAB))
        return np.asarray(
            draw(wide, request(64, seed=seed), start + jnp.zeros(64, jnp.int32)).token
        )

    assert (tokens(0, 0) != tokens(1, 0)).any() and (tokens(0, 0) != tokens(0, 1)).any()


def test_the_smallest_top_p_keeps_the_most_probable_token():
    logits = jnp.asarray(np.random.default_rng(2).standard_normal((8, VOCAB)), jnp.float32)
    out = draw(logits, request(8, top_p=1e-45), jnp.zeros(8, jnp.int32))
    np.testing.assert_array_equal(out.token, logits.argmax(-1))


def test_greedy_takes_the_most_probable_token():
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((8, VOCAB)), jnp.float32)
    out = draw(logits, request(8, temperature=0.0), jnp.zeros(8, jnp.int32))
    np.testing.assert_array_equal(out.token, logits.argmax(-1))
    np.testing.assert_array_equal(out.sampled_logprob, 0)
    np.testing.assert_allclose(out.logprob, jax.nn.log_softmax(logits).max(-1), atol=1e-6)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": -1},
        {"stop_tokens": [-1]},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": None},
        {"temperature": -1},
        {"temperature": 1e-6},
        {"temperature": "1"},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2},
        {"seed": -1},
        {"stop": ("",)},
        {"stop": [5]},
        {"stop": None},
    ],
)
def test_settings_out_of_range_are_named(bad):
    (name,) = bad
    with pytest.raises(InputError, match=f"{name} is out of range"):
        Sampling(**bad)
