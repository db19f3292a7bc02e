"""The course's data: a JSONL file for each phase, and held-out ones beside them.

    python -m train.course.data FOLDER

`pretrain.jsonl` has texts, {"text": ...}; `midtrain.jsonl` and `sft.jsonl` have chats,
{"messages": [{"role", "content"}, ...]}, whose assistant turns are `<think>...</think>` and an
answer. The same seed gives the same bytes, on any machine. No question that `is_held_out`
occurs in them; the files in `held_out/` are made of those questions only.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import tyro

from train.course import text
from train.course.phases import HELD_OUT_DOCUMENTS, PHASES
from train.course.solutions import Task, check, concluded, response, task, tasks, worked
from zaya_jax.config import ZayaConfig
from zaya_jax.evaluation.accuracy import text_question
from zaya_jax.evaluation.families import (
    FAMILIES,
    PRACTICE,
    SEED_STRIDE,
    Problem,
    held_out,
    is_held_out,
    problems,
)
from zaya_jax.loading import NANO
from zaya_jax.text.tokenizer import Tokenizer

FACTS = "data.json"
TRAINING_SEED = 200 * SEED_STRIDE
TEXT_SHARE = 0.25  # of pretraining's documents; the others are problems
HELD_OUT_TEXTS = 50  # one text in so many is held out

Record = dict[str, Any]
Sources = Mapping[str, Iterator[Problem]]


def write(folder: Path, seed: int = 0, documents: Mapping[str, int] | None = None) -> None:
    """Writes `PHASE.jsonl` and `held_out/PHASE.jsonl` for the phases but the last, and `data.json`.

    Args:
      folder: made where it is missing; files of these names are replaced.
      seed: of all choices; seeds give different problems.
      documents: how many for each phase, where not as many as `PHASES` says.
    """
    counts = {name: phase.documents for name, phase in PHASES.items()} | dict(documents or {})
    (folder / "held_out").mkdir(parents=True, exist_ok=True)
    for name in WRITTEN:
        write_lines(folder / f"{name}.jsonl", records(name, seed), counts[name])
        withheld = min(HELD_OUT_DOCUMENTS, counts[name])
        write_lines(folder / "held_out" / f"{name}.jsonl", held_out_records(name, seed), withheld)
    (folder / FACTS).write_text(json.dumps(facts(seed, counts), indent=2) + "\n")


def facts(seed: int, documents: Mapping[str, int]) -> Record:
    """What the files depend on, as in their `data.json`."""
    return {"seed": seed, "documents": dict(documents), "tokenizer": tokenizer_hash()}


def write_lines(file: Path, stream: Iterator[Record], count: int) -> None:
    """The first `count` records, as JSONL; a file of that name is replaced."""
    with file.open("w", encoding="utf-8", newline="\n") as lines:
        for record in itertools.islice(stream, count):
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")


def tokenizer_hash() -> str:
    """SHA-256 of the frozen vocabulary, which data and checkpoints belong to."""
    return hashlib.sha256((NANO / "tokenizer.json").read_bytes()).hexdigest()


def records(phase: str, seed: int = 0) -> Iterator[Record]:
    """A phase's training documents, endless."""
    stream = seed * len(WRITTEN) + WRITTEN.index(phase)
    sources = {family: training_problems(family, stream) for family in FAMILIES | PRACTICE}
    return _WRITERS[phase](Random(f"{phase} {seed}"), sources, False)


def held_out_records(phase: str, seed: int = 0) -> Iterator[Record]:
    """Documents like a phase's, of held-out problems and texts; endless, but they repeat."""
    random = Random(f"{phase} {seed} held out")
    sources = {family: _drawn(random, held_out(family)) for family in FAMILIES | PRACTICE}
    return _WRITERS[phase](random, sources, True)


def _drawn(random: Random, reserved: list[Problem]) -> Iterator[Problem]:
    while True:
        yield from random.sample(reserved, len(reserved))


def training_problems(family: str, stream: int = 0) -> Iterator[Problem]:
    """The problems of a family that are not held out; streams have different ones.

    Left out are also problems whose solution works out a held-out one of any family, and words that
    begin with a held-out one: their question would contain the other.
    """
    for problem in problems(family, TRAINING_SEED + stream * SEED_STRIDE):
        word = problem.entry["metadata"].get("word", "").lower()
        if not (
            is_held_out(problem.question)
            or _begins_with_held_out(word)
            or tasks(problem) & _held_out_tasks()
        ):
            yield problem


