"""Gradients of the router by its inputs and its weights, in Pallas.

One kernel computes the forward pass again for some tokens and goes back to their states; on its way
it leaves the cotangents of the second layer before its activation, `of_second` [T, R]. From these
and the states, the other kernel computes the gradients of the two large matrices: a program owns
some hidden channels and sums over a chunk of tokens. Were it one kernel, each of its programs would
have to leave sums as large as the weights.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.blocks import Blocks, blocks_for
from pallas_kernels.launch import launch, power_of_two
from pallas_kernels.router.layers import (
    SMALLEST,
    Sizes,
    below,
    first_layer,
    gelu,
    gelu_slope,
    hidden_of,
    inverse_root,
    is_chosen,
    load,
    load_out,
    padded,
    product,
    second_layer,
    softmax,
    span,
    store,
    whole,
)
from pallas_kernels.router.reference import Weights

INPUTS, WEIGHTS = "route_backward", "route_backward_weights"
DEFAULT = Blocks((16, 32))  # tokens and hidden channels at once
DEFAULT_WEIGHTS = Blocks((32, 16))
INPUTS_AT_ONCE = 64  # of the first layer; operands with all of them would fill the registers
PROGRAMS = 256  # of each kernel, about: each leaves sums, but fewer would not fill a GPU


def gradients(
    new: jax.Array,
    previous: jax.Array | None,
    weights: Weights,
    expert: jax.Array,
    of_new: jax.Array,
    of_weight: jax.Array,
    eps: float,
) -> tuple[jax.Array, jax.Array | None, Weights]:
    """Of the states, the states of the layer before, and the weights.

    Args:
      new: float32 [T, R], the state for the next layer's router.
      previous: float32 [T, R], the router state of the layer before, or None.
      weights: the router's parameters.
      expert: int32 [T], the one of each token.
      of_new: float32 [T, R], cotangents of `new`.
      of_weight: float32 [T], cotangents of the experts' weights.
      eps: of the RMSNorm.
    """
    # The norm's weight scales the columns of the first matrix: the kernels see but their product,
    # from whose gradient those of both follow.
    norm, fc1 = (w.astype(jnp.float32) for w in (weights.norm, weights.fc1))
    scaled = weights._replace(fc1=fc1 * norm)
    of_states, of_previous, of_second, sums = _of_inputs(
        new, previous, scaled, expert, of_new, of_weight, eps
    )
    of_scaled, of_fc1_bias, of_fc2 = _of_matrices(new, scaled, of_second, eps)
    gradients = Weights(
        depth_scale=None if previous is None else sums[-1],
        norm=jnp.sum(of_scaled * fc1, axis=0),
        fc1=of_scaled * norm,
        fc1_bias=of_fc1_bias,
        fc2=of_fc2,
        fc2_bias=sums[-2],
        out=sums[:-2],
    )
    gradients = jax.tree.map(lambda g, w: g.astype(w.dtype), gradients, weights)
    return of_states, of_previous, gradients


def _of_inputs(new, previous, weights, expert, of_new, of_weight, eps):
    """Those of both states [T, R], of the second layer before its activation [T, R], and those of
    `out`, `fc2_bias` and `depth_scale` as rows [E + 3, R]."""
    (tokens, size), classes = new.shape, len(weights.out)
    (rows, hidden), warps, stages = blocks_for(INPUTS, (size, classes), weights.fc1.dtype, DEFAULT)
    inputs = min(INPUTS_AT_ONCE, padded(size))
    sizes = Sizes(tokens, size, classes, hidden_of(weights, hidden), inputs, eps)
    chunk, rows = _chunk(tokens, rows, PROGRAMS)
    programs = pl.cdiv(tokens, chunk)
    by_token = pl.BlockSpec((chunk,), lambda i: (i,))
    matrix = pl.BlockSpec((chunk, padded(size)), lambda i: (i, 0))
    maybe = None if previous is None else matrix
    states = jax.ShapeDtypeStruct((tokens, size), jnp.float32)
    sums = jax.ShapeDtypeStruct((programs, classes + 2, size), jnp.float32)
    part = pl.BlockSpec((None, padded(classes + 2), padded(size)), lambda i: (i, 0, 0))
    specs: Any = (matrix, maybe, jax.tree.map(whole, weights), by_token, matrix, by_token)
    of_states, of_previous, of_second, sums = launch(
        partial(_inputs, sizes=sizes, rows=rows),
        (states, None if previous is None else states, states, sums),
        name=INPUTS,
        grid=(programs,),
        in_specs=specs,
        out_specs=(matrix, maybe, matrix, part),
        warps=warps,
        stages=stages,
    )(new, previous, weights, expert, of_new, of_weight)
    return of_states, of_previous, of_second, jnp.sum(sums, axis=0)


def _of_matrices(new, weights, of_second, eps):
    """Those of fc1 [R, R], fc1_bias [R] and fc2 [R, R]."""
    (tokens, size), classes = new.shape, len(weights.out)
    (rows, hidden), warps, stages = blocks_for(
        WEIGHTS, (size, classes), weights.fc1.dtype, DEFAULT_WEIGHTS
    )
    inputs = min(INPUTS_AT_ONCE, padded(size))
    sizes = Sizes(tokens, size, classes, hidden_of(weights, hidden), inputs, eps)
    slices = pl.cdiv(size, sizes.hidden)
    chunk, rows = _chunk(tokens, rows, max(PROGRAMS // slices, 1))
    chunks = pl.cdiv(tokens, chunk)
    width = padded(size)
    matrix = pl.BlockSpec((chunk, width), lambda _, i: (i, 0))
    columns = pl.BlockSpec((None, width, sizes.hidden), lambda j, i: (i, 0, j))
    fc1, fc1_bias, fc2 = launch(
        partial(_matrices, sizes=sizes, rows=rows),
        tuple(
            jax.ShapeDtypeStruct((chunks, *shape), jnp.float32)
            for shape in ((size, size), (size,), (size, size))
        ),
        name=WEIGHTS,
        grid=(slices, chunks),
        in_specs=[
            matrix,
            matrix,
            pl.BlockSpec((sizes.hidden, width), lambda j, _: (j, 0)),
            pl.BlockSpec((sizes.hidden,), lambda j, _: (j,)),
            pl.BlockSpec((width, sizes.hidden), lambda j, _: (0, j)),
        ],
        out_specs=(columns, pl.BlockSpec((None, sizes.hidden), lambda j, i: (i, j)), columns),
        warps=warps,
        stages=stages,
    )(new, of_second, weights.fc1, weights.fc1_bias, weights.fc2)
    return jnp.sum(fc1, axis=0).T, jnp.sum(fc1_bias, axis=0), jnp.sum(fc2, axis=0)


def _chunk(tokens: int, rows: int, programs: int) -> tuple[int, int]:
    """Tokens of a program, and how many of them at once."""
    rows = max(SMALLEST, power_of_two(tokens, rows))
    return max(rows, power_of_two(math.ceil(tokens / programs), 2 * tokens)), rows


def _inputs(
    new_ref,
    previous_ref,
    weights,
    expert_ref,
    of_new_ref,
    of_weight_ref,
    of_states_ref,
    of_previous_ref,
    of_second_ref,
    sums_ref,
    *,
    sizes: Sizes,
    rows,
):
    chunk, width = new_ref.shape
    classes = len(weights.out)
    start = pl.program_id(0) * chunk  # interpreted, there is no asking for it in a loop
    column_real = below(sizes.size, width)
    averaged = previous_ref is not None

    def step(number, sums):
        of_out, of_bias, of_scale = sums
        place = pl.ds(number * rows, rows)
        row_real = below(sizes.tokens, rows, start + number * rows)

        def block(ref):
            return load(ref.at[place], row_real, column_real)

        inverse = inverse_root(block(new_ref), sizes)

        def unit(inputs, real):
            return load(new_ref.at[place, inputs], row_real, real) * inverse

        second = second_layer(weights, unit, rows, sizes)
        x, out = gelu(second), load_out(weights, sizes)
        probabilities = softmax(product(out, x), sizes)
        expert = triton.load(expert_ref.at[place], mask=row_real, other=0)
        chosen = jnp.where(is_chosen(expert, probabilities), probabilities, 0.0)
        along = chosen - probabilities * jnp.sum(chosen, axis=0, keepdims=True)
        of_logits = load(of_weight_ref.at[place], row_real)[None] * along
        of_second = product(out, of_logits, 0, 0) * gelu_slope(second)
        of_out = of_out + product(of_logits, x, 1, 1)
        of_bias = of_bias + jnp.sum(of_second, axis=1)
        store(of_second_ref.at[place], of_second.T, row_real, column_real)

        def add(number, total):
            hidden, real = span(number, sizes.hidden, sizes)
            fc1 = load(weights.fc1.at[hidden], real, column_real)
            fc2 = load(weights.fc2.at[:, hidden], column_real, real)
            x = first_layer(weights, unit, rows, sizes, number)
            return total + product(fc1, product(fc2, of_second, 0, 0) * gelu_slope(x), 0, 0)

        zeros = jnp.zeros((width, rows), jnp.float32)
        of_unit = jax.lax.fori_loop(0, pl.cdiv(sizes.size, sizes.hidden), add, zeros).T
        normed = block(new_ref) * inverse
        projected = jnp.sum(of_unit * normed, axis=1, keepdims=True) / sizes.size
        of_states = block(of_new_ref) + (of_unit - normed * projected) * inverse
        store(of_states_ref.at[place], of_states, row_real, column_real)
        if averaged:
            scale = load(weights.depth_scale.at[...], column_real)[None]
            store(of_previous_ref.at[place], of_states * scale, row_real, column_real)
            of_scale = of_scale + jnp.sum(of_states * block(previous_ref), axis=0)
        return of_out, of_bias, of_scale

    zeros = jnp.zeros((width,), jnp.float32)
    sums = jnp.zeros((classes, width), jnp.float32), zeros, zeros
    of_out, of_bias, of_scale = jax.lax.fori_loop(0, chunk // rows, step, sums)
    store(sums_ref.at[:classes], of_out, below(sizes.classes, classes), column_real)
    for number, row in enumerate((of_bias, of_scale)):
        at = sums_ref.at[pl.ds(sizes.classes + number, 1)]
        triton.store(at, row[None], mask=column_real[None])


def _matrices(
    new_ref,
    of_second_ref,
    fc1_ref,
    fc1_bias_ref,
    fc2_ref,
    of_fc1_ref,
    of_fc1_bias_ref,
    of_fc2_ref,
    *,
    sizes: Sizes,
    rows,
):
    chunk, width = new_ref.shape
    start = pl.program_id(1) * chunk
    column_real = below(sizes.size, width)
    real = below(sizes.size, sizes.hidden, pl.program_id(0) * sizes.hidden)

    def step(number, sums):
        of_fc1, of_bias, of_fc2 = sums
        place = pl.ds(number * rows, rows)
        row_real = below(sizes.tokens, rows, start + number * rows)
        inverse = inverse_root(load(new_ref.at[place], row_real, column_real), sizes)

        def add(number, totals):
            """Some of the hidden channels' inputs, and of what they are inputs of."""
            x, of_x = totals
            some, some_real = span(number, sizes.inputs, sizes)
            unit = load(new_ref.at[place, some], row_real, some_real) * inverse
            of_second = load(of_second_ref.at[place, some], row_real, some_real)
            x = x + product(unit, load(fc1_ref.at[:, some], real, some_real), 1, 1)
            return x, of_x + product(of_second, load(fc2_ref.at[some], some_real, real))

        zeros = jnp.zeros((rows, sizes.hidden), jnp.float32)
        x, of_x = jax.lax.fori_loop(0, pl.cdiv(sizes.size, sizes.inputs), add, (zeros, zeros))
        x = x + load(fc1_bias_ref.at[...], real)[None]
        of_x = of_x * gelu_slope(x)
        unit = load(new_ref.at[place], row_real, column_real) * inverse
        of_second = load(of_second_ref.at[place], row_real, column_real)
        return (
            of_fc1 + product(unit, of_x, 0, 0),
            of_bias + jnp.sum(of_x, axis=0),
            of_fc2 + product(of_second, gelu(x), 0, 0),
        )

    zeros = jnp.zeros((width, sizes.hidden), jnp.float32)
    sums = zeros, jnp.zeros((sizes.hidden,), jnp.float32), zeros
    of_fc1, of_bias, of_fc2 = jax.lax.fori_loop(0, chunk // rows, step, sums)
    store(of_fc1_ref.at[...], of_fc1, column_real, real)
    store(of_fc1_bias_ref.at[...], of_bias, real)
    store(of_fc2_ref.at[...], of_fc2, column_real, real)
