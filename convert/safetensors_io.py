"""Reading safetensors files tensor by tensor into memory of our own, and writing them in shards.

The safetensors library would map the files it reads into memory, where the pages read count on top
of the loaded weights; reading a tensor straight into its final buffer keeps the peak at the weights
themselves, and lets a damaged file be named exactly.
"""

import io
import itertools
import json
import math
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from zaya_jax.errors import CheckpointError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_CHUNK = 1 << 22  # elements converted at a time
_ALIGNMENT = 64  # bytes; JAX takes over host memory aligned like this without a copy


class Tensor(NamedTuple):
    """A tensor in a file, not read yet."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    def read(self, dtype: Any = None) -> np.ndarray:
        """The tensor in `dtype` (as stored by default). Raises CheckpointError where the file ends
        too early."""
        target = self.dtype if dtype is None else np.dtype(dtype)
        out = _aligned_empty(self.shape, target)
        flat = out.reshape(-1)
        with _open(self.file) as stream:
            stream.seek(self.offset)
            for start in range(0, flat.size, _CHUNK):
                part = flat[start : start + _CHUNK]
                raw = part if target == self.dtype else np.empty(part.shape, self.dtype)
                if stream.readinto(raw.view(np.uint8)) != raw.nbytes:
                    raise CheckpointError(f"{self.file}: ends within tensor {self.name!r}")
                if raw is not part:
                    self._convert(raw, part)
        return out

    def _convert(self, raw: np.ndarray, out: np.ndarray) -> None:
        with np.errstate(over="ignore"):
            out[:] = raw.astype(out.dtype)
        if not np.array_equal(np.isfinite(raw), np.isfinite(out)):
            raise CheckpointError(
                f"{self.file}: tensor {self.name!r} has values too large for {out.dtype}"
            )


def _open(file: Path) -> io.BufferedReader:
    try:
        return open(file, "rb")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def read_folder(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a checkpoint folder (one file, or shards with an index), and everything wrong
    with them."""
    if (folder / INDEX).exists():
        return _read_shards(folder)
    if not (folder / SINGLE).exists():
        raise CheckpointError(f"{folder}: has neither {SINGLE} nor {INDEX}")
    tensors, problems = read_header(folder / SINGLE)
    return {tensor.name: tensor for tensor in tensors}, problems


def _read_shards(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    index = read_json(folder / INDEX)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{folder / INDEX}: has no weight_map of tensor names to files")
    found: dict[str, Tensor] = {}
    problems: list[str] = []
    for file in sorted(set(places.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX}: shard {file!r} is not the name of a safetensors file"
            )
        if not (folder / file).exists():
            problems.append(f"shard {file} of the index is missing")
            continue
        tensors, damage = read_header(folder / file)
        problems += damage
        for tensor in tensors:
            if tensor.name in found:
                first = found[tensor.name].file.name
                problems.append(f"duplicate tensor {tensor.name!r} in {first} and {file}")
            elif places.get(tensor.name) != file:
                said = places.get(tensor.name, "nowhere")
                problems.append(f"tensor {tensor.name!r} is in {file}, the index says {said}")
            found.setdefault(tensor.name, tensor)
    for name, file in places.items():
        if name not in found and (folder / file).exists():
            problems.append(f"tensor {name!r} is not in {file}, where the index says")
    return found, problems


def read_header(file: Path) -> tuple[list[Tensor], list[str]]:
    """The tensors a safetensors file declares, and everything wrong with the declarations.

    Raises:
      CheckpointError: the file is no safetensors file at all, or shorter than its header says.
    """
    with _open(file) as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{file}: not a safetensors file, or truncated within its header")
        problems: list[str] = []
        header = _parse(file, stream.read(length), problems)
    header.pop("__metadata__", None)
    start, tensors = 8 + length, []
    for name, entry in header.items():
        try:
            kind, shape = entry["dtype"], tuple(operator.index(n) for n in entry["shape"])
            begin, end = (operator.index(n) for n in entry["data_offsets"])
        except (TypeError, KeyError, ValueError):
            raise CheckpointError(f"{file}: damaged header entry for tensor {name!r}") from None
        if not isinstance(kind, str):
            raise CheckpointError(f"{file}: damaged header entry for tensor {name!r}")
        if kind not in DTYPES:
            problems.append(f"tensor {name!r} has dtype {kind}: only {', '.join(DTYPES)} are read")
            continue
        if min(shape, default=0) < 0 or end - begin != math.prod(shape) * DTYPES[kind].itemsize:
            raise CheckpointError(
                f"{file}: tensor {name!r}: {end - begin} bytes do not fit {shape}"
            )
        if begin < 0 or start + end > size:
            raise CheckpointError(
                f"{file}: truncated: tensor {name!r} ends at byte {start + end} of {size}"
            )
        tensors.append(Tensor(name, file, DTYPES[kind], shape, start + begin))
    problems += _overlaps(tensors)
    return tensors, problems


def _overlaps(tensors: list[Tensor]) -> list[str]:
    spans = sorted(tensors, key=lambda tensor: tensor.offset)
    return [
        f"tensors {a.name!r} and {b.name!r} overlap in {a.file.name}"
        for a, b in itertools.pairwise(spans)
        if a.offset + math.prod(a.shape) * a.dtype.itemsize > b.offset
    ]


def _parse(file: Path, text: bytes, problems: list[str]) -> dict[str, Any]:
    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in sorted({name for name in names if names.count(name) > 1}):
            problems.append(f"duplicate tensor {name!r} in {file.name}")
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=collect)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file}: the safetensors header is not valid JSON") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the safetensors header is not a JSON object")
    return header


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError naming the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return value


def write_folder(
    folder: Path,
    sizes: Mapping[str, int],
    make: Callable[[list[str]], dict[str, np.ndarray]],
    shard_bytes: int,
) -> None:
    """Writes the tensors of a checkpoint: as one file, or as shards with an index.

    Args:
      folder: exists.
      sizes: bytes of each tensor, by name.
      make: called with the names of one shard after the other, gives their tensors.
      shard_bytes: at most, unless a single tensor is larger.
    """
    shards = _split(sizes, shard_bytes)
    if len(shards) == 1:
        _write_shard(make(shards[0]), folder / SINGLE)
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(make(names), folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _split(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _write_shard(tensors: dict[str, np.ndarray], file: Path) -> None:
    file.touch()
    usual = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(usual)  # the library leaves files that only their owner can read
