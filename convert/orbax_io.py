"""The project's own layout: an Orbax checkpoint of the tree in `weights/`, with the config and the
tokenizer's files beside it.

Orbax writes it, one leaf in memory after the other, so that any program with Orbax can restore it.
It is read through TensorStore, leaf by leaf, or of a leaf only what a process needs.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from convert.folder import WEIGHTS
from convert.safetensors_read import aligned_empty, cast, read_json
from zaya_jax.errors import CheckpointError

# A leaf is stored in pieces of so many bytes at most, and its rows in pieces of their own if they
# are as large as that, so that whoever wants some experts reads only these.
_PIECE, _LARGE_ROW = 1 << 27, 1 << 20
_METADATA = "_METADATA"  # Orbax's list of a checkpoint's arrays


class Leaf(Protocol):
    """An array in a checkpoint, not read yet."""

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, dtype: Any = None, rows: slice = slice(None)) -> np.ndarray:
        """The array, or these rows of its first axis, in that dtype (as stored by default)."""


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """A leaf of an Orbax checkpoint."""

    name: str
    folder: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    store: ts.TensorStore

    def read(self, dtype: Any = None, rows: slice = slice(None)) -> np.ndarray:
        selected = self.store
        if self.shape:
            first, last, _ = rows.indices(self.shape[0])
            selected = selected[first:last]
        out = aligned_empty(selected.shape, self.dtype)
        try:
            ts.array(out).write(selected).result()  # straight into memory that JAX takes over
        except Exception as error:  # TensorStore raises by the kind of its driver's error
            raise CheckpointError(f"{self.folder}: array {self.name!r}: {_line(error)}") from None
        if dtype is None or np.dtype(dtype) == self.dtype:
            return out
        converted = aligned_empty(out.shape, np.dtype(dtype))
        cast(out, converted, f"{self.folder}: array {self.name!r}")
        return converted


def read_arrays(folder: Path) -> dict[str, StoredArray]:
    """The leaves of the Orbax checkpoint in `folder`/weights, by their path in the tree.

    Raises:
      CheckpointError: there is none, or it is damaged.
    """
    place = folder / WEIGHTS
    metadata = read_json(place / _METADATA)
    try:
        leaves = metadata["tree_metadata"].values()
        keys = [[str(key["key"]) for key in leaf["key_metadata"]] for leaf in leaves]
    except (KeyError, TypeError, AttributeError):
        keys = []
    if not keys or any("/" in key for path in keys for key in path):
        raise CheckpointError(f"{place / _METADATA}: does not list the arrays of a checkpoint")
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    return {"/".join(path): _open_array(place, path, driver) for path in keys}


def _open_array(place: Path, path: list[str], driver: str) -> StoredArray:
    spec = {
        "driver": driver,
        "kvstore": _kvstore(place, ".".join(path)),
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
        "fill_missing_data_reads": False,
    }
    name = "/".join(path)
    try:
        store = ts.open(spec, open=True, read=True).result()
    except Exception as error:  # TensorStore raises by the kind of its driver's error
        raise CheckpointError(
            f"{place}: array {name!r} cannot be opened ({_line(error)})"
        ) from None
    dtype = np.dtype(store.dtype.numpy_dtype)
    return StoredArray(name, place, dtype, tuple(store.shape), store)


def write_arrays(
    folder: Path,
    leaves: Mapping[str, Leaf],
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    on_leaf: Callable[[str, np.ndarray], None] = lambda *_: None,
) -> None:
    """Writes the leaves as an Orbax checkpoint in `folder`/weights, uncompressed.

    Args:
      folder: exists.
      leaves: by their path in the tree, as they are to be stored.
      shardings: of the leaves, where they are to be stored in the pieces that devices hold.
      on_leaf: called with the path and the array of each one that is written.

    Raises:
      CheckpointError: a leaf cannot be read, or the folder not be written.
    """
    pending = {p: _Pending(p, leaf, (shardings or {}).get(p)) for p, leaf in leaves.items()}
    handler = _LeafHandler(sharded=shardings is not None, on_leaf=on_leaf)
    arrays = (jax.Array, ocp.type_handlers.ArrayHandler())  # Orbax warns where there is none
    registry = ocp.type_handlers.create_type_handler_registry((_Pending, handler), arrays)
    usual = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    try:
        with ocp.Checkpointer(usual) as checkpointer:
            place = (folder / WEIGHTS).resolve()
            checkpointer.save(place, args=ocp.args.PyTreeSave(unflatten(pending)))
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # Orbax and TensorStore raise whatever their storage raises
        raise CheckpointError(f"{folder / WEIGHTS}: cannot be written ({_line(error)})") from None


def read_shards(leaf: Leaf, dtype: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """A leaf on the devices of a mesh, of which each process reads what its own hold."""

    @functools.cache
    def rows(start: int | None, stop: int | None) -> np.ndarray:
        return leaf.read(dtype, slice(start, stop))

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        first, *rest = index or (slice(None),)
        return rows(first.start, first.stop)[(slice(None), *rest)]

    return jax.make_array_from_callback(leaf.shape, sharding, part)


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of values by path, with a tuple of layers in each collection."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        place = tree
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = leaf
    for collection in tree.values():
        collection["layers"] = tuple(collection["layers"].values())
    return tree


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A leaf to be written, for Orbax one of a pytree."""

    path: str
    leaf: Leaf
    sharding: jax.sharding.Sharding | None

    def read(self) -> np.ndarray | jax.Array:
        if self.sharding is None:
            return self.leaf.read()
        return read_shards(self.leaf, None, self.sharding)

    def args(self) -> ocp.SaveArgs:
        if self.sharding is not None:
            return ocp.SaveArgs()
        row = math.prod(self.leaf.shape[1:]) * self.leaf.dtype.itemsize
        return ocp.SaveArgs(chunk_byte_size=_PIECE, shard_axes=(0,) if row >= _LARGE_ROW else ())


