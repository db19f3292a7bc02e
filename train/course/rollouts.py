"""Rollouts of the course's model, for the phase that learns to aggregate."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from train.course.solutions import concluded, worked
from zaya_jax.evaluation.families import Problem
from zaya_jax.generation.sampling import Sampling
from zaya_jax.zaya import Zaya

ROLLOUTS = 8  # of the model, for each problem
SLICE = 32  # problems answered together
BATCH = 256
MAX_NEW_TOKENS = 256


def rollouts(model: Zaya, problems: Iterable[Problem], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Answers of the model to each problem, and a worked one, as `train.aggregation` reads them."""
    assert model.tokenizer is not None
    for some in itertools.batched(problems, SLICE):
        messages = [[{"role": "user", "content": problem.question}] for problem in some]
        prompts = [model.tokenizer.encode_chat(message) for message in messages]
        results = model.engine.run(
            [prompt for prompt in prompts for _ in range(ROLLOUTS)],
            Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=1, top_p=1, seed=seed),
            batch_size=BATCH,
        )
        for problem, answers in zip(some, itertools.batched(results, ROLLOUTS), strict=True):
            given = [(result.tokens, problem.score(result.answer.text)) for result in answers]
            given.append((model.tokenizer.encode(concluded(worked(problem))), 1.0))
            for tokens, score in given:
                yield {"question": problem.question, "tokens": tokens, "score": score}
