"""The generation core: everything that generates text is a loop around these three functions.

Their programs are compiled once per bucket, which is a (batch, chunk length, cache length) shape.
The form of the parameters says how they run. Stacked ones (`layouts.stack`) are one program, k
decoding steps included: right for accelerators. A tuple of layers runs layer by layer, each a call
of one compiled layer: that compiles in seconds whatever the depth, reads weights in place, and
keeps no second copy of them.

`state` is donated: keep a `snapshot` of one that is needed again.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.router.api import FREE
from zaya_jax.attention import Tokens
from zaya_jax.config import ZayaConfig
from zaya_jax.generation.sampling import Request, sample
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
from zaya_jax.state import DecodeState, LayerState

# In place of a token: the row had finished, or its logits hold NaN (which finishes it).
FINISHED, NAN = -1, -2


class Prefill(NamedTuple):
    """Result of `prefill_chunk` for tokens [B, S]."""

    last_logits: (
        jax.Array
    )  # float32 [B, V], of each row's last real token; undefined where it has none
    state: DecodeState
    experts: jax.Array  # uint8 [B, S, L]; 255 for padding


class Block(NamedTuple):
    """Result of `decode_block`: up to k tokens a row."""

    state: DecodeState
    last_logits: jax.Array  # float32 [B, V], to go on from
    request: Request  # with what is left of `remaining`
    tokens: jax.Array  # int32 [B, k], FINISHED after a row's last, NAN where logits are no numbers
    logprobs: jax.Array  # float32 [B, k]
    sampled_logprobs: jax.Array  # float32 [B, k]
    experts: (
        jax.Array
    )  # uint8 [B, k, L]; 255 where the token was not forwarded, as a row's last never is


def prefill_chunk(
    params: Params,
    config: ZayaConfig,
    tokens: jax.Array | np.ndarray,
    new_lengths: jax.Array | np.ndarray,
    state: DecodeState,
) -> Prefill:
    """Reads a chunk of every row's prompt, int32 [B, S] with new_lengths [B] real tokens, behind
    what `state` holds."""
    if not isinstance(params["params"]["layers"], tuple):
        return _prefill_stacked(params, config, tokens, new_lengths, state)
    ends = ends_params(params)
    h, where, rotary = _embed(ends, config, tokens, new_lengths, state.lengths)
    h, layers, experts = _run_layers(params, config, h, where, rotary, state.layers())
    capacity = state.capacity
    logits, lengths, chosen = _read_out(ends, config, h, where, experts, capacity)
    return Prefill(logits, DecodeState.from_layers(layers, lengths), chosen)


@partial(jax.jit, donate_argnames="state")
def insert_rows(
    state: DecodeState, rows: jax.Array | Sequence[int], other: DecodeState
) -> DecodeState:
    """`state` with the given rows replaced by those of `other`, which has the same capacity."""
    return state.insert_rows(jnp.asarray(rows), other)


def decode_block(
    params: Params,
    config: ZayaConfig,
    state: DecodeState,
    last_logits: jax.Array,
    request: Request,
    k: int,
) -> Block:
    """Samples up to k tokens a row, starting from the prefill's own logits; ends early when every
    row has finished. `last_logits` is donated too.

    A row finishes with a stop token, its last allowed one, one for which the state has no room, or
    logits that are no numbers. That token is not forwarded, so the row's state ends before it.
    """
    if not isinstance(params["params"]["layers"], tuple):
        return _decode_stacked(params, config, state, last_logits, request, k)
    ends, layers, capacity = ends_params(params), state.layers(), state.capacity
    progress = _start(config, state.lengths, last_logits, request, k)
    for i in range(k):
        progress, h, where, rotary = _choose(ends, config, progress, np.int32(i), capacity)
        h, layers, experts = _run_layers(params, config, h, where, rotary, layers)
        progress = _record(ends, config, progress, np.int32(i), where, h, experts)
        if not np.asarray(progress.request.remaining).any():
            break
    return _as_block(progress, layers)


class _Progress(NamedTuple):
    """A `Block` in the making, without the layers' state."""

    lengths: jax.Array
    last_logits: jax.Array
    request: Request
    tokens: jax.Array
    logprobs: jax.Array
    sampled_logprobs: jax.Array
    experts: jax.Array


