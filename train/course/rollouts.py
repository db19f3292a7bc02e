"""Rollouts of the course's model on training problems, for the phase that learns to aggregate."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from train.course.data import training_problems
from train.course.solutions import response, worked
from zaya_jax.evaluation.families import FAMILIES, Problem
from zaya_jax.generation.sampling import Sampling
from zaya_jax.zaya import Zaya

ROLLOUTS = 8  # of each problem
SLICE = 64  # problems between two writes
BATCH = 256
MAX_NEW_TOKENS = 256
STREAM = 50  # of problems, which no phase's data are from


def write_rollouts(model: Zaya, file: Path, problems: int, seed: int = 0) -> None:
    """Writes a file of rollouts, as `train.aggregation` reads it; the worked solution of each
    problem is its `target`."""
    sources = {family: training_problems(family, STREAM + seed) for family in FAMILIES}
    families = itertools.islice(itertools.cycle(FAMILIES), problems)
    with file.open("w", encoding="utf-8") as lines:
        for some in itertools.batched((next(sources[f]) for f in families), SLICE):
            for line in _rollouts(model, some, seed):
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def _rollouts(model: Zaya, problems: tuple[Problem, ...], seed: int) -> Iterator[dict[str, object]]:
    assert model.tokenizer is not None
    messages = [[{"role": "user", "content": problem.question}] for problem in problems]
    prompts = [model.tokenizer.encode_chat(message) for message in messages]
    results = model.engine.run(
        [prompt for prompt in prompts for _ in range(ROLLOUTS)],
        Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=1, top_p=1, seed=seed),
        batch_size=BATCH,
    )
    for number, result in enumerate(results):
        problem = problems[number // ROLLOUTS]
        yield {
            "question": problem.question,
            "tokens": result.tokens,
            "score": problem.score(result.answer.text),
            "target": response(*worked(problem)),
        }
