"""Greedy accuracy on held-out problems."""

import dataclasses
import time
from collections.abc import Sequence

from zaya_jax.evaluation.families import Problem, best_constant_accuracy
from zaya_jax.generation.rows import Generation
from zaya_jax.zaya import Zaya

BATCH = 128
MAX_NEW_TOKENS = 192  # longer than any worked solution


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


def evaluate(model: Zaya, problems: Sequence[Problem]) -> list[FamilyResult]:
    """Answers every problem greedily; one result for each family, in the order of appearance."""
    families = dict.fromkeys(problem.family for problem in problems)
    return [
        _evaluate_family(model, [problem for problem in problems if problem.family == family])
        for family in families
    ]


def answer_all(model: Zaya, problems: Sequence[Problem]) -> list[Generation]:
    """Greedy generations, one per problem; `generation.answer.text` is the answer."""
    generations = []
    for start in range(0, len(problems), BATCH):
        prompts = [
            [{"role": "user", "content": problem.question}]
            for problem in problems[start : start + BATCH]
        ]
        generations += model.generate(prompts, max_new_tokens=MAX_NEW_TOKENS, temperature=0)
    return generations


def _evaluate_family(model: Zaya, problems: Sequence[Problem]) -> FamilyResult:
    begin = time.perf_counter()
    generations = answer_all(model, problems)
    seconds = time.perf_counter() - begin
    correct = [
        problem.score(generation.answer.text) == 1.0
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
