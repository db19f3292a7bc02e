"""The LM head and its cross-entropy in Pallas: logits exist only in registers and, for the
gradient, in chunks of the vocabulary.

Shapes: T tokens, D channels, V words. The gradient of a chunk's logits is written to memory in the
weight's dtype, for XLA to multiply with the weight and with the hidden states. That moves 12.9 GB
at 8192 tokens and 262272 words, 3 ms of an MI300X, where kernels that kept it in registers would
compute all logits a third time, 8.8 TFLOP or 7 ms at best. A chunk of the vocabulary has all
tokens, so that its rows of the weight's gradient are complete and written once; chunks of tokens
would add up float32 [V, D] in memory.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.blocks import Blocks, blocks_for
from pallas_kernels.cross_entropy import reference
from pallas_kernels.cross_entropy.reference import LOWEST, CrossEntropy, combine, dot, has_target
from pallas_kernels.launch import launch, power_of_two
from pallas_kernels.precision import exact

FORWARD, BACKWARD = "cross_entropy", "cross_entropy_backward"
DEFAULT = Blocks((128, 128, 64), 4, 2)  # tokens, words, channels
SMALLEST = 16  # side of a matrix product
PROGRAMS = 4 * 304  # of the forward pass, wanted: the MI300X has 304 compute units
CHUNK_BYTES = 1 << 29  # of the gradient of logits, in memory at once
ALIGNMENT = 128  # of a chunk's words, for XLA's products


def cross_entropy(
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None = None,
    *,
    temperature: float | jax.Array = 1.0,
) -> CrossEntropy:
    """As `reference.cross_entropy`."""
    if targets.size == 0:
        return reference.cross_entropy(hidden, weight, targets, bias, temperature=temperature)
    if bias is None:
        bias = jnp.zeros((len(weight),), jnp.float32)
    counted = has_target(targets, len(weight))
    hidden = jnp.where(counted[:, None], hidden.astype(jnp.float32) / temperature, 0.0)
    bias = bias.astype(jnp.float32) / temperature
    results = _cross_entropy(hidden, weight, targets, bias)
    return CrossEntropy(*(jnp.where(counted, result, 0.0) for result in results))


@jax.custom_vjp
def _cross_entropy(
    hidden: jax.Array, weight: jax.Array, targets: jax.Array, bias: jax.Array
) -> CrossEntropy:
    """Of float32 [T, D], [V, D], int32 [T] and float32 [V]."""
    hidden = hidden.astype(weight.dtype)
    (tokens, _), words = hidden.shape, len(weight)
    sizes, warps, stages = _blocks(FORWARD, hidden, weight)
    rows, columns, _ = sizes
    groups, tiles = pl.cdiv(tokens, rows), pl.cdiv(words, columns)
    per_split = pl.cdiv(tiles, max(PROGRAMS // groups, 1))
    splits = pl.cdiv(tiles, per_split)
    arrays = hidden, weight, bias, targets
    parts = launch(
        partial(_forward, sizes=sizes, per_split=per_split),
        (jax.ShapeDtypeStruct((splits, tokens), jnp.float32),) * 3,
        name=FORWARD,
        grid=(groups, splits),
        in_specs=[_whole(array.shape) for array in arrays],
        out_specs=(_whole((splits, tokens)),) * 3,
        warps=warps,
        stages=stages,
    )(*arrays)
    return combine(*parts)


def _cross_entropy_forward(hidden, weight, targets, bias):
    results = _cross_entropy(hidden, weight, targets, bias)
    return results, (hidden.astype(weight.dtype), weight, targets, bias, results[1])


def _cross_entropy_backward(saved, cotangents):
    hidden, weight, targets, bias, normalizer = saved
    of_probability, of_normalizer = cotangents
    # Of a logit: `of_others` times its probability, and `of_target` more where it is the target's.
    of_target, of_others = of_probability, of_normalizer - of_probability
    vectors = normalizer, of_target, of_others

    def chunk(first, size, gradients):
        of_hidden, *of_parameters = gradients
        rows, biases = (jax.lax.dynamic_slice_in_dim(x, first, size) for x in (weight, bias))
        of_logits, sums = _of_logits(hidden, rows, biases, (targets - first, *vectors))
        of_parts = dot(of_logits, hidden, 0, 0, weight.dtype), jnp.sum(sums, axis=0)
        of_weight, of_bias = (
            jax.lax.dynamic_update_slice_in_dim(whole, part, first, 0)
            for whole, part in zip(of_parameters, of_parts, strict=True)
        )
        return of_hidden + dot(of_logits, rows, 1, 0), of_weight, of_bias

    size = _chunk(len(hidden), weight)
    whole, rest = divmod(len(weight), size)
    gradients = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(weight), jnp.zeros_like(bias)
    gradients = jax.lax.fori_loop(0, whole, lambda i, g: chunk(i * size, size, g), gradients)
    of_hidden, of_weight, of_bias = chunk(whole * size, rest, gradients) if rest else gradients
    return of_hidden, of_weight, None, of_bias


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _of_logits(hidden, weight, bias, vectors):
    """The gradient of a chunk's logits [T, words], and its sums over the tokens of each program,
    float32 [programs, words]."""
    sizes, warps, stages = _blocks(BACKWARD, hidden, weight)
    tokens, words = len(hidden), len(weight)
    grid = pl.cdiv(tokens, sizes[0]), pl.cdiv(words, sizes[1])
    arrays = hidden, weight, bias, *vectors
    results = (tokens, words), (grid[0], words)
    return launch(
        partial(_backward, sizes=sizes),
        tuple(map(jax.ShapeDtypeStruct, results, (weight.dtype, jnp.float32))),
        name=BACKWARD,
        grid=grid,
        in_specs=[_whole(array.shape) for array in arrays],
        out_specs=tuple(map(_whole, results)),
        warps=warps,
        stages=stages,
    )(*arrays)


def _chunk(tokens: int, weight: jax.Array) -> int:
    """Words of a chunk, all of them about equally many."""
    words = len(weight)
    chunks = pl.cdiv(tokens * words * weight.dtype.itemsize, CHUNK_BYTES)
    size = pl.cdiv(words, chunks)
    return min(pl.cdiv(size, ALIGNMENT) * ALIGNMENT, words)


def _blocks(kernel: str, hidden: jax.Array, weight: jax.Array) -> Blocks:
    """Those of a shape, no larger than the arrays; of 32-bit channels half as many."""
    words, channels = weight.shape
    blocks = blocks_for(kernel, (channels,), weight.dtype, DEFAULT)
    rows, columns, size = blocks.sizes
    pairs = (len(hidden), rows), (words, columns), (channels, size * 2 // weight.dtype.itemsize)
    return blocks._replace(sizes=tuple(max(power_of_two(*p), SMALLEST) for p in pairs))


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    """Programs see the whole array: its sizes need not be powers of two."""
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def _forward(
    hidden_ref,
    weight_ref,
    bias_ref,
    targets_ref,
    maxima_ref,
    sums_ref,
    logits_ref,
    *,
    sizes,
    per_split,
):
    rows, columns, _ = sizes
    split = pl.program_id(1)
    row = pl.program_id(0) * rows + jnp.arange(rows)
    real = row < hidden_ref.shape[0]
    target = triton.load(targets_ref.at[row], mask=real, other=-1)

    def step(tile, carry):
        maximum, total, chosen = carry
        word = tile * columns + jnp.arange(columns)
        logits = _logits(hidden_ref, weight_ref, bias_ref, row, word, sizes)
        is_target = word[None, :] == target[:, None]
        chosen += jnp.sum(jnp.where(is_target, logits, 0.0), axis=1)
        larger = jnp.maximum(maximum, jnp.max(logits, axis=1))
        exponentials = jnp.exp(logits - larger[:, None])
        total = total * jnp.exp(maximum - larger) + jnp.sum(exponentials, axis=1)
        return larger, total, chosen

    zeros = jnp.zeros((rows,), jnp.float32)
    first = split * per_split
    stop = jnp.minimum(first + per_split, pl.cdiv(weight_ref.shape[0], columns))
    results = jax.lax.fori_loop(first, stop, step, (zeros + LOWEST, zeros, zeros))
    for ref, result in zip((maxima_ref, sums_ref, logits_ref), results, strict=True):
        triton.store(ref.at[split, row], result, mask=real)


def _backward(
    hidden_ref,
    weight_ref,
    bias_ref,
    targets_ref,
    normalizer_ref,
    of_target_ref,
    of_others_ref,
    of_logits_ref,
    sums_ref,
    *,
    sizes,
):
    rows, columns, _ = sizes
    tokens, words = of_logits_ref.shape
    group = pl.program_id(0)
    row, word = group * rows + jnp.arange(rows), pl.program_id(1) * columns + jnp.arange(columns)
    real, inside = row < tokens, word < words
    target, normalizer, of_target, of_others = (
        triton.load(ref.at[row], mask=real, other=0)[:, None]
        for ref in (targets_ref, normalizer_ref, of_target_ref, of_others_ref)
    )
    logits = _logits(hidden_ref, weight_ref, bias_ref, row, word, sizes)
    of_logits = of_others * jnp.exp(logits - normalizer)
    of_logits += jnp.where(word[None, :] == target, of_target, 0.0)
    # What the rows beyond the last token have is masked out of the sums.
    of_logits = jnp.where(real[:, None], of_logits, 0.0)
    triton.store(
        of_logits_ref.at[row[:, None], word[None, :]],
        of_logits.astype(of_logits_ref.dtype),
        mask=real[:, None] & inside[None, :],
    )
    triton.store(sums_ref.at[group, word], jnp.sum(of_logits, axis=0), mask=inside)


def _logits(hidden_ref, weight_ref, bias_ref, row, word, sizes):
    """Those of these tokens and words, -inf of words beyond the last one."""
    (tokens, channels), words, size = hidden_ref.shape, weight_ref.shape[0], sizes[2]
    # Beyond the arrays the last row is read again: loads without a mask are wide.
    a, b = jnp.minimum(row, tokens - 1)[:, None], jnp.minimum(word, words - 1)[:, None]

    def step(number, total):
        channel = number * size + jnp.arange(size)[None, :]
        padded = {} if channels % size == 0 else {"mask": channel < channels, "other": 0.0}
        hidden = triton.load(hidden_ref.at[a, channel], **padded)
        weight = triton.load(weight_ref.at[b, channel], **padded)
        precision = exact(weight.dtype)
        return total + triton.dot(hidden, weight, trans_b=True, precision=precision)

    zeros = jnp.zeros(sizes[:2], jnp.float32)
    logits = jax.lax.fori_loop(0, pl.cdiv(channels, size), step, zeros)
    bias = triton.load(bias_ref.at[word], mask=word < words, other=-jnp.inf)
    return logits + bias[None, :]
