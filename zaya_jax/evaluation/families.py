"""Problem families from reasoning-gym, and the problems that are held out of all training.

Item i of a reasoning-gym dataset with seed s is item 0 of seed s + i, so datasets are only distinct
where their seeds lie further apart than either is long: ours are `SEED_STRIDE` apart. Small
families still repeat questions by chance, so training also leaves out whatever `is_held_out`.
"""

import dataclasses
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from zaya_jax.errors import InputError, ZayaError

SEED_STRIDE = 10_000_000
HELD_OUT_SEED = 100 * SEED_STRIDE
RESERVED = 500  # problems of each family that training never sees


@dataclasses.dataclass(frozen=True)
class Family:
    """A reasoning-gym dataset with the settings that make it a nano model's size."""

    dataset: str
    settings: dict[str, int | tuple[str, ...]]


FAMILIES = {
    "spell_backward": Family("spell_backward", {"max_word_len": 8}),
    "chain_sum": Family("chain_sum", {"max_terms": 2, "min_digits": 2, "max_digits": 3}),
    "long_chain_sum": Family(
        "chain_sum", {"min_terms": 3, "max_terms": 4, "min_digits": 2, "max_digits": 3}
    ),
    "products": Family("products", {"min_digits": 2, "max_digits": 2}),
    "gcd": Family("gcd", {"min_value": 2, "max_value": 299}),
    "base_conversion": Family("base_conversion", {"max_base": 9, "min_value": 1, "max_value": 255}),
    "letter_counting": Family("letter_counting", {"min_words": 4, "max_words": 8}),
    "leg_counting": Family(
        "leg_counting", {"min_animals": 2, "max_animals": 3, "max_instances": 9}
    ),
    "fraction_simplification": Family(
        "fraction_simplification",
        {"max_value": 49, "min_factor": 2, "max_factor": 9, "styles": ("plain",)},
    ),
}

# Trained on for their length, and not reported.
PRACTICE = {
    "many_term_sum": Family(
        "chain_sum", {"min_terms": 5, "max_terms": 40, "min_digits": 2, "max_digits": 3}
    ),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question with its expected answer; `entry` is reasoning-gym's item."""

    family: str
    question: str
    answer: str
    entry: dict[str, Any]

    def score(self, answer: str) -> float:
        """reasoning-gym's own score of an answer, 1.0 for a correct one."""
        return float(_dataset(self.family, HELD_OUT_SEED).score_answer(answer, self.entry))


def problems(family: str, seed: int) -> Iterator[Problem]:
    """The problems of a family, `SEED_STRIDE` of them; seeds as far apart give different ones."""
    dataset = _dataset(family, seed)
    for index in range(SEED_STRIDE):
        entry = dataset[index]
        yield Problem(family, entry["question"], entry["answer"], entry)


def held_out(family: str, count: int = RESERVED) -> list[Problem]:
    """The first `count` of a family's held-out problems, no two of them alike.

    Raises:
      InputError: an unknown family, or more problems than are reserved.
    """
    if not 0 < count <= RESERVED:
        raise InputError(f"each family has {RESERVED} held-out problems, {count} were asked for")
    return list(_reserved(family)[:count])


def held_out_problems(count: int = 200) -> list[Problem]:
    """`count` held-out problems, the families in turn."""
    each = -(-count // len(FAMILIES))
    rounds = zip(*(held_out(family, each) for family in FAMILIES), strict=True)
    return list(itertools.chain.from_iterable(rounds))[:count]


def is_held_out(question: str) -> bool:
    """True for every held-out question, and for those with the same `fingerprint`."""
    return fingerprint(question) in _held_out_fingerprints()


def fingerprint(question: str) -> str:
    """A hash of a question's words and numbers in any order, signs and capitals left out: 38 * 47
    is 47 * 38."""
    words = sorted(re.findall(r"\w+", question.lower()))
    return hashlib.sha256(" ".join(words).encode()).hexdigest()


def best_constant_accuracy(problems: Sequence[Problem]) -> float:
    """Accuracy of giving the most common answer of these problems to each of them."""
    counts = Counter(problem.answer for problem in problems)
    return max(counts.values()) / len(problems)


@cache
def distinct_answers(family: str, sample: int = 50_000) -> int:
    """How many different answers a sample of the family's problems has."""
    drawn = itertools.islice(problems(family, HELD_OUT_SEED), sample)
    return len({problem.answer for problem in drawn})


@cache
def _reserved(family: str) -> tuple[Problem, ...]:
    found: dict[str, Problem] = {}
    for problem in problems(family, HELD_OUT_SEED):
        found.setdefault(fingerprint(problem.question), problem)
        if len(found) == RESERVED:
            break
    return tuple(found.values())


@cache
def _held_out_fingerprints() -> frozenset[str]:
    return frozenset(
        fingerprint(problem.question)
        for family in FAMILIES | PRACTICE
        for problem in _reserved(family)
    )


@cache
def _dataset(family: str, seed: int) -> Any:
    if family not in (known := FAMILIES | PRACTICE):
        raise InputError(f"unknown problem family {family!r}: one of {', '.join(known)}")
    try:
        import reasoning_gym
    except ImportError:
        raise ZayaError(
            "the problems need reasoning-gym: pip install zaya-jax[evaluation]"
        ) from None
    kind = known[family]
    return reasoning_gym.create_dataset(kind.dataset, seed=seed, size=SEED_STRIDE, **kind.settings)
