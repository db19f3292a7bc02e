"""Top-1 mixture of experts without dropped tokens, in XLA.

Tokens are sorted by expert and go through the experts in rounds of some tokens an expert: one
batched product per round, as many rounds as the busiest expert needs. Balanced routing takes one
round; routing everything to one expert is as exact and takes more. (`jax.lax.ragged_dot` multiplies
every token with every expert on CPU.)

Shapes: T tokens of D channels, E experts of F hidden channels.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.moe.rounds import in_rounds, sort
from pallas_kernels.precision import exact
from pallas_kernels.product import SWAPPED_ROWS, Weight, product, swapped

MAX_CAPACITY = 512
SINGLE = 8  # so few tokens go through split experts one by one
TILES = 1.0, 1.25, 1.5, 1.75  # of more, so many times the mean of an expert together,
GRAIN = 8  # rounded up to a multiple of this

ROUNDS = 1.25, 1.75, 2.5  # times the mean, of experts in one array
# One array for all experts, or one for each ("split").
Experts = jax.Array | tuple[Weight, ...]


def moe(
    x: jax.Array,
    expert: jax.Array,
    weight: jax.Array,
    gate_up: Experts,
    down: Experts,
    expected: int | None = None,
) -> jax.Array:
    """Sends each token through its expert, weight * down(silu(gate) * up).

    Args:
      x: [T, D].
      expert: int32 [T]; a number outside 0 .. E - 1 (skip class, padding) takes the token through
        none.
      weight: float32 [T].
      gate_up: [E, 2 F, D], the gate's rows first, or E arrays [2 F, D].
      down: [E, D, F], or E arrays [D, F].
      expected: about how many tokens have an expert, by default all: of no effect on the result,
        but the work is that of so many, if they are no more.

    Returns:
      float32 [T, D]; zero for tokens without an expert.
    """
    tokens, experts = x.shape[0], len(gate_up)
    real = (expert >= 0) & (expert < experts)
    if isinstance(gate_up, tuple) or isinstance(down, tuple):
        expert = jnp.where(real, expert, experts)
        out = _split_experts(x, expert, tuple(gate_up), tuple(down))
        return jnp.where(real, weight, 0.0)[:, None] * jnp.where(real[:, None], out, 0.0)
    if 2 * tokens <= experts:
        picked = jnp.where(real, expert, 0)
        out = _expert_mlp(x[:, None], gate_up[picked], down[picked])[:, 0]
        return jnp.where(real, weight, 0.0)[:, None] * jnp.where(real[:, None], out, 0.0)

    expert = jnp.where(real, expert, experts)
    mean = (tokens if expected is None else expected) / experts
    out = in_rounds(x, gate_up, down, sort(expert, experts), _sizes(ROUNDS, mean, tokens))
    return jnp.where(real, weight, 0.0)[:, None] * out


def _split_experts(
    x: jax.Array, expert: jax.Array, gate_up: tuple[Weight, ...], down: tuple[Weight, ...]
) -> jax.Array:
    """One expert after the other, each for the tiles of tokens that chose it: the weights of the
    others are not read, and those of one are read in place.

    float32 [T, D], undefined for tokens whose expert is E.
    """
    tokens = x.shape[0]
    experts = list(zip(gate_up, down, strict=True))
    if tokens == 1:
        each = [partial(_mlp, gate_up=g, down=d) for g, d in experts]
        return jax.lax.switch(expert[0], [*each, lambda x: jnp.zeros(x.shape)], x)
    tiles = _tile_sizes(tokens, gate_up)
    order = jnp.argsort(expert, stable=True)
    counts = jnp.bincount(expert, length=len(experts) + 1)
    starts = jnp.cumsum(counts) - counts
    rows = jnp.pad(x[order], ((0, tiles[-1]), (0, 0)))
    out = jnp.zeros(rows.shape, jnp.float32)
    for number, weights in enumerate(experts):

        def one_tile(i, out, start=starts[number], count=counts[number], weights=weights):
            # The barrier keeps XLA from converting the weights ahead of the loop, chosen or not.
            weights, place = jax.lax.optimization_barrier((weights, start + i * tiles[-1]))
            tile = jax.lax.dynamic_slice_in_dim(rows, place, tiles[-1])

            def first(tile, size):
                y = _mlp(tile[:size], *weights)
                return jnp.pad(y, ((0, tiles[-1] - size), (0, 0)))

            enough = jnp.sum(count - i * tiles[-1] > jnp.array(tiles[:-1], jnp.int32))
            y = jax.lax.switch(enough, [partial(first, size=size) for size in tiles], tile)
            # What a tile writes beyond its expert's tokens, the experts after it write over.
            return jax.lax.dynamic_update_slice_in_dim(out, y, place, 0)

        out = jax.lax.fori_loop(0, -(-counts[number] // tiles[-1]), one_tile, out)
    return jnp.zeros((tokens, x.shape[1])).at[order].set(out[:tokens])


def _tile_sizes(tokens: int, gate_up: tuple[Weight, ...]) -> list[int]:
    """How many tokens an expert may take at once, in ascending order: the fewest that are enough
    for those that chose it cost least."""
    if tokens <= SINGLE:
        return [1]
    if swapped(gate_up[0]):
        return [GRAIN, SWAPPED_ROWS.start]
    return list(_sizes(TILES, tokens / len(gate_up), MAX_CAPACITY))


def _sizes(parts: tuple[float, ...], mean: float, most: int) -> tuple[int, ...]:
    """So many times the mean, rounded up to `GRAIN` and at most `most`, in ascending order."""
    sizes = {max(-(-int(part * mean) // GRAIN), 1) * GRAIN for part in parts}
    return tuple(sorted({min(size, most, MAX_CAPACITY) for size in sizes}))


def _mlp(x: jax.Array, gate_up: Weight, down: Weight) -> jax.Array:
    """One gated MLP: [T, D] -> float32 [T, D]."""
    gate, up = jnp.split(product(x, gate_up), 2, axis=-1)
    return product((jax.nn.silu(gate) * up).astype(x.dtype), down)


def _expert_mlp(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
    """One gated MLP per expert: [E, C, D] -> float32 [E, C, D]."""
    hidden = jnp.einsum(
        "ecd,efd->ecf", x, gate_up, precision=exact(x.dtype), preferred_element_type=jnp.float32
    )
    gate, up = jnp.split(hidden, 2, axis=-1)
    hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
    return jnp.einsum(
        "ecf,edf->ecd", hidden, down, precision=exact(x.dtype), preferred_element_type=jnp.float32
    )


@jax.custom_vjp
def permute(
    x: jax.Array, index: jax.Array, valid: jax.Array, inverse: jax.Array, inverse_valid: jax.Array
) -> jax.Array:
    """Rows of x by `index`, zero where not `valid`; its gradient is the gather by `inverse`, never
    a scatter."""
    return jnp.where(valid[:, None], x[index], 0)


def _permute_forward(x, index, valid, inverse, inverse_valid):
    return permute(x, index, valid, inverse, inverse_valid), (inverse, inverse_valid)


def _permute_backward(residual, cotangent):
    inverse, inverse_valid = residual
    gradient = jnp.where(inverse_valid[:, None], cotangent[inverse], 0)
    return gradient, None, None, None, None


permute.defvjp(_permute_forward, _permute_backward)
