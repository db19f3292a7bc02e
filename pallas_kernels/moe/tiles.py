"""What the grouped products have in common inside their kernels: tiles of rows, blocks of columns
and steps along the contracted axis.

Indices beyond an axis are replaced by its last one, so that neither loads nor stores need a mask:
what was read so is zeroed in one operand of a product if that sums over it, and else makes another
copy of the last result, which is written once more. The last index is one that the result depends
on anyway, so that a NaN there tells nothing new.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.blocks import Blocks
from pallas_kernels.launch import power_of_two
from pallas_kernels.precision import exact


class Tile(NamedTuple):
    """A program's rows: at most so many of one class (`dispatch`).

    Attributes:
      has_expert: int32, 0 for the class of tokens without an expert, else 1.
      expert: that of the rows, E for none.
      rows: int32 [rows], in sorted order.
      tokens: int32 [rows], the token in each.
      real: bool [rows], False for those beyond the last of the class.
    """

    has_expert: jax.Array
    expert: jax.Array
    rows: jax.Array
    tokens: jax.Array
    real: jax.Array

    @classmethod
    def load(cls, number: Any, size: int, order_ref: Any, starts_ref: Any, experts: int) -> "Tile":
        """One of `tiles(...)` tiles of `size` rows: each class has as many as it fills. Those left
        over have no real rows."""
        of_class = jnp.arange(starts_ref.shape[0])
        following = jnp.minimum(of_class + 1, starts_ref.shape[0] - 1)
        count = pl.cdiv(starts_ref[following] - starts_ref[of_class], size)
        ends = jnp.cumsum(count, axis=0)
        expert = jnp.minimum(jnp.sum((ends <= number).astype(jnp.int32), axis=0), experts)
        first = jnp.sum(jnp.where(of_class == expert, ends - count, 0), axis=0)
        row = starts_ref[expert] + (number - first) * size + jnp.arange(size)
        stop = starts_ref[expert + 1]
        rows = jnp.minimum(row, stop - 1)
        has_expert = (expert < experts).astype(jnp.int32)
        return cls(has_expert, expert, rows, order_ref[rows], row < stop)

    def steps(self, size: int, step: int) -> jax.Array:
        """Along a contracted axis of that size: none without an expert, so that sums are zero."""
        return self.has_expert * pl.cdiv(size, step)


def tiles(tokens: int, experts: int, size: int) -> int:
    """How many tiles of `size` rows the classes of tokens fill at most."""
    return (tokens + min(experts + 1, tokens) * (size - 1)) // size


def row_tile(tokens: int, experts: int) -> int:
    """Rows that suit the tokens of an average expert."""
    return max(power_of_two(pl.cdiv(tokens, experts), 128), 16)


def indices(first: Any, count: int, size: int) -> tuple[jax.Array, jax.Array | None]:
    """`count` indices of an axis of that size, and which of them there are (None: all)."""
    index = first + jnp.arange(count)
    if size % count == 0:
        return index, None
    return jnp.minimum(index, size - 1), index < size


def zero_beyond(block: jax.Array, real: jax.Array | None, axis: int) -> jax.Array:
    """The block [rows, columns] with zeros along an axis where there is nothing real."""
    if real is None:
        return block
    return jnp.where(jnp.expand_dims(real, 1 - axis), block, jnp.zeros_like(block))


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """The float32 product of two blocks over those axes."""
    dtype = jnp.promote_types(a.dtype, b.dtype)
    return jax.lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((contract[0],), (contract[1],)), ((), ())),
        precision=exact(dtype),
        preferred_element_type=jnp.float32,
    )


def store(
    ref: Any,
    rows: jax.Array,
    columns: jax.Array,
    value: jax.Array,
    real_rows: jax.Array,
) -> None:
    """Writes the real rows of a block [rows, columns] to an array of two axes."""
    place = ref.at[outside(rows, real_rows, ref.shape[0])[:, None], columns[None, :]]
    mask = jnp.broadcast_to(real_rows[:, None], value.shape)
    triton.store(place, value.astype(ref.dtype), mask=mask)


def outside(index: jax.Array, real: jax.Array, size: int) -> jax.Array:
    """The index where there is something real, else one beyond the axis.

    Interpreted, what a mask leaves out is written too, with its old value: it must not share a
    place with something real.
    """
    return jnp.where(real, index, size)


def fitting(blocks: Blocks, axes: tuple[int, int, int], *factors: jax.Array) -> tuple[int, ...]:
    """Rows, columns and steps of a program along those axes: not much larger than they are, nor too
    small for the matrix units; float32 factors take shorter steps, to fit in the same memory."""
    rows, columns, step = blocks.sizes
    sizes = rows, columns, step * 2 // max(a.dtype.itemsize for a in factors)
    return tuple(max(power_of_two(a, s), 16) for a, s in zip(axes, sizes, strict=True))


def whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    """A block that is all of an array, for programs that index it themselves."""
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))
