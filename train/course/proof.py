"""Whether Markovian RSA helps the embedded model: on held-out problems, beside what it must beat.

    python -m train.course.proof MODEL docs/rsa.json --readme README.md

For every family and seed, the same model answers the same problems in rounds of candidates, and
independently with the whole budget of the last round. Independent answers are scored alone
(avg@16) and by majority (maj@k, with as many of them as take the tokens that the rounds took).
RSA, which sees candidates whole, is run beside it with the first seed.
Two controls ask the second round again: with the tails' tokens in random order, and with the
tails of other problems.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import numpy as np
import tyro

from train.course.report import filled
from zaya_jax.evaluation.families import Problem, distinct_answers, held_out
from zaya_jax.generation.rows import Generation
from zaya_jax.generation.sampling import Sampling
from zaya_jax.loading import load
from zaya_jax.reasoning.answers import final_answer, majority
from zaya_jax.reasoning.markovian_rsa import markovian_rsa
from zaya_jax.reasoning.prompts import Prompts
from zaya_jax.reasoning.settings import PRESETS, Settings
from zaya_jax.reasoning.solution import Solution
from zaya_jax.zaya import Zaya

FAMILIES = (
    "long_chain_sum",
    "base_conversion",
    "gcd",
    "fraction_simplification",
    "chain_sum",
    "leg_counting",
)
WHOLE = 176  # tokens of a response that is seen whole in RSA, where the context has room
SINGLE = 16  # independent answers that are scored alone
BATCH = 256
BEGIN, END = "<!-- rsa: begin -->", "<!-- rsa: end -->"


def prove(
    model: Zaya,
    settings: Settings,
    problems: int = 100,
    seeds: Sequence[int] = (0, 1, 2),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The figures of every family, as JSON; a line for each as it is done."""
    families = []
    for family in FAMILIES:
        asked = held_out(family, problems)
        runs = [_run(model, asked, settings, seed) for seed in seeds]
        row: dict[str, Any] = {"family": family, "answers": distinct_answers(family)}
        row |= {name: _mean([run[name] for run in runs]) for name in runs[0]}
        row["rsa"] = _by_round(
            asked, _solve(model, asked, _whole(model, asked, settings), seeds[0])
        )
        families.append(row)
        say(
            f"{family:24} avg@{SINGLE} {row['single']:.3f}, rounds "
            + " ".join(f"{x:.3f}" for x in row["rounds"])
            + f"; maj@{row['k']:.1f} {row['majority_of_k']:.3f}, rounds' {row['majority']:.3f}"
        )
    return {
        "settings": dataclasses.asdict(settings),
        "problems": problems,
        "seeds": list(seeds),
        "families": families,
    }


def _run(model: Zaya, problems: list[Problem], settings: Settings, seed: int) -> dict[str, Any]:
    """One family with one seed."""
    solutions = _solve(model, problems, settings, seed)
    spent = [s.generated_tokens for s in solutions]
    samples = _independent(model, problems, settings, seed, max(SINGLE, 2 * settings.N))
    each = fmean(len(one.tokens) for mine in samples for one in mine)
    k = min(len(samples[0]), max(1, round(fmean(spent) / each)))
    scores = [
        [_score(problem, one) for one in mine]
        for problem, mine in zip(problems, samples, strict=True)
    ]
    return {
        "single": fmean(fmean(row[:SINGLE]) for row in scores),
        **_by_round(problems, solutions),
        "k": k,
        "majority_of_k": _majority_of(problems, samples, k),
        "majority": fmean(
            _verifier(p)(s.answer or "") for p, s in zip(problems, solutions, strict=True)
        ),
        "majorities_of": {
            str(n): _majority_of(problems, samples, n) for n in (1, 2, 4, 8, 16, 32, 64) if n <= k
        },
        "tokens": fmean(spent),
        "tokens_each": each,
        "prompt_tokens": fmean(s.prompt_tokens for s in solutions),
        "read_tokens": fmean(s.read_tokens for s in solutions),
        "by_correct": _by_correct(solutions, settings.C),
        "controls": {
            name: _control(model, problems, solutions, settings, seed, name)
            for name in ("same", "shuffled", "foreign")
        },
    }


def _solve(
    model: Zaya, problems: Sequence[Problem], settings: Settings, seed: int
) -> list[Solution]:
    return markovian_rsa(
        model.engine,
        [problem.question for problem in problems],
        settings,
        seed=seed,
        verifiers=[_verifier(problem) for problem in problems],
        batch_size=BATCH,
    )


def _whole(model: Zaya, problems: Sequence[Problem], settings: Settings) -> Settings:
    """The settings of RSA: responses are as long as can be seen whole in the model's context."""
    prompts = Prompts(_tokenizer(model))
    longest = max(prompts.longest(problem.question, settings.C, 0) for problem in problems)
    room = (model.config.max_position_embeddings - longest) // (settings.C + 1)
    length = min(WHOLE, room)
    return dataclasses.replace(settings, beta=length, tau=length, final_budget=length)


def _by_round(problems: Sequence[Problem], solutions: Sequence[Solution]) -> dict[str, Any]:
    """Mean correctness, that of the majority, and tokens generated for a problem, by round."""
    rounds = list(zip(*(s.rounds for s in solutions), strict=True))
    return {
        "rounds": [fmean(r.mean_correctness or 0.0 for r in one) for one in rounds],
        "majority_by_round": [
            fmean(_verifier(p)(r.answer or "") for p, r in zip(problems, one, strict=True))
            for one in rounds
        ],
        "tokens_by_round": [
            fmean(sum(len(c.tokens) for c in r.candidates) for r in one) for one in rounds
        ],
    }


