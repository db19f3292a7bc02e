"""Writing safetensors files in shards, one tensor in memory after the other: the safetensors
library wants all tensors of a file at once."""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convert.folder import INDEX
from convert.safetensors_read import DTYPES, SINGLE

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_AHEAD = 2  # tensors that are made while one is written


class Planned(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]  # called in another thread, when its turn comes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_folder(
    folder: Path,
    tensors: Sequence[Planned],
    shard_bytes: int,
    on_tensor: Callable[[Planned, np.ndarray], None] = lambda *_: None,
) -> None:
    """Writes the tensors of a checkpoint, to the disk itself: as one file, or as shards with an
    index.

    Args:
      folder: exists.
      tensors: in their order, but that the wider dtypes come first in a file, for their alignment.
      shard_bytes: of a shard at most, unless a single tensor is larger.
      on_tensor: called with each one that is written.
    """
    shards = [sorted(s, key=lambda t: -t.dtype.itemsize) for s in _split(tensors, shard_bytes)]
    files = [
        SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    made = _made([tensor for shard in shards for tensor in shard])
    for shard, file in zip(shards, files, strict=True):
        _write_shard(folder / file, shard, made, on_tensor)
    if len(shards) > 1:
        places = {t.name: file for s, file in zip(shards, files, strict=True) for t in s}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors)}, "weight_map": places}
        write_durably(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def write_durably(file: Path, data: bytes) -> None:
    """Writes a file to the disk itself."""
    with open(file, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _split(tensors: Sequence[Planned], shard_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def _made(tensors: Sequence[Planned]) -> Iterator[np.ndarray]:
    """The tensors' arrays, of which the next few are made ahead."""
    with ThreadPoolExecutor(_AHEAD) as threads:
        queue = iter(tensors)
        pending = [threads.submit(t.make) for t in itertools.islice(queue, _AHEAD)]
        try:
            while pending:
                array = pending.pop(0).result()
                pending += [threads.submit(t.make) for t in itertools.islice(queue, 1)]
                yield array
        finally:
            threads.shutdown(cancel_futures=True)


def _write_shard(
    file: Path,
    tensors: Sequence[Planned],
    made: Iterator[np.ndarray],
    on_tensor: Callable[[Planned, np.ndarray], None],
) -> None:
    ends = list(itertools.accumulate(t.nbytes for t in tensors))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for tensor, end in zip(tensors, ends, strict=True):
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [end - tensor.nbytes, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    written = "the header"
    try:
        with open(file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors:
                array = np.ascontiguousarray(next(made))
                written = f"tensor {tensor.name!r}"
                assert (array.dtype, array.shape) == (tensor.dtype, tensor.shape), tensor.name
                stream.write(array.reshape(-1).view(np.uint8))
                on_tensor(tensor, array)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"{file}: {written}") from None
