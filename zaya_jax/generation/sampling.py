"""Sampling settings, and the sampler: one token per row, each from its own random stream."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from zaya_jax.errors import InputError

MIN_TEMPERATURE = 1e-4  # below it, scaled logits overflow float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to continue a prompt. Defaults are the authors' recommendation for everything but agents
    and code.

    Attributes:
      max_new_tokens: at most this many tokens, at least 1.
      temperature: 0 takes the most probable token.
      top_p: keeps the most probable tokens that together reach this probability; 1 keeps all.
      top_k: keeps this many; 0 keeps all.
      min_p: keeps tokens at least this probable relative to the most probable one; 0 keeps all.
      seed: two runs with the same seed and prompt give the same tokens.
      stop: strings that end the text, which is cut before them.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else self.stop)
        checks = {
            "max_new_tokens": lambda n: n >= 1 and n == int(n),
            "temperature": lambda t: t == 0 or MIN_TEMPERATURE <= t < math.inf,
            "top_p": lambda p: 0 < p <= 1,
            "top_k": lambda k: k >= 0 and k == int(k),
            "min_p": lambda p: 0 <= p <= 1,
            "seed": lambda seed: 0 <= seed < 2**32 and seed == int(seed),
            "stop": lambda stop: all(isinstance(text, str) and text for text in stop),
        }
        for name, good in checks.items():
            value = getattr(self, name)
            try:
                fits = good(value)
            except TypeError:
                fits = False
            if not fits:
                raise InputError(f"{name} is out of range: {value!r}")


class Request(NamedTuple):
    """What decoding needs to know of each of B rows; rows differ freely within one compiled
    program."""

    request_id: jax.Array  # int32 [B]
    seed: jax.Array  # uint32 [B]
    temperature: jax.Array  # float32 [B]
    top_p: jax.Array  # float32 [B]
    top_k: jax.Array  # int32 [B]
    min_p: jax.Array  # float32 [B]
    stop_tokens: jax.Array  # int32 [B, K], filled up with -1
    remaining: (
        jax.Array
    )  # int32 [B], tokens the row may still sample; 0 for a row that has finished


class Sample(NamedTuple):
    """One token per row."""

    token: jax.Array  # int32 [B]
    logprob: jax.Array  # float32 [B], under the temperature (1 where it is 0), among all tokens
    sampled_logprob: jax.Array  # float32 [B], among the tokens that top-k, top-p and min-p keep


def sample(logits: jax.Array, request: Request, positions: jax.Array) -> Sample:
    """Samples from float32 logits [B, V] for the tokens at int32 positions [B].

    A token's random key depends on its seed, request and position alone, never on its row or
    neighbours.
    """
    greedy = request.temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, request.temperature)[:, None]
    filters = (request.top_k > 0) | (request.top_p < 1) | (request.min_p > 0)
    kept = jax.lax.cond(jnp.any(filters), _truncate, lambda x, _: x, scaled, request)

    def noise(seed: jax.Array, request_id: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), request_id), position)
        return jax.random.gumbel(key, logits.shape[1:])

    drawn = jnp.argmax(kept + jax.vmap(noise)(request.seed, request.request_id, positions), axis=-1)
    token = jnp.where(greedy, jnp.argmax(logits, axis=-1), drawn)

    def logprob(x: jax.Array) -> jax.Array:
        chosen = jnp.take_along_axis(x, token[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(x, axis=-1)

    sampled = jnp.where(greedy, 0.0, logprob(kept))
    return Sample(token.astype(jnp.int32), logprob(scaled), sampled)


def _truncate(scaled: jax.Array, request: Request) -> jax.Array:
    """-inf for the tokens that a row's top-k, then top-p, then min-p drop; ties with the last one
    kept stay."""
    ordered = jnp.sort(scaled, axis=-1, descending=True)
    rank = jnp.arange(scaled.shape[-1])
    keep = (request.top_k[:, None] == 0) | (rank < request.top_k[:, None])
    probability = jax.nn.softmax(jnp.where(keep, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    keep &= (before < request.top_p[:, None]) | (request.top_p[:, None] >= 1) | (rank == 0)
    keep &= probability >= request.min_p[:, None] * probability[:, :1]
    last = jnp.sum(keep, axis=-1, keepdims=True) - 1
    threshold = jnp.take_along_axis(ordered, last, axis=-1)
    return jnp.where(scaled >= threshold, scaled, -jnp.inf)
