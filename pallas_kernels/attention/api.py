"""The attention op, by whichever implementation is selected; arguments as in
`reference.attention`."""

import jax

from pallas_kernels.attention import kernel, reference
from pallas_kernels.selection import select


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offsets: jax.Array,
    segment_ids: jax.Array | None = None,
    window: int | jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    available = {"xla": reference.attention, "pallas": kernel.attention}
    return select("attention", implementation, available)(q, k, v, offsets, segment_ids, window)
