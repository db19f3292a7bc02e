"""What decoding carries from token to token: keys, values, the convolutions' tail and the delayed
value."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from zaya_jax.attention import Tokens


class LayerState(NamedTuple):
    """One layer's part of a `DecodeState`; B rows, N key/value heads of d channels, room for C
    tokens.

    Keys and values have the parameters' dtype, the tail and the delayed value are float32.
    """

    k: jax.Array  # [B, N, C, d]
    v: jax.Array  # [B, N, C, d]
    conv_tail: jax.Array  # [B, T, channels], the last T = (k0 - 1) + (k1 - 1) columns of u
    delayed_value: jax.Array  # [B, N d / 2]

    def extended(
        self,
        k: jax.Array,
        v: jax.Array,
        conv_tail: jax.Array,
        delayed_value: jax.Array,
        tokens: "Tokens",
    ) -> "LayerState":
        """Writes the chunk's real keys and values [B, N, S, d] behind those of the row so far."""
        index = tokens.offsets[:, None] + jnp.arange(k.shape[2])
        index = jnp.where(
            tokens.valid, index, self.k.shape[2]
        )  # padding lands outside, and is dropped

        def write(cache: jax.Array, new: jax.Array) -> jax.Array:
            return jax.vmap(lambda c, n, i: c.at[:, i].set(n, mode="drop"))(
                cache, new.astype(cache.dtype), index
            )

        # Behind the barrier, XLA updates donated caches in place; it would fuse the writes into
        # what reads them, and copy the caches for it.
        k, v = jax.lax.optimization_barrier((write(self.k, k), write(self.v, v)))
        return LayerState(k, v, conv_tail, delayed_value)


class DecodeState(NamedTuple):
    """Decoding state of B rows: one array per layer and kind, and the tokens so far in each row.

    A state cannot be cut back to an earlier position, as the tails of earlier positions are gone:
      to share a prefix,
    keep the state at its end (states are immutable; `snapshot` copies one whose buffers are about
    to be donated).
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    conv_tail: tuple[jax.Array, ...]
    delayed_value: tuple[jax.Array, ...]
    lengths: jax.Array  # int32 [B]

    @classmethod
    def from_layers(cls, layers: Sequence[LayerState], lengths: jax.Array) -> "DecodeState":
        k, v, conv_tail, delayed_value = zip(*layers, strict=True)
        return cls(k, v, conv_tail, delayed_value, lengths)

    def layers(self) -> list[LayerState]:
        kinds = zip(self.k, self.v, self.conv_tail, self.delayed_value, strict=True)
        return [LayerState(*kind) for kind in kinds]

    @property
    def capacity(self) -> int:
        """Tokens each row has room for."""
        return self.k[0].shape[2]

    def repeat(self, count: int) -> "DecodeState":
        """Each row `count` times in a row: [B] -> [B * count]."""
        return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), self)

    def select(self, rows: jax.Array | Sequence[int]) -> "DecodeState":
        """The given rows, in that order."""
        return jax.tree.map(lambda x: x[jnp.asarray(rows)], self)

    def insert_rows(self, rows: jax.Array | Sequence[int], other: "DecodeState") -> "DecodeState":
        """Replaces the given rows by those of `other`, which has the same capacity."""
        return jax.tree.map(lambda x, y: x.at[jnp.asarray(rows)].set(y), self, other)

    def resize(self, capacity: int) -> "DecodeState":
        """A copy with room for `capacity` tokens, which must hold those there are."""
        room = capacity - self.capacity

        def fit(cache: jax.Array) -> jax.Array:
            if room <= 0:
                return jnp.copy(cache[:, :, :capacity])
            return jnp.pad(cache, ((0, 0), (0, 0), (0, room), (0, 0)))

        k, v = (tuple(fit(cache) for cache in caches) for caches in (self.k, self.v))
        return self.snapshot()._replace(k=k, v=v)

    def snapshot(self) -> "DecodeState":
        """A copy in buffers of its own."""
        return jax.tree.map(jnp.copy, self)
