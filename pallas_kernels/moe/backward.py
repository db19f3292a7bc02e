"""The grouped products of the backward pass that the forward pass does not have, in Pallas.

Shapes: T tokens of D channels, E experts of F hidden channels. Gate, up and hidden are kept from
the forward pass, 3 T F values a layer; where layers are rematerialised, those of one at a time.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.blocks import Blocks, blocks_for
from pallas_kernels.launch import launch
from pallas_kernels.moe.dispatch import Dispatch
from pallas_kernels.moe.tiles import (
    Tile,
    dot,
    fitting,
    indices,
    outside,
    row_tile,
    store,
    tiles,
    whole,
    zero_beyond,
)

HIDDEN_GRADIENT = "moe_hidden_gradient"
GATE_UP_GRADIENT, DOWN_GRADIENT = "moe_gate_up_gradient", "moe_down_gradient"


def hidden_blocks(rows: int, columns: int) -> Blocks:
    """Of `hidden_gradient`, for tiles of so many rows."""
    if rows <= 16:
        return Blocks((rows, 32, 256))
    width = 64 if columns % 128 else 128  # odd addresses take many scalar registers
    return Blocks((rows, width, 64)) if rows <= 32 else Blocks((64, width, 64), 8, 2)


def weight_blocks(rows: int, columns: int) -> Blocks:
    """Of a weight gradient: its rows and columns, and tokens."""
    if rows % 128 or columns % 128:
        # Odd addresses take more scalar registers than there are, in two stages of four warps.
        return Blocks((128, 128, 32), 8)
    return Blocks((128, 128, 32), stages=2)


def hidden_gradient(
    of_output: jax.Array,
    weight: jax.Array,
    factors: jax.Array,
    down: jax.Array,
    dispatch: Dispatch,
    dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """What depends on the hidden channels' gradient.

    Args:
      of_output: float32 [T, D], the output's gradient.
      weight: float32 [T].
      factors: gate and up [T, 2 F] in sorted order.
      down: [E, D, F].
      dtype: of x.

    Returns:
      The gradients of gate and up [T, 2 F], of that dtype in sorted order, with rows of class E
      that mean nothing; that of the routing weight, float32 [T].
    """
    (tokens, depth), columns = of_output.shape, down.shape[2]
    tile = row_tile(tokens, len(down))
    blocks = blocks_for(
        HIDDEN_GRADIENT, (tile, depth, columns), down.dtype, hidden_blocks(tile, columns)
    )
    rows, width, step = fitting(blocks, (tokens, columns, depth), factors, down)
    operands = of_output, weight, factors, down, *dispatch
    grid = (pl.cdiv(columns, width), tiles(tokens, len(down), rows))
    shapes = [
        jax.ShapeDtypeStruct(factors.shape, dtype),
        jax.ShapeDtypeStruct((grid[0], tokens), jnp.float32),
    ]
    of_gate_up, parts = launch(
        partial(_hidden_gradient, rows=rows, width=width, step=step),
        shapes,
        name=HIDDEN_GRADIENT,
        grid=grid,
        in_specs=[whole(a.shape) for a in operands],
        out_specs=[whole(s.shape) for s in shapes],
        warps=blocks.warps,
        stages=blocks.stages,
    )(*operands)
    return of_gate_up, jnp.sum(parts, axis=0)


def _hidden_gradient(
    of_output_ref,
    weight_ref,
    factors_ref,
    down_ref,
    order_ref,
    starts_ref,
    of_gate_up_ref,
    of_weight_ref,
    *,
    rows,
    width,
    step,
):
    (experts, depth, size), dtype = down_ref.shape, of_gate_up_ref.dtype
    block = pl.program_id(0)
    tile = Tile.load(pl.program_id(1), rows, order_ref, starts_ref, experts)
    columns, real_columns = indices(block * width, width, size)

    def add(number, total):
        at, real = indices(number * step, step, depth)
        of_output = zero_beyond(of_output_ref[tile.tokens[:, None], at[None, :]], real, 1)
        down = down_ref[tile.expert, at[:, None], columns[None, :]]
        return total + dot(of_output.astype(dtype), down)

    zeros = jnp.zeros((rows, width), jnp.float32)
    of_hidden = jax.lax.fori_loop(0, tile.steps(depth, step), add, zeros)
    gate, up = (
        factors_ref[tile.rows[:, None], (first + columns)[None, :]].astype(jnp.float32)
        for first in (0, size)
    )
    slope = jax.nn.sigmoid(gate)
    silu = gate * slope
    of_weight = zero_beyond(silu * up * of_hidden, real_columns, 1)
    place = of_weight_ref.at[block, outside(tile.tokens, tile.real, of_weight_ref.shape[1])]
    triton.store(place, jnp.sum(of_weight, axis=1), mask=tile.real)
    of_hidden = of_hidden * weight_ref[tile.tokens][:, None]
    of_gate = of_hidden * up * slope * (1.0 + gate * (1.0 - slope))
    store(of_gate_up_ref, tile.rows, columns, of_gate, tile.real)
    store(of_gate_up_ref, tile.rows, size + columns, of_hidden * silu, tile.real)


def gate_up_gradient(
    of_gate_up: jax.Array, x: jax.Array, gate_up: jax.Array, dispatch: Dispatch
) -> jax.Array:
    """[E, 2 F, D], of the gradients of gate and up [T, 2 F] in sorted order and x [T, D]."""
    return _weight_gradient(GATE_UP_GRADIENT, (of_gate_up, x), (False, True), gate_up, dispatch)


def down_gradient(
    of_output: jax.Array, weight: jax.Array, hidden: jax.Array, down: jax.Array, dispatch: Dispatch
) -> jax.Array:
    """[E, D, F], of the output's gradient [T, D] times weight [T] and of hidden [T, F] in sorted
    order."""
    factors = of_output, hidden
    return _weight_gradient(DOWN_GRADIENT, factors, (True, False), down, dispatch, weight)


def _weight_gradient(
    name: str,
    factors: tuple[jax.Array, jax.Array],
    by_token: tuple[bool, bool],
    like: jax.Array,
    dispatch: Dispatch,
    *weight: jax.Array,
) -> jax.Array:
    """For each expert the product of two arrays over its tokens, [E, rows, columns].

    Args:
      factors: [T, rows] and [T, columns].
      by_token: whether they are in the tokens' order, not in the sorted one.
      like: of the result's shape and dtype.
      weight: float32 [T] for the rows of the first factor, or nothing.
    """
    experts, rows, columns = like.shape
    shape = row_tile(len(factors[0]), experts), rows, columns
    blocks = blocks_for(name, shape, like.dtype, weight_blocks(rows, columns))
    height, width, step = fitting(blocks, (rows, columns, len(factors[0])), like)
    operands = *factors, *dispatch, *weight
    return launch(
        partial(_product_over_tokens, by_token=by_token, block=(height, width), step=step),
        jax.ShapeDtypeStruct(like.shape, like.dtype),
        name=name,
        grid=(pl.cdiv(columns, width), pl.cdiv(rows, height), experts),
        in_specs=[whole(a.shape) for a in operands],
        out_specs=whole(like.shape),
        warps=blocks.warps,
        stages=blocks.stages,
    )(*operands)


def _product_over_tokens(left_ref, right_ref, order_ref, starts_ref, *refs, by_token, block, step):
    *weight_ref, out_ref = refs
    _, height, width = out_ref.shape
    columns, _ = indices(pl.program_id(0) * block[1], block[1], width)
    rows, _ = indices(pl.program_id(1) * block[0], block[0], height)
    expert = pl.program_id(2)
    start, stop = starts_ref[expert], starts_ref[expert + 1]

    def add(number, total):
        row = start + number * step + jnp.arange(step)
        sorted_row = jnp.minimum(row, stop - 1)
        token = order_ref[sorted_row]
        left, right = (
            ref[(token if unsorted else sorted_row)[:, None], at[None, :]]
            for ref, unsorted, at in zip(
                (left_ref, right_ref), by_token, (rows, columns), strict=True
            )
        )
        for ref in weight_ref:
            left = left * ref[token][:, None]
        # Products are in the dtype that the activations have in the forward pass.
        narrow = (left_ref, right_ref)[by_token.index(False)].dtype
        left = zero_beyond(left.astype(narrow), row < stop, 0)
        return total + dot(left, right.astype(narrow), (0, 0))

    zeros = jnp.zeros(block, jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(stop - start, step), add, zeros)
    out_ref[expert, rows[:, None], columns[None, :]] = total.astype(out_ref.dtype)
