"""The router at the sizes of real models."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import Blocks
from pallas_kernels.rocm.cases import TOKENS, Case, Sizes
from pallas_kernels.router import backward, kernel, reference

CANDIDATES = {
    kernel.NAME: [
        Blocks((16, 32)),
        Blocks((16, 32), warps=2),
        Blocks((16, 64)),
        Blocks((16, 128), warps=8),
        Blocks((32, 64)),
        Blocks((32, 128)),
        Blocks((64, 64)),
    ],
    backward.INPUTS: [Blocks((16, 16)), Blocks((16, 32)), Blocks((16, 64)), Blocks((32, 16))],
    backward.WEIGHTS: [Blocks((16, 16)), Blocks((32, 16)), Blocks((64, 16)), Blocks((32, 32))],
}


def cases(sizes: Sizes) -> list[Case]:
    size, classes = sizes.router, sizes.experts + 1

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    vector, square = array(size), array(size, size)
    outputs = array(classes, size)
    weights = reference.Weights(vector, vector, square, vector, square, vector, outputs)
    biases = jax.ShapeDtypeStruct((classes,), jnp.float32)
    ours, theirs = partial(kernel.route, eps=1e-5), partial(reference.route, eps=1e-5)

    def of(tokens):
        states = jax.ShapeDtypeStruct((tokens, size), jnp.float32)
        return (states, states, weights, biases), 2.0 * tokens * size * (2 * size + classes)

    (args, flops), (few, few_flops) = of(TOKENS), of(8)
    return [
        Case("router forward", ours, theirs, args, flops),
        Case.training("router training", ours, theirs, args, 3 * flops),
        Case("router decode", ours, theirs, few, few_flops),
    ]
