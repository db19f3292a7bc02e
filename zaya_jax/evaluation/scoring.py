"""Log-probabilities of given tokens: how likely a model finds a continuation of a context."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zaya_jax.compilation import use_persistent_cache
from zaya_jax.config import ZayaConfig
from zaya_jax.errors import InputError, ZayaError
from zaya_jax.generation.batching import bucket, pad_rows
from zaya_jax.layouts import is_for_cpu
from zaya_jax.model import (
    Params,
    apply_ends,
    apply_layer,
    ends_params,
    forward,
    head,
    layer_params,
    place_tokens,
    rotary_tables,
)
from zaya_jax.zaya import Zaya

SHORTEST = 32  # tokens that a row is padded to
BATCH_TOKENS = 4096  # of a batch whose size nobody chose, padding included
PREDICTED = 64  # tokens whose logits exist at once: 64 MiB of them for ZAYA1-8B

Pair = tuple[Sequence[int], Sequence[int]]


class Scores(NamedTuple):
    """What a model makes of n tokens, each given all that stand before it.

    Attributes:
      logprobs: float32 [n], natural logarithms.
      best: bool [n], whether the token is the most probable one (of equal ones, the first).
    """

    logprobs: np.ndarray
    best: np.ndarray

    @property
    def total(self) -> float:
        """Log-probability of all of them together."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def greedy(self) -> bool:
        """Whether greedy decoding would give exactly these tokens."""
        return bool(self.best.all())


def score(model: Zaya, pairs: Sequence[Pair], batch_size: int | None = None) -> list[Scores]:
    """Scores each continuation behind its context, in the order given; see `iterate_scores`."""
    found = dict(iterate_scores(model, pairs, batch_size))
    return [found[number] for number in range(len(pairs))]


