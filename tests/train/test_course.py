"""The mini-course's material: solutions are right, data are clean and repeatable, figures agree."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from train.course import report as reports
from train.course.data import (
    TRAINING_SEED,
    WRITTEN,
    records,
    tokenizer_hash,
    training_problems,
    write,
)
from train.course.phases import PHASES
from train.course.solutions import (
    SOLVERS,
    check,
    concluded,
    response,
    task,
    tasks,
    worked,
)
from zaya_jax import InputError, ZayaConfig
from zaya_jax.evaluation.accuracy import CHAT, MAX_NEW_TOKENS, TEXT
from zaya_jax.evaluation.families import (
    FAMILIES,
    PRACTICE,
    Problem,
    fingerprint,
    held_out,
    is_held_out,
    problems,
)
from zaya_jax.generation.rows import Generation
from zaya_jax.loading import NANO
from zaya_jax.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
EVERY = [*FAMILIES, *PRACTICE]
COUNTS = {"pretrain": 2000, "midtrain": 300, "sft": 2000}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(NANO, ZayaConfig.preset("nano"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("course")
    write(made, documents=COUNTS)
    return made


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def first(stream, count):
    return list(itertools.islice(stream, count))


def questions(record):
    """Everything in a record that may be a question, without surrounding space."""
    if "text" in record:
        parts = record["text"].split("\n\n")
        return ["\n\n".join(parts[:end]) for end in range(1, len(parts) + 1)]
    asked = [m["content"] for m in record["messages"] if m["role"] == "user"]
    parts = [part for content in asked for part in re.split(r"(?m)^\d+\. ", content)]
    return [text.strip() for text in (*asked, *parts) if text.strip()]


@pytest.mark.parametrize("family", EVERY)
def test_no_training_question_is_held_out(family):
    reserved = {problem.question for problem in held_out(family)}
    reserved_words = {fingerprint(question) for question in reserved}
    for problem in first(training_problems(family), 1000):
        assert problem.question not in reserved
        assert fingerprint(problem.question) not in reserved_words


@pytest.mark.parametrize("family", EVERY)
def test_no_training_solution_works_out_a_held_out_problem(family):
    """Euclid's algorithm for 99 and 243 is also the way to simplify 99/243."""
    reserved = {task(problem) for family in FAMILIES for problem in held_out(family)}
    for problem in first(training_problems(family), 300):
        assert not tasks(problem) & reserved


def test_a_solution_works_out_problems_of_other_families():
    def made(family, question, **facts):
        return Problem(family, question, facts.pop("answer", ""), {"metadata": facts})

    long = made("long_chain_sum", "", expression="12 + 30 - 7")
    assert task(made("chain_sum", "", expression="30 + 12")) in tasks(long)
    assert task(made("chain_sum", "", expression="42 - 7")) in tasks(long)
    assert task(made("chain_sum", "", expression="30 - 7")) in tasks(long)  # its check goes back
    assert task(made("chain_sum", "", expression="12 - 7")) not in tasks(long)
    fraction = made("fraction_simplification", "", numerator=12, denominator=30)
    divisor = made("gcd", "", numbers=[30, 12], answer="6")
    assert task(fraction) == task(divisor)
    rows = made("products", "", expression="12 * 34")
    assert task(made("chain_sum", "", expression="48 + 360")) in tasks(rows)
    there = made("base_conversion", "", source_repr="101", source_base=2, target_base=5)
    back = made("base_conversion", "", source_repr="10", source_base=5, target_base=2)
    assert task(there) == task(back)


def test_the_removal_removes_something():
    """Unfiltered, the families repeat held-out questions by chance."""
    drawn = first(problems("gcd", TRAINING_SEED), 20_000)
    overlap = sum(is_held_out(problem.question) for problem in drawn)
    assert overlap > 10
    swapped = fingerprint("What is 38 * 47?") == fingerprint("What is 47 * 38?")
    assert swapped and fingerprint("What is 38 * 47?") != fingerprint("What is 38 * 48?")


