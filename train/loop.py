"""The training step: next-token loss on the responses, AdamW, and router balancing."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from train import balancing
from train.packing import Batch
from zaya_jax.config import ZayaConfig
from zaya_jax.model import Params, forward, head, init
from zaya_jax.moe import BALANCING


class TrainState(NamedTuple):
    """What a step changes."""

    params: Params  # float32 master weights, and the balancing biases
    optimizer: optax.OptState
    balancer: optax.OptState


class Metrics(NamedTuple):
    """Scalars of one step."""

    loss: jax.Array  # mean over the response tokens
    entropy: jax.Array  # of the experts' load, see `balancing.entropy`
    grad_norm: jax.Array  # before clipping


Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def optimizer(schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW with clipped gradients; only matrices decay."""

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim >= 2, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.1, mask=matrices),
    )


def start(config: ZayaConfig, rule: optax.GradientTransformation, seed: int) -> TrainState:
    """Fresh parameters and optimizer states."""
    params = init_by_width(config, jax.random.key(seed))
    return TrainState(
        params, rule.init(params["params"]), balancing.OPTIMIZER.init(params[BALANCING])
    )


def init_by_width(config: ZayaConfig, key: jax.Array) -> Params:
    """Fresh parameters whose layers' matrices have standard deviation 1/sqrt(fan_in).

    The authors' 0.02 is about that at their width. In a narrow model it would leave the router
    scores equal, and then balancing throws all tokens from one expert to the next.
    """

    def rescale(path: Any, leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2:
            return leaf
        experts = "experts" in jax.tree_util.keystr(path)
        fan_in = leaf.shape[-1] if experts else leaf[0].size
        return leaf * (fan_in**-0.5 / 0.02)

    params = init(config, key)
    layers = jax.tree_util.tree_map_with_path(rescale, params["params"]["layers"])
    return {**params, "params": {**params["params"], "layers": layers}}


def make_step(config: ZayaConfig, rule: optax.GradientTransformation) -> Step:
    """The compiled step; the state it is given is donated."""

    def loss_of(weights: Any, biases: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Computes in bfloat16; the cast's gradient is that of the float32 master weights."""
        weights = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)
        params = {"params": weights, BALANCING: biases}
        out = forward(params, config, batch.tokens, segment_ids=batch.segment_ids)
        logits = head(params, config, out.hidden)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        return jnp.sum(losses * batch.mask) / jnp.sum(batch.mask), out.expert_counts

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        weights, biases = state.params["params"], state.params[BALANCING]
        (loss, counts), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            weights, biases, batch
        )
        updates, moments = rule.update(gradients, state.optimizer, weights)
        excess = balancing.pseudo_gradients(biases, counts)
        shifts, balancer = balancing.OPTIMIZER.update(excess, state.balancer, biases)
        params = {
            "params": optax.apply_updates(weights, updates),
            BALANCING: optax.apply_updates(biases, shifts),
        }
        metrics = Metrics(loss, balancing.entropy(counts), optax.global_norm(gradients))
        return TrainState(params, moments, balancer), metrics

    return jax.jit(step, donate_argnums=0)
