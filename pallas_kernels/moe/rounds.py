"""Tokens through one batched product of all experts, as many rounds of it as the busiest needs."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.precision import exact
from pallas_kernels.product import transposed_product


class Routing(NamedTuple):
    """T tokens, sorted by expert."""

    expert: jax.Array  # int32 [T], E for none
    order: jax.Array  # int32 [T], the tokens of expert 0, then those of 1, ...
    rank: jax.Array  # int32 [T], of each token among those of its expert
    starts: jax.Array  # int32 [E], of each expert in `order`
    counts: jax.Array  # int32 [E]


def sort(expert: jax.Array, experts: int) -> Routing:
    """Of int32 [T], where `experts` stands for none."""
    order = jnp.argsort(expert, stable=True)
    counts = jnp.bincount(expert, length=experts + 1)
    starts = jnp.cumsum(counts) - counts
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(len(order))) - starts[expert]
    return Routing(expert, order, rank, starts[:experts], counts[:experts])


class _Places(NamedTuple):
    """Of one round: which token is where among the experts' rows [E C], and back."""

    token: jax.Array  # int32 [E C]
    filled: jax.Array  # bool [E C], whether there is one
    slot: jax.Array  # int32 [T]
    served: jax.Array  # bool [T], whether the token is in this round


def _places(number: jax.Array | int, routing: Routing, capacity: int) -> _Places:
    tokens, experts = len(routing.order), len(routing.counts)
    place = number * capacity + jnp.arange(capacity)
    filled = place < routing.counts[:, None]
    token = routing.order[jnp.minimum(routing.starts[:, None] + place, tokens - 1)]
    served = (routing.expert < experts) & (routing.rank // capacity == number)
    slot = jnp.where(served, routing.expert * capacity + routing.rank % capacity, 0)
    return _Places(token.reshape(-1), filled.reshape(-1), slot, served)


def _choose(routing: Routing, sizes: Sequence[int]) -> jax.Array:
    """Which of the sizes, in ascending order, is enough for the busiest expert, or the last one."""
    return jnp.sum(jnp.max(routing.counts) > jnp.array(sizes[:-1], jnp.int32))


def _rounds(routing: Routing, sizes: Sequence[int]) -> jax.Array:
    """How many there are, if one of the last size is not enough."""
    return -(-jnp.max(routing.counts) // sizes[-1])


def _pick(x: jax.Array, index: jax.Array, valid: jax.Array) -> jax.Array:
    """Rows of x by `index`, zero where not `valid`."""
    return jnp.where(valid[:, None], x[index], 0)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def in_rounds(
    x: jax.Array, gate_up: jax.Array, down: jax.Array, routing: Routing, sizes: tuple[int, ...]
) -> jax.Array:
    """Each token's expert's output, without its weight: [T, D] -> float32 [T, D], zero where there
    is no expert.

    A round takes as many tokens of each expert: one of `sizes`, in ascending order, that is enough
    for the busiest one; if none is, there are several rounds of the last one.

    The gradient has as many rounds, too: differentiated by JAX, those that might be needed would
    each add zeros to the gradients of all experts. It keeps the first round's hidden channels, and
    computes those of others again, which run rarely and would fill memory.
    """
    return _forward(x, gate_up, down, routing, sizes)[0]


def _forward(x, gate_up, down, routing, sizes):
    def one_round(number: jax.Array | int, size: int) -> tuple[jax.Array, jax.Array]:
        places = _places(number, routing, size)
        hidden = _hidden(x, gate_up, places)
        active = _gated(hidden).astype(x.dtype)
        out = _product("ecf,edf->ecd", active, down).reshape(-1, down.shape[1])
        kept = jnp.pad(hidden.astype(x.dtype), ((0, 0), (0, sizes[-1] - size), (0, 0)))
        return _pick(out, places.slot, places.served), kept

    def more(number: jax.Array, total: jax.Array) -> jax.Array:
        return total + one_round(number, sizes[-1])[0]

    out, hidden = _first(one_round, routing, sizes)
    out = jax.lax.fori_loop(1, _rounds(routing, sizes), more, out)
    return out, (x, gate_up, down, routing, hidden)


def _backward(sizes, saved, of_out):
    x, gate_up, down, routing, kept = saved
    of_out = of_out.astype(x.dtype)

    def one_round(number: jax.Array | int, size: int, hidden: jax.Array | None = None) -> Any:
        """Gradients of x, gate_up and down."""
        places = _places(number, routing, size)
        hidden = _hidden(x, gate_up, places) if hidden is None else hidden[:, :size]
        of_y = _pick(of_out, places.token, places.filled).reshape(len(down), size, -1)
        active, gradient = jax.vjp(_gated, hidden.astype(jnp.float32))
        (of_hidden,) = gradient(_product("ecd,edf->ecf", of_y, down))
        of_hidden = of_hidden.astype(x.dtype)
        of_rows = _product("ecf,efd->ecd", of_hidden, gate_up).astype(x.dtype)
        of_x = _pick(of_rows.reshape(-1, x.shape[1]), places.slot, places.served)
        rows = _pick(x, places.token, places.filled).reshape(len(down), size, -1)
        of_gate_up = transposed_product(of_hidden, rows)
        return of_x, of_gate_up, transposed_product(of_y, active.astype(x.dtype))

    def more(number: jax.Array, total: Any) -> Any:
        return jax.tree.map(jnp.add, total, one_round(number, sizes[-1]))

    first = _first(partial(one_round, hidden=kept), routing, sizes)
    return (*jax.lax.fori_loop(1, _rounds(routing, sizes), more, first), None)


def _first(one_round: Callable[..., Any], routing: Routing, sizes: Sequence[int]) -> Any:
    """The first round, of the size that is enough."""
    rounds = [partial(one_round, 0, size) for size in sizes]
    return jax.lax.switch(_choose(routing, sizes), rounds)


in_rounds.defvjp(_forward, _backward)


def _hidden(x: jax.Array, gate_up: jax.Array, places: _Places) -> jax.Array:
    """Of the experts' tokens, before the activation: float32 [E, C, 2 F]."""
    rows = _pick(x, places.token, places.filled).reshape(len(gate_up), -1, x.shape[1])
    return _product("ecd,efd->ecf", rows, gate_up)


def _gated(hidden: jax.Array) -> jax.Array:
    gate, up = jnp.split(hidden, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(axes, a, b, precision=exact(b.dtype), preferred_element_type=jnp.float32)
