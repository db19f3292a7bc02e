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
      max_new_tokens: at most this many tokens; 0 only reads the prompt.
      temperature: 0 takes the most probable token.
      top_p: keeps the most probable tokens that together reach this probability; 1 keeps all.
      top_k: keeps this many; 0 keeps all.
      min_p: keeps tokens at least this probable relative to the most probable one; 0 keeps all.
      seed: two runs with the same seed and prompt give the same tokens.
      stop: strings that end the text, which is cut before them.
      stop_tokens: token ids that end it, beside those of the model's config.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: Sequence[str] = ()
    stop_tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else self.stop)
        checks = {
            "max_new_tokens": lambda n: n >= 0 and n == int(n),
            "temperature": lambda t: t == 0 or MIN_TEMPERATURE <= t < math.inf,
            "top_p": lambda p: 0 < p <= 1,
            "top_k": lambda k: k >= 0 and k == int(k),
            "min_p": lambda p: 0 <= p <= 1,
            "seed": lambda seed: 0 <= seed < 2**32 and seed == int(seed),
            "stop": lambda stop: all(isinstance(text, str) and text for text in stop),
            "stop_tokens": lambda ids: all(0 <= i < 2**31 and i == int(i) for i in ids),
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
    best = _argmax(logits)

    def logprob(x: jax.Array, token: jax.Array) -> jax.Array:
        chosen = jnp.take_along_axis(x, token[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(x, axis=-1)

    def draw(scaled: jax.Array) -> tuple[jax.Array, jax.Array]:
        filters = (request.top_k > 0) | (request.top_p < 1) | (request.min_p > 0)
        kept = jax.lax.cond(jnp.any(filters), _truncate, lambda x, _: x, scaled, request)
        drawn = _argmax(kept + _noise(request, positions, logits.shape[1]))
        token = jnp.where(greedy, best, drawn)
        return token, jnp.where(greedy, 0.0, logprob(kept, token))

    def take_best(_: jax.Array) -> tuple[jax.Array, jax.Array]:
        return best, jnp.zeros_like(positions, jnp.float32)

    token, sampled = jax.lax.cond(jnp.all(greedy), take_best, draw, scaled)
    return Sample(token.astype(jnp.int32), logprob(scaled, token), sampled)


def _argmax(x: jax.Array) -> jax.Array:
    """Index of the first largest number in each row of [B, V]; any where one is NaN. XLA's CPU
    backend runs `jnp.argmax` as a scalar loop, and these as two vectorised ones."""
    index = jnp.arange(x.shape[-1], dtype=jnp.int32)
    largest = jnp.max(x, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(x == largest, index, x.shape[-1]), axis=-1)
    return jnp.minimum(first, x.shape[-1] - 1)


def _noise(request: Request, positions: jax.Array, vocab_size: int) -> jax.Array:
    def row(seed: jax.Array, request_id: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), request_id), position)
        return jax.random.gumbel(key, (vocab_size,))

    return jax.vmap(row)(request.seed, request.request_id, positions)


def _truncate(scaled: jax.Array, request: Request) -> jax.Array:
    """-inf for the tokens that a row's top-k, then top-p, then min-p drop; ties with the last one
    kept stay.

    Each filter keeps the tokens from some logit on. That logit is found by bisection, as sorting a
    vocabulary costs more than a whole decoding step.
    """
    largest = jnp.max(scaled, axis=-1, keepdims=True)
    weight = jnp.exp(scaled - largest)  # proportional to the probability
    top_k = jnp.where(request.top_k == 0, scaled.shape[-1], request.top_k)
    bound = _bound(scaled, jnp.ones_like(scaled), top_k.astype(jnp.float32))
    mass = jnp.sum(jnp.where(scaled >= bound, weight, 0), axis=-1)
    nucleus = _bound(scaled, weight, request.top_p * mass)
    bound = jnp.maximum(bound, jnp.where(request.top_p[:, None] < 1, nucleus, bound))
    bound = jnp.maximum(bound, largest + jnp.log(request.min_p)[:, None])
    return jnp.where(scaled >= jnp.minimum(bound, largest), scaled, -jnp.inf)


def _bound(x: jax.Array, weight: jax.Array, limit: jax.Array) -> jax.Array:
    """Smallest number such that the x [B, V] above it weigh less than `limit` [B]; [B, 1].

    Bisects over the bit patterns of float32, in the order of the numbers.
    """

    def number(key: jax.Array) -> jax.Array:
        bits = jnp.where(key >> 31 == 1, key ^ jnp.uint32(1 << 31), ~key)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = low + (high - low) // 2
        above = jnp.sum(jnp.where(x > number(middle), weight, 0), axis=-1, keepdims=True)
        fits = above < limit[:, None]
        return jnp.where(fits, low, middle + 1), jnp.where(fits, middle, high)

    infinity = jnp.uint32(0xFF800000)
    start = jnp.zeros((x.shape[0], 1), jnp.uint32)
    ends = (start + ~infinity, start + infinity)
    return number(jax.lax.fori_loop(0, 32, halve, ends)[1])
