"""Batches of packed rows: planned from lengths alone, the same in every process, and read where
they are needed."""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from train.data.batch import Batch
from train.data.cache import SourceCache, open_cache
from train.data.config import DataConfig
from train.data.mixture import Draw, mixture, permutation
from train.data.packing import pack
from zaya_jax.config import ZayaConfig
from zaya_jax.errors import ConfigError, DataError
from zaya_jax.text.tokenizer import Tokenizer

Row = list[Draw]


class Plan:
    """The examples of a batch's rows, of which nothing is read yet.

    Attributes:
      examples: those of each row, in their order along it. An empty row is padding.
      length: tokens of a row, padding included.
      tokens: real tokens of all rows.
      bytes: UTF-8 bytes of the text that all rows learn.
    """

    def __init__(self, caches: Sequence[SourceCache], examples: list[Row], length: int):
        self._caches = caches
        self.examples, self.length = examples, length
        drawn = [(caches[source], number) for row in examples for source, number in row]
        self.tokens = sum(int(c.offsets[n + 1] - c.offsets[n]) for c, n in drawn)
        self.bytes = sum(int(cache.bytes[number]) for cache, number in drawn)

    def __len__(self) -> int:
        return len(self.examples)

    def rows(self, selection: slice | Sequence[int] = slice(None)) -> Batch:
        """Reads some rows, by default all: NumPy arrays [selected rows, length]."""
        rows = range(len(self))[selection] if isinstance(selection, slice) else selection
        shape = len(rows), self.length
        batch = Batch(
            np.zeros(shape, np.int32),
            np.zeros(shape, np.int32),
            np.full(shape, -1, np.int32),
            np.zeros(shape, np.float32),
        )
        for place, row in enumerate(rows):
            self._fill(Batch(*(array[place] for array in batch)), self.examples[row])
        return batch

    def _fill(self, row: Batch, examples: Row) -> None:
        start = 0
        for segment, (source, number) in enumerate(examples, 1):
            tokens = self._caches[source].tokens(number)
            end = start + len(tokens)
            row.tokens[start:end] = tokens
            row.segment_ids[start:end] = segment
            row.targets[start : end - 1] = tokens[1:]
            row.weights[start : end - 1] = self._caches[source].weights(number)[1:]
            start = end


class Batches:
    """An endless iterator over batches.

    The order of examples is a function of the configuration and the sources' contents: it depends
    neither on the number of processes, nor on that of workers, nor on rows a batch.

    Args:
      config: the mixture.
      tokenizer, model: of the model to train.
      rows: of a batch, over all processes.
      length: of a row, in tokens; what is longer is split, trimmed or skipped.

    Raises:
      DataError: see `open_cache`.
      ConfigError: there is no source, or the numbers make no batch.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        model: ZayaConfig,
        *,
        rows: int,
        length: int,
    ):
        self.caches = _open_caches(config, tokenizer, model, rows, length)
        self._rows, self._length = rows, length
        self._seed, self._window_size = config.seed, config.window
        weights = [source.weight for source in config.sources]
        self._mixture = mixture([len(cache) for cache in self.caches], weights, config.seed)
        self._identity = {
            "length": length,
            "seed": config.seed,
            "window": config.window,
            "sources": [cache.key for cache in self.caches],
            "weights": weights,
        }
        self._window, self._row = 0, 0  # where the next batch begins
        self._ahead: tuple[int, Future[list[Row]]] | None = None
        self._planner = ThreadPoolExecutor(1, "packing")
        self._packed: list[Row] = []
        self._packed_window = -1
        self._slots = self._filled = 0

    def __iter__(self) -> Iterator[Plan]:
        return self

    def __next__(self) -> Plan:
        examples: list[Row] = []
        while len(examples) < self._rows:
            packed = self._packed_rows(self._window)
            taken = packed[self._row : self._row + self._rows - len(examples)]
            examples += taken
            self._row += len(taken)
            if self._row == len(packed):
                self._window, self._row = self._window + 1, 0
        plan = Plan(self.caches, examples, self._length)
        self._slots += self._rows * self._length
        self._filled += plan.tokens
        return plan

    @property
    def efficiency(self) -> float:
        """Share of real tokens in the batches given out so far by this object."""
        return self._filled / self._slots if self._slots else 1.0

    def statistics(self) -> dict[str, dict[str, Any]]:
        """Of each source, by its path: `records`, `bad` ones, `examples`, `tokens`, conversations
        by what `trimming` did to them."""
        names = ("records", "bad", "examples", "tokens", "trimming")
        return {c.path: {name: c.info[name] for name in names} for c in self.caches}

    def get_state(self) -> dict[str, Any]:
        """The place of the next batch, as JSON: with any rows a batch, it goes on exactly there."""
        return {**self._identity, "next_window": self._window, "next_row": self._row}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was called.

        Raises:
          DataError: the state is of other data, or settings that change their order.
        """
        for name, ours in self._identity.items():
            if (theirs := state.get(name)) != ours:
                raise DataError(
                    f"the data's state does not belong to these data: {name} was {theirs!r}, "
                    f"is {ours!r}"
                )
        window, row = state.get("next_window"), state.get("next_row")
        if not isinstance(window, int) or not isinstance(row, int) or min(window, row) < 0:
            raise DataError(f"the data's state names no place: window {window!r}, row {row!r}")
        self._window, self._row = window, row

    def _packed_rows(self, window: int) -> list[Row]:
        """A window's rows; those of the next one are meanwhile packed."""
        if window != self._packed_window:
            if self._ahead is not None and self._ahead[0] == window:
                self._packed = self._ahead[1].result()
            else:
                self._packed = self._pack(window)
            self._packed_window = window
            self._ahead = window + 1, self._planner.submit(self._pack, window + 1)
        return self._packed

    def _pack(self, window: int) -> list[Row]:
        size = self._window_size
        draws = [self._mixture[place] for place in range(window * size, (window + 1) * size)]
        rows = _pack_draws(self.caches, draws, self._length)
        # Packing makes rows of few long examples first.
        order = permutation(len(rows), self._seed, len(self.caches), window)
        return [rows[place] for place in order]


