"""Examples from which the course's model learns to aggregate by a vote.

The response names the answer that is more frequent among the candidates than every other one, or
of the most frequent ones that which is right. The model is small: it learns to see which answer
leads, but not whether any does, so it is not taught to solve the problem anew where none does.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple, Self

from train.aggregation import Rollout, by_question
from train.course.data import training_problems, write_lines
from train.course.phases import HELD_OUT_DOCUMENTS
from train.course.rollouts import rollouts
from zaya_jax.evaluation.families import FAMILIES, Problem, held_out
from zaya_jax.reasoning.prompts import Prompts
from zaya_jax.reasoning.settings import PRESETS
from zaya_jax.text.tokenizer import Tokenizer
from zaya_jax.zaya import Zaya

STREAM = 50  # of problems, which no other phase's documents are made of
FILE = "aggregation.jsonl"
SETTINGS = PRESETS["nano"]
LATER = 0.4  # of the examples show what candidates of a second round look like
TRIES = 40  # choices of candidates, of a question's rollouts
KEPT = {4: 0.02, 3: 0.5}  # of the choices in which so many candidates agree, which teach less


def write_examples(model: Zaya, folder: Path, count: int, seed: int = 0) -> None:
    """Writes `aggregation.jsonl` and `held_out/aggregation.jsonl`, of the model's own answers.

    Args:
      model: after the phase before.
      folder: of the course's data.
      count: examples.
      seed: of problems, sampling and choices.
    """
    assert model.tokenizer is not None
    trained = [training_problems(family, STREAM + seed) for family in FAMILIES]
    withheld = min(HELD_OUT_DOCUMENTS, count)
    problems = {
        folder / "held_out" / FILE: ([iter(held_out(family)) for family in FAMILIES], withheld),
        folder / FILE: (trained, count),  # the last, as its presence says that both are there
    }
    for file, (sources, wanted) in problems.items():
        drawn = rollouts(model, itertools.islice(_in_turn(sources), wanted), seed)
        part = file.with_suffix(".part")
        write_lines(part, voting_examples(drawn, model.tokenizer, seed=seed), wanted)
        part.replace(file)


def _in_turn(sources: list[Iterator[Problem]]) -> Iterator[Problem]:
    return itertools.chain.from_iterable(zip(*sources, strict=False))


def voting_examples(
    answers: Iterable[Rollout], tokenizer: Tokenizer, each: int = 10, seed: int = 0
) -> Iterator[dict[str, list[int]]]:
    """Examples of format "tokens", at most `each` of a question; see `rollouts`."""
    prompts = Prompts(tokenizer)
    for question, group in by_question(answers):
        if len(group) >= SETTINGS.C:
            found = _of_question(question, group, prompts, tokenizer, Random(f"{seed} {question}"))
            yield from itertools.islice(found, each)


def _of_question(
    question: str, group: Sequence[Rollout], prompts: Prompts, tokenizer: Tokenizer, random: Random
) -> Iterator[dict[str, list[int]]]:
    end = tokenizer.encode(tokenizer.end_tokens[0])
    given = [_Answered.of(one["tokens"], tokenizer) for one in group]
    right = {one.answer for one, rollout in zip(given, group, strict=True) if rollout["score"] == 1}
    for _ in range(TRIES):
        candidates = random.sample(given, SETTINGS.C)
        if random.random() < LATER:
            candidates = [_voted(given, tokenizer, random) or one for one in candidates]
        first = leading([one.answer for one in candidates])
        chosen = next((answer for answer in first if answer in right), None)
        agree = sum(one.answer == chosen for one in candidates)
        if chosen is not None and random.random() < KEPT.get(agree, 1):
            tails = [prompts.tail(one.tokens, SETTINGS.tau) for one in candidates]
            response = [*tokenizer.encode(vote(chosen)), *end]
            yield {"prompt": prompts.aggregation(question, tails).tokens, "response": response}


class _Answered(NamedTuple):
    """A response, and its answer; None where it has none."""

    tokens: list[int]
    answer: str | None

    @classmethod
    def of(cls, tokens: list[int], tokenizer: Tokenizer) -> Self:
        _, _, answer = tokenizer.decode(tokens).partition("</think>\n\n")
        return cls(tokens, answer.removesuffix(tokenizer.end_tokens[0]) or None)


def _voted(given: Sequence[_Answered], tokenizer: Tokenizer, random: Random) -> _Answered | None:
    """What a candidate of a second round would be; None where the first round has no vote."""
    match leading([one.answer for one in random.sample(given, SETTINGS.C)]):
        case [answer]:
            return _Answered(tokenizer.encode(vote(answer)), answer)
    return None


def vote(answer: str) -> str:
    """The response that only names an answer."""
    return f"<think>\nso {answer}\n</think>\n\n{answer}"


def leading(answers: Iterable[str | None]) -> list[str]:
    """The most frequent answers."""
    counts = Counter(answer for answer in answers if answer is not None)
    return [answer for answer in counts if counts[answer] == max(counts.values())]