@pytest.mark.parametrize("phase", WRITTEN)
def test_no_held_out_question_is_in_a_training_file(folder, phase):
    """Neither by its hash nor as text anywhere in the file."""
    rows = read(folder / f"{phase}.jsonl")
    found = [question for row in rows for question in questions(row)]
    assert not any(is_held_out(question) for question in found)
    assert sum(question.startswith("Spell this word") for question in found) > 20
    everything = (folder / f"{phase}.jsonl").read_text()
    for family in EVERY:
        for problem in held_out(family):
            assert json.dumps(problem.question.strip())[1:-1] not in everything


@pytest.mark.parametrize("phase", WRITTEN)
def test_held_out_files_are_made_of_held_out_questions_only(folder, phase):
    rows = read(folder / "held_out" / f"{phase}.jsonl")
    trained = {json.dumps(row) for row in read(folder / f"{phase}.jsonl")}
    assert len(rows) >= 300 and not any(json.dumps(row) in trained for row in rows)
    for row in rows:
        asked = "messages" in row or "\n\nAnswer: " in row["text"]
        assert any(is_held_out(question) for question in questions(row)) == asked


@pytest.mark.parametrize("family", EVERY)
def test_every_worked_answer_gets_full_score_and_every_step_is_true(family):
    for problem in first(training_problems(family, 7), 200):
        steps, answer = worked(problem)
        assert problem.score(answer) == 1.0
        for line in [*steps, *check(problem)]:
            assert_true(line)


def assert_true(line):
    """Every equation in a line holds, and every difference in columns."""
    if re.fullmatch(r"\d{3}[ -]\d{3}[ -]\d{3}", line):
        x, y, rest = (int(line[place::4][::-1]) for place in range(3))
        assert x - y == rest
        return
    for terms, result in re.findall(r"(?<![\d-])(\d+(?:[-+*]\d+)+)=(-?\d+)", line):
        assert eval(terms) == int(result), line
    for numbers in re.findall(r"(\d+)/(\d+)=(\d+)r(\d+)", line):
        number, divisor, quotient, remainder = map(int, numbers)
        assert divmod(number, divisor) == (quotient, remainder), line
    if whole := re.match(r"(-?)\(?(\d+[-+]\d+)\)?: .*: (-?\d+)$", line):
        assert int(f"{whole[1]}1") * eval(whole[2]) == int(whole[3]), line


def test_a_wrong_worked_answer_is_refused(monkeypatch):
    (problem,) = held_out("chain_sum", 1)
    monkeypatch.setitem(SOLVERS, "chain_sum", lambda _: (["?"], "1234567"))
    with pytest.raises(ValueError, match="worked answer '1234567' is wrong"):
        worked(problem)


def test_checks_reach_the_answer_or_the_question_again():
    for family in ("chain_sum", "long_chain_sum", "many_term_sum", "leg_counting", "products"):
        for problem in first(training_problems(family), 20):
            assert re.search(r"-?\d+$", check(problem)[-1])[0] == problem.answer
    for problem in first(training_problems("base_conversion"), 20):
        facts = problem.entry["metadata"]
        divisions = [line for line in check(problem) if "/" in line]
        remainders = [line.rpartition("r")[2] for line in reversed(divisions)]
        assert "".join(remainders) == facts["source_repr"]
    for problem in first(training_problems("gcd"), 20):
        products = [line.rpartition(":")[2].rpartition("=")[2] for line in check(problem)]
        numbers = {str(number) for number in problem.entry["metadata"]["numbers"]}
        assert numbers <= {product.strip() for product in products}


def test_the_same_seed_gives_the_same_bytes_in_another_process(folder, tmp_path):
    program = f"""
from pathlib import Path
from train.course.data import write
write(Path({str(tmp_path)!r}), documents={COUNTS!r})
"""
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env=environment)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.json*"))
    assert len(files) == 7
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / file).read_bytes()


def test_phases_and_seeds_have_different_problems():
    def drawn(phase, seed):
        return {question for row in first(records(phase, seed), 300) for question in questions(row)}

    sft = drawn("sft", 0)
    assert len(sft & drawn("sft", 1)) < 0.15 * len(sft)
    assert len(sft & drawn("pretrain", 0)) < 0.15 * len(sft)


