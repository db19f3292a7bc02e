"""`zaya eval` as a user meets it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zaya_jax.cli.eval import Eval
from zaya_jax.cli.main import main
from zaya_jax.errors import InputError
from zaya_jax.generation.engine import Engine

ZAYA = Path(sys.executable).with_name("zaya")
CHAIN_SUM = ["eval", "nano:chain_sum", "--problems", "6", "--samples", "4"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Where no folder is named, one is made below the current one."""
    monkeypatch.chdir(tmp_path)


def refused(capsys, *arguments: str) -> str:
    """Runs a command that must end with code 2, one line on stderr and no folder."""
    with pytest.raises(SystemExit) as error:
        main(["eval", *arguments])
    assert error.value.code == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown and not Path("runs").exists()
    return shown.strip().splitlines()[-1]


def test_nano_is_evaluated_on_its_own_problems(capsys):
    main([*CHAIN_SUM, "--json", "results.json"])
    shown = capsys.readouterr()
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("eval-nano-chain_sum-") and str(folder) in shown.err
    results = json.loads(Path("results.json").read_text())
    assert results == json.loads((folder / "results.json").read_text())
    metrics = results["all"]
    assert metrics["problems"] == 6 and metrics["avg@4"]["value"] > 0.8
    for text in ("6 problems, 4 samples each", "avg@4", "pass@2", "pass@4", "maj@4", "tokens"):
        assert text in shown.out
    assert f"{metrics['tokens']['total']:,}" in shown.out
    assert f"{metrics['avg@4']['value']:.1%}" in shown.out


def test_the_same_command_again_generates_nothing(capsys, monkeypatch):
    command = ["eval", "nano:gcd", "--problems", "2", "--preset", "greedy"]
    main([*command, "--json", "first.json"])
    monkeypatch.setattr(Engine, "run", None)
    main([*command, "--json", "second.json"])
    assert Path("first.json").read_text() == Path("second.json").read_text()
    assert "2 of 2 samples are there already" in capsys.readouterr().err


def test_other_settings_have_a_folder_of_their_own(monkeypatch):
    monkeypatch.setattr("zaya_jax.cli.eval.evaluate", lambda *a, **k: sys.exit(str(a[3])))
    folders = set()
    for options in ([], ["--seed", "1"], ["--problems", "5"], ["--preset", "greedy"]):
        with pytest.raises(SystemExit) as error:
            main(["eval", "nano:gcd", "--problems", "2", *options])
        folders.add(error.value.code)
    assert len(folders) == 4


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_to_the_same_results_bit_for_bit():
    command = [ZAYA, "eval", "nano", "--problems", "20", "--samples", "3", "--batch-size", "4"]
    command += ["--temperature", "1.3", "--max-new-tokens", "96", "--out"]
    subprocess.run([*command, "whole"], check=True, capture_output=True)
    process = subprocess.Popen([*command, "part"], stderr=subprocess.DEVNULL)
    records = Path("part/records.jsonl")
    while process.poll() is None and not (records.exists() and records.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = records.read_bytes()
    assert 0 < before.count(b"\n") < 60 and not Path("part/results.json").exists()
    done = subprocess.run([*command, "part"], check=True, capture_output=True, text=True)
    assert f"{before.count(b'\n')} of 60 samples are there already" in done.stderr
    assert records.read_bytes().startswith(before)
    for name in ("records.jsonl", "results.json", "settings.json"):
        assert Path("part", name).read_bytes() == Path("whole", name).read_bytes()


def test_an_interrupt_says_how_to_go_on(capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Eval(task="nano:gcd", problems=2, out=Path("there")).run()
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == "interrupted; what is done is in there, and the same command goes on from there"


def test_bad_input_is_one_line_and_leaves_no_folder(capsys):
    file = Path("bad.jsonl")
    file.write_text('{"question": "a", "answer": "1"}\n{"question": "a", "ans\n')
    assert "bad.jsonl, line 2: is no JSON" in refused(capsys, "bad.jsonl")
    file.write_text(json.dumps({"question": "why " * 2000, "answer": "1"}) + "\n")
    assert "leaves no room in the context of 1024" in refused(capsys, "bad.jsonl")
    assert "unknown task 'chess'" in refused(capsys, "chess")
    line = refused(capsys, "nano:gcd", "--max-new-tokens", "1020")
    assert "do not fit the context of 1024" in line
    assert "samples must be at least 1" in refused(capsys, "nano", "--samples", "0")
    line = refused(capsys, "nano", "--preset", "greedy", "--samples", "2")
    assert "greedy samples would all be the same" in line
    assert "temperature is out of range" in refused(capsys, "nano", "--temperature", "-1")
    assert "cannot be written" in refused(capsys, "nano", "--json", "none/x.json")
    assert "unknown preset 'lite'" in refused(capsys, "nano", "--rsa", "lite")
    assert "rsa: unknown setting 'M'" in refused(capsys, "nano", "--rsa", "nano,M=3")
    assert "N must be a number, got 'x'" in refused(capsys, "nano", "--rsa", "nano,N=x")
    assert "N must be a whole number from 1" in refused(capsys, "nano", "--rsa", "nano,N=0")
    line = refused(capsys, "nano", "--rsa", "nano", "--samples", "3")
    assert "--samples is not for --rsa" in line
    assert "more than the context of 1024" in refused(capsys, "nano", "--rsa", "light")


def test_presets_are_chosen_by_task_and_can_be_changed():
    assert Eval(task="nano")._settings().sampling.temperature == 1
    code = Eval(task="humaneval", top_k=5)._settings().sampling
    assert (code.temperature, code.top_p, code.top_k) == (0.6, 0.95, 5)
    assert Eval(task="humaneval", preset="greedy")._settings().sampling.temperature == 0
    rsa = Eval(task="nano", rsa="light,N=16,temperature=0.5")._settings()
    assert rsa.samples == rsa.batch_size == 16 and rsa.rsa.beta == 8192
    assert rsa.rsa.temperature == 0.5
    with pytest.raises(InputError, match="C=4 candidates cannot be chosen from N=2"):
        Eval(task="nano", rsa="light,N=2")._settings()


@pytest.mark.slow
def test_markovian_rsa_from_the_command_line(capsys):
    main(["eval", "nano:chain_sum", "--problems", "2", "--rsa", "nano,N=4,C=2,T=1,tau=32"])
    shown = capsys.readouterr().out
    assert "2 problems, 4 samples each" in shown and "maj@4" in shown
