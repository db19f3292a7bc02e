"""Worked solutions of the problem families, in steps that a few million parameters can take.

Sums go digit by digit from the right, products row by row, divisions by one digit as long division,
words letter by letter. Euclid's algorithm subtracts in columns of a fixed width: what a token
depends on stands right before it, or as far back as in every other line.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from reasoning_gym.arithmetic.leg_counting import ANIMALS

from zaya_jax.evaluation.families import Problem


class Worked(NamedTuple):
    """Lines of reasoning, and the answer that they end in."""

    steps: list[str]
    answer: str


def worked(problem: Problem) -> Worked:
    """A problem's solution.

    Raises:
      ValueError: if reasoning-gym does not give the worked answer full score.
    """
    steps, answer = SOLVERS[problem.family](problem)
    if problem.score(answer) != 1.0:
        raise ValueError(f"worked answer {answer!r} is wrong: {problem.question!r}")
    return Worked(steps, answer)


def response(steps: Iterable[str], answer: str) -> str:
    """Reasoning and answer, in the form of a model's response."""
    return "<think>\n" + "\n".join(steps) + f"\n</think>\n\n{answer}"


def concluded(solved: Worked) -> str:
    """A response whose reasoning ends in the answer, so that its tail has it."""
    return response([*solved.steps, f"so {solved.answer}"], solved.answer)


def check(problem: Problem) -> list[str]:
    """Lines that reach the answer again on another way, or go back from it to the question."""
    return CHECKS[problem.family](problem)


Task = tuple[int | str, ...]


def task(problem: Problem) -> Task:
    """What a problem asks for, in whichever order and family: 12 * 34 is 34 * 12, and to simplify
    12/34 their common divisor must be found."""
    facts = problem.entry["metadata"]
    match problem.family:
        case "chain_sum" | "long_chain_sum" | "many_term_sum":
            return _sum_task(*_terms(problem))
        case "products":
            return _product_task(*_factors(problem))
        case "gcd":
            return ("divisor", *sorted(facts["numbers"]))
        case "fraction_simplification":
            return ("divisor", *sorted([facts["numerator"], facts["denominator"]]))
        case "base_conversion":
            value = int(facts["source_repr"], facts["source_base"])
            return ("digits", value, *sorted([facts["source_base"], facts["target_base"]]))
    return (problem.family, problem.question.lower())


