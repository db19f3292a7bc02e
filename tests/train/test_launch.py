"""The launch files of docs: they are well-formed, and their command is one that `zaya` takes."""

import shlex
import subprocess
from pathlib import Path

import pytest
import tyro
import yaml

from train.config import load_config
from zaya_jax.cli.train import Train

LAUNCH = Path(__file__).parents[2] / "docs" / "launch"


def script_of(name: str) -> str:
    text = (LAUNCH / name).read_text()
    if name.endswith(".sh"):
        return text
    job = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == ["bash", "-c"]
    return container["args"][0]


@pytest.mark.parametrize("name", ["slurm.sh", "jobset.yaml"])
def test_the_command_of_a_launch_file_trains_on_all_its_gpus(name):
    script = script_of(name)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    (command,) = (line for line in script.replace("\\\n", " ").splitlines() if "zaya train" in line)
    words = shlex.split(command.replace('"$JOB_COMPLETION_INDEX"', "3"))
    start, end = words.index("train") + 1, words.index("&")
    train = tyro.cli(Train, args=words[start:end])
    config = load_config(train.phase, train.config, train.set)
    assert (config.mesh.data, config.mesh.expert, config.mesh.context) == (16, 8, 1)
    assert train.distributed or (train.num_processes, train.process_id) == (16, 3)


@pytest.mark.parametrize("name", ["slurm.sh", "jobset.yaml"])
def test_a_job_ends_as_its_run_does(name, tmp_path):
    process = launched(name, "echo runs; exit 7", tmp_path)
    assert process.communicate(timeout=20)[0] == "" and process.returncode == 7


@pytest.mark.parametrize(
    "name, said, code", [("slurm.sh", "saved\nrequeue 12\n", 0), ("jobset.yaml", "saved\n", 75)]
)
def test_a_job_that_is_told_to_stop_lets_its_run_save_and_is_started_again(
    name, said, code, tmp_path
):
    run = "trap 'sleep 1; echo saved; exit 0' TERM; echo runs; for _ in {1..99}; do sleep 0.1; done"
    process = launched(name, run, tmp_path)
    process.terminate()
    assert process.communicate(timeout=20)[0] == said and process.returncode == code


def launched(name: str, run: str, folder: Path) -> subprocess.Popen[str]:
    """A launch file in bash, once its run has begun, with stand-ins for that and for Slurm."""
    for command, body in {"zaya": run, "srun": 'exec "$@"', "scontrol": 'echo "$@"'}.items():
        file = folder / command
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)
    variables = {"SLURM_JOB_ID": "12", "JOB_COMPLETION_INDEX": "3"}
    process = subprocess.Popen(
        ["bash", "-c", script_of(name)],
        env={"PATH": f"{folder}:/usr/bin:/bin", **variables},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "runs\n"
    return process
