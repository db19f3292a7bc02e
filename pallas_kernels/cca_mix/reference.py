"""Compressed convolutional attention between its projections and the attention product (arXiv
2510.04476), in XLA.

Shapes: B rows, S tokens, H query heads and N key/value heads of d channels, g = H/N; u = queries
  then keys, C = (H + N) d
channels; T = (k0 - 1) + (k1 - 1) columns of history for convolutions of k0 and k1 taps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.precision import exact


class Weights(NamedTuple):
    """Parameters of the mixing: convolution taps are ordered oldest first, the last tap is the
    token itself."""

    depthwise: jax.Array  # [C, 1, k0]
    depthwise_bias: jax.Array  # [C]
    grouped: jax.Array  # [C, d, k1], one group per head: the H query heads, then the N key heads
    grouped_bias: jax.Array  # [C]
    temperature: jax.Array  # [N], multiplies the normalised keys
    initial_value: (
        jax.Array
    )  # [N d / 2], delayed value before a first token: the projection's bias, or zeros


class Carry(NamedTuple):
    """What decoding carries from the tokens before: the last T columns of u and the last delayed
    value, in float32."""

    conv_tail: jax.Array  # [B, T, C]
    delayed_value: jax.Array  # [B, N d / 2]


def initial_carry(weights: Weights, batch: int) -> Carry:
    """The carry before a first token: zero columns of u, and the delayed value of a zero hidden
    state."""
    channels, _, k0 = weights.depthwise.shape
    tail = jnp.zeros((batch, k0 + weights.grouped.shape[-1] - 2, channels))
    return Carry(
        tail, jnp.broadcast_to(weights.initial_value, (batch, *weights.initial_value.shape))
    )


@jax.checkpoint  # else some ten arrays of this size would be kept for the gradient
def cca_mix(
    q: jax.Array,
    k: jax.Array,
    current: jax.Array,
    delayed: jax.Array,
    weights: Weights,
    carry: Carry,
    new_lengths: jax.Array,
    age: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, Carry]:
    """From projections to attention-ready queries, keys and values.

    Args:
      q, k: float32 [B, S, H d] and [B, S, N d], projections before the convolutions.
      current, delayed: float32 [B, S, N d / 2], value projections of the token itself, and used one
        token later.
      weights: the layer's parameters; the temperature's dtype sets that of the results, and
        QK-norm's epsilon. The others may be held in float32 instead.
      carry: state from the tokens before this chunk.
      new_lengths: int [B], real tokens of each right-padded row; the new carry is taken at each
        row's last one.
      age: int [B, S], tokens since the token's packed segment began, or None where rows are not
        packed. That of a chunk's first token also tells which columns of the carry are older than
        its segment, and unseen.
      cos, sin: float32 [B, S, r/2], rotary table; the first r channels of a head are rotated. No
        gradient flows to them.

    Returns:
      q [B, S, H, d], k and v [B, S, N, d] in the dtype of the weights, and the new carry.
    """
    batch, length, _ = q.shape
    cos, sin = jax.lax.stop_gradient((cos, sin))
    kv_heads = weights.temperature.shape[0]
    head_dim = weights.grouped.shape[1]
    mean_q, mean_k = qk_mean(q, k, kv_heads, head_dim)
    mixed, conv_tail = convolve(
        jnp.concatenate([q, k], axis=-1), carry.conv_tail, weights, new_lengths, age
    )
    mixed = mixed.reshape(batch, length, mixed.shape[-1] // head_dim, head_dim)
    heads = mixed.shape[2] - kv_heads
    temperature = weights.temperature.astype(jnp.float32)[:, None]
    dtype = weights.temperature.dtype
    eps = float(jnp.finfo(dtype).eps)
    mixed_q = rotate(unit_norm(mixed[:, :, :heads] + mean_q, eps), cos, sin)
    mixed_k = rotate(unit_norm(mixed[:, :, heads:] + mean_k, eps) * temperature, cos, sin)
    v, delayed_value = shift_values(
        current, delayed, carry.delayed_value, weights.initial_value, age, new_lengths
    )
    v = v.reshape(batch, length, kv_heads, head_dim)
    carry = Carry(conv_tail, delayed_value)
    return mixed_q.astype(dtype), mixed_k.astype(dtype), v.astype(dtype), carry


def qk_mean(
    q: jax.Array, k: jax.Array, kv_heads: int, head_dim: int
) -> tuple[jax.Array, jax.Array]:
    """Averages each query with its group's key, and those averages over the group; float32 [B, S,
    H|N, d]."""
    group = q.shape[-1] // (kv_heads * head_dim)
    q = q.reshape(*q.shape[:2], kv_heads, group, head_dim)
    k = k.reshape(*k.shape[:2], kv_heads, 1, head_dim)
    mean_q = (q + k) / 2
    return mean_q.reshape(*q.shape[:2], kv_heads * group, head_dim), jnp.mean(mean_q, axis=3)


def convolve(
    u: jax.Array, tail: jax.Array, weights: Weights, new_lengths: jax.Array, age: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Depthwise, then per-head grouped causal convolution of u [B, S, C]; float32 [B, S, C] and the
    new tail.

    Before a sequence or segment u is zero, so the depthwise output there is its bias, which the
    grouped convolution sees.
    """
    batch, length, channels = u.shape
    k0, k1 = weights.depthwise.shape[-1], weights.grouped.shape[-1]
    history = jnp.concatenate([tail, u], axis=1)
    new_tail = take_columns(history, new_lengths, k0 + k1 - 2)

    # Depthwise output at positions -(k1 - 1) .. S - 1; those before the first token come from the
    # tail alone.
    taps = weights.depthwise[:, 0].astype(jnp.float32)
    bias = weights.depthwise_bias.astype(jnp.float32)
    span = length + k1 - 1
    padded_age = None
    if age is not None and length:
        # Columns of the tail are as much younger than the first token as they are before it.
        before = age[:, :1] - jnp.arange(k1 - 1, 0, -1)
        padded_age = jnp.concatenate([before, age], axis=1)
    depthwise = bias
    for tap in range(k0):
        column = history[:, tap : tap + span]
        depthwise = depthwise + taps[:, tap] * _since_start(column, padded_age, k0 - 1 - tap, 0.0)

    head_dim = weights.grouped.shape[1]
    grouped = weights.grouped.astype(jnp.float32).reshape(-1, head_dim, head_dim * k1)
    columns = [
        _since_start(depthwise[:, tap : tap + length], age, k1 - 1 - tap, bias) for tap in range(k1)
    ]
    # All taps as one product for each head: [tokens, heads, d k1] with [heads, d, d k1].
    inputs = jnp.stack(columns, axis=-1).reshape(
        batch * length, channels // head_dim, head_dim * k1
    )
    mixed = jax.lax.dot_general(
        inputs, grouped, (((2,), (2,)), ((1,), (0,))), precision=exact(jnp.float32)
    )
    mixed = mixed.swapaxes(0, 1).reshape(batch, length, channels)
    return mixed + weights.grouped_bias.astype(jnp.float32), new_tail


