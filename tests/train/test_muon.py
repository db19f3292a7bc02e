"""Muon against NumPy, PyTorch and optax, and on a mesh."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from train.muon import scale_by_muon
from train.optimizer import OptimizerConfig, build

GOLDEN = Path(__file__).parents[1] / "golden" / "training" / "optimizers.safetensors"
COEFFICIENTS = 3.4445, -4.7750, 2.0315
RATE, DECAY = 0.02, 0.1
STEPS = 5


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def orthogonal(matrix: np.ndarray) -> np.ndarray:
    """Newton-Schulz as in Jordan's post, of one matrix, in float32."""
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def reference(
    matrix: np.ndarray, gradients: list[np.ndarray], momentum: float, nesterov: bool
) -> np.ndarray:
    """Muon of one matrix in NumPy."""
    average = np.zeros_like(matrix)
    for gradient in gradients:
        average = momentum * average + (1 - momentum) * gradient
        ahead = momentum * average + (1 - momentum) * gradient if nesterov else average
        scale = 0.2 * np.sqrt(max(matrix.shape))
        matrix = matrix - RATE * (scale * orthogonal(ahead) + DECAY * matrix)
    return matrix


def ours(params, gradients: list, **settings):
    """The parameters after those gradients."""
    config = OptimizerConfig(
        learning_rate=RATE,
        weight_decay=DECAY,
        newton_schulz_dtype="float32",
        schedule="constant",
        clip_norm=0,
    )
    config = config.__class__(**{**vars(config), **settings})
    optimizer = build(config, len(gradients))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params


def experts(**leaves: np.ndarray):
    return {"layers": {"mlp": {"experts": leaves}}}


def attention(leaf: np.ndarray):
    return {"layers": {"self_attn": {"o_proj": {"weight": leaf}}}}


@pytest.mark.parametrize(
    ("momentum", "nesterov"), [(0.95, True), (0.95, False), (0.0, True), (0.0, False)]
)
def test_stacked_matrices_follow_numpy_each_by_itself(momentum, nesterov):
    """Layers, experts, and gate and up separately."""
    weights = {
        "gate_up_proj": draw(0, 2, 3, 32, 12),
        "down_proj": draw(1, 2, 3, 12, 16),
    }
    gradients = [
        {name: draw(10 * step + len(name), *w.shape) for name, w in weights.items()}
        for step in range(STEPS)
    ]
    settings = {"momentum": momentum, "nesterov": nesterov}
    new = ours(experts(**weights), [experts(**g) for g in gradients], **settings)
    new = new["layers"]["mlp"]["experts"]
    for name, height in ("gate_up_proj", 16), ("down_proj", 12):
        for index in np.ndindex(2, 3):
            for start in range(0, weights[name].shape[-2], height):
                where = (*index, slice(start, start + height))
                wanted = reference(
                    weights[name][where], [g[name][where] for g in gradients], momentum, nesterov
                )
                np.testing.assert_allclose(new[name][where], wanted, atol=1e-5, rtol=1e-5)


