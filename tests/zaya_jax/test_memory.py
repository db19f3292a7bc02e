"""What `zaya info` says about memory, against what models and runs take."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from helpers import CONFIGS

import zaya_jax
from convert.synthetic import write_synthetic
from zaya_jax import ZayaConfig
from zaya_jax.cli.main import main
from zaya_jax.generation.batching import bucket
from zaya_jax.memory import HELD, PEAK, plan

RUN = """
import sys, numpy as np, zaya_jax
from zaya_jax.memory import peak_memory

folder, rows, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = zaya_jax.load(folder, layout="decoding")
prompts = np.random.default_rng(0).integers(3, model.config.vocab_size, (rows, length))
model.generate(prompts.tolist(), max_new_tokens=12)
print(peak_memory())
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_and_state_are_counted_to_the_byte(name, dtype, tmp_path):
    config = CONFIGS[name]
    write_synthetic(config, tmp_path, dtype)
    model = zaya_jax.load(tmp_path, layout="decoding")
    sizes = plan(config, 100, 3, dtype)
    buffers = {x.unsafe_buffer_pointer(): x.nbytes for x in jax.tree.leaves(model.params)}
    assert sizes[HELD] == sum(buffers.values())  # a tied head may be the embedding itself
    canonical = zaya_jax.load(tmp_path).params
    assert sizes["weights"] == sum(leaf.nbytes for leaf in jax.tree.leaves(canonical))
    state = zaya_jax.init_state(model.params, config, bucket(3), bucket(100))
    lengths = state.lengths.nbytes
    assert sizes["decoding state"] + lengths == sum(x.nbytes for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("preset", "layers", "dtype", "rows", "length"),
    [("small", 8, "bfloat16", 1, 2048), ("medium", 2, "float32", 4, 3000)],
)
def test_the_peak_of_a_run_is_predicted_within_a_tenth(
    preset, layers, dtype, rows, length, tmp_path
):
    config = ZayaConfig.preset(preset)
    config = dataclasses.replace(
        config, num_hidden_layers=layers, layer_types=config.layer_types[:layers]
    )
    write_synthetic(config, tmp_path, dtype)
    arguments = [sys.executable, "-c", RUN, str(tmp_path), str(rows), str(length)]
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=True)
    predicted = plan(config, length + 12, rows, jnp.dtype(dtype))[PEAK]
    print(f"predicted {predicted / 1e6:.0f} MB, measured {int(done.stdout) / 1e6:.0f} MB")
    assert predicted == pytest.approx(int(done.stdout), rel=0.1)


def test_the_plan_grows_with_rows_and_powers_of_two_of_the_context():
    config = ZayaConfig.preset("small")
    sizes = [plan(config, context, 1, "bfloat16")[PEAK] for context in (1025, 2048, 2049, 9000)]
    assert sizes[0] == sizes[1] < sizes[2] < sizes[3]
    rows = [plan(config, 1024, rows, "bfloat16")["decoding state"] for rows in (1, 3, 4)]
    assert rows[1] == rows[2] == 4 * rows[0]


def test_the_8b_model_is_planned_in_the_memory_of_a_small_machine(tmp_path, capsys):
    """In bfloat16: one copy of the weights, a head beside the embedding, and little more."""
    file = tmp_path / "info.json"
    main(["info", "zaya1_8b", "--context", "512", "--json", str(file)])
    sizes = json.loads(file.read_text())["memory_bytes"]
    head = 262_272 * 2048 * 2
    assert sizes["weights"] + head < sizes[HELD] < sizes["weights"] + 1.1 * head
    assert sizes[HELD] < sizes[PEAK] < 21e9
    assert PEAK in capsys.readouterr().out
