"""`zaya train` before anything is trained: what it prints and what it refuses, in one line."""

import dataclasses
import subprocess
import sys

import jax
import pytest

from train.config import load_config
from train.dry_run import activation_bytes, device_memory
from train.setup import prepare, write_model
from zaya_jax.cli.main import main
from zaya_jax.errors import CheckpointError, ConfigError
from zaya_jax.loading import NANO, load

SOURCE = ["--set", "data.sources=[{path='x.jsonl', format='chat'}]"]


def test_a_dry_run_of_the_8b_model_on_128_devices_that_are_not_there():
    command = [sys.executable, "-m", "zaya_jax.cli.main", "train", "pretrain", "--dry-run"]
    ended = subprocess.run(
        [*command, "--config", "zaya1_8b_base1", *SOURCE],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "300", "HOME": "/nonexistent"},
    )
    assert ended.returncode == 0, ended.stderr
    for text in (
        "8,840,488,784",
        "data 16, expert 8, context 1: 128 devices",
        "16,777,216",
        "step 2000: 6.00e-04",
        # 8.05e9 parameters of experts over 8, the rest everywhere, 4 bytes each
        "7.176",
    ):
        assert text in ended.stdout, text


def test_memory_is_that_of_the_arrays_and_remat_saves_activations():
    settings = ["data.sources=[{path='x'}]", "context=64", "rows=4"]
    setup = prepare(load_config("pretrain", "tiny", settings))
    memory = device_memory(setup)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(setup.like.params))
    assert memory["parameters"] == 4 * parameters
    assert memory["bfloat16 weights"] == 2 * sum(
        x.size for x in jax.tree.leaves(setup.like.params["params"])
    )
    kept = [
        activation_bytes(
            prepare(load_config("pretrain", "tiny", [*settings, f"model.remat={remat}"]))
        )
        for remat in ("none", "dots", "full")
    ]
    assert kept[0] > kept[1] > kept[2] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain"], "missing key 'data'"),
        (["pretrain", "--config", "nowhere"], "no file and no preset 'nowhere'"),
        (["pretrain", "--config", "tiny", "--set", "data.sources=[{pat='x'}]"], "sources.0.pat"),
        (["sft", "--config", "tiny", *SOURCE, "--set", "start_from=/none"], "/none: no such"),
        (["pretrain", "--config", "tiny", *SOURCE, "--set", "tokenizer=/none"], "/none"),
        (["pretrain", "--config", "tiny", *SOURCE, "--set", "mesh.data=4000", "--set", "rows=4000"],
         "needs 4000 devices"),
        (["pretrain", "--config", "tiny", *SOURCE, "--length", "0.5"], "zaya train nano"),
        (["nano", "--config", "tiny"], "--out and --length alone"),
        (["nano", "--length", "2"], "length must be above 0 and at most 1"),
        (["pretrain", "--config", "tiny", "--num-processes", "2"], "go together"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_in_one_line(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["train", *arguments, *(["--dry-run"] if arguments[0] != "nano" else [])])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_a_run_whose_newest_checkpoint_lost_its_weights_can_fall_back(tmp_path):
    """Its configuration is the run's: what is lost is found out when it is restored."""
    config = load_config("pretrain", "tiny", SOURCE[1:])
    new = prepare(config)
    write_model(new, tmp_path)
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    assert prepare(config, tmp_path).like == new.like
    with pytest.raises(CheckpointError, match="checkpoints/2/weights"):
        load(tmp_path)


def test_a_run_that_was_begun_has_its_own_tokenizer(tmp_path):
    """That of the configuration may be gone, as what the run started from may."""
    (tmp_path / "checkpoints" / "1" / "weights").mkdir(parents=True)
    config = load_config("pretrain", "tiny", [*SOURCE[1:], f"tokenizer={NANO}"])
    write_model(prepare(config), tmp_path)
    gone = dataclasses.replace(config, tokenizer="/none")
    assert prepare(gone, tmp_path).tokenizer.fingerprint == prepare(config).tokenizer.fingerprint


def test_a_mesh_without_a_device_of_each_process_is_refused(monkeypatch):
    """Two processes with one device each, and the default mesh of one device."""
    config = load_config("pretrain", "tiny", SOURCE[1:])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="of 1 devices lies on 1 of 2 processes"):
        prepare(config)


def test_no_device_is_not_what_a_processor_stands_for():
    """A mesh smaller than the number of processes: JAX would start without devices, and crash."""
    code = "import jax; from zaya_jax.sharding import simulate_devices; simulate_devices(0); "
    code += "assert jax.config.jax_num_cpu_devices != 0"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_source_that_is_not_there_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["train", "pretrain", "--config", "tiny", *SOURCE, "--out", "run"])
    assert ended.value.code == 2
    assert "x.jsonl" in capsys.readouterr().err


def test_new_weights_of_another_size_need_a_tokenizer(tmp_path, monkeypatch, capsys):
    """The embedded one fits into every vocabulary, and is no other model's."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["train", "pretrain", "--set", "model.preset=small", *SOURCE])
    assert ended.value.code == 2
    assert "tokenizer: must name the folder of one" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    plain = ["train", "pretrain", "--config", "tiny", *SOURCE, "--dry-run"]
    main(plain)
    assert "the embedded model's" in capsys.readouterr().out
