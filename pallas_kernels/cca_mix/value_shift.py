"""The gradient of the value shift, in Pallas: XLA would write twice what it reads, as it does not
join the sum for the initial value with the shift."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.blocks import Blocks, blocks_for
from pallas_kernels.cca_mix.heads import Sizes, consecutive, load, whole
from pallas_kernels.launch import launch, power_of_two

VALUES = "cca_mix_backward_values"
DEFAULT = Blocks((32,))  # tokens
CHANNELS = 128  # at once, at most


def gradients(
    sizes: Sizes, of_v: jax.Array, of_carried: jax.Array, age: jax.Array, new_lengths: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of `current` and `delayed` [B S, C/2], `carried` [B, C/2] and `initial` [C/2] of
    `reference.shift_values`, for cotangents [B S, C] and [B, C/2]; `age` [B S]."""
    (block,), warps, stages = blocks_for(VALUES, sizes[2:7], of_v.dtype, DEFAULT)
    rows, channels = of_v.shape[0], of_carried.shape[1]
    width = power_of_two(channels, CHANNELS)
    programs = pl.cdiv(rows, block)
    operands = of_v, of_carried, age, new_lengths.astype(jnp.int32)
    shapes = (rows, channels), (rows, channels), of_carried.shape, (programs, channels)
    current, delayed, carried, initial = launch(
        partial(_values, sizes=sizes, block=block, width=width),
        tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
        name=VALUES,
        grid=(programs, pl.cdiv(channels, width)),
        in_specs=[whole(x.shape) for x in operands],
        out_specs=tuple(map(whole, shapes)),
        warps=warps,
        stages=stages,
    )(*operands)
    return current, delayed, carried, jnp.sum(initial, axis=0)


def _values(of_v, of_carried, ages, lengths, *outputs, sizes, block, width):
    of_current, of_delayed, of_first, of_initial = outputs
    channels = of_carried.shape[1]
    number = pl.program_id(1) * width + jnp.arange(width)
    real = (number < channels)[None, :]
    here = consecutive(ages, sizes, pl.program_id(0) * block, block)
    index, inside = here.at(sizes)
    after, has_after = here.at(sizes, -1)
    if sizes.packed:
        has_after &= triton.load(ages.at[after], mask=has_after, other=0) > 0
    # The last real token, and the carry if a row has none, are also what the new carry holds.
    last = triton.load(lengths.at[here.row]) - 1
    first = inside & (here.position == 0)

    at = index[:, None], number[None, :]
    own = load(of_v, index, number, inside[:, None] & real)
    triton.store(of_current.at[at], own, mask=inside[:, None] & real)
    shifted = load(of_v, after, channels + number, has_after[:, None] & real)
    ending = load(of_carried, here.row, number, (here.position == last)[:, None] & real)
    triton.store(of_delayed.at[at], shifted + ending, mask=inside[:, None] & real)

    seen = here.see(1)
    carried = load(of_v, index, channels + number, (first & seen)[:, None] & real)
    carried += load(of_carried, here.row, number, (first & (last < 0))[:, None] & real)
    # Interpreted stores write masked elements as well, what was there: not to the same place.
    row = jnp.where(first, here.row, sizes.batch)
    triton.store(of_first.at[row[:, None], number[None, :]], carried, mask=first[:, None] & real)
    initial = load(of_v, index, channels + number, (inside & ~seen)[:, None] & real)
    at = of_initial.at[pl.program_id(0), number]
    triton.store(at, jnp.sum(initial, axis=0), mask=number < channels)
