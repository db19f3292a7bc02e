"""Compressed convolutional attention (arXiv 2510.04476) as a module: projections around the two ops
that do the work. Beside it, plain grouped-query attention, to compare with."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import api as attention
from pallas_kernels.cca_mix import api as cca_mix
from pallas_kernels.cca_mix.reference import rotate
from zaya_jax.config import ZayaConfig
from zaya_jax.layers import INIT, Linear
from zaya_jax.parallel import by_rows, context_size, from_previous, gather_sequence
from zaya_jax.state import LayerState


class Tokens(NamedTuple):
    """Where the tokens of one call stand, shared by all layers. B rows of S tokens."""

    valid: jax.Array  # bool [B, S], False for padding
    offsets: jax.Array  # int32 [B], tokens of the row before this call
    new_lengths: jax.Array  # int32 [B], real tokens of this call in each right-padded row
    # int32 [B, C], of all tokens of the row, also those that other devices have (`parallel`); 0 is
    # padding; None where rows are not packed
    segment_ids: jax.Array | None
    age: (
        jax.Array | None
    )  # int32 [B, S], tokens since the segment began; None where rows are not packed


class Convolution(nn.Module):
    """Parameters of one of CCA's causal convolutions: weight [channels, inputs per channel, taps]
    and bias."""

    channels: int
    inputs: int
    taps: int

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        weight = self.param("weight", INIT, (self.channels, self.inputs, self.taps))
        return weight, self.param("bias", nn.initializers.zeros, (self.channels,))


class Temperature(nn.Module):
    """Learned scale of each key head; 1 at the start (0 would silence every key)."""

    heads: int

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("temp", nn.initializers.ones, (self.heads,))


class Projections(nn.Module):
    """Maps the normed stream to queries, keys and both halves of the values, and holds the
    convolutions."""

    config: ZayaConfig

    def setup(self) -> None:
        c = self.config
        keys = c.num_key_value_heads * c.head_dim
        self.sizes = (c.num_attention_heads * c.head_dim, keys, keys // 2, keys // 2)
        self.q_proj, self.k_proj, self.v_proj_current, self.v_proj_delayed = (
            Linear(size, c.attention_bias) for size in self.sizes
        )
        self.fused = Linear(sum(self.sizes), c.attention_bias)  # all four, of `layouts.for_cpu`
        self.conv_qk_depthwise = Convolution(c.conv_channels, 1, c.cca_time0)
        self.conv_qk_grouped = Convolution(c.conv_channels, c.head_dim, c.cca_time1)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        if self.has_variable("params", "fused"):
            ends = np.cumsum(self.sizes)[:-1]
            q, k, current, delayed = jnp.split(self.fused(x), ends, axis=-1)
            return q, k, current, delayed
        return self.q_proj(x), self.k_proj(x), self.v_proj_current(x), self.v_proj_delayed(x)

    def mixing(self, temperature: jax.Array) -> cca_mix.Weights:
        initial = jnp.zeros(self.sizes[-1])
        if self.config.attention_bias:
            *_, initial = self(jnp.zeros((self.config.hidden_size,), temperature.dtype))
        return cca_mix.Weights(
            *self.conv_qk_depthwise(), *self.conv_qk_grouped(), temperature, initial
        )


class Attention(nn.Module):
    """Attention in the compressed space: [B, S, D] -> [B, S, D], and the layer's new decoding
    state."""

    config: ZayaConfig

    def setup(self) -> None:
        self.qkv_proj = Projections(self.config)
        self.qk_norm = Temperature(self.config.num_key_value_heads)
        self.o_proj = Linear(self.config.hidden_size, self.config.attention_bias)

    def __call__(
        self,
        x: jax.Array,
        tokens: Tokens,
        rotary: tuple[jax.Array, jax.Array],
        window: int | jax.Array | None,
        state: LayerState | None,
    ) -> tuple[jax.Array, LayerState | None]:
        x = jnp.where(tokens.valid[..., None], x, 0)
        weights = self.qkv_proj.mixing(self.qk_norm())
        carry = cca_mix.initial_carry(weights, x.shape[0])
        if state is not None:
            carry = cca_mix.Carry(state.conv_tail, state.delayed_value)
        projections = self.qkv_proj(x)
        if context_size() > 1:
            carry = self._carry_of_previous(projections)
        kernels = self.config.kernels

        def mix(rows: Any, weights: cca_mix.Weights) -> Any:
            (q, k, current, delayed), carry, lengths, age, (cos, sin) = rows
            return cca_mix.cca_mix(
                q,
                k,
                current,
                delayed,
                weights,
                carry,
                lengths,
                age,
                cos,
                sin,
                implementation=kernels,
            )

        unmixed = projections, carry, tokens.new_lengths, tokens.age, rotary
        q, k, v, carry = by_rows(mix, unmixed, weights, kernels)
        k, v = (gather_sequence(x.swapaxes(1, 2), axis=2) for x in (k, v))
        if state is not None:
            state = state.extended(k, v, carry.conv_tail, carry.delayed_value, tokens)
            k, v = state.k, state.v
        return self.o_proj(_attend(q, k, v, tokens, window, kernels)), state

    def _carry_of_previous(self, projections: tuple[jax.Array, ...]) -> cca_mix.Carry:
        """Of the device with the tokens before these. The first one gets zeros, of which its
        tokens' age lets nothing be seen: they see the initial values."""
        q, k, _, delayed = projections
        columns = slice(q.shape[1] - self.config.conv_tail, None)
        tail = jnp.concatenate([q[:, columns], k[:, columns]], axis=-1)
        return cca_mix.Carry(from_previous(tail), from_previous(delayed[:, -1]))

    def initial_state(self, batch: int, capacity: int) -> LayerState:
        """The state before a first token."""
        weights = self.qkv_proj.mixing(self.qk_norm())
        shape = (batch, self.config.num_key_value_heads, capacity, self.config.head_dim)
        k, v = (jnp.zeros(shape, weights.temperature.dtype) for _ in "kv")
        return LayerState(k, v, *cca_mix.initial_carry(weights, batch))