def _since_start(
    column: jax.Array, age: jax.Array | None, back: int, fill: jax.Array | float
) -> jax.Array:
    """`column` [B, S, C], read `back` tokens ago, with `fill` where that was before the token's
    segment began."""
    if age is None or back == 0:
        return column
    return jnp.where((age >= back)[..., None], column, fill)


def take_columns(history: jax.Array, new_lengths: jax.Array, count: int) -> jax.Array:
    """The `count` columns of `history` [B, count + S, C] that end at each row's last real token."""
    index = new_lengths[:, None] + jnp.arange(count)
    return jnp.take_along_axis(history, index[..., None], axis=1)


def shift_values(
    current: jax.Array,
    delayed: jax.Array,
    carried: jax.Array,
    initial: jax.Array,
    age: jax.Array | None,
    new_lengths: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Joins each token's own value with its predecessor's (CCA value shift, arXiv 2510.04476, sec.
    3).

    Args:
      current: [B, S, C/2], projection of the token itself.
      delayed: [B, S, C/2], projection that is used one token later.
      carried: [B, C/2], `delayed` of the token before the first one (`initial` at the start of a
        sequence).
      initial: [C/2], `delayed` of a zero hidden state: the projection's bias, or zeros.
      age: int [B, S], tokens since the token's packed segment began, or None.
      new_lengths: int [B], real tokens in each right-padded row.

    Returns:
      [B, S, C], and the column to carry into the next chunk, [B, C/2] (unchanged where a row has no
      new token).
    """
    history = jnp.concatenate([carried[:, None], delayed], axis=1)
    shifted = _since_start(history[:, :-1], age, 1, initial)
    column = take_columns(history, new_lengths, 1)[:, 0]
    return jnp.concatenate([current, shifted], axis=-1), column


def unit_norm(x: jax.Array, eps: float) -> jax.Array:
    """Scales each head [..., d] to length sqrt(d); lengths below `eps` count as `eps`.

    The bound lies inside the root, whose gradient at a head of zeros (padding) would be NaN.
    """
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * (x.shape[-1] ** 0.5 * jax.lax.rsqrt(jnp.maximum(square, eps**2)))


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding of the first r channels of [B, S, heads, d], halves paired ("neox"); cos,
    sin [B, S, r/2]."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    left, right, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin, rest], axis=-1)
