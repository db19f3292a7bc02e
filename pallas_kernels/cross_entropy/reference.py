"""The LM head and the cross-entropy of its logits, in XLA, without all logits in memory at once."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.precision import exact
from pallas_kernels.product import transposed_product

CHUNK = 1 << 24  # logits in memory at once: 64 MiB in float32, up to twice as many
LOWEST = -1e30  # finite: relative to it, the exponentials of logits that are all -inf are 0

# Of some words, each float32 [T]: the largest logit, the sum of the exponentials relative to it,
# and the target's logit, or 0 where the target is another word.
Part = tuple[jax.Array, jax.Array, jax.Array]


class CrossEntropy(NamedTuple):
    """Both 0 where there is no target."""

    log_probability: jax.Array  # float32 [T], of the target
    log_normalizer: jax.Array  # float32 [T], the logarithm of the sum of all exponentials


def cross_entropy(
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None = None,
    *,
    temperature: float | jax.Array = 1.0,
) -> CrossEntropy:
    """log softmax(logits / temperature) at the targets, for logits = hidden @ weight.T + bias.

    The vocabulary is taken in chunks, whose logits are computed again for the gradient. Chunks of
    tokens would add up the weight's gradient, the largest array, once for each chunk.

    Args:
      hidden: [T, D], float32 or bfloat16; rounded to the weight's dtype for the product.
      weight: [V, D].
      targets: int32 [T]; one outside 0..V-1 means none: the token has no loss and no gradient,
        whatever its hidden state is.
      bias: [V].
      temperature: positive, of all tokens.

    Returns:
      `CrossEntropy`. The gradient flows through both its arrays: the loss -log_probability may be
      joined by a penalty on log_normalizer.
    """
    vocabulary = len(weight)
    if bias is None:
        bias = jnp.zeros((vocabulary,), jnp.float32)
    counted = has_target(targets, vocabulary)
    hidden = jnp.where(counted[:, None], hidden.astype(jnp.float32), 0.0)

    def part(first: jax.Array, weight: jax.Array, bias: jax.Array) -> Part:
        logits = (product(hidden, weight) + bias.astype(jnp.float32)) / temperature
        return summed(logits, targets - first)

    size = _chunk(len(targets), vocabulary)
    rest = vocabulary % size
    parts = []
    if size == vocabulary:
        rest = size  # all at once: a loop would copy the logits that it keeps
    else:
        part = jax.checkpoint(part)
        whole = (x[: vocabulary - rest].reshape(-1, size, *x.shape[1:]) for x in (weight, bias))
        starts = jnp.arange(0, vocabulary - rest, size)
        parts.append(jax.lax.map(lambda chunk: part(*chunk), (starts, *whole)))
    if rest:
        last = part(jnp.int32(vocabulary - rest), weight[-rest:], bias[-rest:])
        parts.append(jax.tree.map(lambda x: x[None], last))
    results = combine(*(jnp.concatenate(columns) for columns in zip(*parts, strict=True)))
    return CrossEntropy(*(jnp.where(counted, result, 0.0) for result in results))


@jax.custom_vjp
def summed(logits: jax.Array, targets: jax.Array) -> Part:
    """Of logits [T, V] and targets [T], which may be other words. No gradient flows through the
    largest logit, on which the results of `combine` do not depend."""
    maximum = jnp.maximum(jnp.max(logits, axis=1), LOWEST)
    at = jnp.clip(targets, 0, logits.shape[1] - 1)[:, None]
    logit = jnp.take_along_axis(logits, at, axis=1)[:, 0]
    logit = jnp.where(has_target(targets, logits.shape[1]), logit, 0.0)
    return maximum, jnp.sum(jnp.exp(logits - maximum[:, None]), axis=1), logit


def _summed_forward(logits, targets):
    maximum, total, logit = summed(logits, targets)
    return (maximum, total, logit), (logits, targets, maximum)


def _summed_backward(saved, gradients):
    """Keeps the logits, and not their exponentials too; one pass over them, no scatter."""
    logits, targets, maximum = saved
    _, of_total, of_logit = gradients
    is_target = jnp.arange(logits.shape[1]) == targets[:, None]
    of_logits = jnp.exp(logits - maximum[:, None]) * of_total[:, None]
    return of_logits + jnp.where(is_target, of_logit[:, None], 0.0), None


summed.defvjp(_summed_forward, _summed_backward)


def combine(maxima: jax.Array, sums: jax.Array, logits: jax.Array) -> CrossEntropy:
    """Of parts of the vocabulary, each float32 [parts, T]; see `Part`."""
    maximum = jnp.max(maxima, axis=0)
    normalizer = maximum + jnp.log(jnp.sum(sums * jnp.exp(maxima - maximum), axis=0))
    return CrossEntropy(jnp.sum(logits, axis=0) - normalizer, normalizer)


def _chunk(tokens: int, vocabulary: int) -> int:
    """Words of a chunk. The number of chunks is a power of two, which divides most vocabularies:
    of others, the last words are cut off."""
    chunks = max(tokens * vocabulary // CHUNK, 1)
    return -(-vocabulary // (1 << (chunks - 1).bit_length()))


def has_target(targets: jax.Array, vocabulary: int) -> jax.Array:
    """Bool [T]."""
    return (targets >= 0) & (targets < vocabulary)


@jax.custom_vjp
def product(hidden: jax.Array, weight: jax.Array) -> jax.Array:
    """float32 [T, D], rounded to the weight's dtype, times weight [V, D]: float32 [T, V]."""
    return dot(hidden.astype(weight.dtype), weight, 1, 1)


def _product_forward(hidden, weight):
    hidden = hidden.astype(weight.dtype)
    return dot(hidden, weight, 1, 1), (hidden, weight)


def _product_backward(saved, of_logits):
    """Rounded, the logits' gradient is multiplied by the matrix units of 16-bit numbers. By one
    product after the other: side by side they would take turns in the caches."""
    hidden, weight = saved
    of_logits = of_logits.astype(weight.dtype)
    of_hidden, of_logits = jax.lax.optimization_barrier((dot(of_logits, weight, 1, 0), of_logits))
    return of_hidden, transposed_product(of_logits, hidden)


product.defvjp(_product_forward, _product_backward)


def dot(a: jax.Array, b: jax.Array, of_a: int, of_b: int, dtype: Any = jnp.float32) -> jax.Array:
    """The product of two matrices along these axes."""
    return jax.lax.dot_general(
        a,
        b,
        (((of_a,), (of_b,)), ((), ())),
        precision=exact(a.dtype),
        preferred_element_type=dtype,
    )
