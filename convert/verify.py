"""Whether a checkpoint is whole, sound, and the same as another one."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from convert.checkpoint import Checkpoint, open_checkpoint
from convert.folder import CHECKSUMS
from convert.orbax_io import Leaf
from convert.safetensors_read import read_json
from zaya_jax.config import FULL, SLIDING

_BLOCK = 1 << 26  # bytes of a leaf in memory at a time, about


@dataclasses.dataclass
class Range:
    """What the values of all leaves of one kind are like; without finite values, least, most and
    mean mean nothing."""

    count: int = 0
    nan: int = 0
    infinite: int = 0
    least: float = math.inf
    most: float = -math.inf
    total: float = 0.0

    def add(self, values: np.ndarray) -> None:
        values = values.astype(np.float32)
        finite = np.isfinite(values)
        self.count += values.size
        if not finite.all():
            nan = int(np.isnan(values).sum())
            self.nan += nan
            self.infinite += values.size - int(finite.sum()) - nan
            values = values[finite]
        if values.size:
            self.least = min(self.least, float(values.min()))
            self.most = max(self.most, float(values.max()))
            self.total += float(values.sum(dtype=np.float64))

    @property
    def finite(self) -> int:
        return self.count - self.nan - self.infinite

    @property
    def mean(self) -> float:
        return self.total / self.finite if self.finite else math.nan


@dataclasses.dataclass
class Report:
    """What was found.

    Attributes:
      checkpoint: opened, so its structure is sound.
      ranges: of the values, by kind of leaf ("mlp/experts/down_proj").
      checksum: SHA-256 over those of all leaves, whatever the layout.
      compared: leaves with a checksum in the folder.
      problems: one line for each.
    """

    checkpoint: Checkpoint
    ranges: dict[str, Range]
    checksum: str
    compared: int
    problems: list[str]


def verify(folder: Path, on_progress: Callable[[int, int], None] = lambda *_: None) -> Report:
    """Reads every value of a checkpoint.

    Raises:
      CheckpointError, ConfigError: it cannot be opened or read to its end.
    """
    checkpoint = open_checkpoint(folder)
    has_sums = (folder / CHECKSUMS).exists()
    stored = read_json(folder / CHECKSUMS) if has_sums else {}
    leaves = checkpoint.leaves
    ranges: dict[str, Range] = {}
    problems = [
        f"{CHECKSUMS} has no {path!r}" for path in leaves if has_sums and path not in stored
    ]
    all_sums, done = hashlib.sha256(), 0
    total = sum(math.prod(leaf.shape) for leaf in leaves.values())
    for path, leaf in leaves.items():
        mine, checksum = Range(), hashlib.sha256()
        common = ranges.setdefault(_kind(path), Range())
        for block in _blocks(leaf):
            checksum.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8))
            mine.add(block)
            common.add(block)
            done += block.size
            on_progress(done, total)
        all_sums.update(f"{path} {checksum.hexdigest()}\n".encode())
        if mine.nan or mine.infinite:
            problems.append(f"{path}: {mine.nan} NaN and {mine.infinite} infinite values")
        if stored.get(path, checksum.hexdigest()) != checksum.hexdigest():
            problems.append(f"{path}: differs from its checksum in {CHECKSUMS}")
    return Report(checkpoint, ranges, all_sums.hexdigest(), len(leaves.keys() & stored), problems)


def compare(
    first: Path, second: Path, on_progress: Callable[[int, int], None] = lambda *_: None
) -> list[str]:
    """What differs between two checkpoints of any layouts, a line for each leaf; [] if nothing
    does.

    Raises:
      CheckpointError, ConfigError: one of them cannot be opened or read to its end.
    """
    a, b = open_checkpoint(first), open_checkpoint(second)
    ignored = {"skip_expert"}  # which the layouts give different names to
    if SLIDING not in a.config.layer_types:
        ignored |= {"sliding_window", "sliding_rope"}
    if FULL not in a.config.layer_types:
        ignored.add("rope")
    fields = [f.name for f in dataclasses.fields(a.config) if f.name not in ignored]
    differences = [
        f"config: {name} is {x!r}, and {y!r}"
        for name in fields
        if (x := getattr(a.config, name)) != (y := getattr(b.config, name))
    ]
    differences += [f"{path}: only in one" for path in sorted(a.leaves.keys() ^ b.leaves.keys())]
    paths = [path for path in a.leaves if path in b.leaves]
    done, total = 0, sum(math.prod(a.leaves[path].shape) for path in paths)
    for path in paths:
        x, y = a.leaves[path], b.leaves[path]
        if x.shape != y.shape or x.dtype != y.dtype:
            differences.append(f"{path}: {x.dtype} {x.shape}, and {y.dtype} {y.shape}")
            continue
        count, most = 0, 0.0
        for p, q in zip(_blocks(x), _blocks(y), strict=True):
            different = _bits(p) != _bits(q)
            count += int(different.sum())
            if different.any():
                gap = p[different].astype(np.float32) - q[different].astype(np.float32)
                most = max(most, float(np.abs(gap).max()))
            done += p.size
            on_progress(done, total)
        if count:
            differences.append(
                f"{path}: {count} of {math.prod(x.shape)} values differ, by {most:.3g} at most"
            )
    return differences


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view({2: np.uint16, 4: np.uint32}[values.dtype.itemsize])


def _blocks(leaf: Leaf) -> Iterator[np.ndarray]:
    """The leaf, some rows after the other."""
    if not leaf.shape:
        yield leaf.read()
        return
    row = math.prod(leaf.shape[1:]) * leaf.dtype.itemsize
    step = max(1, _BLOCK // max(row, 1))
    for start in range(0, leaf.shape[0], step):
        yield leaf.read(rows=slice(start, start + step))


def _kind(path: str) -> str:
    """A leaf's path without its collection and layer."""
    parts = path.split("/")[1:]
    return "/".join(parts[2:] if parts[0] == "layers" else parts)
