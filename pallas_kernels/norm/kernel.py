"""Residual scaling and the RMSNorm after it in one pass, in Pallas: the new stream is normed while
it is in registers.

Shapes: T tokens of D channels. A program takes some tokens, with all their channels.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.blocks import Blocks, blocks_for
from pallas_kernels.launch import launch, power_of_two
from pallas_kernels.norm import reference

FORWARD, BACKWARD = "scale_residual_and_norm", "scale_residual_and_norm_backward"
DEFAULT = Blocks((2,))  # tokens in registers at once
PARTIALS = 512  # programs of the backward pass, each with sums of its own

Scales = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def scale_residual_and_norm(
    output: jax.Array,
    residual: jax.Array,
    *scales_biases_and_weight: jax.Array,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.scale_residual_and_norm`."""
    if residual.size == 0:
        return reference.scale_residual_and_norm(
            output, residual, *scales_biases_and_weight, eps=eps
        )
    size = residual.shape[-1]
    vectors = jnp.stack([v.astype(jnp.float32) for v in scales_biases_and_weight])
    vectors = jnp.pad(vectors, ((0, 3), (0, power_of_two(size, 2 * size) - size)))
    flat = output.reshape(-1, size), residual.reshape(-1, size)
    stream, normed = _scale_and_norm(*flat, vectors, eps)
    return stream.reshape(residual.shape), normed.reshape(residual.shape)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scale_and_norm(
    output: jax.Array, residual: jax.Array, vectors: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """[T, D], float32 [T, D] and the five vectors in a block [8, D] -> two float32 [T, D]."""
    tokens, size = residual.shape
    (rows,), warps, stages = blocks_for(FORWARD, (size,), output.dtype, DEFAULT)
    grid, specs = _blocks(tokens, size, rows)
    float32 = jax.ShapeDtypeStruct((tokens, size), jnp.float32)
    return launch(
        partial(_forward, tokens=tokens, size=size, eps=eps),
        (float32, float32),
        name=FORWARD,
        grid=grid,
        in_specs=[specs, specs, _whole(vectors)],
        out_specs=(specs, specs),
        warps=warps,
        stages=stages,
    )(output, residual, vectors)


def _scale_and_norm_forward(output, residual, vectors, eps):
    stream, normed = _scale_and_norm(output, residual, vectors, eps)
    return (stream, normed), (output, residual, vectors)


def _scale_and_norm_backward(eps, saved, cotangents):
    output, residual, vectors = saved
    tokens, size = residual.shape
    (rows,), warps, stages = blocks_for(BACKWARD, (size,), output.dtype, DEFAULT)
    chunk = power_of_two(math.ceil(tokens / PARTIALS), tokens * 2)
    grid, specs = _blocks(tokens, size, max(chunk, rows))
    sums = jax.ShapeDtypeStruct((*grid, *vectors.shape), jnp.float32)
    of_output, of_residual, partial_sums = launch(
        partial(_backward, rows=rows, tokens=tokens, size=size, eps=eps),
        (
            jax.ShapeDtypeStruct(output.shape, output.dtype),
            jax.ShapeDtypeStruct(residual.shape, jnp.float32),
            sums,
        ),
        name=BACKWARD,
        grid=grid,
        in_specs=[specs] * 4 + [_whole(vectors)],
        out_specs=(specs, specs, pl.BlockSpec((1, *vectors.shape), lambda i: (i, 0, 0))),
        warps=warps,
        stages=stages,
    )(output, residual, *cotangents, vectors)
    return of_output, of_residual, jnp.sum(partial_sums, axis=0)


_scale_and_norm.defvjp(_scale_and_norm_forward, _scale_and_norm_backward)


def _blocks(tokens: int, size: int, rows: int) -> tuple[tuple[int], pl.BlockSpec]:
    """One program for so many tokens."""
    width = power_of_two(size, 2 * size)
    return (pl.cdiv(tokens, rows),), pl.BlockSpec((rows, width), lambda i: (i, 0))


def _whole(array: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda i: (0,) * array.ndim)


def _forward(output_ref, residual_ref, vectors_ref, stream_ref, normed_ref, *, tokens, size, eps):
    vectors = [vectors_ref[i, :][None] for i in range(5)]
    real = _real(pl.program_id(0) * residual_ref.shape[0], residual_ref.shape, tokens, size)
    output = _load(output_ref, 0, real)
    residual = _load(residual_ref, 0, real)
    stream, inverse = _normed(output, residual, vectors, size, eps)
    triton.store(stream_ref.at[...], stream, mask=real)
    triton.store(normed_ref.at[...], stream * inverse * vectors[4], mask=real)


def _backward(
    output_ref,
    residual_ref,
    of_stream_ref,
    of_normed_ref,
    vectors_ref,
    of_output_ref,
    of_residual_ref,
    sums_ref,
    *,
    rows,
    tokens,
    size,
    eps,
):
    vectors = [vectors_ref[i, :][None] for i in range(5)]
    output_scale, output_bias, residual_scale, residual_bias, weight = vectors

    chunk, width = residual_ref.shape
    first = pl.program_id(0) * chunk  # interpreted, there is no asking for it in a loop

    def step(number, sums):
        start = number * rows
        real = _real(first + start, (rows, width), tokens, size)
        output, residual, of_stream, of_normed = (
            _load(ref, start, real)
            for ref in (output_ref, residual_ref, of_stream_ref, of_normed_ref)
        )
        stream, inverse = _normed(output, residual, vectors, size, eps)
        unit = stream * inverse
        of_unit = of_normed * weight
        projected = jnp.sum(of_unit * unit, axis=1, keepdims=True) / size
        # What the rows beyond the last token have is masked out of the sums.
        of_stream = jnp.where(real, of_stream + (of_unit - unit * projected) * inverse, 0.0)
        of_output, of_residual = of_stream * output_scale, of_stream * residual_scale
        place = pl.ds(start, rows)
        triton.store(of_output_ref.at[place], of_output.astype(of_output_ref.dtype), mask=real)
        triton.store(of_residual_ref.at[place], of_residual, mask=real)
        parts = (
            of_stream * (output + output_bias),
            of_output,
            of_stream * (residual + residual_bias),
            of_residual,
            of_normed * unit,
        )
        return tuple(s + jnp.sum(part, axis=0) for s, part in zip(sums, parts, strict=True))

    zeros = (jnp.zeros((width,), jnp.float32),) * 5
    for number, row in enumerate(jax.lax.fori_loop(0, chunk // rows, step, zeros)):
        sums_ref[0, number] = row


def _normed(output, residual, vectors, size, eps):
    """The new stream, and what its rows are to be multiplied with."""
    output_scale, output_bias, residual_scale, residual_bias, _ = vectors
    stream = (output + output_bias) * output_scale + (residual + residual_bias) * residual_scale
    square = jnp.sum(stream * stream, axis=1, keepdims=True) / size
    return stream, jax.lax.rsqrt(square + eps)


def _real(first, shape, tokens, size):
    """Which of the elements of a block that starts at token `first` there are."""
    row = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row < tokens) & (jax.lax.broadcasted_iota(jnp.int32, shape, 1) < size)


def _load(ref, start, real):
    block = ref.at[pl.ds(start, real.shape[0])]
    return triton.load(block, mask=real, other=0.0).astype(jnp.float32)
