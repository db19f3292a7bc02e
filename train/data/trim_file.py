"""Answer-preserving trimming of whole files of conversations."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import fsspec
from fsspec.utils import infer_compression

from train.data.cache import LOGGED_BAD, NAMED_BAD, check_bad_share
from train.data.examples import check_conversation
from train.data.files import find_files
from train.data.records import BadRecord, FileReader, Record, parse
from train.data.trimming import OUTCOMES, Outcome, trim
from train.data.workers import in_order
from zaya_jax.errors import DataError, InputError
from zaya_jax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass
class Tally:
    """Conversations with the same outcome."""

    records: int = 0
    tokens: int = 0
    tokens_kept: int = 0


@dataclass
class TrimStatistics:
    """What became of a file's records."""

    outcomes: dict[Outcome, Tally] = field(
        default_factory=lambda: {outcome: Tally() for outcome in OUTCOMES}
    )
    bad: int = 0

    @property
    def records(self) -> int:
        return self.bad + sum(tally.records for tally in self.outcomes.values())


class _Line(NamedTuple):
    content: bytes  # empty where the conversation was dropped
    outcome: Outcome
    tokens: int
    tokens_kept: int


@dataclass(frozen=True)
class _TrimRecords:
    """The work of a process."""

    tokenizer: Tokenizer
    budget: int

    def __call__(self, records: list[Record]) -> list[_Line | tuple[str, str]]:
        results: list[_Line | tuple[str, str]] = []
        for record in records:
            try:
                results.append(self._trim(record))
            except (BadRecord, InputError) as error:
                results.append((record.place, str(error)))
            except UnicodeEncodeError:  # a lone surrogate, as "\ud800" in JSON
                results.append((record.place, "holds text that is no valid Unicode"))
        return results

    def _trim(self, record: Record) -> _Line:
        fields = parse(record)
        messages, tools = check_conversation(fields)
        trimmed = trim(messages, self.budget, self.tokenizer, tools)
        content = b""
        if trimmed.outcome == "whole":
            content = record.content
        elif trimmed.messages is not None:
            fields = {**fields, "messages": trimmed.messages}
            content = json.dumps(fields, ensure_ascii=False).encode()
        return _Line(content, trimmed.outcome, trimmed.tokens, trimmed.tokens_kept)


def trim_file(
    source: str,
    destination: Path,
    budget: int,
    tokenizer: Tokenizer,
    *,
    workers: int | None = None,
    max_bad_share: float = 0.01,
) -> TrimStatistics:
    """Trims every conversation of a JSONL file; those that already fit are copied as they are.

    The destination appears when it is complete, and stays as it was where that fails.

    Args:
      source: file, glob or URL, as for a training source; perhaps compressed.
      destination: file, compressed if its name says so.
      budget: tokens of a conversation after the chat template.
      workers: as in `DataConfig`, and so is `max_bad_share`.

    Raises:
      DataError: the source is missing, is the destination, or has too many bad records; or the
        destination cannot be written.
    """
    if budget < 1:
        raise DataError(f"budget must be at least 1 token, got {budget}")
    files = find_files(source)
    target = os.path.realpath(destination)
    if any(os.path.realpath(file.path) == target for file in files):
        raise DataError(f"{destination}: is the source too; give another destination")
    statistics = TrimStatistics()
    first: list[tuple[str, str]] = []
    with _replacing(Path(target)) as output:
        work = _TrimRecords(tokenizer, budget)
        for results in in_order(work, FileReader(files, only_lines=True), workers):
            for result in results:
                if isinstance(result, _Line):
                    _count(statistics.outcomes[result.outcome], result)
                    output.write(result.content + b"\n" if result.content else b"")
                    continue
                statistics.bad += 1
                if len(first) < LOGGED_BAD:
                    first.append(result)
                    log.warning("%s: %s; skipped", *result)
        check_bad_share(
            source, statistics.bad, statistics.records, first[:NAMED_BAD], max_bad_share
        )
    return statistics


def _count(tally: Tally, line: _Line) -> None:
    tally.records += 1
    tally.tokens += line.tokens
    tally.tokens_kept += line.tokens_kept


@contextlib.contextmanager
def _replacing(file: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of `file` when the block ends, unless it raises."""
    if not file.parent.is_dir() or (file.exists() and not file.is_file()):
        raise DataError(f"{file}: cannot be written (no such folder, or no file itself)")
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    try:
        compression = infer_compression(file.name)
        with fsspec.open(str(unfinished), "wb", compression=compression) as output:
            yield output
        with open(unfinished, "rb") as written:
            os.fsync(written.fileno())
        unfinished.replace(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
