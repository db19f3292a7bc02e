"""Training examples: problems that are not held out, each with a worked solution of our own.

The solutions break a problem into steps that a model of a few million parameters can take one at a
time: sums digit by digit from the right, products row by row, Euclid's divisions, words letter by
letter.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from zaya_jax.evaluation.families import FAMILIES, SEED_STRIDE, Problem, is_held_out, problems

TRAINING_SEED = 200 * SEED_STRIDE


class Example(NamedTuple):
    """A question and the response to learn."""

    family: str
    question: str
    response: str


def examples(seed: int = 0) -> Iterator[Example]:
    """An endless mixture of all families in random order; seeds give different problems."""
    streams = {family: training_problems(family, seed) for family in FAMILIES}
    choices = random.Random(seed)
    while True:
        for family in choices.sample(list(FAMILIES), len(FAMILIES)):
            problem = next(streams[family])
            yield Example(family, problem.question, solution(problem))


def training_problems(family: str, seed: int = 0) -> Iterator[Problem]:
    """The problems of a family that are not held out."""
    everything = problems(family, TRAINING_SEED + seed * SEED_STRIDE)
    return itertools.filterfalse(lambda problem: is_held_out(problem.question), everything)


def solution(problem: Problem) -> str:
    """Reasoning and answer, in the form of a model's response.

    Raises:
      ValueError: if reasoning-gym does not give the worked answer full score.
    """
    steps, answer = SOLVERS[problem.family](problem)
    if problem.score(answer) != 1.0:
        raise ValueError(f"worked answer {answer!r} is wrong: {problem.question!r}")
    return "<think>\n" + "\n".join(steps) + f"\n</think>\n\n{answer}"


def _spell_backward(problem: Problem) -> tuple[list[str], str]:
    word = problem.entry["metadata"]["word"]
    numbered = [f"{number}{letter}" for number, letter in enumerate(word, 1)]
    return ["".join(reversed(numbered))], word[::-1]


def _chain_sum(problem: Problem) -> tuple[list[str], str]:
    first, *rest = problem.entry["metadata"]["expression"].split(" ")
    total, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        line, total = _signed_sum(total, int(sign + term))
        steps.append(line)
    return steps, str(total)


def _products(problem: Problem) -> tuple[list[str], str]:
    first, second = problem.entry["metadata"]["expression"].split(" * ")
    tens, units = second
    rows = [int(first) * int(units), int(first) * int(tens) * 10]
    line, total = _signed_sum(*rows)
    return [_digit_product(first, units), _digit_product(first, tens), line], str(total)


def _gcd(problem: Problem) -> tuple[list[str], str]:
    small, large = sorted(problem.entry["metadata"]["numbers"])
    steps = []
    while small:
        quotient, remainder = divmod(large, small)
        steps.append(f"{large}-{quotient}*{small}={remainder}")
        large, small = small, remainder
    return steps, str(large)


def _base_conversion(problem: Problem) -> tuple[list[str], str]:
    facts = problem.entry["metadata"]
    source, target = facts["source_base"], facts["target_base"]
    value, into_decimal = 0, []
    for digit in facts["source_repr"]:
        into_decimal.append(f"{value}*{source}+{digit}={value * source + int(digit)}")
        value = value * source + int(digit)
    digits, out_of_decimal = "", []
    while value:
        out_of_decimal.append(f"{value}/{target}={value // target}r{value % target}")
        digits = str(value % target) + digits
        value //= target
    return [" ".join(into_decimal), " ".join(out_of_decimal)], digits


SOLVERS: dict[str, Callable[[Problem], tuple[list[str], str]]] = {
    "spell_backward": _spell_backward,
    "chain_sum": _chain_sum,
    "long_chain_sum": _chain_sum,
    "products": _products,
    "gcd": _gcd,
    "base_conversion": _base_conversion,
}


def _signed_sum(a: int, b: int) -> tuple[str, int]:
    """Works out a + b as a sum or difference of two magnitudes; the line and the result."""
    large, small = sorted([a, b], key=abs, reverse=True)
    adds = (a < 0) == (b < 0)
    x, y = (abs(a), abs(b)) if adds else (abs(large), abs(small))
    task = f"{x}+{y}" if adds else f"{x}-{y}"
    work = _digit_sums(x, y) if adds else _digit_differences(x, y)
    return f"{f'-({task})' if large < 0 else task}: {work}: {a + b}", a + b


def _columns(x: int, y: int) -> Iterator[tuple[int, int]]:
    """The digits of two numbers in pairs, the last ones first."""
    pairs = itertools.zip_longest(reversed(str(x)), reversed(str(y)), fillvalue="0")
    return ((int(a), int(b)) for a, b in pairs)


def _digit_sums(x: int, y: int) -> str:
    steps, carry = [], 0
    for a, b in _columns(x, y):
        total = a + b + carry
        steps.append(f"{a}+{b}+{carry}={total}")
        carry = total // 10
    return " ".join(steps)


def _digit_differences(x: int, y: int) -> str:
    """x - y for x >= y; a step's minuend is what borrowing has made of the digit."""
    steps, borrow = [], 0
    for a, b in _columns(x, y):
        a -= borrow
        borrow = int(a < b)
        a += 10 * borrow
        steps.append(f"{a}-{b}={a - b}")
    return " ".join(steps)


def _digit_product(number: str, digit: str) -> str:
    steps, carry = [], 0
    for a in reversed(number):
        total = int(a) * int(digit) + carry
        steps.append(f"{a}*{digit}+{carry}={total}")
        carry = total // 10
    return " ".join(steps) + f": {int(number) * int(digit)}"
