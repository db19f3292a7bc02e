"""Router balancing (ZAYA1 report, arXiv 2605.05365): biases that even out the experts' load.

A bias enters the choice of an expert but not its weight, so no gradient reaches it. Its
pseudo-gradient is the expert's share of the batch's tokens minus the even share. The first moment
of AdamW is then a leaky integral of the imbalance and its normalisation sets the gain. The report
gives no settings; the rate is ours, the decay zero.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

OPTIMIZER = optax.adamw(2e-3, weight_decay=0.0)


def loads(expert_counts: jax.Array) -> jax.Array:
    """Each expert's share of a layer's tokens, skipped ones included: [L, E + 1] -> [L, E]."""
    counts = expert_counts.astype(jnp.float32)
    return counts[:, :-1] / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1)


def pseudo_gradients(balancing: Any, expert_counts: jax.Array) -> Any:
    """A tree like `balancing`: each expert's excess load, and 0 for the skip class, which stays."""
    load = loads(expert_counts)
    excess = jnp.pad(load - 1 / load.shape[-1], ((0, 0), (0, 1)))
    leaves, tree = jax.tree.flatten(balancing)
    return jax.tree.unflatten(tree, list(excess.astype(leaves[0].dtype)))


def entropy(expert_counts: jax.Array) -> jax.Array:
    """Normalised entropy of the load, averaged over layers: 1 where every expert gets as much."""
    load = loads(expert_counts)
    return jnp.mean(jnp.sum(jax.scipy.special.entr(load), axis=-1)) / jnp.log(load.shape[-1])
