"""Every shard_map: what runs on the shards of a mesh, and how they talk to each other."""

import jax
from jax.sharding import PartitionSpec as P

from pallas_kernels.moe import api as moe


def expert_parallel_moe(
    x: jax.Array,
    expert: jax.Array,
    weight: jax.Array,
    gate_up: moe.Experts,
    down: moe.Experts,
) -> jax.Array:
    """`moe` on the mesh in context, if that spreads the experts: each shard sends all tokens of its
    data shard through its own experts, and the outputs are summed.

    For inference, where batches are small: replicating them costs less than sending each token to
    its expert. Arguments as in `pallas_kernels.moe`; the tokens [T, D] need not divide by the data
    axis (then they are not spread).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["expert"] == 1:
        return moe.moe(x, expert, weight, gate_up, down)
    rows = P("data" if x.shape[0] % mesh.shape["data"] == 0 else None)

    def on_shard(x, expert, weight, gate_up, down):
        own = expert - jax.lax.axis_index("expert") * len(gate_up)
        return jax.lax.psum(moe.moe(x, own, weight, gate_up, down), "expert")

    experts = P("expert")
    spread = jax.shard_map(
        on_shard, mesh=mesh, in_specs=(rows, rows, rows, experts, experts), out_specs=rows
    )
    return spread(x, expert, weight, gate_up, down)
