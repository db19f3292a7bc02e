"""The mesh, and where each parameter lies on it: one table from leaf names to logical axes, one
from those to mesh axes."""

import contextlib
from collections.abc import Sequence

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
MOST_SIMULATED = 1024
MESH_AXES = {"expert": "expert"}


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
        if name not in ("data", "expert") or name in sizes or not size.isdecimal() or size == "0":
            raise ConfigError(f"mesh {text!r}: write it like data=2,expert=4")
        sizes[name] = int(size)
    return sizes


def simulate_devices(count: int) -> None:
    """Lets one processor stand for that many devices, where JAX has not started yet and finds no
    accelerator."""
    if jax.config.jax_num_cpu_devices < count <= MOST_SIMULATED:
        with contextlib.suppress(RuntimeError):  # JAX has started
            jax.config.update("jax_num_cpu_devices", count)


def check_mesh(config: ZayaConfig, mesh: Mesh) -> None:
    """Raises ConfigError where the experts cannot be split evenly over the mesh."""
    if config.num_experts % (size := mesh.shape.get("expert", 1)):
        raise ConfigError(
            f"num_experts {config.num_experts} is not divisible by the expert axis of {size}"
        )


def parameter_sharding(path: str, mesh: Mesh) -> NamedSharding:
    """Where the leaf of that path ("params/layers/0/mlp/experts/down_proj") lies on the mesh."""
    axes: tuple[str | None, ...] = ()
    for end, logical in LOGICAL_AXES.items():
        if path.endswith(end):
            axes = tuple(None if axis is None else MESH_AXES[axis] for axis in logical)
    return NamedSharding(mesh, PartitionSpec(*axes))


def rows_sharding(mesh: Mesh, batch: int) -> NamedSharding:
    """Where arrays whose first axis is the batch lie: spread over the data axis, or on every device
    if they cannot be split evenly."""
    spread = batch % mesh.shape["data"] == 0
    return NamedSharding(mesh, PartitionSpec("data") if spread else PartitionSpec())
