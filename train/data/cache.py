"""Tokenised sources on disk: made once for each content, tokenizer and setting, then mapped into
memory."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train.data.config import DataConfig, Source
from train.data.examples import Encoder, Example
from train.data.records import BadRecord, Record, open_source, parse
from train.data.workers import in_order
from zaya_jax.config import ZayaConfig
from zaya_jax.errors import DataError
from zaya_jax.text.tokenizer import Tokenizer

FORMAT = 1  # to be raised with every change of what a cache holds
TOKENS, OFFSETS, SPANS, SPAN_OFFSETS, BYTES = (
    "tokens.bin",
    "offsets.npy",
    "spans.bin",
    "span_offsets.npy",
    "bytes.npy",
)
BAD, INFO = "bad.jsonl", "info.json"
SPAN = np.dtype([("start", "<i4"), ("end", "<i4"), ("weight", "<f4")])
LOGGED_BAD = 100
NAMED_BAD = 3

log = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """Some records as examples."""

    tokens: np.ndarray  # of all examples, one after the other
    lengths: np.ndarray
    spans: np.ndarray  # SPAN, of all examples
    span_counts: np.ndarray
    bytes: np.ndarray
    records: int
    bad: list[tuple[str, str]]  # place and reason
    outcomes: Counter[str]  # of trimming


@dataclass(frozen=True)
class EncodeRecords:
    """The work of a tokenising process."""

    encoder: Encoder
    dtype: str

    def __call__(self, records: list[Record]) -> Encoded:
        examples: list[Example] = []
        bad = []
        for record in records:
            try:
                examples += self.encoder.examples(parse(record))
            except BadRecord as error:
                bad.append((record.place, str(error)))
        spans = [span for example in examples for span in example.spans]
        return Encoded(
            np.asarray([t for example in examples for t in example.tokens], self.dtype),
            np.asarray([len(example.tokens) for example in examples], np.int64),
            np.asarray([tuple(span) for span in spans], SPAN),
            np.asarray([len(example.spans) for example in examples], np.int64),
            np.asarray([example.bytes for example in examples], np.int64),
            len(records),
            bad,
            Counter(example.outcome for example in examples),
        )


class SourceCache:
    """A tokenised source.

    Attributes:
      key: names its content and everything it was made with.
      info: `records` read, `examples`, `tokens`, `bad` records, and conversations by what
        `trimming` did to them.
      offsets: int64 [examples + 1], where each example's tokens begin.
      bytes: int64 [examples], UTF-8 bytes of the text to learn.
    """

    def __init__(self, folder: Path, path: str):
        self.key, self.path = folder.name, path
        self.info: dict[str, Any] = json.loads((folder / INFO).read_text())
        self.offsets = np.load(folder / OFFSETS, mmap_mode="r")
        self.bytes = np.load(folder / BYTES, mmap_mode="r")
        self._tokens = _map(folder / TOKENS, np.dtype(self.info["dtype"]))
        self._spans = _map(folder / SPANS, SPAN)
        self._span_offsets = np.load(folder / SPAN_OFFSETS, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self, examples: np.ndarray) -> np.ndarray:
        """Tokens of each of the examples."""
        return self.offsets[examples + 1] - self.offsets[examples]

    def tokens(self, example: int) -> np.ndarray:
        return self._tokens[self.offsets[example] : self.offsets[example + 1]]

    def weights(self, example: int) -> np.ndarray:
        """float32, the weight in the loss of each token of an example."""
        weights = np.zeros(self.offsets[example + 1] - self.offsets[example], np.float32)
        for start, end, weight in self._spans[
            self._span_offsets[example] : self._span_offsets[example + 1]
        ]:
            weights[start:end] = weight
        return weights


def open_cache(
    source: Source, config: DataConfig, tokenizer: Tokenizer, model: ZayaConfig, length: int
) -> SourceCache:
    """The tokenised source, made now if there is none of this content and these settings.

    Of several processes that want it one makes it, and the others wait. It appears when it is
    complete.

    Raises:
      DataError: the source is missing or unreadable, has no example, or more bad records than
        `max_bad_share`; or the cache cannot be written.
    """
    on_long = source.resolved_on_long
    encoder = Encoder.of(tokenizer, model, source.format, length, on_long)
    reader = open_source(source)
    root = Path(config.cache).expanduser()
    facts = {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "bos": model.bos_token_id,
        "eos": list(model.eos_token_ids),
        "records": source.format,
        "length": length,
        "on_long": on_long,
        "content": reader.identity(root / "hashes"),
    }
    folder = root / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    if not _is_complete(folder):
        dtype = "<u2" if model.vocab_size <= 1 << 16 else "<u4"
        try:
            with _locked(folder) as unfinished:
                if not _is_complete(folder):
                    work = EncodeRecords(encoder, dtype)
                    _write(unfinished, in_order(work, reader, config.workers), facts, dtype)
                    shutil.rmtree(folder, ignore_errors=True)  # one that was damaged
                    unfinished.rename(folder)
        except OSError as error:
            where = error.filename or folder
            raise DataError(f"{where}: cannot be written ({error.strerror or error})") from None
    cache = SourceCache(folder, source.path)
    _report_bad(cache, folder / BAD, config.max_bad_share)
    if not len(cache):
        raise DataError(f"{source.path}: holds no example")
    return cache


def check_bad_share(path: str, bad: int, records: int, first: Iterable[Any], most: float) -> None:
    """Raises DataError, naming the first places, where too many records are bad."""
    if bad > most * records:
        places = "; ".join(f"{place}: {reason}" for place, reason in first)
        raise DataError(
            f"{path}: {bad:,} of {records:,} records are bad, more than max_bad_share "
            f"{most:g}; the first: {places}"
        )


def _report_bad(cache: SourceCache, file: Path, most: float) -> None:
    bad, records = cache.info["bad"], cache.info["records"]
    with open(file, encoding="utf-8") as lines:
        found = [json.loads(line) for _, line in zip(range(LOGGED_BAD), lines, strict=False)]
    for place, reason in found:
        log.warning("%s: %s; skipped", place, reason)
    if bad:
        log.warning("%s: %d of %d records skipped; all: %s", cache.path, bad, records, file)
    check_bad_share(cache.path, bad, records, found[:NAMED_BAD], most)


def _write(folder: Path, chunks: Iterable[Encoded], facts: dict[str, Any], dtype: str) -> None:
    lengths, span_counts, byte_counts = (np.zeros(1, np.int64) for _ in range(3))
    parts: list[list[np.ndarray]] = [[lengths], [span_counts], [byte_counts[:0]]]
    records = bad = 0
    outcomes: Counter[str] = Counter()
    with (
        open(folder / TOKENS, "wb") as tokens,
        open(folder / SPANS, "wb") as spans,
        open(folder / BAD, "w", encoding="utf-8") as bad_lines,
    ):
        for chunk in chunks:
            tokens.write(chunk.tokens.tobytes())
            spans.write(chunk.spans.tobytes())
            bad_lines.writelines(json.dumps(entry) + "\n" for entry in chunk.bad)
            for part, new in zip(
                parts, (chunk.lengths, chunk.span_counts, chunk.bytes), strict=True
            ):
                part.append(new)
            records, bad, outcomes = (
                records + chunk.records,
                bad + len(chunk.bad),
                outcomes + chunk.outcomes,
            )
    offsets, span_offsets = (np.cumsum(np.concatenate(part)) for part in parts[:2])
    np.save(folder / OFFSETS, offsets)
    np.save(folder / SPAN_OFFSETS, span_offsets)
    np.save(folder / BYTES, np.concatenate(parts[2]))
    info = {
        "made_with": facts,
        "dtype": dtype,
        "records": records,
        "examples": len(offsets) - 1,
        "tokens": int(offsets[-1]),
        "bad": bad,
        "trimming": dict(outcomes),
        "sizes": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    }
    (folder / INFO).write_text(json.dumps(info, indent=1))
    for path in [*folder.iterdir(), folder]:
        _sync(path)


def _is_complete(folder: Path) -> bool:
    """Whether a cache has all its files in full."""
    try:
        sizes = json.loads((folder / INFO).read_text())["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """An empty folder, next to `folder`, that this process alone writes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # goes with the process, however it ends
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            yield unfinished
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _map(file: Path, dtype: np.dtype) -> np.ndarray:
    if file.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(file, dtype, "r")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
