"""Every shard_map: what runs on the shards of a mesh, and how they talk to each other."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from pallas_kernels.moe import api as moe
from pallas_kernels.selection import default_implementation


def by_rows(
    op: Callable[[Any, Any], Any], rows: Any, shared: Any, implementation: str | None
) -> Any:
    """`op(rows, shared)` on the mesh in context, each shard of its data axis with its own rows.

    XLA spreads its own operations by itself, but cannot divide our kernels.

    Args:
      op: of two trees of arrays; its results have the batch as first axis, like `rows`.
      rows: arrays whose first axis is the batch; spread, if that divides by the data axis.
      shared: arrays that every shard has whole.
      implementation: of the op; None is the default.
    """
    mesh = jax.sharding.get_abstract_mesh()
    chosen = implementation or default_implementation()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes or chosen == "xla":
        return op(rows, shared)
    batch = jax.tree.leaves(rows)[0].shape[0]
    spread = P("data" if batch % mesh.shape["data"] == 0 else None)
    return jax.shard_map(op, mesh=mesh, in_specs=(spread, P()), out_specs=spread, check_vma=False)(
        rows, shared
    )


def expert_parallel_moe(
    x: jax.Array,
    expert: jax.Array,
    weight: jax.Array,
    gate_up: moe.Experts,
    down: moe.Experts,
    implementation: str | None = None,
) -> jax.Array:
    """`moe` on the mesh in context, if that spreads the experts: each shard sends all tokens of its
    data shard through its own experts, and the outputs are summed.

    For inference, where batches are small: replicating them costs less than sending each token to
    its expert. Arguments as in `pallas_kernels.moe`; the tokens [T, D] need not divide by the data
    axis (then they are not spread).
    """
    compute = partial(moe.moe, implementation=implementation)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["expert"] == 1:
        return compute(x, expert, weight, gate_up, down)
    rows = P("data" if x.shape[0] % mesh.shape["data"] == 0 else None)

    def on_shard(x, expert, weight, gate_up, down):
        own = expert - jax.lax.axis_index("expert") * len(gate_up)
        return jax.lax.psum(compute(x, own, weight, gate_up, down), "expert")

    experts = P("expert")
    spread = jax.shard_map(
        on_shard,
        mesh=mesh,
        in_specs=(rows, rows, rows, experts, experts),
        out_specs=rows,
        check_vma=False,  # which kernels know nothing of
    )
    return spread(x, expert, weight, gate_up, down)
