"""Block sizes of kernels: what a sweep found best for a shape, or a safe default."""

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.launch import architecture

TABLE = Path(__file__).parent / "blocks.json"


class Blocks(NamedTuple):
    """How a kernel divides its work.

    Attributes:
      sizes: what a program takes at once, along the axes that the kernel names.
      warps: wavefronts of 64 lanes, of a program.
      stages: of software pipelining.
    """

    sizes: tuple[int, ...]
    warps: int = 4
    stages: int = 1


_tried: dict[str, Blocks] = {}
_records: list[list[tuple[str, str]]] = []


def blocks_for(kernel: str, shape: tuple[int, ...], dtype: Any, default: Blocks) -> Blocks:
    """Those to use on the architecture that is compiled for.

    Args:
      kernel: its name.
      shape: the sizes of arrays that matter for the choice.
      dtype: of the operands.
      default: fits any GPU; used where nobody has looked for better.
    """
    name = f"{kernel} {'x'.join(map(str, shape))} {np.dtype(dtype).name}"
    for record in _records:
        record.append((kernel, name))
    if kernel in _tried:
        return _tried[kernel]
    return _table().get(f"{architecture()} {name}", default)


@contextlib.contextmanager
def trying(kernel: str, blocks: Blocks) -> Iterator[None]:
    """Within, that kernel uses these blocks, whatever its shape; not in what JAX has traced
    before."""
    before = _tried.copy()
    _tried[kernel] = blocks
    try:
        yield
    finally:
        _tried.clear()
        _tried.update(before)


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[str, str]]]:
    """A list of the kernels whose blocks are looked up within, each with the name under which the
    table has them, after the architecture's."""
    record: list[tuple[str, str]] = []
    _records.append(record)
    try:
        yield record
    finally:
        _records.pop()


def read_table() -> dict[str, Blocks]:
    """What was found best."""
    rows = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    return {key: Blocks(tuple(sizes), *rest) for key, (sizes, *rest) in rows.items()}


_table = functools.cache(read_table)
