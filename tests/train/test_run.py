"""A run goes on where it was, bit for bit, whatever ended it."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import zaya_jax
from train.metrics import FILE, read

HERE = Path(__file__).parent
STEPS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Texts and chats about sums."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)

    def chat() -> dict:
        a, b = draw.randint(0, 99), draw.randint(0, 99)
        answer = f"<think>\n{a} and {b}\n</think>\n\n{a + b}"
        messages = [("user", f"{a} + {b} ="), ("assistant", answer)]
        return {"messages": [{"role": role, "content": text} for role, text in messages]}

    def text() -> dict:
        return {"text": " ".join(str(draw.randint(0, 99)) for _ in range(draw.randint(2, 30)))}

    for name, record, count in [("text", text, 300), ("chat", chat, 150), ("held", chat, 20)]:
        lines = (json.dumps(record()) + "\n" for _ in range(count))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def config(data) -> Path:
    file = data / "tiny.toml"
    file.write_text(f"""
        context = 64
        rows = 8
        steps = {STEPS}
        log_every = 1
        [model]
        num_hidden_layers = 2
        hidden_size = 32
        moe_intermediate_size = 16
        init = "fan_in"
        [checkpoint]
        every = 5
        [data]
        window = 64
        cache = "{data}/cache"
        sources = [
            {{ path = "{data}/text.jsonl", weight = 2.0 }},
            {{ path = "{data}/chat.jsonl", format = "chat" }},
        ]
        [evaluation]
        every = 10
        [evaluation.data]
        cache = "{data}/cache"
        sources = [{{ path = "{data}/held.jsonl", format = "chat" }}]
    """)
    return file


def environment(data: Path) -> dict[str, str]:
    return {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(data / "programs"), "COLUMNS": "200"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(data: Path, *arguments, script=("-m", "zaya_jax.cli.main")) -> subprocess.Popen:
    command = [sys.executable, *map(str, script), "train", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment(data))


def start_two(data: Path, *arguments) -> list[subprocess.Popen]:
    """The processes of one run."""
    options = ["--coordinator", f"localhost:{free_port()}", "--num-processes", 2, "--process-id"]
    return [start(data, *arguments, *options, number) for number in range(2)]


def run(data: Path, *arguments, code: int = 0, script=("-m", "zaya_jax.cli.main")) -> str:
    process = start(data, *arguments, script=script)
    out, errors = process.communicate(timeout=500)
    assert process.returncode == code, errors[-3000:]
    return out + errors


@pytest.fixture(scope="module")
def straight(data, config) -> Path:
    """The run that nothing interrupts."""
    folder = data / "straight"
    run(data, "pretrain", "--config", config, "--out", folder)
    return folder


TIMES = {"seconds", "tokens_per_second", "seconds_left", "memory", "tokens", "packing"}


def numbers(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read(folder / FILE)]


def last_sums(folder: Path) -> list[int]:
    """Checksums of everything in the last checkpoint, optimizer and counters included."""
    file = folder / "checkpoints" / str(STEPS) / "run" / "metadata"
    return json.loads(file.read_text())["sums"]


def assert_same_run(folder: Path, other: Path) -> None:
    assert numbers(folder) == numbers(other)
    assert last_sums(folder) == last_sums(other)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    while not any(line["step"] >= step for line in read(folder / FILE)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_every_step_is_recorded_and_the_loss_falls(straight):
    lines = [line for line in read(straight / FILE) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    held_out = [line for line in read(straight / FILE) if "held_out_loss" in line]
    assert [line["step"] for line in held_out] == [10, 20]
    for line in held_out:
        assert np.isclose(line["held_out_perplexity"], np.exp(line["held_out_loss"]))
    assert len(lines[0]["entropy_by_layer"]) == 2


def test_a_run_killed_between_steps_goes_on_bit_for_bit(data, config, straight):
    folder = data / "killed"
    process = start(data, "pretrain", "--config", config, "--out", folder)
    wait_for_step(folder, 12, process)
    process.kill()
    process.wait()
    out = run(data, "pretrain", "--config", config, "--out", folder)
    assert "goes on behind step" in out
    assert_same_run(folder, straight)


def test_a_run_killed_on_a_mesh_goes_on_bit_for_bit(data, config):
    mesh = ["--set", "mesh.data=2", "--set", "mesh.expert=2", "--set", "mesh.context=2"]
    arguments = ["pretrain", "--config", config, *mesh, "--out"]
    straight, killed = data / "straight-mesh", data / "killed-mesh"
    run(data, *arguments, straight)
    process = start(data, *arguments, killed)
    wait_for_step(killed, 12, process)
    process.kill()
    process.wait()
    assert "goes on behind step" in run(data, *arguments, killed)
    assert_same_run(killed, straight)


@pytest.mark.parametrize("access", [8, 25])
def test_a_run_killed_inside_a_checkpoint_goes_on_bit_for_bit(data, config, straight, access):
    """All other stages: test_checkpoints.py."""
    folder = data / f"killed-{access}"
    arguments = ["pretrain", "--config", config, "--out", folder]
    script = [HERE / "killed.py", "checkpoints/10", access]
    run(data, *arguments, code=-signal.SIGKILL, script=script)
    run(data, *arguments)
    assert_same_run(folder, straight)


def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(data, config, straight):
    folder = data / "stopped"
    process = start(data, "pretrain", "--config", config, "--out", folder)
    wait_for_step(folder, 7, process)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "stopped and saved" in out
    saved = max(int(entry.name) for entry in (folder / "checkpoints").iterdir())
    assert 7 <= saved < STEPS
    run(data, "pretrain", "--config", config, "--out", folder)
    assert_same_run(folder, straight)


def test_sigterm_to_one_of_two_processes_saves_and_stops_both(data, config):
    folder = data / "one-stopped"
    mesh = ["--set", "mesh.data=2", "--set", "mesh.expert=2"]
    first, second = start_two(data, "pretrain", "--config", config, *mesh, "--out", folder)
    wait_for_step(folder, 7, first)
    second.send_signal(signal.SIGTERM)
    out, errors = first.communicate(timeout=300)
    second.communicate(timeout=300)
    assert (first.returncode, second.returncode) == (0, 0), errors
    assert "stopped and saved" in out
    saved = max(int(entry.name) for entry in (folder / "checkpoints").iterdir())
    assert 7 <= saved < STEPS


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(data, config, straight):
    folder = data / "damaged"
    subprocess.run(["cp", "-r", straight, folder], check=True)
    for file in (folder / "checkpoints" / str(STEPS) / "weights").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-40])
    out = run(data, "pretrain", "--config", config, "--out", folder)
    assert "is damaged" in out and f"goes on behind step {STEPS - 5}" in out
    assert_same_run(folder, straight)


def test_a_finished_run_has_nothing_left_to_do(data, config, straight):
    before = (straight / FILE).read_bytes()
    out = run(data, "pretrain", "--config", config, "--out", straight)
    assert f"step {STEPS} of {STEPS}, loss" in out
    assert (straight / FILE).read_bytes() == before


def test_another_configuration_is_refused_by_name(data, config, straight):
    out = run(data, "pretrain", "--config", config, "--out", straight, "--set", "rows=4", code=2)
    assert "rows = 8, not 4" in out and len(out.strip().splitlines()) == 1


def test_a_folder_that_is_no_run_is_refused(data, config):
    out = run(data, "pretrain", "--config", config, "--out", data, code=2)
    assert "no run" in out and len(out.strip().splitlines()) == 1


def test_a_run_is_a_model_that_loads_and_starts_the_next_phase(data, config, straight):
    model = zaya_jax.load(straight)
    again = zaya_jax.load(straight / "checkpoints" / str(STEPS))
    tokens = np.array([[1, 40, 41, 42]])
    np.testing.assert_array_equal(model.logits(tokens), again.logits(tokens))
    folder = data / "sft"
    values = ["rope_base=1e6", "context=128", "steps=3", f"start_from={straight}"]
    values += [f'data.sources=[{{path="{data}/chat.jsonl", format="chat"}}]']
    settings = [part for value in values for part in ("--set", value)]
    run(data, "sft", "--config", config, "--out", folder, *settings)
    fine_tuned = zaya_jax.load(folder)
    assert fine_tuned.config.rope.theta == 1e6
    assert model.config.rope.theta == 1e5  # as the embedded model has it
    first = read(folder / FILE)[0]["loss"]
    assert first < read(straight / FILE)[0]["loss"] - 0.3


def test_two_processes_train_as_one_does_and_restore_each_others_checkpoints(
    data, config, straight
):
    """On a mesh of 2 x 2 x 1 over two processes of two simulated devices; the second time from a
    checkpoint whose newer one only one of them finds damaged; then on one device."""
    folder = data / "two"
    mesh = ["mesh.data=2", "mesh.expert=2", "optimizer.newton_schulz_dtype=float32"]
    settings = [part for value in [*mesh, "compute_dtype=float32"] for part in ("--set", value)]
    arguments = ["pretrain", "--config", config, *settings]

    def together(steps: int) -> list[str]:
        processes = start_two(data, *arguments, "--out", folder, "--set", f"steps={steps}")
        outputs = [process.communicate(timeout=500) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
        return [out + errors for out, errors in outputs]

    first, second = together(10)
    assert "step 10 of 10" in first and "step" not in second

    alone = data / "alone"
    run(data, *arguments, "--out", alone, "--set", "steps=10")
    for theirs, ours in zip(numbers(folder), numbers(alone), strict=True):
        for name in ("loss", "grad_norm", "held_out_loss"):
            assert np.isclose(theirs.get(name, 0), ours.get(name, 0), rtol=1e-4), (theirs, ours)

    of_second = (folder / "checkpoints" / "10" / "training").glob("ocdbt.process_1/d/*")
    largest = max(of_second, key=lambda file: file.stat().st_size)
    largest.write_bytes(bytes(largest.stat().st_size))
    first, _ = together(12)
    assert "10 is damaged (another process cannot read it)" in first
    assert "goes on behind step 5" in first

    settings = ["--set", "mesh.data=1", "--set", "mesh.expert=1", "--set", "steps=14"]
    out = run(data, *arguments, "--out", folder, *settings)
    assert "goes on behind step 12" in out and "step 14 of 14" in out
