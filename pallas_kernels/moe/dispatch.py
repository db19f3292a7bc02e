"""Which tokens go to which expert: a stable counting sort in one kernel.

Shapes: T tokens, E experts. Class E is that of the tokens without an expert, and the last.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.blocks import Blocks, blocks_for
from pallas_kernels.launch import launch, power_of_two
from pallas_kernels.moe.tiles import outside, whole

SORT = "moe_sort"
DEFAULT = Blocks((512,), 8)  # tokens that a program places, and that it counts at once


class Dispatch(NamedTuple):
    """Tokens in the order of their experts.

    Attributes:
      order: int32 [T], the token in each row; those of one class are in ascending order.
      starts: int32 [C], C > E + 1, the first row of each class; T beyond the last class.
    """

    order: jax.Array
    starts: jax.Array


def sort_by_expert(expert: jax.Array, experts: int) -> Dispatch:
    """A stable sort of int32 [T] by class; numbers outside 0 .. E - 1 are class E."""
    tokens = expert.size
    (size,), warps, stages = blocks_for(SORT, (tokens, experts), expert.dtype, DEFAULT)
    size = power_of_two(tokens, size)
    shapes = [
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
        jax.ShapeDtypeStruct((power_of_two(experts + 2, 2 * experts + 2),), jnp.int32),
    ]
    order, starts = launch(
        partial(_sort, experts=experts, size=size),
        shapes,
        name=SORT,
        grid=(pl.cdiv(tokens, size),),
        in_specs=[whole((tokens,))],
        out_specs=[whole(s.shape) for s in shapes],
        warps=warps,
        stages=stages,
    )(expert.astype(jnp.int32))
    return Dispatch(order, starts)


def _sort(expert_ref, order_ref, starts_ref, *, experts, size):
    """Places a block of tokens. Each program counts all tokens for itself: they are few bytes, and
    a second kernel would take longer to start."""
    tokens, classes = expert_ref.shape[0], starts_ref.shape[0]
    number = pl.program_id(0)
    of_class = jnp.arange(classes)

    def one_hot(block):
        token = block * size + jnp.arange(size)
        expert = triton.load(expert_ref.at[token], mask=token < tokens, other=0)
        expert = jnp.where((expert >= 0) & (expert < experts), expert, experts)
        chosen = (expert[:, None] == of_class[None, :]) & (token < tokens)[:, None]
        return token, chosen.astype(jnp.int32)

    def count(block, sums):
        _, chosen = one_hot(block)
        return sums[0] + chosen, sums[1] + chosen * (block < number).astype(jnp.int32)

    zeros = (jnp.zeros((size, classes), jnp.int32),) * 2
    sums = jax.lax.fori_loop(0, pl.cdiv(tokens, size), count, zeros)
    total, before = (jnp.sum(s, axis=0) for s in sums)
    starts = jnp.cumsum(total, axis=0) - total
    triton.store(starts_ref.at[of_class], starts, mask=jnp.broadcast_to(number == 0, (classes,)))
    token, chosen = one_hot(number)
    rank = (starts + before)[None, :] + jnp.cumsum(chosen, axis=0) - 1
    row = jnp.sum(chosen * rank, axis=1)
    real = token < tokens
    triton.store(order_ref.at[outside(row, real, tokens)], token, mask=real)
