"""Activations times weights, in the two orientations in which weights are held."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.precision import exact

FEWEST_ROWS = 4
STREAMED_ROWS = 2  # at most so many rows are multiplied while the weight streams by
STREAMED_SIZE = 1 << 20  # smaller weights take as long by either way
SEGMENT_ROWS = 8  # a fusion of more slices falls apart in XLA
MOST_GROUPS, GROUP_SUMS = 16, 1 << 17


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transposed:
    """A weight [out, in] held as [in, out]: the form that one row of activations streams through at
    the speed of the memory (`layouts.for_cpu`)."""

    array: jax.Array  # [in, out]

    @property
    def shape(self) -> tuple[int, int]:
        inputs, outputs = self.array.shape
        return outputs, inputs

    @property
    def dtype(self) -> jnp.dtype:
        return self.array.dtype


Weight = jax.Array | Transposed


def product(x: jax.Array, weight: Weight) -> jax.Array:
    """x [..., in] times weight [out, in], of one dtype: float32 [..., out]."""
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(weight, Transposed):
        out = _stream(rows, weight.array) if _streams(rows, weight) else _dot(rows, weight.array, 0)
    else:
        out = _dot(rows, weight, 1)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def _dot(rows: jax.Array, weight: jax.Array, contracted: int) -> jax.Array:
    """Fewer than `FEWEST_ROWS` rows of 16-bit numbers are filled up with zeros: XLA's CPU backend
    multiplies a single row in a scalar loop that reads a tenth of what the memory gives."""
    count = rows.shape[0]
    if count < FEWEST_ROWS and rows.dtype.itemsize == 2:
        rows = jnp.pad(rows, ((0, FEWEST_ROWS - count), (0, 0)))
    out = jax.lax.dot_general(
        rows,
        weight,
        (((1,), (contracted,)), ((), ())),
        precision=exact(weight.dtype),
        preferred_element_type=jnp.float32,
    )
    return out[:count]


def _streams(rows: jax.Array, weight: Transposed) -> bool:
    large = weight.array.size >= STREAMED_SIZE and rows.shape[1] % SEGMENT_ROWS == 0
    return large and rows.shape[0] <= STREAMED_ROWS and weight.dtype.itemsize == 2


def _stream(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """One or two rows [m, in] times weight [in, out] as sums of scaled weight rows, float32.

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
