"""Reading safetensors files tensor by tensor into memory of our own.

The safetensors library would map the files it reads into memory, where the pages read count on top
of the loaded weights; reading a tensor straight into its final buffer keeps the peak at the weights
themselves, and lets a damaged file be named exactly.
"""

import contextlib
import io
import itertools
import json
import math
import operator
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from convert.folder import INDEX
from zaya_jax.errors import CheckpointError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
SINGLE = "model.safetensors"
# Bounds that no honest file comes near, so that a dishonest one costs neither time nor memory.
_HEADER, _AXES, _SIZE = 100_000_000, 16, 1 << 62
_CHUNK = 1 << 22  # elements converted at a time
_ALIGNMENT = 64  # bytes; JAX takes over host memory aligned like this without a copy


class Tensor(NamedTuple):
    """A tensor in a file, not read yet."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    def read(self, dtype: Any = None, rows: slice = slice(None)) -> np.ndarray:
        """The tensor, or these rows of its first axis, in `dtype` (as stored by default).

        Raises:
          CheckpointError: the file ends too early, or values are too large for the dtype.
        """
        first, last, _ = rows.indices(self.shape[0]) if self.shape else (0, 1, 1)
        shape = (last - first, *self.shape[1:]) if self.shape else ()
        out = aligned_empty(shape, self.dtype if dtype is None else np.dtype(dtype))
        self.read_into(out, first)
        return out

    def read_into(self, out: np.ndarray, first_row: int = 0) -> None:
        """Fills an array, of any dtype, with the tensor or with some of its rows."""
        flat = out.reshape(-1)
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        with _open(self.file, f"tensor {self.name!r} ") as stream:
            stream.seek(self.offset + first_row * row)
            for start in range(0, flat.size, _CHUNK):
                part = flat[start : start + _CHUNK]
                raw = part if out.dtype == self.dtype else np.empty(part.shape, self.dtype)
                if stream.readinto(raw.view(np.uint8)) != raw.nbytes:
                    raise CheckpointError(f"{self.file}: ends within tensor {self.name!r}")
                if raw is not part:
                    cast(raw, part, f"{self.file}: tensor {self.name!r}")


def cast(raw: np.ndarray, out: np.ndarray, what: str) -> None:
    """Copies into another dtype. Raises CheckpointError where values are too large for it."""
    with np.errstate(over="ignore"):
        out[:] = raw.astype(out.dtype)
    if not np.array_equal(np.isfinite(raw), np.isfinite(out)):
        raise CheckpointError(f"{what} has values too large for {out.dtype}")


@contextlib.contextmanager
def _open(file: Path, what: str = "") -> Iterator[io.BufferedReader]:
    try:
        with open(file, "rb") as stream:
            yield stream
    except OSError as error:
        raise CheckpointError(f"{file}: {what}cannot be read ({error.strerror})") from None


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array whose memory JAX can take over."""
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
        if not os.path.exists(folder / file):  # which a name too long does not trouble
            problems.append(f"shard {file!r} of the index is missing")
            continue
        tensors, damage = read_header(folder / file)
        problems += damage
        for tensor in tensors:
            if tensor.name in found:
                first = found[tensor.name].file.name
                problems.append(f"duplicate tensor {tensor.name!r} in {first!r} and {file!r}")
            elif places.get(tensor.name) != file:
                said = repr(places[tensor.name]) if tensor.name in places else "nowhere"
                problems.append(f"tensor {tensor.name!r} is in {file!r}, the index says {said}")
            found.setdefault(tensor.name, tensor)
    for name, file in places.items():
        if name not in found and os.path.exists(folder / file):
            problems.append(f"tensor {name!r} is not in {file!r}, where the index says")
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
        if size < 8 or length > min(size - 8, _HEADER):
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
        numbers_fit = len(shape) <= _AXES and all(abs(n) < _SIZE for n in (*shape, begin, end))
        if not isinstance(kind, str) or not numbers_fit:
            raise CheckpointError(f"{file}: damaged header entry for tensor {name!r}")
        if kind not in DTYPES:
            read = ", ".join(DTYPES)
            problems.append(f"tensor {name!r} has dtype {kind!r} in {file.name}, not one of {read}")
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
        counts = Counter(name for name, _ in pairs)
        for name in sorted(name for name, count in counts.items() if count > 1):
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
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return value
