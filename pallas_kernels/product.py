"""Activations times weights, in the forms in which weights are held."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.launch import architecture
from pallas_kernels.precision import exact

STREAMED_ROWS = 2  # at most so many rows are multiplied while the weight streams by
STREAMED_SIZE = 1 << 18  # smaller weights stay in the caches, whatever reads them
FEWEST_ROWS = 4
# Of `_stream_rows`: a fusion of more slices falls apart in XLA, and a group's sums stay cached.
SEGMENT_ROWS = 8
MOST_GROUPS, GROUP_SUMS = 16, 1 << 17
LANES = 32  # of `_stream_columns`
SHORT = 4096  # weights of more rows are streamed as [in, out]
# So many rows are the second operand, of products with weights of more columns than that.
SWAPPED_ROWS, NARROW = range(32, 129, 32), 1024

TRANSPOSED = 8  # rows and columns of a tile of `_transposed`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streamed:
    """A 16-bit weight [out, in] in the form through which a CPU takes one row of activations
    fastest: [out, in], or [in, out] if it is tall. See `streamed`."""

    array: jax.Array
    transposed: bool = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        first, second = self.array.shape
        return (second, first) if self.transposed else (first, second)

    @property
    def dtype(self) -> jnp.dtype:
        return self.array.dtype


Weight = jax.Array | Streamed


def streamed(weight: jax.Array) -> Weight:
    """A weight [out, in] in that form; one that is small or float32 as it is."""
    outputs, inputs = weight.shape
    small = weight.size < STREAMED_SIZE or inputs % LANES
    if small or weight.dtype.itemsize != 2:
        return weight
    transposed = outputs > SHORT
    return Streamed(weight.T if transposed else weight, transposed)


def swapped(weight: Weight) -> bool:
    """Whether `product` takes the weight as first operand for `SWAPPED_ROWS` rows. XLA's products
    on CPU repack their second operand, which costs as much as multiplying a large one."""
    return isinstance(weight, Streamed) and not weight.transposed and weight.shape[1] > NARROW


def product(x: jax.Array, weight: Weight) -> jax.Array:
    """x [..., in] times weight [out, in], of one dtype: float32 [..., out]."""
    rows = x.reshape(-1, x.shape[-1])
    if not isinstance(weight, Streamed):
        out = _dot(rows, weight, 1)
    elif len(rows) <= STREAMED_ROWS:
        out = (_stream_rows if weight.transposed else _stream_columns)(rows, weight.array)
    elif len(rows) in SWAPPED_ROWS and swapped(weight):
        # Without the barrier, XLA would swap them back.
        out = jax.lax.optimization_barrier(_dot(weight.array, rows, 1)).T
    else:
        out = _dot(rows, weight.array, 0 if weight.transposed else 1)
    return out.reshape(*x.shape[:-1], weight.shape[0])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot(rows: jax.Array, weight: jax.Array, contracted: int) -> jax.Array:
    """Rows times a weight whose axis `contracted` is theirs: float32.

    Fewer than `FEWEST_ROWS` rows of 16-bit numbers are filled up with zeros: XLA's CPU backend
    multiplies a single row in a scalar loop that reads a tenth of what the memory gives.
    """
    count = rows.shape[0]
    if count < FEWEST_ROWS and rows.dtype.itemsize == 2:
        rows = jnp.pad(rows, ((0, FEWEST_ROWS - count), (0, 0)))
    return _multiply(rows, weight, 1, contracted)[:count]


def _multiply(a: jax.Array, b: jax.Array, axis_of_a: int, axis_of_b: int) -> jax.Array:
    return jax.lax.dot_general(
        a,
        b,
        (((axis_of_a,), (axis_of_b,)), ((), ())),
        precision=exact(b.dtype),
        preferred_element_type=jnp.float32,
    )


def _dot_forward(rows, weight, contracted):
    return _dot(rows, weight, contracted), (rows, weight)


def _dot_backward(contracted, saved, of_out):
    """Products of operands of the weight's dtype, as forward: XLA would multiply 16-bit numbers
    with float32 ones as float32."""
    rows, weight = saved
    of_out = of_out.astype(weight.dtype)
    of_rows = _multiply(of_out, weight, 1, 1 - contracted)
    factors = (of_out, rows) if contracted == 1 else (rows, of_out)
    return of_rows.astype(rows.dtype), transposed_product(*factors)


_dot.defvjp(_dot_forward, _dot_backward)


def transposed_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """The transpose of a [..., T, m] times b [..., T, n], of one dtype, which the result [..., m,
    n] has too: the gradient of a weight, of T rows.

    XLA's CPU backend multiplies 16-bit numbers as such only where the first operand's last axis is
    contracted: otherwise in float32, at a third of the speed or less. So `a` has to be transposed,
    or, where these are fewer numbers, `b` and the result.
    """
    if architecture() is None and a.dtype.itemsize == 2:
        (rows, m), n = a.shape[-2:], b.shape[-1]
        if rows * m > rows * n + m * n:
            # Without the barrier, XLA would swap them back.
            return jax.lax.optimization_barrier(transposed_product(b, a)).swapaxes(-1, -2)
        a, axis = _transposed(a), a.ndim - 1
    else:
        axis = a.ndim - 2
    batch = tuple(range(a.ndim - 2))
    return jax.lax.dot_general(
        a,
        b,
        (((axis,), (a.ndim - 2,)), (batch, batch)),
        precision=exact(b.dtype),
        preferred_element_type=b.dtype,
    )


def _transposed(a: jax.Array) -> jax.Array:
    """[..., m, n] -> [..., n, m] in memory, by way of tiles: XLA's CPU backend would read along
    columns, a cache line for each number."""
    *batch, m, n = a.shape
    if m % TRANSPOSED or n % TRANSPOSED:
        return jax.lax.optimization_barrier(a.swapaxes(-1, -2))
    tiles = a.reshape(-1, m // TRANSPOSED, TRANSPOSED, n // TRANSPOSED, TRANSPOSED)
    tiles = jax.lax.optimization_barrier(tiles.transpose(0, 3, 1, 4, 2))
    columns = tiles.transpose(0, 1, 3, 2, 4).reshape(*batch, n, m)
    return jax.lax.optimization_barrier(columns)


def _stream_rows(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """Rows [m, in] times weight [in, out] as sums of scaled weight rows, float32.

    XLA turns each segment into one vectorised loop over `out`, split among the cores, that converts
    16-bit weights on their way. The rows of the weight are dealt to groups with sums of their own,
    so that a segment has enough to do, and a group's sums stay in the caches.
    """
    inputs, outputs = weight.shape
    blocks = inputs // SEGMENT_ROWS
    wanted = min(max(GROUP_SUMS // outputs, 2), MOST_GROUPS)
    groups = max(n for n in range(1, wanted + 1) if blocks % n == 0)
    x = rows.astype(jnp.float32).reshape(len(rows), groups, -1)
    weight = weight.reshape(groups, -1, outputs)
    total = jnp.zeros((len(rows), groups, outputs))
    for start in range(0, weight.shape[1], SEGMENT_ROWS):
        for i in range(start, start + SEGMENT_ROWS):
            total = total + x[:, :, i, None] * weight[:, i].astype(jnp.float32)
        total = jax.lax.optimization_barrier(total)
    return jnp.sum(total, axis=1)


def _stream_columns(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """Rows [m, in] times weight [out, in], float32: one vectorised loop adds up the products
    of all slices of each weight row, and what is left of a row is summed."""
    x = rows.astype(jnp.float32).reshape(len(rows), 1, -1, LANES)
    weight = weight.reshape(len(weight), -1, LANES)
    total = x[:, :, 0] * weight[:, 0].astype(jnp.float32)
    for i in range(1, weight.shape[1]):
        total = total + x[:, :, i] * weight[:, i].astype(jnp.float32)
    return jnp.sum(jax.lax.optimization_barrier(total), axis=-1)
