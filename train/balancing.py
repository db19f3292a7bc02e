"""Router balancing (ZAYA1 report, arXiv 2605.05365): biases that even out the experts' load.

A bias enters the choice of an expert but not its weight, so no gradient reaches it. Its
pseudo-gradient is the expert's share of the global batch's tokens minus the even share. AdamW's
first moment is then a leaky integral of the imbalance, its normalisation sets the gain, and its
weight decay is the leak. The skip class keeps its bias.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zaya_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalancingConfig:
    """Settings of AdamW on the balancing biases. Raises `ConfigError`, naming the field, on
    impossible ones. None is published."""

    rate: float = 2e-3
    """Largest step of a bias, about: probabilities, to which biases are added, are at most 1. With
    1e-2, routers that tell tokens apart little send all of them from one expert to the next. 0
    leaves the biases as they are."""
    b1: float = 0.9
    """Decay of the integral of the imbalance."""
    b2: float = 0.999
    """Decay of its mean square, which sets the gain."""
    eps: float = 1e-8
    """Added to the root of that mean square: imbalances below it are not amplified."""
    decay: float = 0.0
    """Decoupled decay of the biases towards 0, times the rate."""

    def __post_init__(self) -> None:
        for name, most in {"rate": 1, "b1": 1, "b2": 1, "eps": 1, "decay": None}.items():
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and value >= 0 and (value < most if most else value < float("inf"))):
                wanted = "from 0 to below 1" if most else "0 or more"
                raise ConfigError(f"balancing: {name} must be {wanted}, not {value!r}")
        if self.eps == 0:  # an even load would be 0/0
            raise ConfigError("balancing: eps must be above 0, not 0")


class Load(NamedTuple):
    """How evenly the tokens of a batch are spread over the experts of each layer.

    Skipped tokens do not count.
    """

    entropy: jax.Array  # float32 [L], normalised: 1 where every expert gets as many, 0 if one all
    max_over_mean: jax.Array  # float32 [L], tokens of the busiest expert over those of an even one
    dead: jax.Array  # int32 [L], experts without a token


def optimizer(config: BalancingConfig) -> optax.GradientTransformation:
    """Of a tree of biases [..., E + 1], given its `pseudo_gradients`; the skip class stays."""
    adamw = optax.adamw(config.rate, config.b1, config.b2, config.eps, weight_decay=config.decay)

    def without_skip(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda update: update.at[..., -1].set(0), updates)

    return optax.chain(adamw, optax.stateless(without_skip))


def pseudo_gradients(biases: Any, expert_counts: jax.Array) -> Any:
    """Each expert's share of a layer's tokens, skipped ones included, minus 1 / E.

    Args:
      biases: a tree whose leaf is [L, E + 1] (stacked), or L leaves [E + 1].
      expert_counts: [L, E + 1], tokens of the global batch by class; the last class skips.

    Returns:
      A tree like `biases`, with 0 for the skip class, and for a layer that saw no token.
    """
    counts = expert_counts.astype(jnp.float32)
    total = jnp.sum(counts, axis=-1, keepdims=True)
    excess = counts / jnp.maximum(total, 1) - 1 / (counts.shape[-1] - 1)
    excess = jnp.where(total > 0, excess, 0).at[:, -1].set(0)
    leaves, tree = jax.tree.flatten(biases)
    parts = jnp.split(excess, len(leaves))
    shaped = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(tree, shaped)


def load(expert_counts: jax.Array) -> Load:
    """The load of counts [L, E + 1]; where all tokens were skipped, 0, 0 and E."""
    counts = expert_counts[:, :-1].astype(jnp.float32)
    experts = counts.shape[-1]
    share = counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1)
    spread = jnp.sum(jax.scipy.special.entr(share), axis=-1)
    return Load(
        entropy=spread / jnp.log(experts) if experts > 1 else jnp.ones_like(spread),
        max_over_mean=jnp.max(share, axis=-1) * experts,
        dead=jnp.sum(counts == 0, axis=-1),
    )