def test_documents_suit_the_contexts(folder, tokenizer):
    """Nothing of pretraining is cut; a part of midtraining is, and it is long; little SFT is."""

    def lengths(name):
        return [tokens(row, tokenizer) for row in read(folder / f"{name}.jsonl")]

    pretrain, midtrain, sft = map(lengths, WRITTEN)
    assert max(pretrain) <= PHASES["pretrain"].context < max(sft) <= PHASES["sft"].context
    context = PHASES["midtrain"].context
    assert 0.05 < sum(n > context for n in midtrain) / len(midtrain) < 0.3
    assert sum(midtrain) / len(midtrain) > 3 * sum(sft) / len(sft)


def tokens(record, tokenizer):
    if "text" in record:
        return len(tokenizer.encode(record["text"])) + 2
    *context, last = record["messages"]
    return len(tokenizer.encode_chat(context)) + len(tokenizer.encode(last["content"])) + 2


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_has_room_for_every_solution(family, tokenizer):
    for problem in first(training_problems(family), 300):
        assert len(tokenizer.encode(concluded(worked(problem)))) < MAX_NEW_TOKENS


def test_the_vocabulary_is_frozen_and_named_in_the_data(folder):
    """Its hash: another vocabulary would spoil all data and checkpoints made before."""
    frozen = "5bb0cc3cdef4874ced2318e32fc680a804c209d55bfb464a18d89d4a8d378237"
    assert tokenizer_hash() == json.loads((folder / "data.json").read_text())["tokenizer"] == frozen


def test_every_phase_mixes_files_that_are_there(folder):
    for place, (name, phase) in enumerate(PHASES.items()):
        assert sum(phase.mixture.values()) == pytest.approx(1) and name in phase.mixture
        assert set(phase.mixture) <= set(list(PHASES)[: place + 1])
        assert phase.rows * phase.context == 2048


class Solver:
    """Stands for a model that knows the worked solutions of chats, or of texts."""

    def __init__(self, form):
        known = [problem for family in FAMILIES for problem in held_out(family, 5)]
        self.texts = {}
        for problem in known:
            steps, answer = worked(problem)
            text = "\n".join([*steps, "", f"Answer: {answer}"])
            self.texts[str(form.prompt(problem.question))] = (
                response(steps, answer) if form is CHAT else text
            )

    def generate(self, prompts, **_):
        texts = (self.texts.get(str(prompt), "") for prompt in prompts)
        return [Generation(text, [0] * 7, [], [], np.zeros((0, 0)), "stop") for text in texts]


@pytest.mark.parametrize("phase, form", [("pretrain", TEXT), ("sft", CHAT)])
def test_a_report_asks_in_the_form_that_the_phase_has_learned(phase, form, monkeypatch, tmp_path):
    monkeypatch.setattr(reports, "distinct_answers", lambda family: 12)
    rows = reports.report(Solver(form), phase, 5)
    assert [row.family for row in rows] == list(FAMILIES)
    assert {row.accuracy for row in rows} == {1.0} and {row.tokens for row in rows} == {35}
    other = CHAT if form is TEXT else TEXT
    assert {row.accuracy for row in reports.report(Solver(other), phase, 5)} == {0.0}
    reports.save(tmp_path / "nano.json", {phase: rows})
    assert reports.load(tmp_path / "nano.json") == {phase: rows}


def test_the_table_stands_between_the_markers_and_nowhere_else():
    row = reports.FamilyReport("gcd", 200, 0.755, 0.3, 80, 999)
    both = {"pretrain": [row], "sft": [dataclasses.replace(row, accuracy=0.9)]}
    text = f"before\n{reports.BEGIN}\nold\n{reports.END}\nafter"
    made = reports.with_table(text, both)
    assert "| gcd | 75.5% | 90.0% | 30.0% | 80 |" in made and "old" not in made
    assert made.startswith("before\n") and made.endswith("\nafter")
    assert reports.with_table(made, both) == made
    with pytest.raises(InputError, match="nano: begin"):
        reports.with_table("no markers", both)


def test_the_readme_says_what_the_figures_say():
    figures = reports.load(ROOT / "docs" / "nano.json")
    readme = (ROOT / "README.md").read_text()
    assert reports.with_table(readme, figures) == readme
    for rows in figures.values():
        assert [row.family for row in rows] == list(FAMILIES)
