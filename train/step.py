"""The training step: gradients, optimizer, router balancing, and what is done about bad steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train import balancing
from train.config import FaultConfig, TrainConfig
from train.data.batch import Batch
from train.gradients import gradients
from zaya_jax.allocation import give_back_freed_memory
from zaya_jax.config import ZayaConfig
from zaya_jax.layouts import stack
from zaya_jax.model import Params, init
from zaya_jax.moe import BALANCING
from zaya_jax.sharding import parameter_specs, state_specs

WARMUP = 20  # accepted steps before a loss can count as a spike
DECAY = 0.98  # of the running mean of losses
JUMP = 0.5  # nats above the running mean, below which no loss is a spike
# Operations are then ordered for least memory, and not so that more of them could run at once: on
# few cores they would only share these.
ON_CPUS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


class Health(NamedTuple):
    """What tells bad steps from good ones; scalars."""

    mean_loss: jax.Array  # float32, running mean over accepted steps
    accepted: jax.Array  # int32
    skipped: jax.Array  # int32
    in_a_row: jax.Array  # int32, skipped since the last accepted one


class TrainState(NamedTuple):
    """What a step changes: all of it is in a checkpoint, at the same shapes on every mesh."""

    step: jax.Array  # int32, steps taken, skipped ones included
    params: Params  # stacked float32 master weights, and the balancing biases
    optimizer: optax.OptState
    balancer: optax.OptState
    health: Health


class Metrics(NamedTuple):
    """Of one step; scalars, or [L] for each layer."""

    loss: jax.Array  # mean negative log-likelihood, in nats a token
    grad_norm: jax.Array  # before clipping
    penalty: jax.Array  # that z_loss adds to it
    weight: jax.Array  # sum of the targets' weights in the loss
    tokens: jax.Array  # real ones
    accepted: jax.Array  # bool
    updates: jax.Array  # accepted steps before this one, which the learning rate follows
    skipped: jax.Array  # steps of the run
    in_a_row: jax.Array  # skipped ones since the last accepted one
    load: balancing.Load  # of the experts


Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def fresh_health() -> Health:
    return Health(jnp.float32(0), jnp.int32(0), jnp.int32(0), jnp.int32(0))


def start(
    params: Params, rule: optax.GradientTransformation, balancer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step, of stacked float32 parameters."""
    optimizer = rule.init(params["params"])
    return TrainState(
        jnp.int32(0), params, optimizer, balancer.init(params[BALANCING]), fresh_health()
    )


