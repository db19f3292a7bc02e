"""Rollouts of the course's model, for the phase that learns to aggregate."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from train.course.solutions import another_way, concluded
from zaya_jax.evaluation.families import Problem
from zaya_jax.generation.sampling import Sampling
from zaya_jax.zaya import Zaya

ROLLOUTS = 8  # of each problem
SLICE = 32  # problems answered together
BATCH = 256
MAX_NEW_TOKENS = 256


def rollouts(model: Zaya, problems: Iterable[Problem], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rollouts as `train.aggregation` reads them; a problem's solution on another way is the
    `target`."""
    assert model.tokenizer is not None
    for some in itertools.batched(problems, SLICE):
        messages = [[{"role": "user", "content": problem.question}] for problem in some]
        prompts = [model.tokenizer.encode_chat(message) for message in messages]
        results = model.engine.run(
            [prompt for prompt in prompts for _ in range(ROLLOUTS)],
            Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=1, top_p=1, seed=seed),
            batch_size=BATCH,
        )
        for number, result in enumerate(results):
            problem = some[number // ROLLOUTS]
            yield {
                "question": problem.question,
                "tokens": result.tokens,
                "score": problem.score(result.answer.text),
                "target": concluded(another_way(problem)),
            }
