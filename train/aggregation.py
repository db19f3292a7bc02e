"""Examples that teach a model to aggregate candidates, made from rollouts.

Rollouts of one question are grouped; C of them are shown as they are in Markovian RSA, and a
verified response is to be learned (arXiv 2605.05365). What comes out is read as a source of format
"tokens", since candidates are token ids that another tokenisation of their text need not give.

    python -m train.aggregation ROLLOUTS EXAMPLES --model CHECKPOINT
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import tyro

from zaya_jax.errors import DataError, ZayaError
from zaya_jax.loading import load_tokenizer
from zaya_jax.reasoning.prompts import Prompts
from zaya_jax.text.tokenizer import Tokenizer

Rollout = Mapping[str, Any]


def aggregation_examples(
    rollouts: Iterable[Rollout],
    tokenizer: Tokenizer,
    *,
    C: int = 4,
    tau: int = 4096,
    each: int = 1,
    seed: int = 0,
    template: Path | None = None,
) -> Iterator[dict[str, list[int]]]:
    """Examples of aggregation, {"prompt": token ids, "response": token ids}.

    Args:
      rollouts: objects with `question`, `tokens` (the ids of a response, its end of turn included)
        and `score` (1 for a correct one); those of one question follow each other. A `target`, the
        text of a verified response, is learned where there is one; else a correct rollout that is
        not among the candidates.
      tokenizer: of the model that made them.
      C: candidates in a prompt.
      tau: tokens of a candidate's tail.
      each: prompts made of one question, with other candidates where there are enough.
      seed: of the choices.
      template: a file in place of `aggregation.jinja`.

    Yields:
      Examples; none for questions with too few rollouts, or without a correct one to learn.
    """
    prompts = Prompts(tokenizer, template)
    end = tokenizer.encode(tokenizer.end_tokens[0])
    for question, group in by_question(rollouts):
        random = Random(f"{seed} {question}")
        for _ in range(each):
            order = random.sample(group, len(group))
            target = order[0].get("target")
            if target is None:
                correct = [one for one in order if one["score"] == 1]
                if not correct:
                    break
                order.remove(correct[0])
                response = list(correct[0]["tokens"])
            else:
                response = [*tokenizer.encode(target), *end]
            if len(order) < C:
                break
            tails = [prompts.tail(one["tokens"], tau) for one in order[:C]]
            yield {"prompt": prompts.aggregation(question, tails).tokens, "response": response}


def read_rollouts(file: Path) -> Iterator[Rollout]:
    """The rollouts of a JSONL file.

    Raises:
      DataError: the file cannot be read, or a line is no rollout.
    """
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    rollout = json.loads(line)
                    list(map(int, rollout["tokens"]))
                    float(rollout["score"]), rollout["question"].strip()
                except (ValueError, TypeError, KeyError, AttributeError):
                    raise DataError(
                        f"{file}:{number}: is no rollout with question, tokens and score"
                    ) from None
                yield rollout
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None


def main(
    rollouts: Path,
    examples: Path,
    /,
    model: str | None = None,
    C: int = 4,
    tau: int = 4096,
    each: int = 1,
    seed: int = 0,
    template: Path | None = None,
) -> None:
    """Turns a file of rollouts into one of examples.

    Args:
      rollouts: JSONL file, see `aggregation_examples`.
      examples: JSONL file to write.
      model: checkpoint folder or hub id whose tokenizer counts; by default the embedded model.
      C: candidates in a prompt.
      tau: tokens of a candidate's tail.
      each: prompts made of one question.
      seed: of the choices.
      template: a file in place of aggregation.jinja.
    """
    part = examples.with_suffix(".part")
    try:
        found = aggregation_examples(
            read_rollouts(rollouts),
            load_tokenizer(model),
            C=C,
            tau=tau,
            each=each,
            seed=seed,
            template=template,
        )
        with part.open("w", encoding="utf-8") as lines:
            count = sum(bool(lines.write(json.dumps(example) + "\n")) for example in found)
        part.replace(examples)
    except OSError as error:
        sys.exit(f"{examples}: cannot be written ({error.strerror})")
    except ZayaError as error:
        part.unlink(missing_ok=True)
        sys.exit(str(error))
    print(f"{examples}: {count} examples")


def by_question(rollouts: Iterable[Rollout]) -> Iterator[tuple[str, Sequence[Rollout]]]:
    """Rollouts that follow each other and answer the same question, with that question."""
    group: list[Rollout] = []
    for rollout in rollouts:
        if group and group[0]["question"] != rollout["question"]:
            yield group[0]["question"], group
            group = []
        group.append(rollout)
    if group:
        yield group[0]["question"], group


if __name__ == "__main__":
    tyro.cli(main)
