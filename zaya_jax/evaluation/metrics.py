"""What the scores of several samples a problem say: averages, pass@k, majorities, and how sure they
are."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from zaya_jax.reasoning.answers import majority

DRAWS = 100  # subsets of k samples whose majorities are averaged
LEVEL = 0.95


def avg_at_k(scores: np.ndarray) -> np.ndarray:
    """The mean score of each problem's samples: [problems, k] -> [problems]."""
    return np.asarray(scores, float).mean(axis=1)


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """The chance that one of k samples is correct, estimated without bias from n of them.

    That is the share of the subsets of k that hold a correct one: 1 - C(n-c, k) / C(n, k), here
    as a product of factors between 0 and 1 (arXiv 2107.03374, sec. 2.1).

    Args:
      correct: bool [problems, n].
      k: at most n.

    Returns:
      float [problems].
    """
    correct = np.asarray(correct, bool)
    n = correct.shape[1]
    _check_k(k, n)
    wrong = n - correct.sum(axis=1, keepdims=True)
    drawn = np.arange(k)
    return 1 - np.prod(np.maximum(wrong - drawn, 0) / (n - drawn), axis=1)


def maj_at_k(
    answers: Sequence[Sequence[str | None]],
    correct: np.ndarray,
    logprobs: np.ndarray,
    k: int,
    draws: int = DRAWS,
) -> np.ndarray:
    """The chance that the most frequent answer of k samples is correct.

    It is averaged over random subsets of k of the n samples, always the same ones; for k = n there
    is one vote.

    Args:
      answers: of each problem's n samples, in the form in which they are compared; None does not
        vote.
      correct: bool [problems, n].
      logprobs: float [problems, n], of a sample's tokens on average: they settle ties.
      k: at most n.
      draws: subsets of each problem.

    Returns:
      float [problems].
    """
    correct = np.asarray(correct, bool)
    n = correct.shape[1]
    _check_k(k, n)
    random = np.random.default_rng(0)
    subsets = [random.permutation(n)[:k] for _ in range(draws)] if k < n else [np.arange(n)]
    result = np.zeros(len(correct))
    for number, row in enumerate(answers):
        winners = [majority([row[i] for i in s], logprobs[number][s]) for s in subsets]
        right = [
            winner is not None and correct[number, subset[winner]]
            for winner, subset in zip(winners, subsets, strict=True)
        ]
        result[number] = np.mean(right)
    return result


def interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float] | None:
    """A confidence interval for the mean of values that lie in 0 .. 1, one a problem.

    The problems are the sample; several answers to one problem only make its value more certain.
    It is Wilson's interval for n* problems with Student's t, where n* is the number of problems of
    which mean m has the standard error that the values show: m (1-m) / se^2. Unlike m +- t se it
    lies in 0 .. 1 and has a width where all values are equal (n* is their number then). None for
    one problem.
    """
    values = np.asarray(values, float)
    n = len(values)
    if n < 2:
        return None
    mean, variance = values.mean(), values.var(ddof=1) / n
    size = mean * (1 - mean) / variance if variance > 1e-12 else n
    t = student_t.ppf((1 + level) / 2, n - 1)
    shrink = 1 + t * t / size
    middle = (mean + t * t / (2 * size)) / shrink
    half = t / shrink * np.sqrt(mean * (1 - mean) / size + t * t / (4 * size * size))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def token_use(tokens: np.ndarray, finish_reasons: Sequence[str]) -> dict[str, Any]:
    """Tokens of samples: in all, on average, percentiles, and the share that was cut off by a
    budget or the context."""
    tokens = np.asarray(tokens)
    middle, ninety = np.percentile(tokens, [50, 90])
    return {
        "total": int(tokens.sum()),
        "mean": float(tokens.mean()),
        "median": float(middle),
        "p90": float(ninety),
        "max": int(tokens.max()),
        "truncated": sum(r in ("length", "context") for r in finish_reasons) / len(finish_reasons),
    }


def ks(samples: int) -> list[int]:
    """1, 2, 4, ... and the number of samples itself."""
    powers = [1 << i for i in range(samples.bit_length())]
    return sorted({*powers, samples} - {k for k in powers if k > samples})


def _check_k(k: int, samples: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(f"k must lie in 1 .. {samples}, got {k}")
