"""An endless, shuffled mixture of sources: which example comes when."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

BLOCK = 4096  # places whose examples are worked out at a time
ENDLESS = 1 << 62
ROUNDS = 6


class Draw(NamedTuple):
    """An example of a source, both by number."""

    source: int
    example: int


def mixture(sizes: Sequence[int], weights: Sequence[float], seed: int) -> grain.MapDataset[Draw]:
    """The draws of an endless mixture, by their place in it.

    Each source is gone through again and again, every time in another order of all its examples.

    Args:
      sizes: examples of each source.
      weights: of the sources in the mixture, in examples.
      seed: of the orders.
    """
    sources = [
        grain.MapDataset.source(_Repeated(size, seed, number)) for number, size in enumerate(sizes)
    ]
    return grain.MapDataset.mix(sources, weights)


def permute(places: np.ndarray, size: int, *seeds: int) -> np.ndarray:
    """What stands at some places of a random order of 0 .. size - 1: int64, of the same shape.

    A Feistel network over the next power of four, walked until it ends below `size`: any part of
    the order costs what it is long, and the order is the same wherever and whenever it is asked
    for. (Grain's shuffle, much the same, leaves out an example of 2**16 + 1 and gives another one
    twice, in 0.2.18, and takes milliseconds for each example of a small source.)
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.Philox(np.random.SeedSequence(seeds)).random_raw(ROUNDS)
    values = places.astype(np.uint64)
    pending = np.arange(values.size)
    while pending.size:
        left, right = values[pending] >> half, values[pending] & mask
        for key in keys:
            left, right = right, left ^ (_scatter(right + key) & mask)
        values[pending] = left << half | right
        pending = pending[values[pending] >= size]
    return values.astype(np.int64)


def permutation(size: int, *seeds: int) -> np.ndarray:
    """A whole random order of 0 .. size - 1."""
    return permute(np.arange(size), size, *seeds)


def _scatter(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class _Repeated:
    """A source that is shuffled anew for each epoch, as grain reads one."""

    def __init__(self, size: int, seed: int, number: int):
        self._size, self._number = size, number

        def block(epoch: int, first: int) -> list[int]:
            places = np.arange(first, min(first + BLOCK, size))
            return permute(places, size, seed, number, epoch).tolist()

        self._block = functools.lru_cache(4)(block)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Draw:
        epoch, place = divmod(index, self._size)
        return Draw(self._number, self._block(epoch, place - place % BLOCK)[place % BLOCK])
