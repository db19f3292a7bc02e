"""What the CCA mixing kernels share: one head of some tokens, from memory to before its rotation.

Kernels see q, k and the cotangents as [B S, heads d], the convolution tail as [B T, C]; other
symbols as in `reference`. A head's channels come as pairs: half of them in each of two blocks, so
that a channel and the one it is rotated with have the same place. Channels beyond the rotary ones
are paired as well, and rotated by nothing.
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

NOWHERE = -(1 << 30)  # the position of what is no token


class Sizes(NamedTuple):
    """Of one call, all static."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    k0: int
    k1: int
    half: int  # of the rotary channels
    packed: bool  # whether there are ages
    few: bool  # tokens
    eps: float

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.kv_heads

    @property
    def tail(self) -> int:
        """Columns of history."""
        return self.k0 + self.k1 - 2

    @property
    def pairs(self) -> int:
        """Of channels, in a head; of an odd head's last one, half is missing."""
        return (self.head_dim + 1) // 2

    @property
    def lanes(self) -> int:
        """A block of them, at least what the matrix units take."""
        return max(power_of_two(self.pairs, 2 * self.pairs), 16)


class Inputs(NamedTuple):
    """References to memory."""

    q: Any  # [B S, H d]
    k: Any  # [B S, N d]
    tail: Any  # [B T, C]
    age: Any  # int32 [B S]
    cos: Any  # [B S, r / 2]
    sin: Any  # [B S, r / 2]
    taps: Any  # [C, k0]
    depthwise_bias: Any  # [C]
    # [(H + N) k1 d, d]: head, tap and input channel; output channel. For few tokens as they are
    # held, [C, d k1]: to transpose them would move more than to mix.
    matrices: Any
    grouped_bias: Any  # [C]
    temperature: Any  # [N]


class Head(NamedTuple):
    """A query or a key head, by its number among all heads."""

    is_key: Any  # bool, known before the kernel runs or in it
    number: Any
    kv_head: Any

    def place(self, sizes: Sizes) -> Any:
        """Its number among the heads of its own kind."""
        return either(self.is_key, lambda: self.number - sizes.heads, lambda: self.number)


