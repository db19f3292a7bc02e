"""The mesh, and where each array lies on it: one table from leaf names to logical axes, one from
those to mesh axes.

In training, parameters are stacked (`layouts.stack`), and what the optimizer keeps of each of them
is divided once more, over all axes of the mesh on which the parameter is replicated (ZeRO).
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from zaya_jax.config import ZayaConfig
from zaya_jax.errors import ConfigError

AXES = ("data", "expert", "context")

# Logical axes of the leaves that are not replicated, by the end of their path.
LOGICAL_AXES = {
    "experts/gate_up_proj": ("expert", None, None),
    "experts/down_proj": ("expert", None, None),
}
MESH_AXES: dict[str, str | tuple[str, ...]] = {
    "expert": "expert",
    "rows": ("data", "expert"),
    "sequence": "context",
}
# Of training batches [B, S].
BATCH = PartitionSpec(MESH_AXES["rows"], MESH_AXES["sequence"])
MOST_SIMULATED = 1024


def make_mesh(
    data: int = 1, expert: int = 1, context: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of the given sizes over the first devices. Raises ConfigError where there are too
    few."""
    sizes = (data, expert, context)
    devices = jax.devices() if devices is None else devices
    count = int(np.prod(sizes))
    if min(sizes) < 1 or count > len(devices):
        raise ConfigError(
            f"a mesh of {'x'.join(map(str, sizes))} needs {count} devices of {len(devices)}"
        )
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    return Mesh(np.array(devices[:count]).reshape(sizes), AXES, axis_types=auto)


def parse_mesh(text: str) -> dict[str, int]:
    """Axis sizes of a mesh as one writes it: "data=2,expert=4". Raises ConfigError on anything
    else."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes or not size.isdecimal() or size == "0":
            raise ConfigError(f"mesh {text!r}: write it like data=2,expert=4,context=1")
        sizes[name] = int(size)
    return sizes


def simulate_devices(count: int) -> None:
    """Lets one processor stand for that many devices, where JAX has not started yet and finds no
    accelerator."""
    if max(jax.config.jax_num_cpu_devices, 0) < count <= MOST_SIMULATED:
        with contextlib.suppress(RuntimeError):  # JAX has started
            jax.config.update("jax_num_cpu_devices", count)


def check_mesh(config: ZayaConfig, mesh: Mesh) -> None:
    """Raises ConfigError where the experts cannot be split evenly over the mesh."""
    if config.num_experts % (size := mesh.shape.get("expert", 1)):
        raise ConfigError(
            f"num_experts {config.num_experts} is not divisible by the expert axis of {size}"
        )


def check_batch(shape: tuple[int, ...], accumulate: int, config: ZayaConfig, mesh: Mesh) -> None:
    """Raises ConfigError where a training batch [B, S] cannot be split evenly over the mesh."""
    rows, length = shape
    data, expert, context = (mesh.shape[axis] for axis in AXES)
    if accumulate < 1 or rows % (data * expert * accumulate):
        raise ConfigError(
            f"a batch of {rows} rows is not divisible by data {data} x expert {expert} x "
            f"{accumulate} micro-batches"
        )
    if length % context:
        raise ConfigError(
            f"rows of {length} tokens are not divisible by the context axis of {context}"
        )
    halo = max(config.conv_tail, 1)
    if context > 1 and length // context < halo:
        raise ConfigError(
            f"shards of {length // context} tokens are shorter than the {halo} before them that "
            f"they need: rows of {length} tokens on a context axis of {context}"
        )


def parameter_sharding(path: str, mesh: Mesh) -> NamedSharding:
    """Where the leaf of that path ("params/layers/0/mlp/experts/down_proj") lies on the mesh."""
    return NamedSharding(mesh, parameter_spec(path))


def parameter_spec(path: str) -> PartitionSpec:
    """Of the leaf of that path, in canonical or stacked form ("params/layers/mlp/...")."""
    axes: tuple[Any, ...] = ()
    for end, logical in LOGICAL_AXES.items():
        if path.endswith(end):
            axes = tuple(None if axis is None else MESH_AXES[axis] for axis in logical)
            if is_stacked(path):
                axes = (None, *axes)
    return PartitionSpec(*axes)


@dataclasses.dataclass(frozen=True)
class Division:
    """How gradients of a stacked parameter are divided, and what the optimizer keeps of it (ZeRO).

    Attributes:
      axes: of the mesh, on which the parameter is replicated.
      dimension: that is divided over all of these: the first one that their product divides, but
        for that of layers (which a scan takes apart) and one that is sharded already. None where
        there is no such dimension: then every device has all of it. That happens to small vectors,
        as the temperatures; the balancing biases are never divided.
      stacked: whether dimension 0 is that of layers.
    """

    axes: tuple[str, ...]
    dimension: int | None
    stacked: bool


def division(path: str, shape: tuple[int, ...], mesh: Mesh) -> Division:
    """Of the stacked parameter of that path, of global shape."""
    spec, stacked = parameter_spec(path), is_stacked(path)
    axes = tuple(axis for axis in AXES if axis not in spec)
    parts = int(np.prod([mesh.shape[axis] for axis in axes]))
    free = [
        dimension
        for dimension in range(stacked, len(shape))
        if shape[dimension] % parts == 0 and spec[dimension : dimension + 1] in ((), (None,))
    ]
    divisible = free and not path.endswith("balancing_biases")
    return Division(axes, free[0] if divisible else None, stacked)


def divisions(params: Any, mesh: Mesh) -> Any:
    """A tree of `Division`, of stacked parameters."""
    return map_with_paths(lambda path, leaf: division(path, leaf.shape, mesh), params)


def state_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Where gradients of a stacked parameter lie, and what the optimizer keeps of it; with full
    sharding, also the parameter itself."""
    how, spec = division(path, shape, mesh), parameter_spec(path)
    if how.dimension is None:
        return spec
    entries: list[Any] = [*spec, *[None] * (how.dimension + 1 - len(spec))]
    entries[how.dimension] = how.axes
    return PartitionSpec(*entries)


def parameter_specs(params: Any, mesh: Mesh, full_sharding: bool = False) -> Any:
    """A tree of `PartitionSpec`, of stacked parameters."""
    if full_sharding:
        return state_specs(params, mesh)
    return map_with_paths(lambda path, _: parameter_spec(path), params)


def state_specs(params: Any, mesh: Mesh) -> Any:
    """A tree of `PartitionSpec`, of gradients of stacked parameters, and of what the optimizer
    keeps of them."""
    return map_with_paths(lambda path, leaf: state_spec(path, leaf.shape, mesh), params)


def is_stacked(path: str) -> bool:
    """Whether the leaf of that path has a leading axis of layers."""
    return re.search(r"(^|/)layers/(?!\d)", path) is not None


def map_with_paths(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` of a function of the leaf's path ("params/embed_tokens/weight") and leaves."""

    def on_leaf(path: Any, *leaves: Any) -> Any:
        return function(jax.tree_util.keystr(path, simple=True, separator="/"), *leaves)

    return jax.tree_util.tree_map_with_path(on_leaf, tree, *rest)


def rows_sharding(mesh: Mesh, batch: int) -> NamedSharding:
    """Where arrays whose first axis is the batch lie: spread over the data axis, or on every device
    if they cannot be split evenly."""
    spread = batch % mesh.shape["data"] == 0
    return NamedSharding(mesh, PartitionSpec("data") if spread else PartitionSpec())
