"""The layers of the router's MLP for some tokens, within a Pallas kernel.

Shapes: T tokens of a program, R channels rounded up to a power of two, H hidden channels at once.
But for its input, the MLP's activations are channels by tokens: were the result of one product the
left operand of the next, the compiler would have every warp compute all of it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.launch import power_of_two
from pallas_kernels.precision import exact
from pallas_kernels.router.reference import Weights

SMALLEST = 16  # side of a matrix product
SHARED = 1 << 16  # bytes of shared memory, through which weights of the first layer go
WIDEST = 512  # channels of which the fewest tokens, as operands, fit into shared memory

# Of q, from the highest power, in erfc(x) = exp(-x q(x)) on [0, 6]: a fit with the smallest
# relative error, 6e-6 up to 4, of which float32 makes most.
EXPONENT = (
    -2.53155410e-08,
    8.49731667e-07,
    -1.23305483e-05,
    1.00368369e-04,
    -4.87159754e-04,
    1.24762137e-03,
    4.58020966e-04,
    -1.96479270e-02,
    1.02984443e-01,
    6.36579948e-01,
    1.12838160e00,
)

# The first layer's input, a span of channels at once [T, span]: a function of its place in
# references and of which of the channels there are.
Columns = Callable[[Any, jax.Array], jax.Array]


class Sizes(NamedTuple):
    """What kernels are compiled for: all tokens, the router's width, the classes, the hidden
    channels and the inputs that are multiplied at once, and the eps of the norm."""

    tokens: int
    size: int
    classes: int
    hidden: int
    inputs: int
    eps: float


def normal(x: jax.Array) -> jax.Array:
    """The normal distribution's function in float32, to a few digits of its own size also where it
    is small: Triton on AMD GPUs has no erf."""
    size = jnp.minimum(jnp.abs(x) * math.sqrt(0.5), 6.0)  # 1e-17 from there on
    exponent = jnp.full_like(size, EXPONENT[0])
    for c in EXPONENT[1:]:
        exponent = exponent * size + c
    tail = 0.5 * jnp.exp(-size * exponent)
    return jnp.where(x < 0, tail, 1.0 - tail)


def gelu(x: jax.Array) -> jax.Array:
    """The exact one, of float32."""
    return x * normal(x)


def gelu_slope(x: jax.Array) -> jax.Array:
    """The derivative of `gelu`."""
    density = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return normal(x) + x * density


def padded(size: int) -> int:
    """What a block has along an axis of that size."""
    return max(SMALLEST, power_of_two(size, 2 * size))


def hidden_of(weights: Weights, most: int) -> int:
    """H: at most so many, and as the first layer's weights for them fit into shared memory."""
    width = padded(len(weights.fc2_bias))
    return max(SMALLEST, min(most, width, SHARED // (width * weights.fc1.dtype.itemsize)))


def whole(array: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(tuple(map(padded, array.shape)), lambda *_: (0,) * array.ndim)


def below(limit: int, count: int, start=0):
    """Which of so many numbers from `start` on there are."""
    return start + jnp.arange(count) < limit


def load(ref, *real):
    """A block in float32, zero where there is nothing along one of its axes."""
    return triton.load(ref, mask=_mask(*real), other=0.0).astype(jnp.float32)


def store(ref, values, *real):
    """Writes a block where there is something along all of its axes."""
    triton.store(ref, values, mask=_mask(*real))


def _mask(first, second=None):
    return first if second is None else first[:, None] & second[None]


def product(a, b, of_a=1, of_b=0):
    """Of two matrices over these axes, in full float32."""
    return jax.lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), precision=exact(jnp.float32))


def inverse_root(states, sizes: Sizes):
    """What the rows of [T, R] are multiplied with to be normed [T, 1]."""
    square = jnp.sum(states * states, axis=1, keepdims=True) / sizes.size
    return jax.lax.rsqrt(square + sizes.eps)


def span(number, length, sizes: Sizes):
    """The channels of a span, for references, and which of them there are."""
    return pl.ds(number * length, length), below(sizes.size, length, number * length)


def first_layer(weights: Weights, normed: Columns, rows: int, sizes: Sizes, number):
    """Some hidden channels [H, T] before their activation."""
    hidden, hidden_real = span(number, sizes.hidden, sizes)

    def add(number, total):
        inputs, real = span(number, sizes.inputs, sizes)
        fc1 = load(weights.fc1.at[hidden, inputs], hidden_real, real)
        return total + product(fc1, normed(inputs, real), 1, 1)

    zeros = jnp.zeros((sizes.hidden, rows), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(sizes.size, sizes.inputs), add, zeros)
    return total + load(weights.fc1_bias.at[hidden], hidden_real)[:, None]


def second_layer(weights: Weights, normed: Columns, rows: int, sizes: Sizes):
    """The second layer [R, T] before its activation."""
    width = len(weights.fc2_bias)
    real = below(sizes.size, width)

    def add(number, total):
        x = gelu(first_layer(weights, normed, rows, sizes, number))
        hidden, hidden_real = span(number, sizes.hidden, sizes)
        return total + product(load(weights.fc2.at[:, hidden], real, hidden_real), x)

    zeros = jnp.zeros((width, rows), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(sizes.size, sizes.hidden), add, zeros)
    return total + load(weights.fc2_bias.at[...], real)[:, None]


def load_out(weights: Weights, sizes: Sizes):
    """The last layer's weights [E + 1, R]."""
    classes, width = weights.out.shape
    return load(weights.out.at[...], below(sizes.classes, classes), below(sizes.size, width))


def softmax(logits, sizes: Sizes):
    """Probabilities [E + 1, T], zero for classes that there are not."""
    logits = jnp.where(below(sizes.classes, len(logits))[:, None], logits, -jnp.inf)
    exponentials = jnp.exp(logits - jnp.max(logits, axis=0, keepdims=True))
    return exponentials / jnp.sum(exponentials, axis=0, keepdims=True)


def is_chosen(expert, probabilities):
    """Whether a class is a token's expert [E + 1, T]."""
    return jax.lax.broadcasted_iota(jnp.int32, probabilities.shape, 0) == expert[None]