def _independent(
    model: Zaya, problems: Sequence[Problem], settings: Settings, seed: int, count: int
) -> list[list[Generation]]:
    prompts = Prompts(_tokenizer(model))
    asked = [prompts.question(p.question).tokens for p in problems for _ in range(count)]
    sampling = _sampling(settings, settings.final_budget, seed + 1000)
    results = model.engine.run(asked, sampling, batch_size=BATCH)
    return [results[i : i + count] for i in range(0, len(results), count)]


def _control(
    model: Zaya,
    problems: Sequence[Problem],
    solutions: Sequence[Solution],
    settings: Settings,
    seed: int,
    kind: str,
) -> float:
    """Mean correctness where the second round sees the tails of the first as they are, with their
    tokens in random order, or those of the next problem."""
    prompts, random, asked = Prompts(_tokenizer(model)), Random(seed), []
    for number, problem in enumerate(problems):
        source = solutions[(number + (kind == "foreign")) % len(solutions)].rounds[0]
        for request in solutions[number].rounds[1].candidates:
            tails = [list(source.candidates[i].tail) for i in request.subset]
            if kind == "shuffled":
                tails = [random.sample(tail, len(tail)) for tail in tails]
            asked.append(prompts.aggregation(problem.question, tails).tokens)
    sampling = _sampling(settings, settings.final_budget, seed + 2000)
    results = model.engine.run(asked, sampling, batch_size=BATCH)
    return fmean(
        _score(problems[number // settings.N], result) for number, result in enumerate(results)
    )


def _by_correct(solutions: Sequence[Solution], C: int) -> list[list[float]]:
    """For 0 to C correct candidates in a prompt: how many responses, and how many were correct."""
    counts = np.zeros((C + 1, 2))
    for solution in solutions:
        for before, after in zip(solution.rounds, solution.rounds[1:], strict=False):
            for one in after.candidates:
                right = sum(before.candidates[i].score == 1 for i in one.subset)
                counts[right] += 1, one.score == 1
    return counts.tolist()


def _majority_of(
    problems: Sequence[Problem], samples: Sequence[Sequence[Generation]], k: int
) -> float:
    """Accuracy of the majority of k, over the disjoint groups of k that there are."""
    right = []
    for problem, mine in zip(problems, samples, strict=True):
        for start in range(0, len(mine) - k + 1, k):
            some = mine[start : start + k]
            answers = [final_answer(one.answer.text) for one in some]
            place = majority(answers, list(map(_logprob, some)))
            right.append(0.0 if place is None else _verifier(problem)(answers[place] or ""))
    return fmean(right)


def _logprob(generation: Generation) -> float:
    return fmean(generation.logprobs) if generation.logprobs else 0.0


def _score(problem: Problem, generation: Generation) -> float:
    return _verifier(problem)(final_answer(generation.answer.text) or "")


def _verifier(problem: Problem) -> Callable[[str], float]:
    return lambda answer: float(problem.score(answer) == 1.0)


def _sampling(settings: Settings, budget: int, seed: int) -> Sampling:
    return Sampling(
        max_new_tokens=budget, temperature=settings.temperature, top_p=settings.top_p, seed=seed
    )


def _tokenizer(model: Zaya) -> Any:
    assert model.tokenizer is not None
    return model.tokenizer


def _mean(values: Sequence[Any]) -> Any:
    """Means of numbers, lists and objects, place by place."""
    if isinstance(values[0], dict):
        names = [name for name in values[0] if all(name in value for value in values)]
        return {name: _mean([value[name] for value in values]) for name in names}
    return np.mean(np.array(values, float), axis=0).tolist()


def table(figures: dict[str, Any]) -> str:
    """The Markdown table of the README."""
    heads = (
        f"`nano`, held-out | answers | single, avg@{SINGLE} | round 0 | last round | gain | "
        "maj@k, as many tokens | majority of the last round | prompt tokens read"
    )
    lines = [heads, " | ".join(["---"] * 9)]
    rows = figures["families"]
    for row in rows:
        lines.append(_line(row["family"], f"{row['answers']:,}", row))
    mean = _mean([{k: v for k, v in row.items() if k != "family"} for row in rows])
    lines.append(_line("mean", "", mean))
    return "\n".join(f"| {line} |" for line in lines)


def _line(name: str, answers: str, row: dict[str, Any]) -> str:
    gain = 100 * (row["rounds"][-1] - row["single"])
    return (
        f"{name} | {answers} | {row['single']:.1%} | {row['rounds'][0]:.1%} | "
        f"{row['rounds'][-1]:.1%} | {gain:+.1f} | {row['majority_of_k']:.1%} (k={row['k']:.0f}) | "
        f"{row['majority']:.1%} | {row['read_tokens']:,.0f} of {row['prompt_tokens']:,.0f}"
    )


def main(
    model: str,
    figures: Path,
    /,
    readme: Path | None = None,
    problems: int = 100,
    seeds: tuple[int, ...] = (0, 1, 2),
) -> None:
    """Measures, and writes the figures; then the README's table.

    Args:
      model: folder of a checkpoint.
      figures: JSON file to write.
      readme: has the two markers.
      problems: of each family.
      seeds: of sampling.
    """
    found = prove(load(model, layout="decoding"), PRESETS["nano"], problems, seeds)
    figures.write_text(json.dumps(found, indent=1) + "\n")
    if readme is not None:
        readme.write_text(filled(readme.read_text(), BEGIN, END, table(found)))


if __name__ == "__main__":
    tyro.cli(main)