def iterate_scores(
    model: Zaya, pairs: Sequence[Pair], batch_size: int | None = None
) -> Iterator[tuple[int, Scores]]:
    """Scores each continuation behind its context; gives each pair's number and scores as soon as
    they are known, the longest first.

    Rows are padded to powers of two, for each of which one program is compiled. What several pairs
    share entirely, as contexts with continuations of one token do, is read once. Logits are
    computed for the tokens of continuations only, and of 64 at a time.

    Args:
      model: in any form; on the CPU, one loaded with `layout="decoding"` is fastest.
      pairs: token ids of a context and of its continuation, each at least one.
      batch_size: rows read at once, made a power of two; by default as many as make up 4096 tokens.

    Raises:
      InputError: an empty context or continuation, an unknown token, a pair longer than the
        model's context and the one token behind it, or a batch size below 1.
      ZayaError: logits that hold NaN.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    for number, pair in enumerate(pairs):
        _check(number, pair, model.config)
    use_persistent_cache()
    # The last token is only predicted, never read: pairs that differ in nothing else share a row.
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        groups.setdefault((*context, *continuation)[:-1], []).append(number)
    waiting = sorted(groups, key=len, reverse=True)
    while waiting:
        length = bucket(len(waiting[0]), SHORTEST)
        size = bucket(batch_size) if batch_size else max(1, BATCH_TOKENS // length)
        alike = sum(bucket(len(row), SHORTEST) == length for row in waiting)
        size = min(size, bucket(alike))
        rows, waiting = waiting[: min(size, alike)], waiting[min(size, alike) :]
        numbers = [groups[row] for row in rows]
        yield from _score_rows(model, rows, numbers, pairs, (size, length))


def _check(number: int, pair: Pair, config: ZayaConfig) -> None:
    context, continuation = pair
    if not len(context) or not len(continuation):
        empty = "continuation" if len(context) else "context"
        raise InputError(f"pair {number} has an empty {empty}: give it at least one token")
    tokens = np.concatenate([np.asarray(context), np.asarray(continuation)])
    if tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise InputError(f"pair {number} has tokens outside the vocabulary of {config.vocab_size}")
    if len(tokens) > config.max_position_embeddings + 1:
        raise InputError(
            f"pair {number} has {len(tokens)} tokens; the model reads "
            f"{config.max_position_embeddings} and predicts one more"
        )


def _score_rows(
    model: Zaya,
    rows: list[tuple[int, ...]],
    numbers: list[list[int]],
    pairs: Sequence[Pair],
    shape: tuple[int, int],
) -> Iterator[tuple[int, Scores]]:
    """Scores the pairs of those `numbers` for each row, in a batch [B, S] of the given shape."""
    config, (size, length) = model.config, shape
    padding = [(config.pad_token_id,)] * (size - len(rows))
    hidden = _read(model.params, config, *pad_rows([*rows, *padding], length, config.pad_token_id))
    wanted, places = [], []
    for slot, (row, group) in enumerate(zip(rows, numbers, strict=True)):
        for number in group:
            target = pairs[number][1]
            start = len(row) - len(target)  # a token is predicted at the position before its own
            wanted.append(number)
            places.append([(slot, start + i, token) for i, token in enumerate(target)])
    logprobs, best = _predict(model.params, config, hidden, np.concatenate(places))
    ends = np.cumsum([len(place) for place in places])[:-1]
    for number, *part in zip(wanted, np.split(logprobs, ends), np.split(best, ends), strict=True):
        if np.isnan(part[0]).any():
            raise ZayaError(f"pair {number}: the model's logits hold NaN")
        yield number, Scores(*part)


def _read(params: Params, config: ZayaConfig, tokens: np.ndarray, lengths: np.ndarray) -> jax.Array:
    """Hidden states [B, S, D] of right-padded rows. As in generation, stacked layers are one
    program, and others are called one by one, which compiles in seconds."""
    if not isinstance(params["params"]["layers"], tuple):
        return _forward(params, config, tokens, new_lengths=lengths).hidden
    ends = ends_params(params)
    h, where, rotary = _embed(ends, config, tokens, lengths)
    router_state = None
    if alike := is_for_cpu(params):  # all layers are one program
        router_state = jnp.zeros((*h.shape[:-1], config.router_hidden_size))
    for i, kind in enumerate(config.layer_types):
        first = i == 0 and not alike
        h, router_state, _, _ = _layer(
            layer_params(params, i), config, kind, first, h, router_state, where, rotary[kind], None
        )
    return _ends(ends, config, "final_norm", h)


_forward = jax.jit(forward, static_argnames="config")
_ends = jax.jit(apply_ends, static_argnames=("config", "method"))
_layer = jax.jit(
    apply_layer,
    static_argnames=("config", "kind", "first"),
    donate_argnames=("h", "router_state"),
)


@partial(jax.jit, static_argnames="config")
def _embed(ends, config, tokens, lengths):
    """What the layers need of tokens [B, S]: the stream, their places, and rotary tables."""
    where = place_tokens(tokens, new_lengths=lengths)
    rotary = rotary_tables(jnp.arange(tokens.shape[1])[None], config)
    return apply_ends(ends, config, "embed", tokens), where, rotary


def _predict(
    params: Params, config: ZayaConfig, hidden: jax.Array, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities, and whether they are the highest, of tokens at int [N, 3] (row, position,
    token), a few at a time."""
    padded = np.zeros((-(-len(places) // PREDICTED), PREDICTED, 3), np.int32)
    padded.reshape(-1, 3)[: len(places)] = places
    ends = ends_params(params)
    parts = [_predict_chunk(ends, config, hidden, *chunk.T) for chunk in padded]
    logprobs, best = (np.concatenate(part)[: len(places)] for part in zip(*parts, strict=True))
    return logprobs, best


@partial(jax.jit, static_argnames="config")
def _predict_chunk(ends, config, hidden, rows, positions, tokens):
    logits = head(ends, config, hidden[rows, positions])
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    largest = jnp.max(logits, axis=-1, keepdims=True)
    index = jnp.arange(logits.shape[-1])
    first = jnp.min(jnp.where(logits == largest, index, logits.shape[-1]), axis=-1)
    return chosen - jax.nn.logsumexp(logits, axis=-1), first == tokens
