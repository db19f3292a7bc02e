"""Loss and gradients do not depend on the mesh, nor on micro-batches, rematerialisation, or where
parameters lie."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from helpers import ODD, TINY
from packed import packed_batch

from train.gradients import gradients
from zaya_jax.errors import ConfigError
from zaya_jax.layouts import stack
from zaya_jax.model import init
from zaya_jax.sharding import AXES

PROGRAM = Path(__file__).parent / "on_meshes.py"


def run(model: str) -> list[dict]:
    paths = os.pathsep.join([str(PROGRAM.parents[1]), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, PROGRAM, model],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "cases"), [("odd", 21), ("tiny", 7), ("plain", 3), ("kernels", 1)]
)
def test_every_mesh_gives_the_loss_gradients_and_counts_of_one_device(model, cases):
    """With segments over, at and around the boundaries of shards, empty rows, windows within a
    shard and over several, and tokens that all go to one expert, or to none; a batch without
    targets has no loss and no gradient. Gradients are divided, not summed whole on every device,
    and no device gathers activations but keys and values."""
    results = run(model)
    assert len(results) == cases
    for result in results:
        assert abs(result["nll"]) < 2e-6, result
        if result["case"] == "evaluation":
            continue
        assert abs(result["loss"]) < 2e-6 and abs(result["weight"]) < 1e-6, result
        assert result["tokens"] == result["counts"] == 0, result
        assert result["gradients"] < 3e-5, result
        kinds = result["collectives"]
        assert kinds["all-reduce"] < 40, result
        if " 1x1x1" not in result["case"]:  # the largest one; a layer's, with full sharding
            assert kinds["reduce-scatter"] > 200, result
        if " 2x4x1" in result["case"]:
            assert "all-gather" not in kinds and "all-to-all" in kinds, result


def mesh(data=1, expert=1, context=1):
    return jax.sharding.AbstractMesh((data, expert, context), AXES)


@pytest.mark.parametrize(
    ("config", "sizes", "shape", "accumulate", "message"),
    [
        (TINY, {"data": 4}, (6, 16), 1, "6 rows is not divisible by data 4 x expert 1 x 1 micro"),
        (TINY, {"data": 2, "expert": 2}, (6, 16), 1, "6 rows is not divisible by data 2 x expert"),
        (TINY, {"data": 2}, (6, 16), 2, "6 rows is not divisible by data 2 x expert 1 x 2 micro"),
        (TINY, {}, (6, 16), 0, "0 micro-batches"),
        (TINY, {"context": 3}, (6, 16), 1, "16 tokens are not divisible by the context axis of 3"),
        (ODD, {"context": 4}, (6, 16), 1, "4 tokens are shorter than the 5 before them"),
        (TINY, {"expert": 3}, (6, 16), 1, "num_experts 4 is not divisible by the expert axis of 3"),
    ],
)
def test_what_a_mesh_cannot_split_evenly_is_refused(config, sizes, shape, accumulate, message):
    params = jax.eval_shape(lambda: stack(init(config, jax.random.key(0)), config))
    with pytest.raises(ConfigError, match=message):
        gradients(params, config, packed_batch(*shape), mesh(**sizes), accumulate=accumulate)