class _Writer(ocp.type_handlers.NumpyHandler):
    """Keeps errors until every write of a batch has ended: each one that Orbax would leave behind
    prints a traceback when it finds its event loop closed."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self.errors: list[Exception] = []

    async def _open_and_write(self, *arguments: Any) -> None:
        try:
            await super()._open_and_write(*arguments)
        except Exception as error:
            self.errors.append(error)

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> Sequence[Any]:
        for written in await super().serialize(values, infos, args):
            written.result()
        if self.errors:
            raise self.errors[0]
        return []


class _LeafHandler(ocp.type_handlers.TypeHandler):
    """Writes leaves as Orbax's own handlers do, but a few after the other, while the next ones are
    read."""

    def __init__(self, sharded: bool, on_leaf: Callable[[str, np.ndarray], None]):
        self._on_leaf = on_leaf
        self._usual: ocp.type_handlers.TypeHandler = (
            ocp.type_handlers.ArrayHandler() if sharded else _Writer()
        )

    def typestr(self) -> str:
        return self._usual.typestr()

    async def metadata(self, infos: Any) -> Any:
        return await self._usual.metadata(infos)

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        return await self._usual.deserialize(infos, args)

    async def serialize(
        self, values: Sequence[_Pending], infos: Any, args: Any = None
    ) -> Sequence[Any]:
        batches = _batches([value.leaf for value in values])
        with ThreadPoolExecutor(1) as reader:

            def read(batch: range) -> list[Any]:
                return [values[i].read() for i in batch]

            reads = [reader.submit(read, batches[0])]
            for batch, following in itertools.zip_longest(batches, batches[1:]):
                arrays = reads.pop().result()
                if following is not None:
                    reads.append(reader.submit(read, following))
                chosen = slice(batch.start, batch.stop)
                arguments = [value.args() for value in values[chosen]]
                for written in await self._usual.serialize(arrays, infos[chosen], arguments):
                    written.result()
                for value, array in zip(values[chosen], arrays, strict=True):
                    self._on_leaf(value.path, np.asarray(array))
        return []


def _batches(leaves: Sequence[Leaf]) -> list[range]:
    """Runs of leaves that are written together, as each writing waits for the disk."""
    batches, size = [range(0)], 0
    for i, leaf in enumerate(leaves):
        nbytes = math.prod(leaf.shape) * leaf.dtype.itemsize
        if size + nbytes > _PIECE and batches[-1]:
            batches.append(range(i, i))
            size = 0
        batches[-1] = range(batches[-1].start, i + 1)
        size += nbytes
    return batches


def _kvstore(place: Path, name: str) -> dict[str, Any]:
    files = {"driver": "file", "path": f"{place.resolve()}/"}
    if (place / "manifest.ocdbt").exists():
        return {"driver": "ocdbt", "base": files, "path": f"{name}/"}
    return {**files, "path": f"{place.resolve()}/{name}/"}


def _line(error: Exception) -> str:
    """What an error of a library says, as one line without the details that it appends."""
    text = " ".join(str(error).split()).partition(" [")[0] or type(error).__name__
    return text