def either(condition: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    if isinstance(condition, bool):
        return yes() if condition else no()
    return jax.lax.cond(condition, yes, no)


def query(sizes: Sizes, kv_head: Any, member: Any) -> Head:
    return Head(False, kv_head * sizes.group + member, kv_head)


def key(sizes: Sizes, kv_head: Any) -> Head:
    return Head(True, sizes.heads + kv_head, kv_head)


class Tokens(NamedTuple):
    """Those of a program: their row of the batch, and their position, which may lie outside of the
    chunk."""

    row: Any
    position: Any  # int32 [tokens]
    age: Any  # int32 [tokens], or None
    first: Any  # bool, whether the tail is among what they see

    def at(self, sizes: Sizes, back: int = 0) -> tuple[jax.Array, jax.Array]:
        """Where in memory those `back` tokens ago are, and whether they are in the chunk."""
        position = self.position - back
        return self.row * sizes.length + position, (position >= 0) & (position < sizes.length)

    def see(self, back: int) -> jax.Array:
        """Whether their segments had begun `back` tokens ago."""
        return all_true(self.position) if self.age is None or back == 0 else self.age >= back


def tokens(ages: Any, sizes: Sizes, row: Any, position: jax.Array) -> Tokens:
    first = jnp.min(jnp.where(position == NOWHERE, sizes.tail, position)) < sizes.tail
    if not sizes.packed:
        return Tokens(row, position, None, first)
    index = row * sizes.length + jnp.maximum(position, 0)
    age = triton.load(ages.at[index], mask=position < sizes.length, other=0)
    return Tokens(row, position, age + jnp.minimum(position, 0), first)


def consecutive(ages: Any, sizes: Sizes, first: Any, count: int) -> Tokens:
    """Tokens of all rows, one row after the other; those after the last are nowhere."""
    index = first + jnp.arange(count)
    row = jnp.minimum(index // sizes.length, sizes.batch - 1)
    position = index - row * sizes.length
    return tokens(ages, sizes, row, jnp.where(position < sizes.length, position, NOWHERE))


class Channels(NamedTuple):
    """Some of a head's channels, a power of two of them."""

    number: jax.Array  # int32
    real: jax.Array  # which of them there are


def in_pairs(sizes: Sizes) -> tuple[Channels, Channels]:
    """Those that are rotated with each other."""
    pair = jnp.arange(sizes.lanes)
    rotary, alone = pair < sizes.half, sizes.pairs - sizes.half
    first = jnp.where(rotary, pair, pair + sizes.half)
    second = first + jnp.where(rotary, sizes.half, alone)
    if sizes.head_dim == 2 * sizes.lanes:
        return Channels(first, all_true(pair)), Channels(second, all_true(pair))
    real = pair < sizes.pairs
    return Channels(first, real), Channels(second, real & (second < sizes.head_dim))


def pick(which: Any, pair: tuple[Any, Any]) -> Any:
    """One of two, by a number that is only known when the kernel runs: a loop over both is half the
    code, and what it loads cannot pile up in registers."""
    return jax.tree.map(lambda first, second: jnp.where(which == 0, first, second), *pair)


def in_order(sizes: Sizes, first: Any, count: int) -> Channels:
    number = first + jnp.arange(count)
    even = sizes.head_dim % count == 0
    return Channels(number, all_true(number) if even else number < sizes.head_dim)


def all_true(x: jax.Array) -> jax.Array:
    """A constant of that shape, which costs nothing in a mask."""
    return jnp.full(x.shape, True)


def load(ref: Any, rows: jax.Array, columns: jax.Array, real: jax.Array) -> jax.Array:
    values = triton.load(ref.at[rows[:, None], columns[None, :]], mask=real, other=0)
    return values.astype(jnp.float32)


def load_head(ref: Any, sizes: Sizes, place: Any, here: Tokens, channels: Channels) -> jax.Array:
    """[tokens, channels] of a head's own array, zero outside of the chunk."""
    index, inside = here.at(sizes)
    column = place * sizes.head_dim + channels.number
    return load(ref, index, column, inside[:, None] & channels.real[None, :])


def load_u(
    inputs: Inputs, sizes: Sizes, head: Head, here: Tokens, channels: Channels, back: int
) -> jax.Array:
    """The head's projection `back` tokens ago [tokens, channels], from the tail where that was
    before the chunk; zero before a token's segment."""
    seen = here.see(back)
    index, inside = here.at(sizes, back)
    column = head.place(sizes) * sizes.head_dim + channels.number
    real = (seen & inside)[:, None] & channels.real[None, :]
    values = either(
        head.is_key,
        lambda: load(inputs.k, index, column, real),
        lambda: load(inputs.q, index, column, real),
    )
    if sizes.tail == 0:
        return values

    def with_tail(values):
        position = here.position - back + sizes.tail
        before = seen & (position >= 0) & (position < sizes.tail)
        column = head.number * sizes.head_dim + channels.number
        real = before[:, None] & channels.real[None, :]
        return values + load(inputs.tail, here.row * sizes.tail + position, column, real)

    return jax.lax.cond(here.first, with_tail, lambda values: values, values)


def load_vector(ref: Any, sizes: Sizes, head: Head, channels: Channels, *tap: int) -> jax.Array:
    """[1, channels] of a bias, or of a tap of the depthwise convolution."""
    column = head.number * sizes.head_dim + channels.number
    values = triton.load(ref.at[(column, *tap)], mask=channels.real, other=0)
    return values.astype(jnp.float32)[None, :]


def load_matrix(
    inputs: Inputs, sizes: Sizes, head: Head, back: int, into: Channels, out: Channels
) -> jax.Array:
    """[input channels, output channels] of the grouped convolution's tap that sees the token `back`
    tokens ago."""
    tap = sizes.k1 - 1 - back
    if sizes.few:
        rows, columns = head.number * sizes.head_dim + out.number, into.number * sizes.k1 + tap
        at = inputs.matrices.at[rows[:, None], columns[None, :]]
        return triton.load(at, mask=out.real[:, None] & into.real[None, :], other=0).T
    first = (head.number * sizes.k1 + tap) * sizes.head_dim
    at = inputs.matrices.at[(first + into.number)[:, None], out.number[None, :]]
    return triton.load(at, mask=into.real[:, None] & out.real[None, :], other=0)


def product(x: jax.Array, matrix: jax.Array, matrix_axis: int = 0) -> jax.Array:
    """float32 [m, k] with a matrix in its own dtype, contracted over that axis of it, to float32.

    A float32 value is the sum of three in bfloat16, and their products with bfloat16 are exact:
    three passes of the bfloat16 units, which are eight times as fast as those for float32.
    """
    if matrix.dtype != jnp.bfloat16:
        return dot(x, matrix.astype(jnp.float32), y_axis=matrix_axis)
    high, middle, low = (dot(third, matrix, y_axis=matrix_axis) for third in thirds(x))
    return low + middle + high


def thirds(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """float32 as three bfloat16 whose sum it is: its 24 bits in eights.

    They are cut by their bits, because compilers may take a rounding that is undone for nothing.
    """
    high = _upper_bits(x)
    middle = _upper_bits(x - high)
    high, middle, low = (y.astype(jnp.bfloat16) for y in (high, middle, x - high - middle))
    return high, middle, low


def _upper_bits(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & -(1 << 16)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def dot(x: jax.Array, y: jax.Array, x_axis: int = 1, y_axis: int = 0) -> jax.Array:
    """Contracted over these axes, to float32."""
    return jax.lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=exact(x.dtype),
        preferred_element_type=jnp.float32,
    )


def depthwise(
    inputs: Inputs, sizes: Sizes, head: Head, here: Tokens, channels: Channels
) -> list[jax.Array]:
    """What each tap of the grouped convolution sees, that of the token itself first: float32
    [tokens, channels]."""
    # Before a token's segment u is zero, so that the depthwise convolution gives its bias.
    u = [load_u(inputs, sizes, head, here, channels, back) for back in range(sizes.tail + 1)]
    taps = [load_vector(inputs.taps, sizes, head, channels, tap) for tap in range(sizes.k0)]
    bias = load_vector(inputs.depthwise_bias, sizes, head, channels)
    return [
        bias + sum(tap * x for tap, x in zip(reversed(taps), u[back:], strict=False))
        for back in range(sizes.k1)
    ]


def mixed(
    inputs: Inputs, sizes: Sizes, head: Head, here: Tokens, width: int
) -> tuple[jax.Array, jax.Array]:
    """The head's convolution and mean, in pairs: float32 [tokens, pairs] twice.

    Args:
      width: input channels that are multiplied at once.
    """
    pairs = in_pairs(sizes)

    def step(number, sums):
        channels = in_order(sizes, number * width, width)
        for back, column in enumerate(depthwise(inputs, sizes, head, here, channels)):
            matrices = (load_matrix(inputs, sizes, head, back, channels, out) for out in pairs)
            sums = tuple(s + product(column, m) for s, m in zip(sums, matrices, strict=True))
        return sums

    zeros = jnp.zeros((*here.position.shape, sizes.lanes), jnp.float32)
    sums = jax.lax.fori_loop(0, math.ceil(sizes.head_dim / width), step, (zeros, zeros))
    first, second = (
        s
        + load_vector(inputs.grouped_bias, sizes, head, channels)
        + _mean(inputs, sizes, head, here, channels)
        for s, channels in zip(sums, pairs, strict=True)
    )
    return first, second


def _mean(inputs: Inputs, sizes: Sizes, head: Head, here: Tokens, channels: Channels) -> jax.Array:
    """A query's with its key, or a key's with its group's mean query."""
    kv_head = head.kv_head
    keys = load_head(inputs.k, sizes, kv_head, here, channels)
    if not head.is_key:
        return (load_head(inputs.q, sizes, head.number, here, channels) + keys) / 2

    def step(member, queries):
        place = kv_head * sizes.group + member
        return queries + load_head(inputs.q, sizes, place, here, channels)

    queries = jax.lax.fori_loop(0, sizes.group, step, jnp.zeros_like(keys))
    return (queries / sizes.group + keys) / 2


def turn(inputs: Inputs, sizes: Sizes, here: Tokens) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of each pair's rotation [tokens, pairs]; beyond the rotary channels, one and
    zero."""
    pair = jnp.arange(sizes.lanes)
    index, inside = here.at(sizes)
    real = inside[:, None] & (pair < sizes.half)[None, :]
    at = (index[:, None], pair[None, :])
    return (
        triton.load(inputs.cos.at[at], mask=real, other=1.0),
        triton.load(inputs.sin.at[at], mask=real, other=0.0),
    )


def unit_scale(sizes: Sizes, first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Squared length of each head, and what makes its length sqrt(d): [tokens, 1]."""
    square = jnp.sum(first * first + second * second, axis=1, keepdims=True)
    bounded = jnp.maximum(square, sizes.eps**2)
    return square, sizes.head_dim**0.5 * jax.lax.rsqrt(bounded)


def store(
    ref: Any, sizes: Sizes, place: Any, here: Tokens, channels: Channels, values: jax.Array
) -> None:
    """Of the tokens that are in the chunk."""
    index, inside = here.at(sizes)
    column = place * sizes.head_dim + channels.number
    at = ref.at[index[:, None], column[None, :]]
    mask = inside[:, None] & channels.real[None, :]
    triton.store(at, values.astype(ref.dtype), mask=mask)


def whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    """Every program sees the whole array: what programs read overlaps by the convolutions' halo."""
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))
