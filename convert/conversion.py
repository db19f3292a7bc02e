"""From any layout to any other, leaf by leaf."""

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from convert.checkpoint import NAMES, Checkpoint, Layout, is_stacked, names_in, open_checkpoint
from convert.folder import find, read_carried, recover, replacing, resolved, unfinished
from convert.legacy_config import write_legacy
from convert.mapping import Entry, mapping
from convert.orbax_io import Leaf
from convert.writing import MAX_SHARD_BYTES, write_checkpoint
from zaya_jax.config import ZayaConfig
from zaya_jax.errors import CheckpointError, InputError
from zaya_jax.loading import parse_dtype
from zaya_jax.sharding import check_mesh, parameter_sharding

Skip = Literal["zero", "identity"]
# What a token of the skip class gets, by whoever reads these layouts.
_MEANING: dict[Layout, Skip] = {"hf": "zero", "hf-legacy": "identity"}


@dataclasses.dataclass(frozen=True)
class Converted:
    """A leaf in another dtype."""

    leaf: Leaf
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape

    def read(self, dtype: Any = None, rows: slice = slice(None)) -> np.ndarray:
        return self.leaf.read(self.dtype if dtype is None else dtype, rows)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion that is known to be possible.

    Attributes:
      source: the opened checkpoint.
      to: the layout to write.
      config: of the new checkpoint: the source's, but for what the skip class means.
      leaves: of the new checkpoint.
    """

    source: Checkpoint
    to: Layout
    config: ZayaConfig
    leaves: dict[str, Leaf]

    @property
    def nbytes(self) -> int:
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in self.leaves.values())

    def rows(self) -> Iterator[tuple[str, str, str, str, str]]:
        """The whole mapping: a tensor of the source and its dtype, the new one and its, and their
        shape. Where only one side has a tensor for each expert, the other is given with an
        index."""
        layouts = (self.source.layout, self.to)
        for path, entry in mapping(self.config).items():
            was, becomes = str(self.source.leaves[path].dtype), str(self.leaves[path].dtype)
            if not any(is_stacked(layout, entry) for layout in layouts):
                (old,), (new,) = (names_in(layout, path, entry) for layout in layouts)
                yield old, was, new, becomes, "x".join(map(str, entry.shape))
                continue
            for i in range(entry.shape[0]):
                old, new = (_row_name(layout, path, entry, i) for layout in layouts)
                yield old, was, new, becomes, "x".join(map(str, entry.shape[1:]))
        for name in self.source.dropped:
            yield name, "", "dropped: a copy of the embedding", "", ""


def plan(
    source: str | os.PathLike[str],
    to: Layout,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    skip: Skip | None = None,
) -> Plan:
    """Opens and checks the source, and what becomes of it. Arguments and errors are those of
    `convert`."""
    kind = None if dtype is None else parse_dtype(dtype)
    if mesh is not None and to != "orbax":
        raise InputError("a mesh is for Orbax: safetensors are not sharded by device")
    checkpoint = open_checkpoint(find(source))
    table = mapping(checkpoint.config)
    leaves = dict(checkpoint.leaves)
    if kind is not None:
        for path, leaf in leaves.items():
            fixed = table[path].always_float32
            leaves[path] = Converted(leaf, np.dtype(np.float32) if fixed else kind)
    config = _settle_skip(checkpoint, to, skip)
    if to == "hf-legacy":
        write_legacy(config)  # raises where it cannot be expressed
    if mesh is not None:
        check_mesh(config, mesh)
    return Plan(checkpoint, to, config, leaves)


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    to: Layout,
    *,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    mesh: Mesh | None = None,
    skip: Skip | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> Plan:
    """Converts a checkpoint, bit for bit where no dtype is given, with a few tensors in memory at a
    time. The destination appears when it is complete; until then, what was there stays.

    Args:
      source: a folder of any layout, or a repository on the Hugging Face hub.
      destination: the new folder.
      to: its layout.
      dtype: float32, bfloat16 or float16, of all tensors but the balancing biases, which become
        float32; as stored by default.
      max_shard_bytes: of a safetensors file, unless one tensor is larger.
      mesh: an Orbax checkpoint is written in the pieces that its devices hold. It can be loaded on
        any other.
      skip: what the skip class is to mean, where the two layouts differ in it and some token could
        be routed to it.
      overwrite: replaces a checkpoint at the destination.
      on_progress: called with the bytes written so far and their number.

    Raises:
      CheckpointError: the source is damaged or incomplete, the destination cannot be written, or
        the new checkpoint would be another model.
      ConfigError: naming the field of config.json at fault, or the dtype or mesh.
      InputError: a mesh for another layout than Orbax.
    """
    path = Path(destination)
    recover(resolved(path))  # which may be the source
    planned = plan(source, to, dtype=dtype, mesh=mesh, skip=skip)
    if planned.source.folder.resolve().is_relative_to(unfinished(resolved(path))):
        raise CheckpointError(f"{source}: would be removed as an unfinished {path}; move it first")
    shardings = None
    if mesh is not None:
        shardings = {path: parameter_sharding(path, mesh) for path in planned.leaves}
    done, total = 0, planned.nbytes

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    with replacing(path, overwrite) as folder:
        _check_room(folder, total)
        write_checkpoint(
            folder,
            to,
            planned.config,
            planned.leaves,
            read_carried(planned.source.folder),
            shard_bytes=max_shard_bytes,
            shardings=shardings,
            on_bytes=wrote,
        )
    return planned


def skip_is_reachable(biases: np.ndarray) -> bool:
    """Whether any token could be routed to the skip class, the last one.

    The router chooses the largest of probability + bias, the first of equal ones. The skip class is
    nearest to being it where its probability is 1 and the others' are 0.
    """
    *experts, skip = biases.astype(np.float64)
    return bool(1 + skip > max(experts))


def _settle_skip(checkpoint: Checkpoint, to: Layout, skip: Skip | None) -> ZayaConfig:
    config = checkpoint.config
    wanted = _MEANING.get(to, config.skip_expert)
    if skip is not None or to == checkpoint.layout or wanted == config.skip_expert:
        return dataclasses.replace(config, skip_expert=skip or config.skip_expert)
    for path, leaf in checkpoint.leaves.items():
        if path.endswith("balancing_biases") and skip_is_reachable(leaf.read()):
            raise CheckpointError(
                f"{checkpoint.folder}: {path} lets tokens reach the skip class, which means "
                f"{config.skip_expert!r} here and {wanted!r} in {NAMES[to]}: say which to keep "
                "(--skip)"
            )
    return dataclasses.replace(config, skip_expert=wanted)


def _check_room(folder: Path, needed: int) -> None:
    if needed > (free := shutil.disk_usage(folder).free):
        raise CheckpointError(
            f"{folder.parent.parent}: the checkpoint needs {needed / 1e9:.1f} GB, "
            f"only {free / 1e9:.1f} GB are free on its disk"
        )


def _row_name(layout: Layout, path: str, entry: Entry, i: int) -> str:
    names = names_in(layout, path, entry)
    return names[i] if is_stacked(layout, entry) else f"{names[0]}[{i}]"
