"""A checkpoint of any layout from the leaves of our tree."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.checkpoint import Layout, is_stacked, names_in
from convert.folder import CHECKSUMS, CONFIG
from convert.legacy_config import write_legacy
from convert.mapping import mapping
from convert.orbax_io import Leaf, write_arrays
from convert.safetensors_write import Planned, write_durably, write_folder
from zaya_jax.config import ZayaConfig

MAX_SHARD_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class Held:
    """A leaf in memory."""

    array: Any

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.array.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    def read(self, dtype: Any = None, rows: slice = slice(None)) -> np.ndarray:
        array = np.asarray(self.array)
        array = array[rows] if array.ndim else array
        return array if dtype is None else array.astype(dtype)


def write_checkpoint(
    folder: Path,
    layout: Layout,
    config: ZayaConfig,
    leaves: Mapping[str, Leaf],
    carried: Mapping[str, bytes],
    *,
    shard_bytes: int = MAX_SHARD_BYTES,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes a whole checkpoint, to the disk itself.

    Args:
      folder: exists and is empty.
      layout: to write.
      config: the architecture.
      leaves: all of the mapping table's, as they are to be stored.
      carried: the contents of files that go beside the weights, by name.
      shard_bytes: of one safetensors file, at most.
      shardings: as for `write_arrays`.
      on_bytes: called with the size of what was written, again and again.

    Raises:
      ConfigError: the layout cannot express the config.
      CheckpointError: a leaf cannot be read.
      OSError: the folder cannot be written.
    """
    values = write_legacy(config) if layout == "hf-legacy" else config.to_hf()
    values |= {"dtype": str(leaves["params/norm/weight"].dtype)}
    hashes = {path: hashlib.sha256() for path in leaves}

    def wrote(path: str, array: np.ndarray) -> None:
        hashes[path].update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        on_bytes(array.nbytes)

    if layout == "orbax":
        write_arrays(folder, leaves, shardings, wrote)
    else:
        paths: dict[str, str] = {}
        tensors: list[Planned] = []
        for path, entry in mapping(config).items():
            names = names_in(layout, path, entry)
            paths |= dict.fromkeys(names, path)
            tensors += _planned(names, leaves[path], is_stacked(layout, entry))
        write_folder(folder, tensors, shard_bytes, lambda t, array: wrote(paths[t.name], array))
    for name, data in carried.items():
        write_durably(folder / name, data)
    write_durably(folder / CHECKSUMS, _json({p: h.hexdigest() for p, h in hashes.items()}))
    write_durably(folder / CONFIG, _json(values))


def _planned(names: tuple[str, ...], leaf: Leaf, stacked: bool) -> list[Planned]:
    """The tensors of a leaf: itself, or its rows under names of their own."""
    if not stacked:
        return [Planned(names[0], leaf.dtype, leaf.shape, leaf.read)]

    def row(i: int) -> Callable[[], np.ndarray]:
        return lambda: leaf.read(rows=slice(i, i + 1))[0]

    return [Planned(name, leaf.dtype, leaf.shape[1:], row(i)) for i, name in enumerate(names)]


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
