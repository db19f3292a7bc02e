"""avg@k, pass@k, majorities and their intervals, on plain arrays."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from zaya_jax.evaluation.metrics import (
    avg_at_k,
    interval,
    ks,
    maj_at_k,
    majority,
    pass_at_k,
    token_use,
)

outcomes = st.tuples(st.integers(1, 4), st.integers(1, 7)).flatmap(
    lambda shape: arrays(bool, shape)
)


@given(outcomes)
def test_pass_at_1_is_the_average(correct):
    np.testing.assert_allclose(pass_at_k(correct, 1), avg_at_k(correct))


@given(outcomes)
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(correct):
    n = correct.shape[1]
    for k in range(1, n + 1):
        subsets = [
            row[list(s)].any() for row in correct for s in itertools.combinations(range(n), k)
        ]
        counted = np.reshape(subsets, (len(correct), -1)).mean(axis=1)
        np.testing.assert_allclose(pass_at_k(correct, k), counted)


@given(outcomes)
def test_pass_at_k_grows_with_k(correct):
    values = [pass_at_k(correct, k) for k in range(1, correct.shape[1] + 1)]
    assert (np.diff(values, axis=0) >= -1e-12).all()
    np.testing.assert_array_equal(values[-1], correct.any(axis=1))


def test_pass_at_k_is_exact_where_binomials_would_overflow():
    correct = np.arange(20_000)[None] < 1
    np.testing.assert_allclose(pass_at_k(correct, 5_000), 0.25)


def test_more_samples_than_there_are_is_an_error():
    with pytest.raises(ValueError, match=r"k must lie in 1 \.\. 3, got 4"):
        pass_at_k(np.ones((2, 3)), 4)
    with pytest.raises(ValueError, match="got 0"):
        maj_at_k([["a"]], np.ones((1, 1)), np.zeros((1, 1)), 0)


def test_majority_counts_first_and_settles_ties_by_mean_log_probability():
    assert majority(["a", "b", "a"], [-9, -1, -8]) == 2
    assert majority(["a", "b"], [-2, -1]) == 1
    assert majority(["a", "a", "b", "b"], [-1, -5, -2, -2]) == 2
    assert majority([None, None, "a"], [-1, -1, -9]) == 2
    assert majority([None, None], [-1, -1]) is None


def test_maj_at_k_of_all_samples_is_one_vote():
    answers = [["a", "b", "b"], ["a", "b", None], [None, None, None]]
    correct = np.array([[0, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
    logprobs = np.array([[-1.0, -2, -2], [-1, -2, -1], [-1, -1, -1]])
    assert maj_at_k(answers, correct, logprobs, 3).tolist() == [1, 1, 0]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_maj_at_k_averages_over_subsets(seed):
    random = np.random.default_rng(seed)
    answers = [list(map(str, random.integers(0, 3, 6)))]
    correct = np.array([[answer == "0" for answer in answers[0]]])
    logprobs = -random.random((1, 6))
    votes = []
    for subset in itertools.combinations(range(6), 3):
        winner = majority([answers[0][i] for i in subset], logprobs[0][list(subset)])
        votes.append(answers[0][subset[winner]] == "0")
    (estimate,) = maj_at_k(answers, correct, logprobs, 3, draws=2_000)
    assert estimate == pytest.approx(np.mean(votes), abs=0.06)


@pytest.mark.parametrize("problems", [8, 30, 200])
@pytest.mark.parametrize("samples", [1, 8])
@pytest.mark.parametrize("spread", [(1, 1), (8, 1), (1, 3)])
def test_intervals_cover_the_true_mean_of_all_problems(problems, samples, spread):
    """Each problem has its own chance of being solved, from a beta distribution."""
    random = np.random.default_rng(0)
    truth, trials, covered = spread[0] / sum(spread), 400, 0
    for _ in range(trials):
        chances = random.beta(*spread, size=problems)
        bounds = interval(random.binomial(samples, chances) / samples)
        covered += bounds[0] <= truth <= bounds[1]
    assert covered / trials >= 0.93


def test_several_samples_of_a_problem_do_not_count_as_problems():
    """Repeating each answer eight times changes nothing."""
    correct = np.random.default_rng(0).random((40, 1)) < 0.6
    assert interval(avg_at_k(np.repeat(correct, 8, axis=1))) == interval(avg_at_k(correct))


def test_intervals_at_the_ends():
    low, high = interval(np.ones(20))
    assert 0.7 < low < 0.9 and high == 1
    low, high = interval(np.zeros(20))
    assert low == 0 and 0.1 < high < 0.3
    assert interval(np.ones(1)) is None
    assert np.diff(interval(np.full(2000, 0.5)))[0] < 0.05


def test_tokens():
    use = token_use(np.array([1, 2, 3, 10]), ["stop", "length", "stop", "context"])
    assert use["total"] == 16 and use["mean"] == 4 and use["median"] == 2.5
    assert use["max"] == 10 and use["truncated"] == 0.5


def test_ks_are_powers_of_two_and_the_whole():
    assert ks(1) == [1] and ks(8) == [1, 2, 4, 8] and ks(6) == [1, 2, 4, 6]
