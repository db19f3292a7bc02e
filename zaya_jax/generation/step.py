"""The generation core: everything that generates text is a loop around these three functions.

`prefill_chunk` and `decode_block` are compiled once per bucket, which is a (batch, chunk length,
cache length) shape. Their `state` argument is donated: keep a `snapshot` of one that is needed
again.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.router.api import FREE
from zaya_jax.config import ZayaConfig
from zaya_jax.generation.sampling import Request, sample
from zaya_jax.model import Params, forward, head
from zaya_jax.state import DecodeState


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
    tokens: jax.Array  # int32 [B, k], -1 after a row has finished
    logprobs: jax.Array  # float32 [B, k]
    sampled_logprobs: jax.Array  # float32 [B, k]
    experts: (
        jax.Array
    )  # uint8 [B, k, L]; 255 where the token was not forwarded, as a row's last never is


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def prefill_chunk(
    params: Params,
    config: ZayaConfig,
    tokens: jax.Array,
    new_lengths: jax.Array,
    state: DecodeState,
) -> Prefill:
    """Reads a chunk of every row's prompt, int32 [B, S] with new_lengths [B] real tokens, behind
    what `state` holds."""
    out = forward(params, config, tokens, new_lengths=new_lengths, state=state)
    assert out.state is not None
    last = jnp.maximum(new_lengths - 1, 0)[:, None, None]
    hidden = jnp.take_along_axis(out.hidden, last, axis=1)[:, 0]
    return Prefill(head(params, config, hidden), out.state, out.experts)


def insert_rows(
    state: DecodeState, rows: jax.Array | Sequence[int], other: DecodeState
) -> DecodeState:
    """`state` with the given rows replaced by those of `other`, which has the same capacity."""
    return state.insert_rows(rows, other)


@partial(jax.jit, static_argnames=("config", "k"), donate_argnames=("state", "last_logits"))
def decode_block(
    params: Params,
    config: ZayaConfig,
    state: DecodeState,
    last_logits: jax.Array,
    request: Request,
    k: int,
) -> Block:
    """Samples up to k tokens a row, starting from the prefill's own logits; ends early when every
    row has finished.

    A row finishes with a stop token or its last allowed one. That token is not forwarded, so the
    row's state ends before it.
    """
    batch = last_logits.shape[0]
    start = Block(
        state,
        last_logits,
        request,
        jnp.full((batch, k), -1, jnp.int32),
        jnp.zeros((batch, k)),
        jnp.zeros((batch, k)),
        jnp.full((batch, k, config.num_hidden_layers), FREE, jnp.uint8),
    )

    def step(carry: tuple[jax.Array, Block]) -> tuple[jax.Array, Block]:
        i, block = carry
        request = block.request
        active = request.remaining > 0
        token, logprob, sampled_logprob = sample(block.last_logits, request, block.state.lengths)
        stops = jnp.any(token[:, None] == request.stop_tokens, axis=-1)
        remaining = jnp.where(active & ~stops, request.remaining - 1, 0)
        goes_on = remaining > 0
        out = forward(
            params,
            config,
            jnp.where(goes_on, token, config.pad_token_id)[:, None],
            new_lengths=goes_on.astype(jnp.int32),
            state=block.state,
        )
        assert out.state is not None
        logits = head(params, config, out.hidden[:, 0])
        return i + 1, Block(
            out.state,
            jnp.where(goes_on[:, None], logits, block.last_logits),
            request._replace(remaining=remaining),
            block.tokens.at[:, i].set(jnp.where(active, token, -1)),
            block.logprobs.at[:, i].set(jnp.where(active, logprob, 0)),
            block.sampled_logprobs.at[:, i].set(jnp.where(active, sampled_logprob, 0)),
            block.experts.at[:, i].set(out.experts[:, 0]),
        )

    def unfinished(carry: tuple[jax.Array, Block]) -> jax.Array:
        i, block = carry
        return (i < k) & jnp.any(block.request.remaining > 0)

    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), start))[1]
