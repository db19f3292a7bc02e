"""What the records of an evaluation come to."""

import itertools
from collections import Counter
from typing import Any

import numpy as np

from zaya_jax.evaluation.metrics import avg_at_k, interval, ks, maj_at_k, pass_at_k, token_use
from zaya_jax.evaluation.records import Key, Record
from zaya_jax.evaluation.tasks import Task
from zaya_jax.reasoning.answers import normalised


def summary(task: Task, samples: int, done: dict[Key, Record]) -> dict[str, Any]:
    """The metrics of all samples, and of those of each group."""
    problems = {q.id: [done[q.id, s] for s in range(samples)] for q in task.questions}
    groups = dict.fromkeys(q.group for q in task.questions)
    members = {name: [problems[q.id] for q in task.questions if q.group == name] for name in groups}
    return {
        "all": _metrics(list(problems.values()), task.votes),
        "groups": {name: _metrics(some, task.votes) for name, some in members.items()},
    }


def _metrics(problems: list[list[Record]], votes: bool) -> dict[str, Any]:
    """Of records as [problem][sample]."""
    flat = list(itertools.chain.from_iterable(problems))
    n = len(problems[0])
    correct = np.array([[record["correct"] for record in one] for one in problems])
    values = {f"avg@{n}": avg_at_k(correct)}
    values |= {f"pass@{k}": pass_at_k(correct, k) for k in ks(n)}
    if votes:
        answers = [[_vote(record["answer"]) for record in one] for one in problems]
        logprobs = np.array([[_number(record["logprob"]) for record in one] for one in problems])
        values |= {f"maj@{k}": maj_at_k(answers, correct, logprobs, k) for k in ks(n) if k > 1}
    metrics = {
        name: {"value": float(some.mean()), "interval": interval(some)}
        for name, some in values.items()
    }
    reasons = [record["finish_reason"] for record in flat]
    tokens = token_use(np.array([record["tokens"] for record in flat]), reasons)
    if "rounds" in flat[0]:
        rounds = [one[0]["rounds"] for one in problems]
        tokens["total"] = sum(r["generated_tokens"] for r in rounds)
        tokens |= {name: sum(r[name] for r in rounds) for name in ("prompt_tokens", "read_tokens")}
    return {
        "problems": len(problems),
        "samples": n,
        **metrics,
        "score": float(np.mean([record["score"] for record in flat])),
        "tokens": tokens,
        "finish_reasons": dict(sorted(Counter(reasons).items())),
        "noted": sum("note" in record for record in flat),
    }


def _vote(answer: str | None) -> str | None:
    return None if answer is None else normalised(answer)


def _number(logprob: float | None) -> float:
    return -np.inf if logprob is None else logprob
