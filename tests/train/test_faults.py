"""Steps without a number for a loss, or with a loss that jumps up."""

import contextlib
import dataclasses
import errno
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import run as running
from train import setup
from train.config import load_config
from train.metrics import FILE, read
from train.run import train
from train.setup import check_alike, run_folder
from train.step import Health, _accept, _is_spike, fresh_health
from zaya_jax.cli.main import main
from zaya_jax.errors import ZayaError

STEPS = 16


class Notes:
    """What a run says."""

    def __init__(self):
        self.lines = []

    def begin(self, phase, step, total):
        pass

    def say(self, line):
        self.lines.append(line)

    def show(self, step, values):
        pass


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    records = ({"text": f"{n} and {n * n % 97}"} for n in range(300))
    (folder / "text.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    values = [f"data.sources=[{{path='{folder}/text.jsonl'}}]", f"data.cache={folder}/cache"]
    values += ["context=32", "rows=2", f"steps={STEPS}", "log_every=1", "checkpoint.every=4"]
    values += ["model.num_hidden_layers=1", "model.hidden_size=32", "model.moe_intermediate_size=8"]
    values += ["data.window=64", "optimizer.kind=adamw", "faults.skips=2", "faults.restores=2"]
    return load_config("pretrain", None, values)


@pytest.fixture
def spoil(monkeypatch):
    """Makes the losses of some batches NaN, by their number from 1."""

    def of(numbers):
        original, drawn = running.to_devices, []

        def to_devices(plan, mesh):
            drawn.append(plan)
            batch = original(plan, mesh)
            bad = len(drawn) in numbers
            return batch._replace(weights=batch.weights * jnp.nan) if bad else batch

        monkeypatch.setattr(running, "to_devices", to_devices)
        return drawn

    return of


def losses(run):
    return {line["step"]: line.get("loss") for line in read(run / FILE)}


def test_a_step_without_a_loss_changes_nothing_and_is_counted(config, spoil, tmp_path):
    spoil({6, 7})
    notes = Notes()
    outcome = train(config, tmp_path, notes)
    assert outcome.finished and outcome.metrics["skipped"] == 2
    assert [line.partition(":")[0] for line in notes.lines if "skipped" in line] == [
        "step 6 is skipped",
        "step 7 is skipped",
    ]
    found = losses(tmp_path)
    assert found[6] is None and found[7] is None  # valid JSON has no NaN
    assert found[STEPS] < found[1]
    rates = {line["step"]: line["learning_rate"] for line in read(tmp_path / FILE)}
    assert rates[6] == rates[7] == rates[8]  # the schedule follows updates


def test_a_run_behind_its_last_step_is_finished_with_or_without_a_loss(
    config, spoil, tmp_path, capsys, monkeypatch
):
    spoil({STEPS})
    train(config, tmp_path, Notes())
    shorter = dataclasses.replace(config, steps=STEPS - 3)
    for again in (config, shorter):
        outcome = train(again, tmp_path, Notes())
        assert (outcome.step, outcome.finished) == (STEPS, True)
    monkeypatch.setattr(running, "train", lambda *_: outcome)
    sources = "data.sources=[{path='x'}]"
    main(["train", "pretrain", "--config", "tiny", "--set", sources, "--out", str(tmp_path)])
    assert f"step {STEPS} of 100, loss nan" in capsys.readouterr().out


def test_a_disk_that_is_full_is_one_error_wherever_it_is_met(tmp_path):
    with (
        pytest.raises(ZayaError, match=r"metrics\.jsonl: No space left on device"),
        run_folder(tmp_path),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")


def test_many_bad_steps_go_back_to_a_checkpoint_and_their_data_are_left_out(
    config, spoil, tmp_path
):
    drawn = spoil({10, 11, 12})
    notes = Notes()
    outcome = train(config, tmp_path, notes)
    assert any("back to the checkpoint of step 8" in line for line in notes.lines)
    assert outcome.finished and outcome.step == STEPS
    # Behind step 8: 9 (good), three bad ones, then 9 to 16 with what follows, and one ahead.
    assert len(drawn) == 8 + 1 + 3 + 8 + 1
    assert np.isfinite(outcome.metrics["loss"])


def test_bad_steps_without_end_are_an_error(config, spoil, tmp_path):
    spoil(set(range(6, 1000)))
    with pytest.raises(ZayaError, match="too many steps had to be skipped"):
        train(config, tmp_path, Notes())
    assert (tmp_path / "checkpoints" / "4").is_dir()


def test_bad_steps_before_any_checkpoint_are_an_error(config, spoil, tmp_path):
    spoil(set(range(1, 1000)))
    with pytest.raises(ZayaError, match="before a checkpoint"):
        train(config, tmp_path, Notes())


def test_a_loss_far_above_the_running_mean_is_a_spike(config):
    health = fresh_health()
    losses = jax.random.uniform(jax.random.key(0), (40,), minval=1.9, maxval=2.1)
    for loss in losses:
        assert not _is_spike(health, loss, config.faults)
        health = _accept(health, loss)
    assert 1.9 < health.mean_loss < 2.1
    assert _is_spike(health, jnp.float32(6.5), config.faults)
    assert not _is_spike(health, jnp.float32(5.5), config.faults)
    learned = health._replace(mean_loss=jnp.float32(0.02))  # where single batches differ by much
    assert not _is_spike(learned, jnp.float32(0.5), config.faults)
    assert _is_spike(learned, jnp.float32(0.6), config.faults)
    young = Health(health.mean_loss, jnp.int32(3), jnp.int32(0), jnp.int32(0))
    assert not _is_spike(young, jnp.float32(50.0), config.faults)


def test_nothing_is_saved_among_bad_steps_and_the_number_of_tokens_goes_back_too(
    config, spoil, tmp_path
):
    spoil({11, 12, 13})  # step 12 would be saved
    notes = Notes()
    train(config, tmp_path, notes)
    assert any("back to the checkpoint of step 8" in line for line in notes.lines)
    tokens = [line["tokens"] for line in read(tmp_path / FILE) if "tokens" in line]
    straight = tmp_path / "straight"
    spoil(set())
    train(config, straight, Notes())
    expected = [line["tokens"] for line in read(straight / FILE) if "tokens" in line]
    assert abs(tokens[-1] - expected[-1]) < 0.1 * expected[-1]


def test_a_checkpoint_that_is_due_among_bad_steps_follows_the_next_good_one(
    config, spoil, tmp_path
):
    spoil({8, 9})
    keep = dataclasses.replace(config.checkpoint, keep=9)
    train(dataclasses.replace(config, checkpoint=keep), tmp_path, Notes())
    saved = sorted(int(entry.name) for entry in (tmp_path / "checkpoints").iterdir())
    assert saved == [4, 10, 12, 16]


@pytest.mark.parametrize("number, kept", [(errno.ENOLCK, True), (errno.EIO, False)])
def test_a_file_system_without_locks_is_trained_on(number, kept, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(setup.fcntl, "flock", flock)
    with contextlib.nullcontext() if kept else pytest.raises(ZayaError), run_folder(tmp_path):
        pass


@pytest.mark.parametrize("other", ["nothing", "a setting", "the data"])
def test_processes_must_have_the_same_configuration_and_data(other, monkeypatch):
    """As two processes would see it, of which this is the second."""
    config, data = load_config("pretrain", "tiny"), {"files": ["a.txt"]}
    digests = []

    def gather(own):
        digests.append(own)
        return np.stack([digests[0], own])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(setup.multihost_utils, "process_allgather", gather)
    check_alike(config, data)
    if other == "a setting":
        config = dataclasses.replace(config, rows=2 * config.rows)
    elif other == "the data":
        data = {"files": ["b.txt"]}
    refused = contextlib.nullcontext()
    if other != "nothing":
        refused = pytest.raises(ZayaError, match="different configurations or data")
    with refused:
        check_alike(config, data)
