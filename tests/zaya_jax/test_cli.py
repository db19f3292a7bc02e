"""The command line as a user meets it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from zaya_jax.cli.doctor import fallback_warning
from zaya_jax.cli.main import main
from zaya_jax.loading import NANO

ZAYA = Path(sys.executable).with_name("zaya")
QUESTION = "Spell this word backward (example: sun -> nus): learning"


def fails(capsys, *arguments: str) -> str:
    """Runs a command that must end with code 2 and one line on stderr; returns the line."""
    with pytest.raises(SystemExit) as error:
        main(list(arguments))
    assert error.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Traceback" not in line
    return line


def test_generate_streams_an_answer_of_the_embedded_model(tmp_path, capsys):
    file = tmp_path / "out.json"
    main(["generate", QUESTION, "--temperature", "0", "--json", str(file)])
    shown = capsys.readouterr()
    (row,) = json.loads(file.read_text())
    assert row["text"] in shown.out and "<think>" in row["text"]
    assert row["answer"] == "gninrael" and row["thinking"].startswith("8g7n")
    assert row["finish_reason"] == "stop" and len(row["logprobs"]) == len(row["tokens"])
    assert "tokens/s" in shown.err


def test_generate_answers_several_prompts_and_continues_raw_text(tmp_path):
    file = tmp_path / "out.json"
    main(["generate", "a", "b", "--raw", "--max-new-tokens", "4", "--json", str(file)])
    assert [row["prompt"] for row in json.loads(file.read_text())] == ["a", "b"]


def test_info_counts_and_plans(tmp_path, capsys):
    file = tmp_path / "info.json"
    main(["info", "zaya1_8b", "--context", "4096", "--json", str(file)])
    values = json.loads(file.read_text())
    assert values["parameters"]["total"] == 8_840_488_784
    assert values["memory_bytes"]["key/value cache, per token"] == 40 * 1024
    assert values["config"]["model_type"] == "zaya"
    assert "8,840,488,784" in capsys.readouterr().out
    main(["info"])
    assert "Configuration of nano" in capsys.readouterr().out


def test_doctor_names_devices_and_kernels(tmp_path, capsys):
    file = tmp_path / "doctor.json"
    main(["doctor", "--json", str(file)])
    values = json.loads(file.read_text())
    assert values["versions"]["jax"].startswith("0.12.") and values["warning"] is None
    ops = ["attention", "cca_mix", "cross_entropy", "moe", "newton_schulz", "norm", "router"]
    assert values["kernels"] == dict.fromkeys(ops, "xla")
    assert "cpu 0" in capsys.readouterr().out


def test_doctor_shows_kernels_that_the_environment_chose(monkeypatch, tmp_path, capsys):
    file = tmp_path / "doctor.json"
    monkeypatch.setenv("ZAYA_JAX_KERNELS", "pallas")
    main(["doctor", "--json", str(file)])
    values = json.loads(file.read_text())
    assert set(values["kernels"].values()) == {"pallas"}
    assert values["flags"]["ZAYA_JAX_KERNELS"] == "pallas"
    monkeypatch.setenv("ZAYA_JAX_KERNELS", "cuda")
    assert "ZAYA_JAX_KERNELS is 'cuda': one of xla, pallas" in fails(capsys, "doctor")


def test_doctor_shouts_when_rocm_fell_back_to_the_cpu():
    with_plugin = {"jax": "0.12.0", "jax-rocm7-plugin": "0.12.0"}
    without = {"jax": "0.12.0", "jax-rocm7-plugin": "not installed"}
    assert "no AMD GPU and runs on the CPU" in (fallback_warning(with_plugin, "cpu") or "")
    assert fallback_warning(with_plugin, "gpu") is None
    assert fallback_warning(without, "cpu") is None


def test_errors_are_one_line_with_exit_code_2(capsys, tmp_path):
    missing = str(tmp_path / "missing")
    assert fails(capsys, "generate", "hi", "--model", missing).endswith("missing: no such folder")
    assert fails(capsys, "info", missing).endswith("missing: no such folder")
    assert "give a prompt" in fails(capsys, "generate")
    assert "temperature is out of range: -1.0" in fails(
        capsys, "generate", "hi", "--temperature", "-1"
    )
    assert "context must lie in 1 .. 1024" in fails(capsys, "info", "--context", "5000")
    assert "batch must be at least 1" in fails(capsys, "info", "--batch", "0")
    assert "cannot be written" in fails(capsys, "doctor", "--json", missing + "/x.json")
    assert "leaves no room in the context of 1024" in fails(capsys, "generate", "x" * 2000)
    assert "cannot be written" in fails(capsys, "generate", "x", "--json", str(tmp_path))
    assert "no valid Unicode" in fails(capsys, "generate", "\udcff")
    assert "shown must not be negative" in fails(capsys, "demo", "--shown", "-1")


def test_text_that_looks_like_markup_is_printed_as_it_is(capsys):
    from zaya_jax.cli.output import streaming

    main(["generate", "What is [/a]?", "b", "--max-new-tokens", "2"])
    assert "What is [/a]?" in capsys.readouterr().out
    with streaming("Working") as on_text:
        on_text(0, "x[1:end:2] :heart: \t|")
    assert capsys.readouterr().out == "x[1:end:2] :heart: \t|\n"


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
@pytest.mark.parametrize("command", [["doctor"], ["generate", "hi"]])
def test_a_backend_that_cannot_start_is_one_line(platform, command):
    environment = {**os.environ, "JAX_PLATFORMS": platform}
    done = subprocess.run([ZAYA, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "zaya: JAX cannot start" in done.stderr


def test_unknown_options_end_with_code_2():
    for arguments in (["generate", "hi", "--temprature", "0"], ["explode"], []):
        done = subprocess.run([ZAYA, *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr


def test_an_interrupt_and_a_closed_pipe_leave_no_traceback():
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = f"{ZAYA} generate '{QUESTION}' | head -c 1"
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, env=environment, timeout=120
    )
    assert "Traceback" not in done.stderr
    process = subprocess.Popen([ZAYA, "generate", QUESTION], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()  # it is loading
    process.send_signal(2)
    assert process.wait(60) == 130
    assert "Traceback" not in process.stderr.read()


@pytest.mark.slow
def test_the_wheel_runs_anywhere(tmp_path):
    """Built, installed without the source in reach, run from another folder."""
    root, pip = Path(__file__).parents[2], [sys.executable, "-m", "pip"]
    subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, root],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run(
        [*pip, "install", "-q", "--no-deps", "--target", site, wheel],
        check=True,
    )
    code = "import zaya_jax; from zaya_jax.cli.main import main; print(zaya_jax.__file__); "
    code += f"main(['generate', {QUESTION!r}, '--temperature', '0'])"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert str(site) in done.stdout and "</think>" in done.stdout, done.stderr


def test_convert_says_what_it_read_and_wrote(tmp_path, capsys):
    out, back = tmp_path / "out", tmp_path / "back"
    main(["convert", str(NANO), str(out), "--to", "hf-legacy"])
    text = "the legacy Zyphra layout, 131 leaves, 0.01 GB, from the current Hugging Face layout"
    assert text in capsys.readouterr().out
    main(["convert", str(out), str(back), "--to", "orbax", "--dtype", "float32"])
    assert "from the legacy Zyphra layout" in capsys.readouterr().out
    main(["generate", "--model", str(back), QUESTION, "--temperature", "0"])
    assert "gninrael" in capsys.readouterr().out


def test_convert_shows_the_mapping_without_writing(tmp_path, capsys):
    main(["convert", str(NANO), str(tmp_path / "out"), "--to", "hf-legacy", "--dry-run"])
    shown = capsys.readouterr().out
    assert "model.layers.3.zaya_block.experts.local_experts.0.linear_fc1.weight" in shown
    assert "model.layers.1.mlp.experts.gate_up_proj" in shown and "float32" in shown
    assert not list(tmp_path.iterdir())


def test_convert_errors_are_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    nano, out = str(NANO), str(tmp_path / "out")
    missing = str(tmp_path / "missing")
    assert fails(capsys, "convert", missing, out, "--to", "hf").endswith("no such folder")
    assert "not loaded from the hub" in fails(capsys, "convert", "x/y", out, "--to", "hf")
    line = fails(capsys, "convert", nano, nano, "--to", "orbax")
    assert line.endswith("nano: exists; say --overwrite to replace the checkpoint")
    line = fails(capsys, "convert", nano, out, "--to", "hf", "--max-shard-size", "5 apples")
    assert "max-shard-size '5 apples': write it like 5G" in line
    line = fails(capsys, "convert", nano, out, "--to", "hf", "--mesh", "data=1")
    assert "a mesh is for Orbax" in line
    assert not list(tmp_path.iterdir())
