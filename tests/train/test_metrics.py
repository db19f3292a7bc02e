"""Where the numbers of a run go, and the pictures made of them."""

import json
import sys
from types import SimpleNamespace

import pytest

from train.metrics import FILE, read, tracking
from train.plotting import PLOTS, plot
from zaya_jax.cli.main import main
from zaya_jax.errors import ZayaError


def log(run, step, names=(), **values):
    with tracking(run, step - 1, names) as tracker:
        tracker.log(step, values)


def test_lines_of_steps_that_are_taken_again_are_dropped(tmp_path):
    for step in range(1, 6):
        log(tmp_path, step, loss=step / 10)
    (tmp_path / FILE).open("a").write('{"step": 6, "los')  # a process died while it wrote
    log(tmp_path, 4, loss=9.0)
    assert [(r["step"], r["loss"]) for r in read(tmp_path / FILE)] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, 9.0),
    ]


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00", b"null", b"3", b'{"loss": 1}', b"{", b""])
def test_a_damaged_line_does_not_keep_the_run_from_going_on(tmp_path, damage):
    log(tmp_path, 1, loss=0.5)
    (tmp_path / FILE).open("ab").write(damage + b"\n")
    log(tmp_path, 2, loss=0.25)
    assert [r["loss"] for r in read(tmp_path / FILE)] == [0.5, 0.25]


def test_numbers_that_are_none_leave_valid_json(tmp_path):
    log(tmp_path, 1, loss=float("nan"), grad_norm=float("inf"), entropy=0.5, by_layer=[1.0, 2.0])
    (line,) = (tmp_path / FILE).read_text().splitlines()
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert strict == {"step": 1, "entropy": 0.5, "by_layer": [1.0, 2.0]}


def test_tensorboard_gets_every_number(tmp_path):
    log(tmp_path, 3, ["tensorboard"], loss=0.25, by_layer=[0.5, 0.75])
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    for name in (b"loss", b"by_layer/0", b"by_layer/1"):
        assert name in content


def test_weights_and_biases_goes_on_in_the_run_of_that_name(tmp_path, monkeypatch):
    calls = []
    run = SimpleNamespace(
        define_metric=lambda name, step_metric: calls.append((name, step_metric)),
        log=calls.append,
        finish=lambda: calls.append("end"),
    )
    wandb = SimpleNamespace(init=lambda **settings: calls.append(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log(tmp_path, 7, ["wandb"], loss=0.5, by_layer=[1.0])
    settings, steps, logged, end = calls
    assert settings["name"] == tmp_path.name and settings["resume"] == "allow"
    assert steps == ("*", "step")
    assert logged == {"step": 7, "loss": 0.5, "by_layer/0": 1.0} and end == "end"
    log(tmp_path, 3, ["wandb"], loss=0.5)
    assert calls[4]["id"] == settings["id"] != tmp_path.name  # it goes on in the same run


def test_a_tracker_that_is_not_installed_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ZayaError, match=r"pip install 'zaya-jax\[wandb\]'"):
        log(tmp_path, 1, ["wandb"], loss=1.0)


def test_pictures_of_all_that_was_logged(tmp_path, capsys):
    for step in range(1, 4):
        log(tmp_path, step, loss=3 - step, entropy=0.5, entropy_by_layer=[0.4, 0.6])
    log(tmp_path, 4, held_out_loss=0.1, learning_rate=1e-3, grad_norm=1.0, tokens_per_second=5.0)
    main(["plot", str(tmp_path)])
    shown = capsys.readouterr().out.split()
    assert [name.rsplit("/", 1)[1] for name in shown] == [f"{name}.png" for name in PLOTS]
    for file in (tmp_path / "plots").iterdir():
        assert file.read_bytes()[:4] == b"\x89PNG" and file.stat().st_size > 5000


def test_a_folder_without_metrics_is_no_run(tmp_path, capsys):
    with pytest.raises(ZayaError, match=r"has no metrics\.jsonl"):
        plot(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["plot", str(tmp_path / "nowhere")])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_pictures_need_matplotlib(tmp_path, monkeypatch, capsys):
    log(tmp_path, 1, loss=3)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit):
        main(["plot", str(tmp_path)])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "pip install 'zaya-jax[train]'" in line and "matplotlib" in line