class HeldOut:
    """Every example of the sources once, as batches, always the same: for perplexity and bits per
    byte. The sources' weights do not count.

    Attributes:
      tokens, bytes: of all batches, as in `Plan`.
    """

    def __init__(self, plans: list[Plan]):
        self.plans = plans
        self.tokens = sum(plan.tokens for plan in plans)
        self.bytes = sum(plan.bytes for plan in plans)

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[Plan]:
        return iter(self.plans)


def held_out(
    config: DataConfig,
    tokenizer: Tokenizer,
    model: ZayaConfig,
    *,
    rows: int,
    length: int,
    examples: int | None = None,
) -> HeldOut:
    """A fixed evaluation set; the last batch is filled up with empty rows.

    Args:
      examples: at most that many, drawn with the configuration's seed.
      others: as for `Batches`, and so are the errors.
    """
    caches = _open_caches(config, tokenizer, model, rows, length)
    draws = [Draw(source, n) for source, cache in enumerate(caches) for n in range(len(cache))]
    if examples is not None and examples < len(draws):
        chosen = np.sort(permutation(len(draws), config.seed)[:examples])
        draws = [draws[place] for place in chosen]
    packed = _pack_draws(caches, draws, length)
    plans = []
    for batch in itertools.batched(packed, rows):
        padding: list[Row] = [[] for _ in range(rows - len(batch))]
        plans.append(Plan(caches, [*batch, *padding], length))
    return HeldOut(plans)


def _open_caches(
    config: DataConfig, tokenizer: Tokenizer, model: ZayaConfig, rows: int, length: int
) -> list[SourceCache]:
    if not config.sources:
        raise ConfigError("sources is empty: name at least one to train on")
    if rows < 1:
        raise ConfigError(f"a batch must have at least 1 row, got {rows}")
    return [open_cache(source, config, tokenizer, model, length) for source in config.sources]


def _pack_draws(caches: Sequence[SourceCache], draws: Sequence[Draw], length: int) -> list[Row]:
    sources, numbers = np.asarray(draws, np.int64).reshape(-1, 2).T
    lengths = np.zeros(len(draws), np.int64)
    for source, cache in enumerate(caches):
        lengths[sources == source] = cache.lengths(numbers[sources == source])
    return [[draws[place] for place in row] for row in pack(lengths, length)]