def new_params(config: ZayaConfig, seed: int, by_width: bool) -> Params:
    """Fresh stacked parameters; `by_width` scales the layers' matrices to a standard deviation of
    1/sqrt(fan_in), where the authors' 0.02 would leave the router scores of a narrow model equal
    (then balancing throws all tokens from one expert to the next)."""

    def rescale(path: Any, leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2:
            return leaf
        experts = "experts" in jax.tree_util.keystr(path)
        fan_in = leaf.shape[-1] if experts else leaf[0].size
        return leaf * (fan_in**-0.5 / 0.02)

    params = init(config, jax.random.key(seed))
    if by_width:
        layers = jax.tree_util.tree_map_with_path(rescale, params["params"]["layers"])
        params = {**params, "params": {**params["params"], "layers": layers}}
    return stack(params, config)


def state_shardings(
    state: TrainState, rule: optax.GradientTransformation, mesh: Mesh, full: bool
) -> TrainState:
    """A `NamedSharding` for each leaf of a state, of arrays or their shapes: parameters by the
    table of `sharding`, what the optimizer keeps of each divided once more, the rest everywhere.

    Args:
      state: of stacked parameters.
      rule: its optimizer.
      mesh: of the devices.
      full: divide the parameters like the optimizer's state.
    """
    whole = NamedSharding(mesh, P())

    def placed(specs: Any) -> Any:
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    everywhere: TrainState = jax.tree.map(lambda _: whole, state)
    divided = placed(state_specs(state.params, mesh)["params"])
    optimizer = optax.tree_map_params(
        rule,
        lambda leaf, sharding: leaf if _is_masked(leaf) else sharding,
        state.optimizer,
        divided,
        transform_non_params=lambda _: whole,
        is_leaf=_is_masked,
    )
    params = placed(parameter_specs(state.params, mesh, full))
    return everywhere._replace(params=params, optimizer=optimizer)


def _is_masked(leaf: Any) -> bool:
    """Whether this stands for a parameter that is another optimizer's."""
    return isinstance(leaf, optax.MaskedNode)


def make_step(
    config: TrainConfig,
    model: ZayaConfig,
    mesh: Mesh,
    rule: optax.GradientTransformation,
    balancer: optax.GradientTransformation,
    shardings: TrainState,
) -> Step:
    """The compiled step; the state it is given is donated.

    Args:
      config: of the run.
      model: the architecture, as the run computes it.
      mesh: of the devices.
      rule, balancer: the optimizers of weights and of balancing biases.
      shardings: of the state, from `state_shardings`.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        weights, biases = state.params["params"], state.params[BALANCING]
        losses, slopes, counts = gradients(
            state.params,
            model,
            batch,
            mesh,
            accumulate=config.accumulate,
            compute_dtype=jnp.dtype(config.compute_dtype),
            z_loss=config.z_loss,
            full_sharding=config.mesh.full_sharding,
        )
        norm = optax.global_norm(_in_float32(slopes))
        good = jnp.isfinite(losses.loss) & jnp.isfinite(norm)
        good &= ~_is_spike(state.health, losses.loss, config.faults)

        def accept() -> TrainState:
            # Cast here, they need no memory: what a branch is given lies there.
            updates, optimizer = optax.with_extra_args_support(rule).update(
                _in_float32(slopes), state.optimizer, weights, norm=norm
            )
            excess = balancing.pseudo_gradients(biases, counts)
            shifts, moments = balancer.update(excess, state.balancer, biases)
            params = {
                "params": optax.apply_updates(weights, updates),
                BALANCING: optax.apply_updates(biases, shifts),
            }
            health = _accept(state.health, losses.loss)
            return TrainState(state.step, params, optimizer, moments, health)

        # A choice between all old and new numbers would have XLA copy the old ones.
        after = jax.lax.cond(good, accept, lambda: state._replace(health=_skip(state.health)))
        after = after._replace(step=state.step + 1)
        metrics = Metrics(
            loss=losses.nll,
            grad_norm=norm,
            penalty=losses.penalty,
            weight=losses.weight,
            tokens=losses.tokens,
            accepted=good,
            updates=state.health.accepted,
            skipped=after.health.skipped,
            in_a_row=after.health.in_a_row,
            load=balancing.load(counts),
        )
        return after, metrics

    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings, NamedSharding(mesh, P())),
        compiler_options=ON_CPUS if mesh.devices.flat[0].platform == "cpu" else None,
    )


def compiled(step: Step, state: TrainState, batch: Batch) -> Step:
    """The step for arrays like these, compiled before it needs any memory: what compiling needed is
    given back."""
    ahead: Step = step.lower(state, batch).compile()  # type: ignore[attr-defined]
    give_back_freed_memory()
    return ahead


def _in_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _is_spike(health: Health, loss: jax.Array, faults: FaultConfig) -> jax.Array:
    if faults.spike_factor == 0:
        return jnp.bool_(False)
    limit = jnp.maximum(faults.spike_factor * health.mean_loss, health.mean_loss + JUMP)
    return (health.accepted >= WARMUP) & (loss > limit)


def _accept(health: Health, loss: jax.Array) -> Health:
    """The running mean is that of as many losses as there were, until they are many."""
    rate = jnp.maximum(1 - DECAY, 1 / (health.accepted + 1))
    mean = health.mean_loss + rate * (loss - health.mean_loss)
    return health._replace(mean_loss=mean, accepted=health.accepted + 1, in_a_row=jnp.int32(0))


def _skip(health: Health) -> Health:
    return health._replace(skipped=health.skipped + 1, in_a_row=health.in_a_row + 1)
