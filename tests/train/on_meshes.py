"""Loss, gradients and counts on meshes of eight simulated devices, against one device.

Run by `test_gradients`, in a process of its own: prints one JSON object a case.
"""

import dataclasses
import json
import math
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from helpers import ODD, TINY, random_params
from packed import packed_batch

from pallas_kernels.rocm import hlo
from train.data.batch import Batch
from train.gradients import gradients, negative_log_likelihood
from zaya_jax import forward, head, make_mesh
from zaya_jax.layouts import stack

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # compiling is all that takes time

Z_LOSS = 1e-2
# Parts of 6 tokens on eight devices, which the halo of 5 just fits in.
ROWS, LENGTH = 16, 48
# Windows within a part, and over several.
MODELS = {
    "odd": dataclasses.replace(ODD, num_experts=8, sliding_window=4),
    "tiny": dataclasses.replace(
        TINY,
        num_experts=8,
        layer_types=("hybrid", "hybrid_sliding"),
        sliding_window=15,
    ),
    "plain": dataclasses.replace(
        TINY, num_experts=8, attention="gqa", router="linear", residual_scaling=False
    ),
    "kernels": dataclasses.replace(
        ODD,
        num_experts=8,
        num_hidden_layers=1,
        layer_types=("hybrid_sliding",),
        sliding_window=9,
        kernels="pallas",
    ),
}
PACKED = packed_batch(ROWS, LENGTH)
# Interpreted kernels take long: rows of which some have segments around the boundaries.
FEW = Batch(*(x[3:7] for x in PACKED))
# What the routers are given: a bias of one class draws all tokens to it.
ROUTING = {"mixed": (), "all to one": (3,), "all skipped": (8,)}
CASES = [
    ("odd", "1x1x1", {"accumulate": 4, "remat": "dots"}),
    ("odd", "2x4x1", {"remat": "full"}),
    ("odd", "8x1x1", {"accumulate": 2}),
    ("odd", "1x8x1", {"full_sharding": True}),
    ("odd", "2x2x2", {"accumulate": 4, "full_sharding": True, "remat": "dots"}),
    ("odd", "1x1x8", {}),
    ("odd", "4x1x2", {"accumulate": 2, "full_sharding": True, "remat": "full"}),
    ("tiny", "2x2x2", {}),
    ("tiny", "1x1x8", {"full_sharding": True}),
    ("plain", "2x2x2", {"full_sharding": True}),
    ("kernels", "1x2x4", {}),
]


def parameters(config, classes):
    params = stack(random_params(config), config)
    gate = params["balancing"]["layers"]["mlp"]["gate"]
    for chosen in classes:
        biases = gate["balancing_biases"].at[:, chosen].set(100.0)
        gate = {"balancing_biases": biases}
    return {**params, "balancing": {"layers": {"mlp": {"gate": gate}}}}


@partial(jax.jit, static_argnums=1)
def plainly(params, config, batch):
    """Of all logits, on one device."""

    def loss(weights):
        tree = {**params, "params": weights}
        out = forward(tree, config, batch.tokens, segment_ids=batch.segment_ids)
        logits = head(tree, config, out.hidden)
        of_target = jnp.take_along_axis(
            jax.nn.log_softmax(logits), jnp.maximum(batch.targets, 0)[..., None], axis=-1
        )[..., 0]
        weight = jnp.where(batch.targets >= 0, batch.weights, 0.0)
        squares = jnp.square(jax.nn.logsumexp(logits, axis=-1))
        means = [jnp.sum(weight * x) / jnp.sum(weight) for x in (-of_target, Z_LOSS * squares)]
        return means[0] + means[1], (means[0], jnp.sum(weight), out.expert_counts)

    (total, (nll, weight, counts)), of_weights = jax.value_and_grad(loss, has_aux=True)(
        params["params"]
    )
    return total, nll, weight, counts, of_weights


def worst(actual, expected):
    """Of all leaves, the largest difference by the largest value of the leaf."""
    differences = {}
    for (path, b), a in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape and np.isfinite(a).all(), jax.tree_util.keystr(path)
        differences[jax.tree_util.keystr(path)] = np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
    leaf = max(differences, key=differences.__getitem__)
    return float(differences[leaf]), leaf


def largest_collectives(compiled):
    """Elements of the largest result of each kind."""
    sizes = {}
    for computation in hlo.Program(compiled.as_text()).computations.values():
        for i in computation.values():
            if i.op in hlo.COLLECTIVES:
                largest = max(math.prod(shape) for _, shape in i.shapes)
                sizes[i.op] = max(largest, sizes.get(i.op, 0))
    return sizes


def check(model, sizes, settings):
    settings = dict(settings)
    remat = settings.pop("remat", "none")
    config = dataclasses.replace(MODELS[model], remat=remat)
    reference = dataclasses.replace(MODELS[model], kernels="xla")
    mesh = make_mesh(*map(int, sizes.split("x")))
    same = dict(config=config, mesh=mesh, compute_dtype=jnp.float32)
    compute = jax.jit(partial(gradients, **same, z_loss=Z_LOSS, **settings))
    batch, routing = (FEW, {"mixed": ()}) if model == "kernels" else (PACKED, ROUTING)
    compute = compute.lower(parameters(config, ()), batch=batch).compile()
    for name, classes in routing.items():
        params = parameters(config, classes)
        losses, of_weights, counts = compute(params, batch=batch)
        loss, nll, weight, expected_counts, expected = plainly(params, reference, batch)
        error, leaf = worst(of_weights, expected)
        yield {
            "case": f"{model} on {sizes}, {settings}, remat {remat}, {name}",
            "loss": float(losses.loss / loss - 1),
            "nll": float(losses.nll / nll - 1),
            "weight": float(losses.weight / weight - 1),
            "tokens": int(losses.tokens) - int(np.count_nonzero(batch.segment_ids)),
            "counts": int(jnp.abs(counts - expected_counts).max()),
            "gradients": error,
            "leaf": leaf,
            "collectives": largest_collectives(compute),
        }
    if (model, sizes) == ("tiny", "2x2x2"):
        total, of = jax.jit(partial(negative_log_likelihood, **same))(params, batch=PACKED)
        yield {"case": "evaluation", "nll": float(total / of / nll - 1)}
        nothing = PACKED._replace(weights=0 * PACKED.weights)
        losses, of_weights, _ = compute(params, batch=nothing)
        assert losses.loss == losses.weight == 0 < losses.tokens
        assert all(not leaf.any() for leaf in jax.tree.leaves(of_weights))


if __name__ == "__main__":
    for model, *case in CASES:
        if model in sys.argv[1:]:
            for result in check(model, *case):
                print(json.dumps(result), flush=True)
