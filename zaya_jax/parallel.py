"""Every shard_map: what runs on the shards of a mesh, and how they talk to each other."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.moe import api as moe
from pallas_kernels.selection import default_implementation

GATHERED = "gathered parameters"


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

    Inside a `shard_map` over the expert axis, as in training, tokens and experts are those of one
    device, and each token is sent to its expert.
    """
    compute = partial(moe.moe, implementation=implementation)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["expert"] == 1:
        return compute(x, expert, weight, gate_up, down)
    if "expert" in mesh.manual_axes:
        return _all_to_all_moe(x, expert, weight, gate_up, down, implementation)
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


def _all_to_all_moe(
    x: jax.Array,
    expert: jax.Array,
    weight: jax.Array,
    gate_up: moe.Experts,
    down: moe.Experts,
    implementation: str | None,
) -> jax.Array:
    """`moe` of a device's tokens [T, D], by experts of which it holds a part, [E / n, ...], as the
    other n - 1 devices of its expert axis do.

    Each device has room for all tokens of each other one: nothing is dropped, wherever they go.
    What is empty has no expert, and costs no products. Tokens without an expert stay. Outputs are
    rounded to the dtype of x where they are sent back, and so are their gradients.
    """
    devices, tokens, own = jax.lax.axis_size("expert"), len(x), len(gate_up)
    routed = (expert >= 0) & (expert < devices * own)
    target = jnp.where(routed, expert // own, devices)
    order = jnp.argsort(target, stable=True)
    counts = jnp.bincount(target, length=devices + 1)
    starts = jnp.cumsum(counts) - counts
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(tokens)) - starts[target]
    place = jnp.where(routed, target * tokens + rank, 0)  # of each token among all that are sent
    index = jnp.arange(tokens)
    token = order[jnp.minimum(starts[:devices, None] + index, tokens - 1)].reshape(-1)
    filled = (index < counts[:devices, None]).reshape(-1)

    def exchange(rows: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(rows, "expert", split_axis=0, concat_axis=0, tiled=True)

    rows = exchange(moe.permute(x, token, filled, place, routed))
    number = exchange(jnp.where(filled, expert[token] % own, -1))
    ones = jnp.ones(number.shape, jnp.float32)
    out = moe.moe(rows, number, ones, gate_up, down, expected=tokens, implementation=implementation)
    out = moe.permute(exchange(out.astype(x.dtype)), place, routed, token, filled)
    out = out.astype(jnp.float32)
    return jnp.where(routed, weight, 0.0)[:, None] * out


def context_size() -> int:
    """Devices that share each row, inside a `shard_map`: each has a part of the sequence."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape["context"] if "context" in mesh.manual_axes else 1


def gather_sequence(x: jax.Array, axis: int) -> jax.Array:
    """The whole sequence along that axis, of which each device has a part."""
    if context_size() == 1:
        return x
    return jax.lax.all_gather(x, "context", axis=axis, tiled=True)


def own_start(length: int) -> jax.Array | int:
    """Where this device's part of a sequence begins, of `length` tokens."""
    return 0 if context_size() == 1 else jax.lax.axis_index("context") * length


def from_previous(last: jax.Array) -> jax.Array:
    """`last` of the device that has the part of the sequence before this one's; zeros where there
    is none."""
    size = context_size()
    return jax.lax.ppermute(last, "context", [(i, i + 1) for i in range(size - 1)])


def by_matrices(
    op: Callable[[jax.Array], jax.Array], x: jax.Array, mesh: Mesh | None, whole: bool = False
) -> jax.Array:
    """`op(x)` of matrices that are spread over a mesh, each device with its share of whole ones.

    Args:
      op: of a batch of matrices; its result has the same shape. Zeros are among its arguments.
      x: [N, rows, columns], or [N, E, rows, columns] of experts, which stay on the `expert` axis; N
        is spread over the other axes, filled up with zeros where it does not divide. [rows,
        columns] is computed by one device.
      mesh: on which x lies, sharded in any way; None is one device.
      whole: every device gets all results, but for other devices' experts, in the dtype that `op`
        gives them; otherwise XLA spreads them as it likes.
    """
    if mesh is None or mesh.size == 1:
        return op(x)
    if x.ndim == 2:
        return by_matrices(op, x[None], mesh, whole)[0]
    spec = P(("data", "context"), "expert") if x.ndim == 4 else P(mesh.axis_names)
    shards = mesh.size // (mesh.shape["expert"] if x.ndim == 4 else 1)
    filling = ((0, -len(x) % shards), *((0, 0),) * (x.ndim - 1))
    spread = jax.shard_map(op, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    out = spread(jnp.pad(x, filling))[: len(x)]
    if not whole:
        return out
    return jax.lax.with_sharding_constraint(out, NamedSharding(mesh, P(None, *spec[1:])))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sharded:
    """A device's part of a parameter that all of them need whole, for a moment: `gathered` has it.

    Attributes:
      part: float32; may have a leading axis of layers, that a scan takes off.
      dimension: which is divided, without that axis.
      axes: of the mesh, that it is divided over.
      dtype: of the whole.
    """

    part: jax.Array
    dimension: int = dataclasses.field(metadata={"static": True})
    axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})


def gathered(tree: Any) -> Any:
    """A tree with `Sharded` leaves, with whole ones in their place; their gradients leave as parts,
    summed in float32 over all devices."""

    def whole(leaf: Any) -> Any:
        if not _is_sharded(leaf):
            return leaf
        array = _gather(leaf.part, leaf.dimension, leaf.axes, leaf.dtype)
        return checkpoint_name(array, GATHERED)

    return jax.tree.map(whole, tree, is_leaf=_is_sharded)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(part: jax.Array, dimension: int, axes: tuple[str, ...], dtype: Any) -> jax.Array:
    return jax.lax.all_gather(part.astype(dtype), axes, axis=dimension, tiled=True)


def _gather_forward(part, dimension, axes, dtype):
    return _gather(part, dimension, axes, dtype), None


def _gather_backward(dimension, axes, dtype, _, gradient):
    return (reduce_scatter(gradient.astype(jnp.float32), dimension, axes),)


_gather.defvjp(_gather_forward, _gather_backward)


def reduce_scatter(x: jax.Array, dimension: int | None, axes: tuple[str, ...]) -> jax.Array:
    """The sum of all devices' x along some axes of the mesh, of which each gets its part of a
    dimension; all of it where that is None."""
    if dimension is None:
        return jax.lax.psum(x, axes)
    return jax.lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True)


def rematerialized(step: Callable[..., Any], remat: str, layers: Any) -> Callable[..., Any]:
    """The body of a scan over layers whose gradient keeps what `ZayaConfig.remat` says; of `layers`
    that are `Sharded`, parameters are gathered again, whatever it says."""
    policies = jax.checkpoint_policies
    policy = {
        "none": policies.save_anything_except_these_names(GATHERED),
        "dots": policies.dots_with_no_batch_dims_saveable,
        "full": policies.nothing_saveable,
    }[remat]
    if remat == "none" and not any(map(_is_sharded, jax.tree.leaves(layers, is_leaf=_is_sharded))):
        return step
    return jax.checkpoint(step, policy=policy, prevent_cse=False)


def _is_sharded(leaf: Any) -> bool:
    return isinstance(leaf, Sharded)
