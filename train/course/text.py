"""Short texts made from templates: letters, words, counting, number facts, small stories.

No text is downloaded, so that the course runs anywhere and is the same everywhere. The facts are
those that the worked solutions build on. They keep to numbers that no held-out question is about:
sums and products of digits, and no word that is to be spelled.
"""

# ruff: noqa: SIM905  (words in a row are easier to read than a column of strings)

from collections.abc import Callable, Iterator
from random import Random

from reasoning_gym.arithmetic.leg_counting import ANIMALS

from train.course.solutions import difference_in_columns

LETTERS = "abcdefghijklmnopqrstuvwxyz"
UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NAMES = "Ada Ben Cleo Dan Eva Finn Gina Hugo Iris Jon Kim Leo Mia Nils Olga Paul".split()
THINGS = "apples books coins cups eggs keys leaves nuts pens shells stamps stones".split()
PLACES = "market school river garden station bakery library harbour".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
KINDS = "big small old new red blue green quiet".split()

Words = Iterator[str]


def document(random: Random, words: Words, longest: int) -> str:
    """A few texts about one or two subjects, one a line.

    Args:
      random: what the choices are drawn from.
      words: endless, for spelling.
      longest: bytes that the document has at most; at least 100.
    """
    subjects = random.sample(SUBJECTS, random.choice([1, 1, 2]))
    lines: list[str] = []
    while True:
        line = random.choice(subjects)(random, words)
        if len("\n".join([*lines, line]).encode()) > longest or len(lines) == 8:
            return "\n".join(lines)
        lines.append(line)


def _alphabet(random: Random, words: Words) -> str:
    first = random.randrange(len(LETTERS) - 6)
    last = random.randint(first + 3, min(first + 12, len(LETTERS) - 1))
    run = LETTERS[first : last + 1]
    if random.random() < 0.3:
        return f"The alphabet backward from {run[-1]} to {run[0]}: {' '.join(reversed(run))}."
    return f"The alphabet from {run[0]} to {run[-1]}: {' '.join(run)}."


def _counting(random: Random, words: Words) -> str:
    step = random.choice([1, 1, 2, 3, 5, 10])
    start = random.randrange(200)
    numbers = [start + step * index for index in range(random.randint(4, 8))]
    by = "" if step == 1 else f" by {UNITS[step]}"
    if random.random() < 0.3:
        numbers.reverse()
        return f"Counting down{by}: {' '.join(map(str, numbers))}."
    return f"Counting{by}: {' '.join(map(str, numbers))}."


def _number_names(random: Random, words: Words) -> str:
    number = random.randrange(100)
    tens, units = divmod(number, 10)
    name = UNITS[number] if number < 20 else TENS[tens - 2] + (f"-{UNITS[units]}" if units else "")
    return random.choice([f"{number} is {name}.", f"{name.capitalize()} is written {number}."])


def _sums(random: Random, words: Words) -> str:
    a, b, carry = random.randrange(10), random.randrange(10), random.randrange(2)
    return random.choice([f"{a}+{b}+{carry}={a + b + carry}", f"{a + b}-{b}={a}"])


def _times_table(random: Random, words: Words) -> str:
    a, b, carry = random.randrange(10), random.randrange(10), random.randrange(9)
    return f"{a}*{b}+{carry}={a * b + carry}"


def _divisions(random: Random, words: Words) -> str:
    divisor = random.randint(2, 9)
    number = random.randrange(10 * divisor)
    return f"{number}/{divisor}={number // divisor}r{number % divisor}"


def _differences(random: Random, words: Words) -> str:
    small, large = sorted(random.randrange(450) for _ in range(2))
    return f"{large}-{small}\n{difference_in_columns(large, small)}"


def _order(random: Random, words: Words) -> str:
    numbers = random.sample(range(300), random.randint(2, 4))
    if len(numbers) == 2:
        return f"{min(numbers)} is less than {max(numbers)}."
    return f"In order: {' '.join(map(str, sorted(numbers)))}."


def _legs(random: Random, words: Words) -> str:
    name = random.choice(list(ANIMALS))
    legs, count = ANIMALS[name], random.randint(1, 9)
    return f"One {name} has {legs} legs. {name} {count}*{legs}={count * legs}"


def _spelling(random: Random, words: Words) -> str:
    word = next(words)
    letter = random.choice(word)
    return random.choice(
        [
            f"The word {word} has {len(word)} letters: {' '.join(word)}.",
            f"{word.capitalize()} begins with {word[0]} and ends with {word[-1]}.",
            f'The letter "{letter}" appears {word.count(letter)} times in {word}.',
        ]
    )


def _story(random: Random, words: Words) -> str:
    name, other = random.sample(NAMES, 2)
    things, has = random.choice(THINGS), random.randint(2, 9)
    more, given = random.randint(1, 9), random.randint(1, has)
    return random.choice(
        [
            f"{name} has {has} {things} and finds {more} more. Now {name} has {has + more}.",
            f"{name} has {has} {things} and gives {other} {given}. Now {name} has {has - given}.",
        ]
    )


def _walk(random: Random, words: Words) -> str:
    name, other = random.sample(NAMES, 2)
    first, second = random.sample(KINDS, 2)
    day, place = random.choice(DAYS), random.choice(PLACES)
    things = random.choice(THINGS)
    return f"On {day} {name} meets {other} at the {first} {place} and buys {second} {things}."


SUBJECTS: tuple[Callable[[Random, Words], str], ...] = (
    _alphabet,
    _counting,
    _number_names,
    _sums,
    _times_table,
    _divisions,
    _differences,
    _order,
    _legs,
    _spelling,
    _story,
    _walk,
)
