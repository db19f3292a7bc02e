"""Our kernels, interpreted, on meshes of eight simulated devices, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

MODEL = """
import dataclasses
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # compiling is all that takes time
import jax.numpy as jnp
import numpy as np
import zaya_jax
from zaya_jax.sharding import parameter_sharding, rows_sharding
from helpers import TINY, assert_close, logits, random_params, random_tokens

KERNELS = dataclasses.replace(
    TINY, num_hidden_layers=1, layer_types=("hybrid",), num_experts=8, kernels="pallas"
)
XLA = dataclasses.replace(KERNELS, kernels="xla")
params, tokens = random_params(KERNELS), random_tokens(0, 8, 3)

def loss(weights, rest, config, tokens):
    out = logits({**rest, "params": weights}, config, tokens)
    return -jnp.mean(jax.nn.log_softmax(out)[..., 7]), out

compute = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)

def placed(mesh):
    def put(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jax.device_put(leaf, parameter_sharding(name, mesh))

    spread = jax.tree_util.tree_map_with_path(put, params)
    return spread, jax.device_put(tokens, rows_sharding(mesh, len(tokens)))

(_, wanted), gradient = compute(params["params"], params, XLA, tokens)
for sizes in ((8, 1), (1, 8)):
    mesh = zaya_jax.make_mesh(*sizes)
    with jax.set_mesh(mesh):
        spread, rows = placed(mesh)
        assert_close(logits(spread, KERNELS, rows), wanted)

mesh = zaya_jax.make_mesh(2, 4)
with jax.set_mesh(mesh):
    spread, rows = placed(mesh)
    (_, got), of_spread = compute(spread["params"], spread, KERNELS, rows)
assert_close(got, wanted)
leaves = jax.tree_util.tree_leaves_with_path(gradient)
for (path, a), b in zip(leaves, jax.tree.leaves(of_spread), strict=True):
    worst = np.abs(np.asarray(a) - np.asarray(b)).max()
    assert worst <= 2e-5 * np.abs(a).max(), (jax.tree_util.keystr(path), worst)
"""

OP = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # compiling is all that takes time
import jax.numpy as jnp
import numpy as np
import zaya_jax
from pallas_kernels.moe import reference
from zaya_jax.parallel import expert_parallel_moe

def gradients(f, expert, *args):
    out, pull = jax.vjp(lambda x, *rest: f(x, expert, *rest), *args)
    return out, pull(jnp.sign(jnp.sin(jnp.arange(out.size))).reshape(out.shape))

rng = np.random.default_rng(0)
for tokens, name in ((25, "pallas"), (24, "ragged")):
    shapes = (tokens, 16), (tokens,), (8, 24, 16), (8, 16, 12)
    args = [jnp.asarray(0.4 * rng.standard_normal(s), jnp.float32) for s in shapes]
    expert = jnp.asarray(rng.integers(-1, 10, tokens), jnp.int32)
    wanted = jax.jit(lambda *a: gradients(reference.moe, *a))(expert, *args)
    compute = lambda *a: expert_parallel_moe(*a, implementation=name)
    with jax.set_mesh(zaya_jax.make_mesh(2, 4)):
        got = jax.jit(lambda *a: gradients(compute, *a))(expert, *args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        worst = np.abs(np.asarray(a) - np.asarray(b)).max()
        assert worst <= 1e-5 * np.abs(b).max(), (name, tokens, a.shape, worst)
"""


def run(program: str) -> None:
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, "-c", program + 'print("same")'],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert ended.stdout.strip() == "same", ended.stderr[-2000:]


def test_the_model_and_its_gradients_on_meshes_are_those_of_xla_on_one_device():
    """What shards compute of a tensor's gradient is summed, once."""
    run(MODEL)


def test_experts_and_their_gradients_on_a_mesh_are_those_of_one_device():
    """Also where tokens do not divide by the data axis, and some have no expert."""
    run(OP)
