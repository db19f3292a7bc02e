"""The router in one pass, in Pallas: from its down-projection's output to the expert of each token.

Shapes: T tokens, R the router's width, E + 1 classes. A program takes some tokens; the weights are
small enough to stay in the caches from which all programs read them.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.blocks import Blocks, blocks_for
from pallas_kernels.launch import launch, power_of_two
from pallas_kernels.router import backward, reference
from pallas_kernels.router.layers import (
    SMALLEST,
    WIDEST,
    Sizes,
    below,
    gelu,
    hidden_of,
    inverse_root,
    is_chosen,
    load,
    load_out,
    padded,
    product,
    second_layer,
    softmax,
    store,
    whole,
)
from pallas_kernels.router.reference import FREE, Weights

NAME = "route"
DEFAULT = Blocks((16, 64))  # tokens of a program, hidden channels at once

Results = tuple[jax.Array, jax.Array, jax.Array]


def route(
    states: jax.Array,
    previous: jax.Array | None,
    weights: Weights,
    balancing_biases: jax.Array,
    eps: float,
    forced: jax.Array | None = None,
) -> Results:
    """As `reference.route`, which it leaves to do what no program could: no tokens, or such as are
    wider than shared memory."""
    shape, size = states.shape[:-1], states.shape[-1]
    if states.size == 0 or size > WIDEST:
        return reference.route(states, previous, weights, balancing_biases, eps, forced)
    if previous is None or weights.depth_scale is None:
        previous, weights = None, weights._replace(depth_scale=None)
    else:
        previous = previous.reshape(-1, size)
    if forced is not None:
        forced = forced.reshape(-1)
    new, expert, weight = _route(
        states.reshape(-1, size), previous, weights, balancing_biases, forced, eps
    )
    return new.reshape(*shape, size), expert.reshape(shape), weight.reshape(shape)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _route(
    states: jax.Array,
    previous: jax.Array | None,
    weights: Weights,
    biases: jax.Array,
    forced: jax.Array | None,
    eps: float,
) -> Results:
    """[T, R] twice, weights, [E + 1] and [T] -> [T, R], int32 [T] and float32 [T]."""
    (tokens, size), classes = states.shape, len(biases)
    (rows, hidden), warps, stages = blocks_for(NAME, (size, classes), weights.fc1.dtype, DEFAULT)
    rows = max(SMALLEST, power_of_two(tokens, rows))
    sizes = Sizes(tokens, size, classes, hidden_of(weights, hidden), padded(size), eps)
    by_token = pl.BlockSpec((rows,), lambda i: (i,))
    matrix = pl.BlockSpec((rows, padded(size)), lambda i: (i, 0))
    expert, weight = (jax.ShapeDtypeStruct((tokens,), t) for t in (jnp.int32, jnp.float32))
    averaged = previous is not None
    new = jax.ShapeDtypeStruct((tokens, size), jnp.float32) if averaged else None
    specs: Any = (  # None where there is no array
        matrix,
        matrix if averaged else None,
        jax.tree.map(whole, weights),
        whole(biases),
        None if forced is None else by_token,
    )
    new, expert, weight = launch(
        partial(_forward, sizes=sizes),
        (new, expert, weight),
        name=NAME,
        grid=(pl.cdiv(tokens, rows),),
        in_specs=specs,
        out_specs=(matrix if averaged else None, by_token, by_token),
        warps=warps,
        stages=stages,
    )(states, previous, weights, biases, forced)
    return (new if averaged else states), expert, weight


def _route_forward(states, previous, weights, biases, forced, eps):
    results = _route(states, previous, weights, biases, forced, eps)
    new, expert, _ = results
    return results, (new, previous, weights, biases, expert)


def _route_backward(eps, saved, cotangents):
    new, previous, weights, biases, expert = saved
    of_new, _, of_weight = cotangents
    gradients = backward.gradients(new, previous, weights, expert, of_new, of_weight, eps)
    return *gradients, jnp.zeros_like(biases), None


_route.defvjp(_route_forward, _route_backward)


def _forward(
    states_ref,
    previous_ref,
    weights,
    biases_ref,
    forced_ref,
    new_ref,
    expert_ref,
    weight_ref,
    *,
    sizes: Sizes,
):
    rows, width = states_ref.shape
    row_real = below(sizes.tokens, rows, pl.program_id(0) * rows)
    column_real = below(sizes.size, width)
    class_real = below(sizes.classes, len(biases_ref))

    states = load(states_ref.at[...], row_real, column_real)
    if previous_ref is not None:
        scale = load(weights.depth_scale.at[...], column_real)[None]
        states += load(previous_ref.at[...], row_real, column_real) * scale
        store(new_ref.at[...], states, row_real, column_real)
    normed = states * inverse_root(states, sizes) * load(weights.norm.at[...], column_real)[None]
    x = gelu(second_layer(weights, lambda *_: normed, rows, sizes))
    probabilities = softmax(product(load_out(weights, sizes), x), sizes)

    biased = probabilities + load(biases_ref.at[...], class_real)[:, None]
    expert = _first_of_largest(jnp.where(class_real[:, None], biased, -jnp.inf))
    if forced_ref is not None:
        forced = triton.load(forced_ref.at[...], mask=row_real, other=FREE).astype(jnp.int32)
        expert = jnp.where(forced == FREE, expert, forced)
    weight = jnp.sum(jnp.where(is_chosen(expert, probabilities), probabilities, 0.0), axis=0)
    weight = jnp.where(expert < sizes.classes, weight, jnp.nan)  # forced to a class there is not
    store(expert_ref.at[...], expert, row_real)
    store(weight_ref.at[...], weight, row_real)


def _first_of_largest(x):
    """As `jnp.argmax` of the columns: a NaN is larger than all numbers."""
    x = jnp.where(jnp.isnan(x), jnp.inf, x)
    largest = x == jnp.max(x, axis=0, keepdims=True)
    number = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.min(jnp.where(largest, number, x.shape[0]), axis=0)
