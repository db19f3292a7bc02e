"""Newton-Schulz iterations in Pallas: half of the products with symmetric results are left out.

Shapes: E matrices X [rows, columns]; N is the smaller of the two, M the larger. An iteration takes
three kernels: the Gram matrix A [N, N], the polynomial B = b A + c A A, and a X + B X, or a X + X B
where there are more rows than columns, so that nothing is transposed in memory. Before the first
iteration X is divided by its norm; that scale goes into the results of the kernels.

The matrices are the first axis of the grids, the one that runs fastest. The MI300X deals programs
to its eight dies in turn; so each die has matrices of its own in its cache, if their number is a
multiple of eight.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.blocks import Blocks, blocks_for
from pallas_kernels.launch import launch, power_of_two
from pallas_kernels.newton_schulz.reference import (
    COEFFICIENTS,
    EPS,
    STEPS,
    compute_dtype,
    frobenius_scale,
)
from pallas_kernels.precision import exact

GRAM, POLYNOMIAL, UPDATE = "newton_schulz_gram", "newton_schulz_polynomial", "newton_schulz_update"
SYMMETRIC = Blocks((128, 64), 4, 2)  # side of a tile of the result, terms of the sums at once
RECTANGULAR = Blocks((128, 128, 64), 4, 2)  # rows and columns of a tile, terms of the sums
SMALLEST = 16  # side of a matrix product


def newton_schulz(
    x: jax.Array,
    steps: int = STEPS,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = EPS,
) -> jax.Array:
    """As `reference.newton_schulz`."""
    if x.size == 0:
        return x
    a, b, c = coefficients
    rows, columns = x.shape[-2:]
    tall = rows > columns
    matrices = x.astype(compute_dtype(x.dtype)).reshape(-1, rows, columns)
    scale = frobenius_scale(x, eps).reshape(-1)
    for _ in range(steps):
        gram = _symmetric(GRAM, matrices, scale * scale, over=0 if tall else 1)
        polynomial = _symmetric(POLYNOMIAL, gram, jnp.full_like(scale, c), over=1, addend=b)
        matrices = _update(matrices, polynomial, scale, a, tall)
        scale = jnp.ones_like(scale)
    return matrices.reshape(x.shape).astype(x.dtype)


def _symmetric(
    name: str, x: jax.Array, scale: jax.Array, over: int, addend: float = 0.0
) -> jax.Array:
    """The products of X [E, N, M] with its transposed over axis `over` of X, times a scale [E];
    where X is symmetric itself, plus so many times X.

    Products are computed for tiles on and below the diagonal, and written above it too.
    """
    size, terms = x.shape[2 - over], x.shape[1 + over]
    (side, step), warps, stages = blocks_for(name, x.shape, x.dtype, SYMMETRIC)
    side, step = _fit(side, size), _fit(step, terms)
    tiles = pl.cdiv(size, side)
    result = jax.ShapeDtypeStruct((len(x), size, size), x.dtype)
    return launch(
        partial(_symmetric_tile, over=over, side=side, step=step, addend=addend),
        result,
        name=name,
        grid=(len(x), tiles * (tiles + 1) // 2),
        in_specs=[_whole(x), _ONE],
        out_specs=_whole(result),
        warps=warps,
        stages=stages,
    )(x, scale)


def _update(
    x: jax.Array, polynomial: jax.Array, scale: jax.Array, a: float, tall: bool
) -> jax.Array:
    """(a X + B X) times a scale [E], or (a X + X B) if X [E, rows, columns] is tall."""
    matrices, rows, columns = x.shape
    (height, width, step), warps, stages = blocks_for(UPDATE, x.shape, x.dtype, RECTANGULAR)
    height, width = _fit(height, rows), _fit(width, columns)
    step = _fit(step, min(rows, columns))
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return launch(
        partial(_update_tile, height=height, width=width, step=step, a=a, tall=tall),
        result,
        name=UPDATE,
        grid=(matrices, pl.cdiv(rows, height) * pl.cdiv(columns, width)),
        in_specs=[_whole(x), _whole(polynomial), _ONE],
        out_specs=_whole(result),
        warps=warps,
        stages=stages,
    )(x, polynomial, scale)


_ONE = pl.BlockSpec((1,), lambda e, n: (e,))


def _whole(array: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda e, n: (0, 0, 0))


def _fit(block: int, size: int) -> int:
    return max(SMALLEST, power_of_two(size, block))


def triangle(number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Row and column of the tile of that number, on or below the diagonal, counted row by row."""
    row = ((jnp.sqrt(8.0 * number.astype(jnp.float32) + 1.0) - 1.0) * 0.5).astype(jnp.int32)
    # The root is not exact.
    row -= (row * (row + 1) // 2 > number).astype(jnp.int32)
    row += ((row + 1) * (row + 2) // 2 <= number).astype(jnp.int32)
    return row, number - row * (row + 1) // 2


def _symmetric_tile(x_ref, scale_ref, out_ref, *, over, side, step, addend):
    matrix = pl.program_id(0)
    i, j = (place * side + jnp.arange(side) for place in triangle(pl.program_id(1)))

    def add(number, total):
        k = number * step + jnp.arange(step)
        left, right = (
            _load(x_ref, matrix, *((k, place) if over == 0 else (place, k))) for place in (i, j)
        )
        return total + _product(left, right, over, over)

    total = jnp.zeros((side, side), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(x_ref.shape[1 + over], step), add, total)
    total *= scale_ref[0]
    if addend:
        total += addend * _load(x_ref, matrix, i, j).astype(jnp.float32)
    total = total.astype(out_ref.dtype)
    mirrored = total.T
    # On the diagonal, what is above it is taken from below, whatever the order of the sums.
    _store(out_ref, matrix, i, j, jnp.where(i[:, None] >= j[None], total, mirrored))
    _store(out_ref, matrix, j, i, jnp.where(i[None] >= j[:, None], mirrored, total))


def _update_tile(x_ref, polynomial_ref, scale_ref, out_ref, *, height, width, step, a, tall):
    matrix, number = pl.program_id(0), pl.program_id(1)
    across = pl.cdiv(x_ref.shape[2], width)
    i = number // across * height + jnp.arange(height)
    j = number % across * width + jnp.arange(width)
    left_ref, right_ref = (x_ref, polynomial_ref) if tall else (polynomial_ref, x_ref)

    def add(number, total):
        k = number * step + jnp.arange(step)
        return total + _product(_load(left_ref, matrix, i, k), _load(right_ref, matrix, k, j), 1, 0)

    total = jnp.zeros((height, width), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(polynomial_ref.shape[1], step), add, total)
    total += a * _load(x_ref, matrix, i, j).astype(jnp.float32)
    total = (total * scale_ref[0]).astype(out_ref.dtype)
    _store(out_ref, matrix, i, j, total)


def _product(x, y, over_x, over_y):
    dimensions = (((over_x,), (over_y,)), ((), ()))
    return jax.lax.dot_general(
        x, y, dimensions, precision=exact(x.dtype), preferred_element_type=jnp.float32
    )


def _load(ref, matrix, i, j):
    """Rows i and columns j of a matrix, zero where there are none."""
    return triton.load(ref.at[matrix, i[:, None], j[None]], mask=_real(ref, i, j), other=0.0)


def _store(ref, matrix, i, j, value):
    triton.store(ref.at[matrix, i[:, None], j[None]], value, mask=_real(ref, i, j))


def _real(ref, i, j):
    return (i < ref.shape[1])[:, None] & (j < ref.shape[2])[None]