def test_layers_follow_numpy_wide_tall_and_square():
    for shape in (16, 24), (24, 16), (16, 16):
        weight, gradients = draw(0, 3, *shape), [draw(step + 1, 3, *shape) for step in range(STEPS)]
        new = ours(attention(weight), [attention(g) for g in gradients])
        new = new["layers"]["self_attn"]["o_proj"]["weight"]
        for layer in range(3):
            wanted = reference(weight[layer], [g[layer] for g in gradients], 0.95, True)
            np.testing.assert_allclose(new[layer], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_per_slice_within_the_bfloat16_rounding_of_pytorch(shape):
    """`torch.optim.Muon` computes in bfloat16 only: ours in float32 differs from it by as much as
    ours in bfloat16 differs from ours in float32, at most."""
    golden = load_file(GOLDEN)
    name = f"{shape[0]}x{shape[1]}"
    weight, gradients = golden[name], list(golden[f"{name}_gradients"])
    stacked = [np.stack([g, -g]) for g in gradients]
    run = lambda dtype: np.asarray(  # noqa: E731
        ours(
            attention(np.stack([weight, weight])),
            [attention(g) for g in stacked],
            newton_schulz_dtype=dtype,
        )["layers"]["self_attn"]["o_proj"]["weight"][0]
    )
    theirs = golden[f"{name}_muon"]
    moved = np.linalg.norm(theirs - weight)
    exact, rounded = run("float32"), run("bfloat16")
    rounding = np.linalg.norm(rounded - exact)
    assert np.linalg.norm(exact - theirs) < 1.5 * rounding < 0.02 * moved
    assert np.linalg.norm(rounded - theirs) < 1.5 * rounding


def test_without_nesterov_it_is_that_of_optax():
    """With it, optax corrects the bias of the momentum and of the gradient apart."""
    weight, gradients = draw(0, 24, 40), [draw(step + 1, 24, 40) for step in range(STEPS)]
    theirs = optax.contrib.muon(
        RATE, nesterov=False, eps=1e-7, weight_decay=DECAY, consistent_rms=0.2
    )
    params, state = jnp.asarray(weight), theirs.init(jnp.asarray(weight))
    for gradient in gradients:
        updates, state = theirs.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
    new = ours(attention(weight[None]), [attention(g[None]) for g in gradients], nesterov=False)
    new = new["layers"]["self_attn"]["o_proj"]["weight"][0]
    np.testing.assert_allclose(new, params, atol=1e-5, rtol=1e-5)


def test_the_first_update_is_that_of_optax_with_nesterov_too():
    gradient = jnp.asarray(draw(0, 3, 24, 40))
    numbers = optax.contrib.MuonDimensionNumbers(1, 2)
    theirs = optax.contrib.scale_by_muon(eps=1e-7, weight_dimension_numbers=numbers)
    wanted, _ = theirs.update(gradient, theirs.init(gradient))
    mine = scale_by_muon(dtype=jnp.float32)
    got, _ = mine.update(gradient, mine.init(gradient))
    np.testing.assert_allclose(got, 0.2 * 40**0.5 * wanted, atol=1e-5, rtol=1e-5)


def test_without_momentum_nothing_is_kept():
    mine = scale_by_muon(0.0)
    assert not jax.tree.leaves(mine.init(jnp.ones((2, 3, 4))))
    kept = scale_by_muon(0.9).init(jnp.ones((2, 3, 4), jnp.bfloat16))
    assert [leaf.dtype for leaf in jax.tree.leaves(kept)] == [jnp.float32]


def test_matrices_without_gradient_only_decay():
    weight = draw(0, 2, 8, 8)
    new = ours(attention(weight), [attention(np.zeros_like(weight))])
    new = new["layers"]["self_attn"]["o_proj"]["weight"]
    np.testing.assert_allclose(new, weight * (1 - RATE * DECAY), rtol=1e-6)


MESHES = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # compiling is all that takes time
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from train.optimizer import OptimizerConfig, build
from zaya_jax import make_mesh

SHAPES = {
    "experts/gate_up_proj": (3, 8, 32, 16),
    "experts/down_proj": (3, 8, 16, 8),
    "k_proj/weight": (3, 16, 24),
    "embed_tokens/weight": (40, 16),
}
rng = np.random.default_rng(1)
draw = lambda: {name: rng.standard_normal(s).astype(np.float32) for name, s in SHAPES.items()}
params, gradients = draw(), [draw(), draw()]

def updates(mesh, place, kernels=None, full=True):
    config = OptimizerConfig(
        newton_schulz_dtype="float32", schedule="constant", newton_schulz_steps=2
    )
    optimizer = build(config, 2, mesh=mesh, full_sharding=full, kernels=kernels)
    state = optimizer.init(place(params))
    step = jax.jit(optimizer.update)
    for gradient in gradients:
        out, state = step(place(gradient), state, place(params))
    return out

def placed(mesh, axis):
    # As ZeRO-1 leaves it: experts over their axis, and a dimension of the matrices over the others.
    def put(name, leaf):
        spec = [None] * leaf.ndim
        experts = name.startswith("experts")
        if experts:
            spec[1] = "expert"
        spec[axis] = ("data", "context") if experts else mesh.axis_names
        return jax.device_put(leaf, NamedSharding(mesh, P(*spec)))
    return lambda tree: {name: put(name, leaf) for name, leaf in tree.items()}

wanted = updates(None, lambda tree: tree)
for *sizes, axis, kernels, full in [
    (2, 4, 1, -2, None, True),
    (2, 4, 1, -2, None, False),
    (2, 2, 2, -1, None, False),
    (2, 4, 1, -1, "pallas", True),
]:
    mesh = make_mesh(*sizes)
    got = updates(mesh, placed(mesh, axis), kernels, full)
    for name, b in wanted.items():
        worst = np.abs(np.asarray(got[name]) - b).max()
        assert worst <= 1e-5 * np.abs(b).max(), (sizes, name, worst / np.abs(b).max())

optimizer = build(OptimizerConfig(), 2, mesh=make_mesh(2, 4), full_sharding=False)
steps = str(jax.make_jaxpr(optimizer.update)(gradients[0], optimizer.init(params), params))
sent = [line.split(" = ")[0] for line in steps.splitlines() if "sharding_constraint[" in line]
assert len(sent) == 3 and all("bf16[3," in line for line in sent), sent
print("same")
"""


def test_every_mesh_gives_the_updates_of_one_device():
    """Of sharded gradients and momentum, clipped by their norm; three layers divide by no axis; our
    kernel too, interpreted. No array is gathered on one device on its way. Where all devices need
    the matrices' directions, these are sent as the bfloat16 numbers that they are."""
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, "-c", MESHES],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert ended.stdout.strip() == "same", ended.stderr[-2000:]
    assert "rematerialization" not in ended.stderr
