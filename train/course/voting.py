"""Examples from which the course's model learns to aggregate: vote, or try again.

The model is small, so what it is to learn depends on nothing but what it sees. Where one answer
is more frequent among the candidates than every other, the response is that answer; where none is,
it is a solution on another way, whose mistakes are others than those of the candidates. Examples
in which the vote would be wrong are left out.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

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
UNANIMOUS = 0.3  # of the examples in which all candidates agree are kept


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
    end = tokenizer.encode(tokenizer.end_tokens[0])
    for question, group in by_question(answers):
        random = Random(f"{seed} {question}")
        texts = [tokenizer.decode(one["tokens"]) for one in group]
        given = [_answer(text, number) for number, text in enumerate(texts)]
        right = {a for a, one in zip(given, group, strict=True) if one["score"] == 1}
        for _ in range(each if len(group) >= SETTINGS.C else 0):
            later, shown, tails = random.random() < LATER, [], []
            for place in random.sample(range(len(group)), SETTINGS.C):
                answer, tokens = given[place], group[place]["tokens"]
                if later and (voted := most(random.sample(given, SETTINGS.C))):
                    answer, tokens = voted, tokenizer.encode(vote(voted))
                shown.append(answer)
                tails.append(prompts.tail(tokens, SETTINGS.tau))
            top = most(shown)
            if (top and top not in right) or (
                len(set(shown)) == 1 and random.random() >= UNANIMOUS
            ):
                continue
            text = vote(top) if top else group[0]["target"]
            response = [*tokenizer.encode(text), *end]
            yield {"prompt": prompts.aggregation(question, tails).tokens, "response": response}


def vote(answer: str) -> str:
    """The response that only names an answer."""
    return f"<think>\nso {answer}\n</think>\n\n{answer}"


def most(answers: list[str]) -> str | None:
    """The answer that is there more often than every other one; None where there is no such."""
    (top, votes), *others = Counter(answers).most_common(2)
    return top if votes > max([1, *(count for _, count in others)]) else None


def _answer(text: str, number: int) -> str:
    """A response's answer; where it has none, something that no other one has."""
    answer = text.partition("</think>\n\n")[2].partition("<|im_end|>")[0]
    return answer or f"none {number}"
