"""Asks a model the questions of a task, keeps every sample, and sums them up."""

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import jax
import numpy as np

from zaya_jax.errors import InputError
from zaya_jax.evaluation.records import Record, Records
from zaya_jax.evaluation.summary import summary
from zaya_jax.evaluation.tasks import Question, Task, fingerprint
from zaya_jax.generation.engine import BATCH
from zaya_jax.generation.rows import Interrupted
from zaya_jax.generation.sampling import Sampling
from zaya_jax.reasoning.markovian_rsa import markovian_rsa
from zaya_jax.reasoning.prompts import Prompts
from zaya_jax.reasoning.settings import Settings as RsaSettings
from zaya_jax.text.chat import split_thinking
from zaya_jax.zaya import Zaya

# The authors' sampling: for mathematics, knowledge and instructions; for code and agents.
PRESETS: dict[str, dict[str, Any]] = {
    "math": {"temperature": 1.0, "top_p": 0.95, "top_k": 0},
    "code": {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
    "greedy": {"temperature": 0.0, "top_p": 1.0, "top_k": 0},
}
LONGEST = 32_768  # tokens of a response, where the context has room for more and nothing is said
SLICE = 8  # batches between two visits to the disk
CAPACITY_STEP = 64
SMALL = 4096  # numbers in a parameter

OnProgress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a task is evaluated.

    Attributes:
      samples: of each problem; the final candidates where there is `rsa`.
      sampling: of each sample but for its seed, which is made of this one, the problem's id and the
        sample's number.
      budget: tokens of a response, in place of `sampling.max_new_tokens`; by default what the
        context has room for behind the longest prompt, at most 32,768.
      batch_size: rows decoded at once. Samples depend on it, as floating-point sums do.
      rsa: answers with Markovian RSA, which has its own sampling.

    Raises:
      InputError: settings that contradict each other.
    """

    samples: int = 1
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    budget: int | None = None
    batch_size: int = BATCH
    rsa: RsaSettings | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"samples must be at least 1, got {self.samples}")
        if self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.budget is not None and self.budget < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {self.budget}")
        if self.rsa is not None and self.samples != self.rsa.N:
            raise InputError(f"with Markovian RSA, samples are its N={self.rsa.N} candidates")
        if self.rsa is None and self.samples > 1 and self.sampling.temperature == 0:
            raise InputError(f"{self.samples} greedy samples would all be the same: take one")


def evaluate(
    model: Zaya,
    task: Task,
    settings: Settings,
    folder: Path,
    *,
    described: dict[str, Any] | None = None,
    on_progress: OnProgress = lambda done, total: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Evaluates a model on a task, or goes on with it where the folder has a part of the samples.

    Args:
      model: with a tokenizer.
      folder: for `settings.json`, `records.jsonl` with a line for each sample, and `results.json`.
      described: further settings that the samples depend on, such as the model's name.
      on_progress: called with the number of samples that are done, and of all.
      on_note: called with what a user should know and is no error.

    Returns:
      What `results.json` holds: for the whole task and each group of problems avg@k, pass@k and
      maj@k with confidence intervals, and the tokens.

    Raises:
      InputError: a question or a budget that does not fit (nothing has been generated then), or a
        folder that is not this evaluation's.
      KeyboardInterrupt: on Ctrl-C; what was finished is in the folder.
    """
    settings, prompts = _fitted(model, task, settings)
    identity = {
        **(described or {}),
        "weights": _weights(model),
        "task": task.name,
        "problems": len(task.questions),
        "questions": fingerprint(task.questions),
        **_as_json(settings),
    }
    keys = [(q.id, sample) for q in task.questions for sample in range(settings.samples)]
    with contextlib.closing(Records(folder, identity, keys)) as records:
        if records.dropped:
            on_note(f"{records.file}: the last line was torn and is dropped")
        if records.done:
            on_note(f"{folder}: {len(records.done)} of {len(keys)} samples are there already")

        def tell() -> None:
            on_progress(len(records.done), len(keys))

        tell()
        answer = _answer if settings.rsa is None else _reason
        answer(model, task, settings, prompts, records, tell)
        results = {"settings": identity, **summary(task, settings.samples, records.done)}
        records.finish(results)
    return results


class _Prompts(NamedTuple):
    """The prompt of each problem, by id, and the tokens that a row must have room for."""

    tokens: dict[str, list[int]]
    capacity: int


def _fitted(model: Zaya, task: Task, settings: Settings) -> tuple[Settings, _Prompts]:
    """Prompts, and the settings with budgets that fit them all. Raises InputError for a question
    that does not fit, before anything is generated."""
    if model.tokenizer is None:
        raise InputError("an evaluation needs a tokenizer, which this checkpoint has not")
    context = model.config.max_position_embeddings
    tokens = {}
    for question in task.questions:
        if not question.text.strip():
            raise InputError(f"{question.place}: the question is empty")
        try:
            prompt = model.tokenizer.encode_chat([{"role": "user", "content": question.text}])
        except InputError as error:
            raise InputError(f"{question.place}: {error}") from None
        if len(prompt) >= context:
            raise InputError(
                f"{question.place}: the question has {len(prompt)} tokens, "
                f"which leaves no room in the context of {context}"
            )
        tokens[question.id] = list(prompt)
    if len(tokens) < len(task.questions):
        raise InputError(f"{task.name}: several problems have the same id")
    longest = max(map(len, tokens.values()))
    if settings.rsa is not None:
        _check_rounds(model, task, settings.rsa, tokens)
        return settings, _Prompts(tokens, 0)
    budget = min(LONGEST, context - longest) if settings.budget is None else settings.budget
    for question in task.questions:
        if (room := context - len(tokens[question.id])) < budget:
            raise InputError(
                f"{question.place}: {len(tokens[question.id])} tokens of question and {budget} of "
                f"response do not fit the context of {context}: max_new_tokens can be {room}"
            )
    sampling = dataclasses.replace(settings.sampling, max_new_tokens=budget)
    capacity = -(-(longest + budget) // CAPACITY_STEP) * CAPACITY_STEP
    return dataclasses.replace(settings, sampling=sampling), _Prompts(tokens, capacity)


def _check_rounds(
    model: Zaya, task: Task, settings: RsaSettings, tokens: dict[str, list[int]]
) -> None:
    """Raises InputError for a question that does not fit the rounds of Markovian RSA."""
    assert model.tokenizer is not None
    prompts, context = Prompts(model.tokenizer), model.config.max_position_embeddings
    for question in task.questions:
        later = prompts.longest(question.text, settings.C, settings.tau) if settings.T else 0
        for number in range(settings.T + 1):
            prompt = later if number else len(tokens[question.id])
            if prompt + settings.budget(number) > context:
                raise InputError(
                    f"{question.place}: round {number} can need {prompt} tokens of prompt and "
                    f"{settings.budget(number)} of response, more than the context of {context}"
                )


def _answer(
    model: Zaya,
    task: Task,
    settings: Settings,
    prompts: _Prompts,
    records: Records,
    tell: Callable[[], None],
) -> None:
    """Makes the missing samples, each from its own seed."""
    questions = {question.id: question for question in task.questions}
    for keys in itertools.batched(records.missing(), SLICE * settings.batch_size):
        asked = [
            dataclasses.replace(settings.sampling, seed=_seed(settings.sampling.seed, *key))
            for key in keys
        ]
        try:
            results = model.engine.run(
                [prompts.tokens[id] for id, _ in keys],
                asked,
                batch_size=settings.batch_size,
                capacity=prompts.capacity,
            )
            interrupted = None
        except Interrupted as error:
            results, interrupted = error.results, error
        made = (
            _record(
                questions[id],
                sample,
                result.text or "",
                result.answer.text,
                len(result.tokens),
                fmean(result.logprobs) if result.logprobs else None,
                result.finish_reason,
            )
            for (id, sample), result in zip(keys, results, strict=True)
            if result.finish_reason != "interrupted"
        )
        _keep(records, made)
        if interrupted is not None:
            raise interrupted
        tell()


def _reason(
    model: Zaya,
    task: Task,
    settings: Settings,
    prompts: _Prompts,
    records: Records,
    tell: Callable[[], None],
) -> None:
    """Answers with Markovian RSA, as many problems side by side as there are rows for; the samples
    of a problem are the candidates of its last round."""
    assert settings.rsa is not None
    side_by_side = max(1, settings.batch_size // settings.rsa.N)
    for number, questions in enumerate(itertools.batched(task.questions, side_by_side)):
        numbers = range(settings.samples)
        if all((q.id, sample) in records.done for q in questions for sample in numbers):
            continue
        solutions = markovian_rsa(
            model.engine,
            [question.text for question in questions],
            settings.rsa,
            seed=settings.sampling.seed,
            folder=records.path / "rounds" / f"{number:05d}",
            batch_size=settings.batch_size,
        )
        for question, solution in zip(questions, solutions, strict=True):
            rounds = {
                "answer": solution.answer,
                "generated_tokens": solution.generated_tokens,
                "prompt_tokens": solution.prompt_tokens,
                "read_tokens": solution.read_tokens,
            }
            made = (
                _record(
                    question,
                    sample,
                    candidate.text,
                    split_thinking(candidate.text).text,
                    len(candidate.tokens),
                    candidate.logprob,
                    candidate.finish_reason,
                )
                | {"rounds": rounds}
                for sample, candidate in enumerate(solution.rounds[-1].candidates)
            )
            _keep(records, made)
        tell()


def _keep(records: Records, made: Iterable[Record]) -> None:
    """Appends records as far as they can be made: the last ones before an interrupt too."""
    finished: list[Record] = []
    try:
        for record in made:
            finished.append(record)
    finally:
        records.append(finished)


def _record(
    question: Question,
    sample: int,
    text: str,
    answer: str,
    tokens: int,
    logprob: float | None,
    finish_reason: str,
) -> Record:
    """A sample with its score; `answer` is its text without the reasoning."""
    checked = question.check(answer)
    record = {
        "id": question.id,
        "group": question.group,
        "sample": sample,
        "question": question.text,
        "expected": question.expected,
        "text": text,
        "answer": checked.answer,
        "correct": checked.score == 1.0,
        "score": checked.score,
        "tokens": tokens,
        "logprob": logprob,
        "finish_reason": finish_reason,
    }
    return record | ({"note": checked.note} if checked.note else {})


def _seed(seed: int, id: str, sample: int) -> int:
    """Of one sample, whatever others there are; those of a problem are all different."""
    digest = hashlib.sha256(f"{seed} {id}".encode()).digest()
    return (int.from_bytes(digest[:4], "little") + sample) % 2**32


def _weights(model: Zaya) -> str:
    """A hash that differs where a model was trained further, or reads text in another way: of the
    parameters that are small, of which each layer has some."""
    assert model.tokenizer is not None
    digest = hashlib.sha256(f"{model.config!r} {model.tokenizer.fingerprint}".encode())
    for leaf in jax.tree.leaves(model.params):
        if leaf.size <= SMALL:
            digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _as_json(settings: Settings) -> dict[str, Any]:
    """The settings as `settings.json` has them."""
    if settings.rsa is not None:
        how = {f"rsa.{name}": value for name, value in dataclasses.asdict(settings.rsa).items()}
        how["seed"] = settings.sampling.seed
    else:
        names: Sequence[str] = [field.name for field in dataclasses.fields(Sampling)]
        how = {n: getattr(settings.sampling, n) for n in names if not n.startswith("stop")}
    return {"samples": settings.samples, "batch_size": settings.batch_size, **how}
