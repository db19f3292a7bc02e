"""Packs examples into rows of tokens, none of them cut."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from train.problems import Example
from zaya_jax.text.tokenizer import Tokenizer

POOL = 64  # examples that a row can choose from


class Batch(NamedTuple):
    """Packed rows; all arrays [B, S]."""

    tokens: Any  # int32
    segment_ids: Any  # int32; 1, 2, .. along a row, 0 for padding
    targets: Any  # int32, the token after each one
    mask: Any  # bool, True where the target belongs to a response


class Tokenized(NamedTuple):
    """An example's tokens, of which the first `prompt` ones are given."""

    tokens: list[int]
    prompt: int


def tokenize(example: Example, tokenizer: Tokenizer, eos: int) -> Tokenized:
    """The prompt exactly as generation encodes it, then the response and its end."""
    prompt = tokenizer.encode_chat([{"role": "user", "content": example.question}])
    return Tokenized([*prompt, *tokenizer.encode(example.response), eos], len(prompt))


def batches(stream: Iterable[Tokenized], rows: int, length: int) -> Iterator[Batch]:
    """Batches of `rows` packed rows of `length` tokens; an example waits until a row has room.

    Raises:
      ValueError: an example longer than a row.
    """
    stream = iter(stream)
    pool: list[Tokenized] = []
    while True:
        batch = Batch(*(np.zeros((rows, length), kind) for kind in (np.int32,) * 3 + (bool,)))
        for row in range(rows):
            pool += [next(stream) for _ in range(POOL - len(pool))]
            _fill(batch, row, pool)
        yield batch


def _fill(batch: Batch, row: int, pool: list[Tokenized]) -> None:
    """Moves examples from the pool into a row: the one that waited longest, then best fits."""
    room = batch.tokens.shape[1]
    if len(pool[0].tokens) > room:
        raise ValueError(f"an example has {len(pool[0].tokens)} tokens, a row only {room}")
    segment = 0
    while fitting := [example for example in pool if len(example.tokens) <= room]:
        example = max(fitting, key=lambda e: len(e.tokens)) if segment else pool[0]
        pool.remove(example)
        segment += 1
        start = batch.tokens.shape[1] - room
        end = start + len(example.tokens)
        batch.tokens[row, start:end] = example.tokens
        batch.segment_ids[row, start:end] = segment
        batch.targets[row, start : end - 1] = example.tokens[1:]
        batch.mask[row, start + example.prompt - 1 : end - 1] = True
        room -= len(example.tokens)
