"""Rows of tokens as arrays: right padding, and the bucket shapes that keep programs from being
compiled anew."""

import itertools
from collections.abc import Sequence

import numpy as np

from zaya_jax.config import ZayaConfig
from zaya_jax.errors import InputError

MAX_CHUNK = 512


def bucket(size: int, smallest: int = 1) -> int:
    """The next power of two, at least `smallest`."""
    return max(smallest, 1 << (size - 1).bit_length())


def check_tokens(rows: Sequence[Sequence[int]], config: ZayaConfig) -> list[list[int]]:
    """Prompts as lists of ints. Raises InputError for ones that the model cannot read."""
    checked = []
    for number, row in enumerate(rows):
        try:
            array = np.asarray(row)
        except ValueError:
            array = np.empty((0, 0))
        if array.ndim != 1 or array.size == 0:
            raise InputError(f"prompt {number} is empty or no flat list of tokens")
        if array.dtype.kind not in "iu":
            raise InputError(f"prompt {number} has tokens that are no integers")
        outside = array[(array < 0) | (array >= config.vocab_size)]
        if outside.size:
            raise InputError(
                f"prompt {number} has token {outside[0]}, "
                f"outside the vocabulary of {config.vocab_size}"
            )
        if array.size >= config.max_position_embeddings:
            raise InputError(
                f"prompt {number} has {array.size} tokens, which leaves no room in the context of "
                f"{config.max_position_embeddings}"
            )
        checked.append([int(token) for token in array])
    return checked


def check_cuts(
    cuts: Sequence[Sequence[int]] | None, prompts: Sequence[Sequence[int]]
) -> list[tuple[int, ...]]:
    """Where the parts of each prompt end: at its cuts, and at its end. Raises InputError for cuts
    that are not ascending numbers inside the prompt."""
    if cuts is None:
        return [(len(prompt),) for prompt in prompts]
    if len(cuts) != len(prompts):
        raise InputError(f"{len(prompts)} prompts have {len(cuts)} lists of cuts")
    ends = [(*one, len(prompt)) for one, prompt in zip(cuts, prompts, strict=True)]
    for number, places in enumerate(ends):
        if any(a >= b for a, b in itertools.pairwise((0, *places))):
            raise InputError(
                f"prompt {number}: cuts must ascend inside its {places[-1]} tokens, "
                f"got {list(places[:-1])}"
            )
    return ends


def pad_rows(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded int32 [B, length] tokens and their int32 [B] real lengths."""
    tokens = np.full((len(rows), length), pad, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens, np.array([len(row) for row in rows], np.int32)


def from_left_padded(tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turns left-padded rows [B, S] with their attention mask into right-padded ones and lengths
    [B].

    Raises:
      InputError: a mask that is not zeros followed by ones.
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask).astype(bool)
    if tokens.ndim != 2 or mask.shape != tokens.shape:
        raise InputError(f"tokens {tokens.shape} and mask {mask.shape} must be two equal [B, S]")
    lengths = mask.sum(axis=1)
    expected = np.arange(tokens.shape[1]) >= (tokens.shape[1] - lengths)[:, None]
    if (mask != expected).any():
        raise InputError(f"row {int((mask != expected).any(axis=1).argmax())} is not left-padded")
    shifted = [np.roll(row, count) for row, count in zip(tokens, lengths, strict=True)]
    return np.stack(shifted).astype(np.int32), lengths.astype(np.int32)
