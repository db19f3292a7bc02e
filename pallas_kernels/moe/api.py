"""The mixture-of-experts op, by whichever implementation is selected; arguments as in
`reference.moe`."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.launch import architecture
from pallas_kernels.moe import kernel, ragged, reference
from pallas_kernels.moe.reference import Experts, permute
from pallas_kernels.selection import select

__all__ = ["LIBRARY", "Experts", "moe", "permute"]

# Tokens an expert from which AMD's grouped product is chosen by default: on paper, multiplying then
# takes ten times as long as reading the weights, so fusing saves nothing, and a library's tuned
# tiles are the better bet. Not measured: the kit of docs/amd.md times both.
LIBRARY = 4096


def moe(
    x: jax.Array,
    expert: jax.Array,
    weight: jax.Array,
    gate_up: Experts,
    down: Experts,
    expected: int | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    # XLA's best is a loop over experts on CPUs; on GPUs a grouped product, which needs bfloat16.
    grouped = architecture() is not None and x.dtype != jnp.float32
    # Only the reference's work depends on how many tokens it is given, those without expert too.
    xla = ragged.moe if grouped else partial(reference.moe, expected=expected)
    available = {"xla": xla, "pallas": kernel.moe, "ragged": ragged.moe}
    tokens = x.shape[0] if expected is None else expected
    instead = "ragged" if tokens >= LIBRARY * len(down) else "pallas"
    return select("moe", implementation, available, instead)(x, expert, weight, gate_up, down)
