"""What a run trains on: sources, their mixture, and how they are tokenised and packed."""

import dataclasses
import math
from typing import Literal

from zaya_jax.errors import ConfigError

OnLong = Literal["split", "trim", "skip"]
# What can be done with examples longer than a row, the default first.
ON_LONG: dict[str, tuple[OnLong, ...]] = {
    "text": ("split", "skip"),
    "chat": ("trim", "skip"),
    "tokens": ("skip",),
}
LARGEST_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Source:
    """Where records come from, and what they are.

    Raises:
      ConfigError: naming the field at fault.
    """

    path: str
    """A file or glob, here or at any fsspec URL (s3://, gs://, memory://); *.array_record files
    with a JSON object in each record; hf://NAME[:SPLIT] of the Hugging Face hub, or a folder that
    `save_to_disk` of `datasets` wrote, also with [:SPLIT]."""
    format: Literal["text", "chat", "tokens"] = "text"
    """text: documents, the field `text` of each record, or whole files where a file is no JSONL
    (*.jsonl, *.json, also compressed). chat: conversations, with the fields `messages` and
    perhaps `tools`, of which the assistant's turns are learned. tokens: the fields `prompt` and
    `response`, token ids, of which the response is learned."""
    weight: float = 1.0
    """Share of the mixture's examples, in proportion to the other sources' weights."""
    on_long: OnLong | None = None
    """Examples longer than a row: split into consecutive pieces (text; the default there), trim
    the reasoning and keep the answer (chat; the default there), or skip them as bad records (the
    default of tokens)."""

    def __post_init__(self):
        if not isinstance(self.path, str) or not self.path:
            raise ConfigError(f"source path must be a file, glob or URL, got {self.path!r}")
        where = f"source {self.path}:"
        if self.format not in ON_LONG:
            raise ConfigError(f"{where} format must be {', '.join(ON_LONG)}, got {self.format!r}")
        if not _is_number(self.weight) or not 0 < self.weight < math.inf:
            raise ConfigError(f"{where} weight must be a positive number, got {self.weight!r}")
        choices = ON_LONG[self.format]
        if self.on_long is not None and self.on_long not in choices:
            raise ConfigError(
                f"{where} on_long must be {' or '.join(choices)} for format {self.format}, "
                f"got {self.on_long!r}"
            )

    @property
    def resolved_on_long(self) -> OnLong:
        """`on_long`, or the format's default."""
        return self.on_long or ON_LONG[self.format][0]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """A mixture of sources, and how it becomes rows of tokens.

    Raises:
      ConfigError: naming the field at fault.
    """

    sources: tuple[Source, ...] = ()
    """At least one."""
    seed: int = 0
    """Of the order of examples, 0 to 2**32 - 1."""
    window: int = 4096
    """Examples that are packed into rows at a time: more of them fill rows better, where few
    examples fill a row."""
    workers: int | None = None
    """Processes that tokenise; 0 for none but this one; by default one a processor, at most 16.
    The result does not depend on it."""
    cache: str = "~/.cache/zaya-jax/data"
    """Folder of tokenised sources."""
    max_bad_share: float = 0.01
    """Bad records are counted, logged and skipped; a larger share than this of a source stops the
    run."""

    def __post_init__(self):
        object.__setattr__(self, "sources", tuple(self.sources))
        if not all(isinstance(source, Source) for source in self.sources):
            raise ConfigError("sources must be a list of sources, each with a path and a format")
        if not _is_integer(self.seed) or not 0 <= self.seed <= LARGEST_SEED:
            raise ConfigError(f"seed must lie in 0 .. {LARGEST_SEED}, got {self.seed!r}")
        if not _is_integer(self.window) or self.window < 1:
            raise ConfigError(f"window must be at least 1 example, got {self.window!r}")
        if self.workers is not None and (not _is_integer(self.workers) or self.workers < 0):
            raise ConfigError(f"workers must be a number of processes, got {self.workers!r}")
        if not isinstance(self.cache, str) or not self.cache:
            raise ConfigError(f"cache must be a folder, got {self.cache!r}")
        if not _is_number(self.max_bad_share) or not 0 <= self.max_bad_share <= 1:
            raise ConfigError(f"max_bad_share must lie in 0 .. 1, got {self.max_bad_share!r}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
