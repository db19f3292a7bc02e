"""Markovian RSA: rounds of candidates, each of which sees the tails of some of the round before.

Test-time compute of arXiv 2605.05365. However long the model thinks in all, a row holds no more
than the question, C tails of tau tokens, and one response.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import jax
import numpy as np

from zaya_jax.errors import InputError
from zaya_jax.generation.engine import Engine
from zaya_jax.generation.rows import Generation, OnText
from zaya_jax.generation.sampling import Sampling
from zaya_jax.reasoning.answers import final_answer
from zaya_jax.reasoning.folder import Folder
from zaya_jax.reasoning.prompts import Prompt, Prompts
from zaya_jax.reasoning.settings import Settings
from zaya_jax.reasoning.solution import Candidate, Round, Solution, Verifier

CAPACITY_STEP = 64  # so that questions of about one length use the same programs
SMALL_LEAF = 4096  # numbers in a parameter that is compared when a run goes on

OnRound = Callable[[int, list[Round]], None]


def markovian_rsa(
    engine: Engine,
    questions: Sequence[str],
    settings: Settings,
    *,
    seed: int = 0,
    verifiers: Sequence[Verifier] | None = None,
    template: Path | str | None = None,
    folder: Path | str | None = None,
    batch_size: int | None = None,
    share: bool = True,
    on_text: OnText | None = None,
    on_round: OnRound | None = None,
) -> list[Solution]:
    """Answers every question; the rounds of all of them run side by side.

    Args:
      engine: of a model with a tokenizer.
      settings: see `Settings` and `PRESETS`.
      seed: of all choices. What comes out for a question depends on it, the question, the settings
        and the batch size alone.
      verifiers: for each question, what scores an answer, 1 for a correct one; not seen by the
        model.
      template: a file in place of `aggregation.jinja`.
      folder: what every round has made is kept here; the same call again goes on behind the last
        complete round.
      batch_size: rows decoded at once; by default the N candidates of one question.
      share: False reads every prompt on its own, to the same result.
      on_text: called with the number of a candidate (the N of the first question come first) and
        each new piece of its text.
      on_round: called with the number of each round, 0 to T, and with the round of every question.

    Raises:
      InputError: an empty question, or one for which the context is too short with these budgets;
        or `folder` holds something else. Nothing has been generated then.
      Interrupted: on Ctrl-C; complete rounds are in `folder`.
    """
    if engine.tokenizer is None:
        raise InputError("Markovian RSA needs a tokenizer, which this checkpoint has not")
    if verifiers is not None and len(verifiers) != len(questions):
        raise InputError(f"{len(questions)} questions have {len(verifiers)} verifiers")
    prompts = Prompts(engine.tokenizer, template)
    capacity = _capacity(engine, questions, settings, prompts)
    store = folder and Folder(folder, _identity(engine, questions, settings, seed, prompts))
    rounds: list[list[Round]] = []  # [round][question]
    for number in range(settings.T + 1):
        current = store.read(number) if store else None
        if current is None:
            asked = [
                request
                for q, question in enumerate(questions)
                for request in _requests(
                    question, settings, number, rounds[-1][q] if rounds else None, prompts, seed
                )
            ]
            results = engine.run(
                [request.prompt.tokens for request in asked],
                [request.sampling for request in asked],
                on_text,
                batch_size=batch_size or settings.N,
                cuts=[request.prompt.cuts for request in asked],
                share=share,
                capacity=capacity,
            )
            tau = settings.tau if number < settings.T else 0
            candidates = [
                _candidate(request, result, prompts, tau)
                for request, result in zip(asked, results, strict=True)
            ]
            current = [Round(list(some)) for some in itertools.batched(candidates, settings.N)]
            if store:
                store.write(number, current)
        if verifiers is not None:
            pairs = zip(current, verifiers, strict=True)
            current = [_scored(round, verifier) for round, verifier in pairs]
        rounds.append(current)
        if on_round is not None:
            on_round(number, current)
    return [Solution(question, [r[q] for r in rounds]) for q, question in enumerate(questions)]


class _Request(NamedTuple):
    """What one candidate is asked for."""

    prompt: Prompt
    subset: list[int]
    sampling: Sampling


def _requests(
    question: str,
    settings: Settings,
    number: int,
    before: Round | None,
    prompts: Prompts,
    seed: int,
) -> list[_Request]:
    """The N requests of one question in one round; `before` is None in the first one.

    A subset is uniform; it is listed in ascending order, as then more prompts begin alike.
    """
    digest = np.frombuffer(hashlib.sha256(question.encode()).digest(), np.uint32)
    random = np.random.default_rng([seed, number, *digest.tolist()])
    requests = []
    for one in random.integers(2**32, size=settings.N):
        subset: list[int] = []
        if before is not None:
            subset = sorted(random.choice(settings.N, settings.C, replace=False).tolist())
        tails = [before.candidates[i].tail for i in subset] if before is not None else []
        prompt = prompts.aggregation(question, tails) if tails else prompts.question(question)
        sampling = Sampling(
            max_new_tokens=settings.budget(number),
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=int(one),
        )
        requests.append(_Request(prompt, subset, sampling))
    return requests


def _candidate(request: _Request, result: Generation, prompts: Prompts, tau: int) -> Candidate:
    return Candidate(
        text=result.text or "",
        answer=final_answer(result.answer.text),
        tokens=result.tokens,
        logprob=fmean(result.logprobs) if result.logprobs else 0.0,
        finish_reason=result.finish_reason,
        subset=request.subset,
        tail=prompts.tail(result.tokens, tau) if tau else [],
        prompt_tokens=len(request.prompt.tokens),
        read_tokens=result.prompt_read,
    )


def _scored(round: Round, verifier: Verifier) -> Round:
    return Round(
        [
            dataclasses.replace(c, score=0.0 if c.answer is None else float(verifier(c.answer)))
            for c in round.candidates
        ]
    )


def _capacity(
    engine: Engine, questions: Sequence[str], settings: Settings, prompts: Prompts
) -> int:
    """Tokens that a row has room for: the longest prompt and response that there can be.

    Raises:
      InputError: that is more than the context.
    """
    context, longest = engine.config.max_position_embeddings, 0
    for question in questions:
        alone = len(prompts.question(question).tokens)
        if alone >= context:
            raise InputError(
                f"the question has {alone} tokens, which leaves no room in the context of {context}"
            )
        later = prompts.longest(question, settings.C, settings.tau) if settings.T else alone
        for number in range(settings.T + 1):
            prompt, budget = later if number else alone, settings.budget(number)
            if prompt + budget > context:
                raise InputError(
                    f"round {number} can need {prompt} tokens of prompt (question: {alone}) and "
                    f"{budget} of response, more than the context of {context}"
                )
            longest = max(longest, prompt + budget)
    return -(-longest // CAPACITY_STEP) * CAPACITY_STEP


def _identity(
    engine: Engine, questions: Sequence[str], settings: Settings, seed: int, prompts: Prompts
) -> dict[str, Any]:
    """What rounds on disk depend on, by name."""
    assert engine.tokenizer is not None
    weights = hashlib.sha256(repr(engine.config).encode())
    for leaf in jax.tree.leaves(engine.params):
        if leaf.size <= SMALL_LEAF:
            weights.update(np.asarray(leaf).tobytes())
    return {
        "questions": list(questions),
        **dataclasses.asdict(settings),
        "seed": seed,
        "template": prompts.source,
        "tokenizer": engine.tokenizer.fingerprint,
        "model": weights.hexdigest(),
    }