@cache
def _held_out_tasks() -> frozenset[Task]:
    return frozenset(task(problem) for family in FAMILIES for problem in held_out(family))


def _begins_with_held_out(word: str) -> bool:
    return any(word[:end] in _held_out_words() for end in range(1, len(word) + 1))


@cache
def _held_out_words() -> frozenset[str]:
    words = (problem.entry["metadata"]["word"] for problem in held_out("spell_backward"))
    return frozenset(word.lower() for word in words)


def _pretrain(random: Random, sources: Sources, withheld: bool) -> Iterator[Record]:
    """Short texts, and problems with worked answers as texts, none longer than the context."""
    room = PHASES["pretrain"].context - 2  # the first and the last token
    tokenizer = Tokenizer.from_folder(NANO, ZayaConfig.preset("nano"))
    assert tokenizer is not None
    words = (problem.entry["metadata"]["word"] for problem in sources["spell_backward"])
    while True:
        if random.random() < TEXT_SHARE:
            document = text.document(random, words, longest=room)
            if _is_held_out_text(document) != withheld:
                continue
        else:
            problem = next(sources[random.choice(list(FAMILIES))])
            steps, answer = worked(problem)
            lines = "\n".join([*steps, "", f"Answer: {answer}"])
            document = text_question(problem.question) + lines
        if len(tokenizer.encode(document)) <= room:
            yield {"text": document}


def _is_held_out_text(document: str) -> bool:
    return hashlib.sha256(document.encode()).digest()[0] % HELD_OUT_TEXTS == 0


def _midtrain(random: Random, sources: Sources, withheld: bool) -> Iterator[Record]:
    """Long reasoning: many terms, several problems at once, checked answers, conversations."""
    kinds = (_many_terms, _several, _checked, _conversation)
    while True:
        yield _chat(*random.choice(kinds)(random, sources))


def _sft(random: Random, sources: Sources, withheld: bool) -> Iterator[Record]:
    """A question and its worked answer; now and then a second one, where both fit the context."""
    tokenizer = Tokenizer.from_folder(NANO, ZayaConfig.preset("nano"))
    assert tokenizer is not None
    while True:
        chat = _chat(*(_turn(random, sources) for _ in range(random.choice([1] * 6 + [2]))))
        if len(tokenizer.encode_chat(chat["messages"])) < PHASES["sft"].context:
            yield chat


_WRITERS = {"pretrain": _pretrain, "midtrain": _midtrain, "sft": _sft}
WRITTEN = tuple(_WRITERS)  # phases whose documents no model is needed for
Turn = tuple[str, str]


def _chat(*turns: Turn) -> Record:
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    return {"messages": messages}


def _draw(random: Random, sources: Sources) -> Problem:
    return next(sources[random.choice(list(FAMILIES))])


def _turn(random: Random, sources: Sources) -> Turn:
    problem = _draw(random, sources)
    return problem.question, concluded(worked(problem))


def _conversation(random: Random, sources: Sources) -> list[Turn]:
    return [_turn(random, sources) for _ in range(random.randint(2, 9))]


def _many_terms(random: Random, sources: Sources) -> list[Turn]:
    problem = next(sources["many_term_sum"])
    return [(problem.question, response(*worked(problem)))]


def _checked(random: Random, sources: Sources) -> list[Turn]:
    """A problem of several steps, and its answer reached again on another way."""
    problem = _draw(random, sources)
    steps, answer = worked(problem)
    return [(problem.question, response([*steps, "check", *check(problem)], answer))]


def _several(random: Random, sources: Sources) -> list[Turn]:
    drawn = [_draw(random, sources) for _ in range(random.randint(2, 9))]
    solved = [worked(problem) for problem in drawn]
    question = "\n".join(f"{n}. {p.question.strip()}" for n, p in enumerate(drawn, 1))
    steps = [f"{n}.\n" + "\n".join([*s.steps, s.answer]) for n, s in enumerate(solved, 1)]
    answers = "\n".join(f"{n}. {s.answer}" for n, s in enumerate(solved, 1))
    return [(question, response(steps, answers))]


if __name__ == "__main__":
    tyro.cli(write)
