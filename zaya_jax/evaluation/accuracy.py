"""Greedy accuracy on held-out problems."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from zaya_jax.evaluation.families import Problem, best_constant_accuracy
from zaya_jax.generation.rows import Generation
from zaya_jax.zaya import Prompt, Zaya

BATCH = 128
MAX_NEW_TOKENS = 320  # longer than any worked solution


class Form(NamedTuple):
    """How a question is put to a model, and its answer read from what it generates."""

    prompt: Callable[[str], Prompt]
    answer: Callable[[Generation], str]


def text_question(question: str) -> str:
    """How texts of a question, steps and "Answer: ..." begin."""
    return f"{question.strip()}\n\n"


CHAT = Form(
    prompt=lambda question: [{"role": "user", "content": question}],
    answer=lambda generation: generation.answer.text,
)
# For a model that has seen no chats yet.
TEXT = Form(
    prompt=lambda question: f"<bos>{text_question(question)}",
    answer=lambda generation: (generation.text or "").rpartition("Answer: ")[2].strip(),
)


@dataclasses.dataclass(frozen=True)
class FamilyResult:
    """What a model made of the problems of one family.

    Attributes:
      accuracy: share of answers with reasoning-gym's full score.
      constant: accuracy of always giving these problems' most common answer.
      tokens: generated, reasoning included.
      seconds: of generation, compilation included.
    """

    family: str
    problems: int
    accuracy: float
    constant: float
    tokens: int
    seconds: float


def evaluate(model: Zaya, problems: Sequence[Problem], form: Form = CHAT) -> list[FamilyResult]:
    """Answers every problem greedily; one result for each family, in the order of appearance."""
    families = dict.fromkeys(problem.family for problem in problems)
    return [
        _evaluate_family(model, [p for p in problems if p.family == family], form)
        for family in families
    ]


def answer_all(model: Zaya, problems: Sequence[Problem], form: Form = CHAT) -> list[Generation]:
    """Greedy generations, one per problem; `form.answer` reads an answer from each."""
    return model.generate(
        [form.prompt(problem.question) for problem in problems],
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=0,
        batch_size=min(BATCH, len(problems)),
    )


def _evaluate_family(model: Zaya, problems: Sequence[Problem], form: Form) -> FamilyResult:
    begin = time.perf_counter()
    generations = answer_all(model, problems, form)
    seconds = time.perf_counter() - begin
    correct = [
        problem.score(form.answer(generation)) == 1.0
        for problem, generation in zip(problems, generations, strict=True)
    ]
    return FamilyResult(
        problems[0].family,
        len(problems),
        sum(correct) / len(problems),
        best_constant_accuracy(problems),
        sum(len(generation.tokens) for generation in generations),
        seconds,
    )