class GroupedQueryAttention(nn.Module):
    """Plain attention: projections, rotary embedding, scaled products. [B, S, D] -> [B, S, D];
    a state is not supported."""

    config: ZayaConfig

    def setup(self) -> None:
        c = self.config
        queries, keys = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            Linear(size, c.attention_bias) for size in (queries, keys, keys, c.hidden_size)
        )

    def __call__(
        self,
        x: jax.Array,
        tokens: Tokens,
        rotary: tuple[jax.Array, jax.Array],
        window: int | jax.Array | None,
        state: LayerState | None,
    ) -> tuple[jax.Array, LayerState | None]:
        x = jnp.where(tokens.valid[..., None], x, 0)
        q, k, v = (
            projection(x).reshape(*x.shape[:2], -1, self.config.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        dtype: Any = self.q_proj.get_variable("params", "weight").dtype
        q, k, v = (part.astype(dtype) for part in (q, k, v))
        k, v = (gather_sequence(part.swapaxes(1, 2), axis=2) for part in (k, v))
        return self.o_proj(_attend(q, k, v, tokens, window, self.config.kernels)), state


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tokens: Tokens,
    window: int | jax.Array | None,
    kernels: str | None,
) -> jax.Array:
    """Outputs [B, S, H d] of queries [B, S, H, d], with keys and values [B, N, C, d]."""

    def attend(rows: Any, window: int | jax.Array | None) -> jax.Array:
        q, k, v, offsets, segment_ids = rows
        return attention.attention(q, k, v, offsets, segment_ids, window, implementation=kernels)

    rows = q, k, v, tokens.offsets, tokens.segment_ids
    out = by_rows(attend, rows, window, kernels)
    return out.reshape(*out.shape[:2], -1)
