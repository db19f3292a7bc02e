"""`zaya data`: preparing training data."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import tyro
from rich.table import Table

from zaya_jax.cli.output import check_destination, console, messages, working, write_json
from zaya_jax.errors import DataError
from zaya_jax.loading import load_tokenizer

OUTCOME_NAMES = {
    "whole": "kept whole",
    "cut": "last reasoning cut",
    "deleted": "earlier reasoning deleted",
    "dropped": "dropped: answers too long",
}


@dataclasses.dataclass
class Data:
    """Prepare training data.

    trim: make every conversation of a JSONL file (fields `messages`, perhaps `tools`) fit into a
    number of tokens by cutting the end of its reasoning, never its answers. The output appears
    when it is complete.
    """

    action: tyro.conf.Positional[Literal["trim"]]
    """What to do."""
    source: tyro.conf.Positional[str]
    """JSONL file, glob or URL; perhaps compressed."""
    destination: tyro.conf.Positional[Path]
    """JSONL file to write; an earlier one is replaced."""
    budget: int
    """Tokens of a conversation after the chat template."""
    model: str | None = None
    """Checkpoint folder or hub id whose tokenizer and chat template count; by default the embedded
    model."""
    workers: int | None = None
    """Processes; 0 for none but this one; by default one a processor."""
    max_bad_share: float = 0.01
    """Bad records are reported and skipped; a larger share than this of all is an error."""
    json: Path | None = None
    """Also write the statistics to this file."""

    def run(self) -> None:
        try:
            from train.data.config import DataConfig
            from train.data.trim_file import trim_file
        except ModuleNotFoundError as error:
            raise DataError(
                f"preparing data needs the extra `train`: pip install 'zaya-jax[train]' "
                f"(there is no {error.name})"
            ) from None
        check_destination(self.json)
        DataConfig(workers=self.workers, max_bad_share=self.max_bad_share)  # checks them
        tokenizer = load_tokenizer(self.model)
        with working(f"Trimming {self.source}"), _showing_log("train.data"):
            done = trim_file(
                self.source,
                self.destination,
                self.budget,
                tokenizer,
                workers=self.workers,
                max_bad_share=self.max_bad_share,
            )
        table = Table("conversations", "records", "tokens before", "after")
        for outcome, tally in done.outcomes.items():
            numbers = (tally.records, tally.tokens, tally.tokens_kept)
            table.add_row(OUTCOME_NAMES[outcome], *(f"{number:,}" for number in numbers))
        table.add_row("bad records, skipped", f"{done.bad:,}")
        console.print(table)
        write_json(self.json, {"budget": self.budget, **dataclasses.asdict(done)})


class _Messages(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        messages.print(record.getMessage(), markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _showing_log(name: str) -> Iterator[None]:
    """Shows what is logged as lines on stderr."""
    logger, handler = logging.getLogger(name), _Messages()
    logger.addHandler(handler)
    propagated, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated
