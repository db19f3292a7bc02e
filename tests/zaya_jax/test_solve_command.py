"""`zaya solve` as a user meets it."""

import io
import json
import re

import pytest

from zaya_jax.cli import output
from zaya_jax.cli.main import main

QUESTION = "State the final answer to the following arithmetic problem: 361 + 575 ="
FEW = ["--N", "4", "--C", "2", "--T", "1"]


def fails(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as error:
        main(["solve", *arguments])
    assert error.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("zaya: ")]
    return line


def test_the_answer_goes_to_stdout_and_the_rounds_to_stderr_and_json(tmp_path, capsys):
    file = tmp_path / "solution.json"
    main(["solve", QUESTION, *FEW, "--expected", "0936", "--json", str(file)])
    shown = capsys.readouterr()
    assert re.search(r"round 0 of 1: \d+ tokens, \d+% correct; '936' x", shown.err)
    assert "round 1 of 1" in shown.err and "read once for several" in shown.err
    solution = json.loads(file.read_text())
    assert shown.out == f"{solution['answer']}\n" and solution["settings"]["N"] == 4
    assert [len(r["candidates"]) for r in solution["rounds"]] == [4, 4]
    assert solution["mean_correctness"] == solution["rounds"][1]["mean_correctness"]
    assert len(solution["rounds"][1]["candidates"][0]["subset"]) == 2


def test_the_same_command_again_does_nothing_twice(tmp_path, capsys, monkeypatch):
    command = ["solve", "-", *FEW, "--out", str(tmp_path / "rounds")]
    monkeypatch.setattr("sys.stdin", io.StringIO(QUESTION))
    main(command)
    first = capsys.readouterr()
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "rounds").iterdir()}
    monkeypatch.setattr("sys.stdin", io.StringIO(QUESTION))
    main(command)
    assert capsys.readouterr().out == first.out
    assert before == {f: f.stat().st_mtime_ns for f in (tmp_path / "rounds").iterdir()}
    monkeypatch.setattr("sys.stdin", io.StringIO(QUESTION))
    assert "another seed" in fails(capsys, *command[1:], "--seed", "1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([" "], "the question is empty"),
        (["long " * 300], "leaves no room in the context of 1024"),
        ([QUESTION, "--beta", "9000"], "more than the context of 1024"),
        ([QUESTION, "--preset", "light"], "more than the context of 1024"),
        ([QUESTION, "--preset", "light", "--C", "9"], "C=9 candidates cannot be chosen from N=8"),
        ([QUESTION, "--N", "0"], "N must be a whole number from 1 on"),
        ([QUESTION, "--template", "missing.jinja"], "missing.jinja: cannot be read"),
        ([QUESTION, "--json", "missing/x.json"], "cannot be written"),
        ([QUESTION, "--T", "0", "--final-budget", "3"], "no candidate of the last round came"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert message in fails(capsys, *arguments)


def test_a_terminal_shows_the_candidates_while_they_think(capsys, monkeypatch):
    screen = output.Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr("zaya_jax.cli.solve.messages", screen)
    main(["solve", QUESTION, *FEW])
    shown = screen.file.getvalue()
    assert "is thinking" in shown and "round 1 of 1" in shown
    assert "is thinking" not in capsys.readouterr().out