def tasks(problem: Problem) -> set[Task]:
    """What is worked out in a problem's solution or check, itself among it."""
    found, facts = {task(problem)}, problem.entry["metadata"]
    match problem.family:
        case "chain_sum" | "long_chain_sum" | "many_term_sum":
            for terms in (_terms(problem), _terms(problem)[::-1]):
                totals = itertools.accumulate(terms)
                found |= {_sum_task(*pair) for pair in zip(totals, terms[1:], strict=False)}
        case "products":
            for first, second in itertools.permutations(_factors(problem)):
                tens, units = divmod(second, 10)
                found.add(_sum_task(first * units, first * tens * 10))
        case "gcd":
            divisor = int(problem.answer)
            found |= {_product_task(divisor, number // divisor) for number in facts["numbers"]}
    return found


def _sum_task(*terms: int) -> Task:
    return ("sum", *sorted(terms))


def _product_task(*factors: int) -> Task:
    return ("product", *sorted(factors))


def _spell_backward(problem: Problem) -> tuple[list[str], str]:
    word = problem.entry["metadata"]["word"]
    return [_numbered_backward(word)], word[::-1]


def _numbered_backward(word: str) -> str:
    return "".join(f"{number}{word[number - 1]}" for number in range(len(word), 0, -1))


def _chain_sum(problem: Problem) -> tuple[list[str], str]:
    steps, total = _running_sum(_terms(problem))
    return steps, str(total)


def _terms(problem: Problem) -> list[int]:
    first, *rest = problem.entry["metadata"]["expression"].split(" ")
    signed = zip(rest[::2], rest[1::2], strict=True)
    return [int(first), *(int(sign + term) for sign, term in signed)]


def _running_sum(terms: list[int]) -> tuple[list[str], int]:
    total, steps = terms[0], []
    for term in terms[1:]:
        line, total = _signed_sum(total, term)
        steps.append(line)
    return steps, total


def _products(problem: Problem) -> tuple[list[str], str]:
    first, second = _factors(problem)
    return _multiply(first, second), str(first * second)


def _factors(problem: Problem) -> tuple[int, int]:
    first, second = problem.entry["metadata"]["expression"].split(" * ")
    return int(first), int(second)


def _multiply(first: int, second: int) -> list[str]:
    """The lines of a product; `second` has one or two digits."""
    if second < 10:
        return [_digit_product(first, second)]
    tens, units = divmod(second, 10)
    line, _ = _signed_sum(first * units, first * tens * 10)
    return [_digit_product(first, units), _digit_product(first, tens), line]


def _gcd(problem: Problem) -> tuple[list[str], str]:
    steps, divisor = _euclid(*problem.entry["metadata"]["numbers"])
    return steps, str(divisor)


def _euclid(a: int, b: int) -> tuple[list[str], int]:
    """The greatest common divisor of two numbers below 1000, and the lines that find it.

    Subtracts the smaller number, or ten times it, while it has two digits; then divides.
    """
    large, small = max(a, b), min(a, b)
    steps = [f"{large}-{small}"]
    while small >= 10:
        taken = 10 * small if large >= 10 * small else small
        steps.append(difference_in_columns(large, taken))
        rest = large - taken
        large, small = max(rest, small), min(rest, small)
    while small > 1:
        steps.append(_long_division(large, small))
        large, small = small, large % small
    return steps, small or large


def difference_in_columns(x: int, y: int) -> str:
    """x - y for 0 <= y <= x < 1000, in three columns: digits of x, of y, of the difference.

    The units come first. Between two columns stands a minus where the second lends to the first,
    else a space: 240 - 129 is "091-421 211".
    """
    line, borrow = "", 0
    for place in (1, 10, 100):
        a, b = x // place % 10, y // place % 10
        rest = a - b - borrow
        borrow = int(rest < 0)
        line += f"{a}{b}{rest % 10}{'-' if borrow else ' '}"
    return line.rstrip()


def _fraction_simplification(problem: Problem) -> tuple[list[str], str]:
    facts = problem.entry["metadata"]
    numerator, denominator = facts["numerator"], facts["denominator"]
    steps, divisor = _euclid(numerator, denominator)
    steps += [_long_division(numerator, divisor), _long_division(denominator, divisor)]
    return steps, f"{numerator // divisor}/{denominator // divisor}"


def _base_conversion(problem: Problem) -> tuple[list[str], str]:
    facts = problem.entry["metadata"]
    return _convert(facts["source_repr"], facts["source_base"], facts["target_base"])


def _convert(digits: str, source: int, target: int) -> tuple[list[str], str]:
    """Horner's rule into decimal, then divisions: lines, and the digits in the target base."""
    value, steps = int(digits[0]), []
    for digit in digits[1:]:
        steps.append(_digit_product(value, source, int(digit)))
        value = value * source + int(digit)
    converted = ""
    while value:
        steps.append(_long_division(value, target))
        value, remainder = divmod(value, target)
        converted = str(remainder) + converted
    return steps, converted


def _letter_counting(problem: Problem) -> tuple[list[str], str]:
    facts = problem.entry["metadata"]
    line, count = _count(facts["target_letter"], facts["span"])
    return [line], str(count)


def _count(letter: str, words: Iterable[str]) -> tuple[str, int]:
    """The words, with a number behind the wanted letter wherever it occurs."""
    count, marked = 0, ""
    for character in " ".join(words):
        marked += character
        if character.lower() == letter:
            count += 1
            marked += str(count)
    return marked, count


def _leg_counting(problem: Problem) -> tuple[list[str], str]:
    steps, total = _legs(problem.entry["metadata"]["animals"].items())
    return steps, str(total)


def _legs(animals: Iterable[tuple[str, int]]) -> tuple[list[str], int]:
    total, steps = 0, []
    for place, (name, count) in enumerate(animals):
        legs = count * ANIMALS[name]
        plural = "s" if count > 1 else ""  # as the question has it
        line = f"{count} {name}{plural} {count}*{ANIMALS[name]}={legs}"
        steps.append(line if place == 0 else f"{line} {total}+{legs}={total + legs}")
        total += legs
    return steps, total


SOLVERS: dict[str, Callable[[Problem], tuple[list[str], str]]] = {
    "spell_backward": _spell_backward,
    "chain_sum": _chain_sum,
    "long_chain_sum": _chain_sum,
    "many_term_sum": _chain_sum,
    "products": _products,
    "gcd": _gcd,
    "base_conversion": _base_conversion,
    "letter_counting": _letter_counting,
    "leg_counting": _leg_counting,
    "fraction_simplification": _fraction_simplification,
}


def _check_spelling(problem: Problem) -> list[str]:
    return [_numbered_backward(problem.answer)]


def _check_sum(problem: Problem) -> list[str]:
    return _running_sum(_terms(problem)[::-1])[0]


def _check_product(problem: Problem) -> list[str]:
    first, second = _factors(problem)
    return _multiply(second, first)


def _check_divisor(problem: Problem) -> list[str]:
    divisor = int(problem.answer)
    numbers = problem.entry["metadata"]["numbers"]
    return _multiples(divisor, [number // divisor for number in numbers])


def _check_fraction(problem: Problem) -> list[str]:
    facts = problem.entry["metadata"]
    reduced = [facts["simplified_numerator"], facts["simplified_denominator"]]
    return _multiples(facts["reduction_factor"], reduced)


def _multiples(factor: int, numbers: Iterable[int]) -> list[str]:
    lines = (_multiply(max(factor, number), min(factor, number)) for number in numbers)
    return list(itertools.chain.from_iterable(lines))


def _check_conversion(problem: Problem) -> list[str]:
    facts = problem.entry["metadata"]
    return _convert(problem.answer, facts["target_base"], facts["source_base"])[0]


def _check_letters(problem: Problem) -> list[str]:
    facts = problem.entry["metadata"]
    return [_count(facts["target_letter"], reversed(facts["span"]))[0]]


def _check_legs(problem: Problem) -> list[str]:
    return _legs(reversed(problem.entry["metadata"]["animals"].items()))[0]


CHECKS: dict[str, Callable[[Problem], list[str]]] = {
    "spell_backward": _check_spelling,
    "chain_sum": _check_sum,
    "long_chain_sum": _check_sum,
    "many_term_sum": _check_sum,
    "products": _check_product,
    "gcd": _check_divisor,
    "base_conversion": _check_conversion,
    "letter_counting": _check_letters,
    "leg_counting": _check_legs,
    "fraction_simplification": _check_fraction,
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


def _digit_product(number: int, digit: int, carry: int = 0) -> str:
    """number * digit + carry, digit by digit; the result follows where there was more than one."""
    steps, value = [], number * digit + carry
    for a in reversed(str(number)):
        total = int(a) * digit + carry
        steps.append(f"{a}*{digit}+{carry}={total}")
        carry = total // 10
    return _with_result(steps, str(value))


def _long_division(number: int, divisor: int) -> str:
    """Quotient and remainder, digit by digit from the left, leading zeros of the quotient left out.

    A divisor of one digit keeps every step within the multiplication table.
    """
    steps: list[str] = []
    rest = 0
    for place, digit in enumerate(str(number), 1):
        rest = 10 * rest + int(digit)
        if steps or rest >= divisor or place == len(str(number)):
            steps.append(f"{rest}/{divisor}={rest // divisor}r{rest % divisor}")
            rest %= divisor
    return _with_result(steps, f"{number // divisor}r{number % divisor}")


def _with_result(steps: list[str], result: str) -> str:
    line = " ".join(steps)
    return f"{line}: {result}" if len(steps) > 1 else line
