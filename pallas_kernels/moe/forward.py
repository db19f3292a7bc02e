"""The grouped products of tiles of tokens with their experts' weights, in Pallas.

A program takes a tile of rows of one class (`tiles.Tile`) and some columns. Columns are the
first axis of the grid: programs that share rows start together, and one chiplet of eight reads the
same columns of the weights for all rows of an expert.

Shapes: T tokens of D channels, E experts of F hidden channels.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.blocks import Blocks, blocks_for
from pallas_kernels.launch import launch
from pallas_kernels.moe.dispatch import Dispatch
from pallas_kernels.moe.tiles import (
    Tile,
    dot,
    fitting,
    indices,
    row_tile,
    store,
    tiles,
    whole,
    zero_beyond,
)

HIDDEN, KEEPING_HIDDEN = "moe_hidden", "moe_hidden_and_factors"
OUTPUT, INPUT_GRADIENT = "moe_output", "moe_input_gradient"


def default_blocks(rows: int, columns: int) -> Blocks:
    """Of tiles [rows, columns]. With few rows, reading the weights is all that matters."""
    if rows <= 16:
        return Blocks((rows, 32, 2 * columns), stages=2)
    return Blocks((rows, columns, 64), stages=2)


def hidden(x: jax.Array, gate_up: jax.Array, dispatch: Dispatch, keep: bool) -> list[jax.Array]:
    """silu(gate) * up of x [T, D] with gate_up [E, 2 F, D].

    Args:
      keep: whether gate and up are wanted too: the backward pass needs them.

    Returns:
      [T, F] of x's dtype in sorted order, zero in the rows of class E; if kept, gate and up
      [T, 2 F] likewise, but float32: rounded to bfloat16, gradients would err by a third more.
    """
    name = KEEPING_HIDDEN if keep else HIDDEN
    (tokens, depth), columns = x.shape, gate_up.shape[1] // 2
    tile = row_tile(tokens, len(gate_up))
    blocks = blocks_for(name, (tile, depth, columns), x.dtype, default_blocks(tile, 64))
    rows, width, step = fitting(blocks, (tokens, columns, depth), x, gate_up)
    operands = x, gate_up, *dispatch
    shapes = [jax.ShapeDtypeStruct((tokens, columns), x.dtype)]
    if keep:
        shapes.append(jax.ShapeDtypeStruct((tokens, 2 * columns), jnp.float32))
    return launch(
        partial(_hidden, rows=rows, width=width, step=step),
        shapes,
        name=name,
        grid=(pl.cdiv(columns, width), tiles(tokens, len(gate_up), rows)),
        in_specs=[whole(a.shape) for a in operands],
        out_specs=[whole(s.shape) for s in shapes],
        warps=blocks.warps,
        stages=blocks.stages,
    )(*operands)


def _hidden(x_ref, gate_up_ref, order_ref, starts_ref, hidden_ref, *kept_ref, rows, width, step):
    experts, depth, size = gate_up_ref.shape[0], x_ref.shape[1], hidden_ref.shape[1]
    tile = Tile.load(pl.program_id(1), rows, order_ref, starts_ref, experts)
    columns, _ = indices(pl.program_id(0) * width, width, size)

    def add(number, sums):
        at, real = indices(number * step, step, depth)
        x = zero_beyond(x_ref[tile.tokens[:, None], at[None, :]], real, 1)
        gate, up = (
            gate_up_ref[tile.expert, (first + columns)[:, None], at[None, :]] for first in (0, size)
        )
        return sums[0] + dot(x, gate, (1, 1)), sums[1] + dot(x, up, (1, 1))

    zeros = (jnp.zeros((rows, width), jnp.float32),) * 2
    gate, up = jax.lax.fori_loop(0, tile.steps(depth, step), add, zeros)
    store(hidden_ref, tile.rows, columns, jax.nn.silu(gate) * up, tile.real)
    for ref in kept_ref:
        store(ref, tile.rows, columns, gate, tile.real)
        store(ref, tile.rows, size + columns, up, tile.real)


def output(hidden: jax.Array, down: jax.Array, weight: jax.Array, dispatch: Dispatch) -> jax.Array:
    """weight * down(hidden): float32 [T, D] in the tokens' order, zero without an expert."""
    shape = jax.ShapeDtypeStruct((len(hidden), down.shape[1]), jnp.float32)
    return _scattered(OUTPUT, hidden, down, 2, dispatch, shape, weight)


def input_gradient(
    of_gate_up: jax.Array, gate_up: jax.Array, dispatch: Dispatch, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Of gradients of gate and up [T, 2 F] in sorted order: [T, D] in the tokens' order."""
    shape = jax.ShapeDtypeStruct((len(of_gate_up), gate_up.shape[2]), dtype)
    return _scattered(INPUT_GRADIENT, of_gate_up, gate_up, 1, dispatch, shape)


def _scattered(
    name: str,
    left: jax.Array,
    right: jax.Array,
    contracted: int,
    dispatch: Dispatch,
    shape: jax.ShapeDtypeStruct,
    *weight: jax.Array,
) -> jax.Array:
    """Rows of `left` in sorted order times their expert's part of `right`, whose axis `contracted`
    is summed over; each row of the result goes to its token."""
    depth, (tokens, columns) = left.shape[1], shape.shape
    tile = row_tile(tokens, len(right))
    blocks = blocks_for(name, (tile, depth, columns), right.dtype, default_blocks(tile, 128))
    rows, width, step = fitting(blocks, (tokens, columns, depth), left, right)
    operands = left, right, *dispatch, *weight
    return launch(
        partial(_product, contracted=contracted, rows=rows, width=width, step=step),
        shape,
        name=name,
        grid=(pl.cdiv(columns, width), tiles(tokens, len(right), rows)),
        in_specs=[whole(a.shape) for a in operands],
        out_specs=whole((tokens, columns)),
        warps=blocks.warps,
        stages=blocks.stages,
    )(*operands)


def _product(left_ref, right_ref, order_ref, starts_ref, *refs, contracted, rows, width, step):
    *weight_ref, out_ref = refs
    experts, depth = right_ref.shape[0], left_ref.shape[1]
    tile = Tile.load(pl.program_id(1), rows, order_ref, starts_ref, experts)
    columns, _ = indices(pl.program_id(0) * width, width, out_ref.shape[1])

    def add(number, total):
        at, real = indices(number * step, step, depth)
        left = zero_beyond(left_ref[tile.rows[:, None], at[None, :]], real, 1)
        if contracted == 2:
            right = right_ref[tile.expert, columns[:, None], at[None, :]]
        else:
            right = right_ref[tile.expert, at[:, None], columns[None, :]]
        return total + dot(left, right, (1, contracted - 1))

    zeros = jnp.zeros((rows, width), jnp.float32)
    total = jax.lax.fori_loop(0, tile.steps(depth, step), add, zeros)
    for ref in weight_ref:
        # A token without an expert may have any weight, NaN too.
        total = total * jnp.where(tile.has_expert == 1, ref[tile.tokens], 0.0)[:, None]
    store(out_ref, tile.tokens, columns, total, tile.real)