def _as_block(progress: _Progress, layers: Sequence[LayerState]) -> Block:
    values = progress._asdict()
    return Block(DecodeState.from_layers(layers, values.pop("lengths")), **values)


@partial(jax.jit, static_argnames=("config", "k"), donate_argnames="last_logits")
def _start(
    config: ZayaConfig, lengths: jax.Array, last_logits: jax.Array, request: Request, k: int
) -> _Progress:
    batch = last_logits.shape[0]
    return _Progress(
        lengths,
        last_logits,
        request,
        jnp.full((batch, k), FINISHED, jnp.int32),
        jnp.zeros((batch, k)),
        jnp.zeros((batch, k)),
        jnp.full((batch, k, config.num_hidden_layers), FREE, jnp.uint8),
    )


def _sample(
    config: ZayaConfig, progress: _Progress, i: jax.Array, capacity: int
) -> tuple[_Progress, jax.Array, jax.Array]:
    """Token i of each unfinished row; tokens [B, 1] to forward, and how many of them [B] go on."""
    p, request = progress, progress.request
    active = request.remaining > 0
    token, logprob, sampled_logprob = sample(p.last_logits, request, p.lengths)
    broken = jnp.any(jnp.isnan(p.last_logits), axis=-1)
    stops = jnp.any(token[:, None] == request.stop_tokens, axis=-1)
    stops |= broken | (p.lengths >= capacity)
    remaining = jnp.where(active & ~stops, request.remaining - 1, 0)
    shown = jnp.where(active, jnp.where(broken, NAN, token), FINISHED)
    progress = p._replace(
        request=request._replace(remaining=remaining),
        tokens=p.tokens.at[:, i].set(shown),
        logprobs=p.logprobs.at[:, i].set(jnp.where(active, logprob, 0)),
        sampled_logprobs=p.sampled_logprobs.at[:, i].set(jnp.where(active, sampled_logprob, 0)),
    )
    goes_on = remaining > 0
    tokens = jnp.where(goes_on, token, config.pad_token_id)[:, None]
    return progress, tokens, goes_on.astype(jnp.int32)


def _advance(
    progress: _Progress, i: jax.Array, count: jax.Array, logits: jax.Array, experts: jax.Array
) -> _Progress:
    """Takes in what the model made of token i: logits [B, V] and experts [B, L] of the `count` [B]
    rows that went on."""
    return progress._replace(
        lengths=progress.lengths + count,
        last_logits=jnp.where(count[:, None] > 0, logits, progress.last_logits),
        experts=progress.experts.at[:, i].set(experts),
    )


# Layer by layer


@partial(jax.jit, static_argnames=("config", "capacity"), donate_argnames="progress")
def _choose(
    ends: Params, config: ZayaConfig, progress: _Progress, i: jax.Array, capacity: int
) -> tuple[_Progress, jax.Array, Tokens, Any]:
    """The first program of a decoding step: samples and embeds."""
    progress, tokens, count = _sample(config, progress, i, capacity)
    return progress, *_embed(ends, config, tokens, count, progress.lengths)


@partial(jax.jit, static_argnames="config", donate_argnames="progress")
def _record(
    ends: Params,
    config: ZayaConfig,
    progress: _Progress,
    i: jax.Array,
    where: Tokens,
    h: jax.Array,
    experts: Sequence[jax.Array],
) -> _Progress:
    """The last program of a decoding step: from the layers' output [B, 1, D] to new logits."""
    logits = head(ends, config, apply_ends(ends, config, "final_norm", h)[:, 0])
    chosen = jnp.stack(experts, axis=-1)[:, 0]
    return _advance(progress, i, where.new_lengths, logits, chosen)


