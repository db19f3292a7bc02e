"""The mixture of experts in Pallas: tokens are sorted by expert, and each tile of them is
multiplied with its expert's weights; no row of x and no weight is copied.

Shapes: T tokens of D channels, E experts of F hidden channels.
"""

import jax

from pallas_kernels.moe import backward, forward, reference
from pallas_kernels.moe.dispatch import Dispatch, sort_by_expert
from pallas_kernels.moe.reference import Experts


def moe(
    x: jax.Array, expert: jax.Array, weight: jax.Array, gate_up: Experts, down: Experts
) -> jax.Array:
    """As `reference.moe`, which also computes experts in separate arrays, a form for CPUs, and no
    tokens at all."""
    if isinstance(gate_up, tuple) or isinstance(down, tuple) or not len(x):
        return reference.moe(x, expert, weight, gate_up, down)
    return _moe(x, weight, gate_up, down, sort_by_expert(expert, gate_up.shape[0]))


@jax.custom_vjp
def _moe(
    x: jax.Array, weight: jax.Array, gate_up: jax.Array, down: jax.Array, dispatch: Dispatch
) -> jax.Array:
    (hidden,) = forward.hidden(x, gate_up, dispatch, keep=False)
    return forward.output(hidden, down, weight, dispatch)


def _moe_forward(x, weight, gate_up, down, dispatch):
    hidden, factors = forward.hidden(x, gate_up, dispatch, keep=True)
    out = forward.output(hidden, down, weight, dispatch)
    return out, (x, weight, gate_up, down, dispatch, hidden, factors)


def _moe_backward(saved, of_output):
    x, weight, gate_up, down, dispatch, hidden, factors = saved
    of_gate_up, of_weight = backward.hidden_gradient(
        of_output, weight, factors, down, dispatch, x.dtype
    )
    return (
        forward.input_gradient(of_gate_up, gate_up, dispatch, x.dtype),
        of_weight.astype(weight.dtype),
        backward.gate_up_gradient(of_gate_up, x, gate_up, dispatch),
        backward.down_gradient(of_output, weight, hidden, down, dispatch),
        None,
    )


_moe.defvjp(_moe_forward, _moe_backward)
