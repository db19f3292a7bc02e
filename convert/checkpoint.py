"""A checkpoint folder of any layout as the leaves of our tree, not read yet."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from convert.folder import CONFIG, INDEX, WEIGHTS, beside
from convert.legacy_config import read_legacy
from convert.mapping import Entry, copies, mapping
from convert.orbax_io import Leaf, read_arrays
from convert.safetensors_read import (
    DTYPES,
    SINGLE,
    Tensor,
    aligned_empty,
    read_folder,
    read_json,
)
from zaya_jax.config import ZayaConfig, is_legacy
from zaya_jax.errors import CheckpointError, ConfigError

Layout = Literal["hf", "hf-legacy", "orbax"]
NAMES: dict[Layout, str] = {
    "hf": "the current Hugging Face layout",
    "hf-legacy": "the legacy Zyphra layout",
    "orbax": "the Orbax layout",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: everything is there and has the shape that the config asks for.

    Attributes:
      folder: where it is.
      layout: of its files.
      config: the architecture.
      leaves: of the tree, by their path, in the order of the mapping table.
      dropped: tensors that only repeat a leaf.
    """

    folder: Path
    layout: Layout
    config: ZayaConfig
    leaves: dict[str, Leaf]
    dropped: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Stacked:
    """A leaf whose rows are tensors of their own, all of one shape and dtype."""

    rows: tuple[Tensor, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.rows[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.rows[0].shape)

    def read(self, dtype: Any = None, rows: slice = slice(None)) -> np.ndarray:
        chosen = self.rows[rows]
        kind = self.dtype if dtype is None else np.dtype(dtype)
        out = aligned_empty((len(chosen), *self.shape[1:]), kind)
        for tensor, place in zip(chosen, out, strict=True):
            tensor.read_into(place)
        return out


@dataclasses.dataclass(frozen=True)
class OfLayer:
    """One layer's part of a leaf that training holds for all layers together."""

    stacked: Leaf
    layer: int

    @property
    def dtype(self) -> np.dtype:
        return self.stacked.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stacked.shape[1:]

    def read(self, dtype: Any = None, rows: slice = slice(None)) -> np.ndarray:
        (array,) = self.stacked.read(dtype, slice(self.layer, self.layer + 1))
        return array[rows] if array.ndim else array


def unstacked(found: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The leaves of our tree, of those of a training checkpoint (`layouts.stack`) or of any other
    one; without layer 0's `router_states_scale`, which only stacking needs."""
    leaves: dict[str, Leaf] = {}
    for path, leaf in found.items():
        collection, layers, name = path.partition("/layers/")
        if not layers or name.partition("/")[0].isdecimal() or not leaf.shape:
            leaves[path] = leaf
            continue
        first = int(name.endswith("router_states_scale"))
        for layer in range(first, leaf.shape[0]):
            leaves[f"{collection}/layers/{layer}/{name}"] = OfLayer(leaf, layer)
    return leaves


def layout_of(folder: Path) -> Layout:
    """The layout of a folder, by its config and what it holds."""
    of_run = beside(folder) != folder  # even where its weights are lost
    if of_run or ((folder / WEIGHTS).is_dir() and not _holds_safetensors(folder)):
        return "orbax"
    return "hf-legacy" if is_legacy(read_json(folder / CONFIG)) else "hf"


def read_config(folder: Path) -> ZayaConfig:
    """The configuration of a checkpoint. Raises as `open_checkpoint` does."""
    if layout_of(folder) != "hf-legacy":
        return _config(folder, [])
    return _config(folder, read_folder(folder)[0] if _holds_safetensors(folder) else [])


def _holds_safetensors(folder: Path) -> bool:
    return (folder / SINGLE).exists() or (folder / INDEX).exists()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Checks a folder's config and tensors against each other, without reading the latter.

    Raises:
      CheckpointError: listing everything that is missing, unknown, misshapen, duplicate or damaged.
      ConfigError: naming the field of config.json at fault.
    """
    layout = layout_of(folder)
    found: dict[str, Any] = {}
    problems: list[str] = []
    if layout == "orbax":
        found |= unstacked(read_arrays(folder))
    else:
        tensors, problems = read_folder(folder)
        found |= tensors
    config = _config(folder, found)
    _check_names(folder, layout, found)
    table = mapping(config)
    shapes = {
        name: shape for path, entry in table.items() for name, shape in _wanted(layout, path, entry)
    }
    dropped = () if layout == "orbax" else _drop_copies(config, layout, found, problems)
    what = "array" if layout == "orbax" else "tensor"
    problems += [f"missing {what} {name!r} {s}" for name, s in shapes.items() if name not in found]
    for name, leaf in found.items():
        if name not in shapes:
            problems.append(f"unknown {what} {name!r} {leaf.shape}{_place(leaf)}")
        elif leaf.dtype not in DTYPES.values():
            problems.append(f"{what} {name!r} is {leaf.dtype}, not one of {', '.join(DTYPES)}")
        elif leaf.shape != shapes[name]:
            problems.append(
                f"{what} {name!r} has shape {leaf.shape}, expected {shapes[name]}{_place(leaf)}"
            )
    leaves: dict[str, Leaf] = {}
    if not problems:
        for path, entry in table.items():
            parts = tuple(found[name] for name, _ in _wanted(layout, path, entry))
            if len(kinds := {str(part.dtype) for part in parts}) > 1:
                problems.append(f"tensors {parts[0].name!r} .. are {' and '.join(sorted(kinds))}")
            leaves[path] = Stacked(parts) if is_stacked(layout, entry) else parts[0]
    if problems:
        raise CheckpointError(f"{folder}: {len(problems)} problems: " + "; ".join(problems))
    return Checkpoint(folder, layout, config, leaves, dropped)


def _place(leaf: Leaf) -> str:
    return f" in {leaf.file.name}" if isinstance(leaf, Tensor) else ""


def names_in(layout: Layout, path: str, entry: Entry) -> tuple[str, ...]:
    """What a leaf's tensors are called in a layout."""
    return {"hf": (entry.name,), "hf-legacy": entry.legacy, "orbax": (path,)}[layout]


def is_stacked(layout: Layout, entry: Entry) -> bool:
    """Whether each row of a leaf is a tensor of its own in a layout."""
    return layout == "hf-legacy" and entry.transform == "stack"


def _wanted(layout: Layout, path: str, entry: Entry) -> list[tuple[str, tuple[int, ...]]]:
    names = names_in(layout, path, entry)
    shape = entry.shape[1:] if is_stacked(layout, entry) else entry.shape
    return [(name, shape) for name in names]


def _config(folder: Path, names: Iterable[str]) -> ZayaConfig:
    file = beside(folder) / CONFIG
    values = read_json(file)
    try:
        if not is_legacy(values):
            return ZayaConfig.from_hf(values)
        numbers = [int(match[1]) for name in names if (match := _LAYER.match(name))]
        return read_legacy(values, max(numbers, default=-1) + 1)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _check_names(folder: Path, layout: Layout, names: Iterable[str]) -> None:
    """Raises CheckpointError where the tensors are of another layout than the config."""
    other: dict[Layout, tuple[Layout, str]] = {
        "hf": ("hf-legacy", ".zaya_block."),
        "hf-legacy": ("hf", ".mlp.gate."),
    }
    if layout in other:
        wrong, mark = other[layout]
        if name := next((name for name in names if mark in name), None):
            raise CheckpointError(
                f"{folder}: {CONFIG} has {NAMES[layout]}, tensor {name!r} has {NAMES[wrong]}"
            )


def _drop_copies(
    config: ZayaConfig, layout: Layout, found: dict[str, Tensor], problems: list[str]
) -> tuple[str, ...]:
    """Takes tensors out that only repeat another one; those that do not are problems."""
    dropped = []
    for name, path in copies(config).items():
        (original,) = names_in(layout, path, mapping(config)[path])
        if name in found and original in found:
            if _same(found[name], found[original]):
                del found[name]
                dropped.append(name)
            else:
                problems.append(
                    f"{name} differs from the embedding, but tie_word_embeddings is true"
                )
    return tuple(dropped)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, compared a few rows at a time."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    parts = (slice(start, start + 4096) for start in range(0, a.shape[0] if a.shape else 1, 4096))
    return all(a.read(rows=part).tobytes() == b.read(rows=part).tobytes() for part in parts)