@partial(jax.jit, static_argnames="config")
def _embed(
    ends: Params,
    config: ZayaConfig,
    tokens: jax.Array,
    new_lengths: jax.Array,
    lengths: jax.Array,
) -> tuple[jax.Array, Tokens, dict[str, tuple[jax.Array, jax.Array]]]:
    """What the layers need of tokens [B, S]: the stream, their places, and rotary tables."""
    where = place_tokens(tokens, None, new_lengths, lengths)
    positions = lengths[:, None] + jnp.arange(tokens.shape[1])
    return apply_ends(ends, config, "embed", tokens), where, rotary_tables(positions, config)


_layer = jax.jit(
    apply_layer,
    static_argnames=("config", "kind", "first"),
    donate_argnames=("h", "router_state", "state"),
)


def _run_layers(
    params: Params,
    config: ZayaConfig,
    h: jax.Array,
    where: Tokens,
    rotary: dict[str, tuple[jax.Array, jax.Array]],
    layers: list[LayerState],
) -> tuple[jax.Array, list[LayerState], list[jax.Array]]:
    """Calls the compiled layer once for each of an unstacked tree."""
    router_state, after, chosen = None, [], []
    if alike := is_for_cpu(params):  # all layers are one program
        router_state = jnp.zeros((*h.shape[:-1], config.router_hidden_size))
    for i, kind in enumerate(config.layer_types):
        first = i == 0 and not alike
        h, router_state, state, experts = _layer(
            layer_params(params, i),
            config,
            kind,
            first,
            h,
            router_state,
            where,
            rotary[kind],
            layers[i],
        )
        after.append(state)
        chosen.append(experts)
    return h, after, chosen


@partial(jax.jit, static_argnames=("config", "capacity"))
def _read_out(
    ends: Params,
    config: ZayaConfig,
    h: jax.Array,
    where: Tokens,
    experts: Sequence[jax.Array],
    capacity: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits of each row's last real token, NaN where the row overflowed; its new length; experts
    [B, S, L]."""
    lengths = where.offsets + where.new_lengths
    logits = _last_logits(ends, config, apply_ends(ends, config, "final_norm", h), where)
    logits = jnp.where((lengths <= capacity)[:, None], logits, jnp.nan)
    return logits, lengths, jnp.stack(experts, axis=-1)


def _last_logits(params: Params, config: ZayaConfig, hidden: jax.Array, where: Tokens) -> jax.Array:
    last = jnp.maximum(where.new_lengths - 1, 0)[:, None, None]
    return head(params, config, jnp.take_along_axis(hidden, last, axis=1)[:, 0])


# As one program


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def _prefill_stacked(params, config, tokens, new_lengths, state):
    out = forward(params, config, tokens, new_lengths=new_lengths, state=state)
    assert out.state is not None
    where = place_tokens(tokens, None, new_lengths)
    return Prefill(_last_logits(params, config, out.hidden, where), out.state, out.experts)


@partial(jax.jit, static_argnames=("config", "k"), donate_argnames=("state", "last_logits"))
def _decode_stacked(params, config, state, last_logits, request, k):
    def step(carry):
        i, progress, state = carry
        progress, tokens, count = _sample(config, progress, i, state.capacity)
        out = forward(params, config, tokens, new_lengths=count, state=state)
        logits = head(params, config, out.hidden[:, 0])
        return i + 1, _advance(progress, i, count, logits, out.experts[:, 0]), out.state

    def unfinished(carry):
        i, progress, _ = carry
        return (i < k) & jnp.any(progress.request.remaining > 0)

    start = jnp.int32(0), _start(config, state.lengths, last_logits, request, k), state
    _, progress, state = jax.lax.while_loop(unfinished, step, start)
    return _as_block(progress, state.layers())
