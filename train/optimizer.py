"""The optimizer of every phase: Muon for matrices and AdamW for the rest, or AdamW for all."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from train import schedules
from train.muon import scale_by_muon
from zaya_jax.errors import ConfigError

# What is done with a leaf. Matrices decay, as is usual, and so do the embedding and the head;
# vectors, biases, scales and the small convolutions do not.
MATRIX = "matrix"  # Muon, decays
GATE_UP = "gate_up"  # Muon on each half, decays
TABLE = "table"  # AdamW, decays
VECTOR = "vector"  # AdamW

# By the end of a leaf's path; the longest that fits counts. The router's matrices are matrices like
# others: the report (arXiv 2605.05365) takes only embeddings, norms, convolutions, residual scales
# and temperatures from Muon.
RULES = {
    "embed_tokens/weight": TABLE,
    "lm_head/weight": TABLE,
    "q_proj/weight": MATRIX,
    "k_proj/weight": MATRIX,
    "v_proj_current/weight": MATRIX,
    "v_proj_delayed/weight": MATRIX,
    "v_proj/weight": MATRIX,
    "o_proj/weight": MATRIX,
    "gate/down_proj/weight": MATRIX,
    "router_mlp/fc1/weight": MATRIX,
    "router_mlp/fc2/weight": MATRIX,
    "router_mlp/out_proj/weight": MATRIX,
    "gate/out_proj/weight": MATRIX,
    "experts/gate_up_proj": GATE_UP,
    "experts/down_proj": MATRIX,
    "conv_qk_depthwise/weight": VECTOR,
    "conv_qk_grouped/weight": VECTOR,
    "norm/weight": VECTOR,
    "input_layernorm/weight": VECTOR,
    "post_attention_layernorm/weight": VECTOR,
    "input_hidden_states_scale": VECTOR,
    "input_hidden_states_bias": VECTOR,
    "hidden_states_scale": VECTOR,
    "hidden_states_bias": VECTOR,
    "residual_scale": VECTOR,
    "residual_bias": VECTOR,
    "router_states_scale": VECTOR,
    "temp": VECTOR,
    "bias": VECTOR,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of the optimizer. Raises `ConfigError`, naming the field, on impossible ones.

    The reports publish the rates of the base phase and that Muon matches AdamW's RMS, and nothing
    else: all other values are public defaults.
    """

    kind: Literal["muon", "adamw"] = "muon"
    """Muon for matrices and AdamW for the rest, or AdamW for all."""
    learning_rate: float = 6e-4
    """The peak; of the base phase, by a third party's reading of arXiv 2511.17127."""
    adamw_ratio: float = 1.0
    """Of AdamW's rate to Muon's. Muon's updates are scaled to be as large as AdamW's, so that they
    can share a rate. Without effect if `kind` is adamw."""
    weight_decay: float = 0.1
    """Decoupled, times the learning rate; of matrices, embedding and head. Not published."""
    momentum: float = 0.95
    """Of Muon; 0 keeps no momentum (reinforcement learning). Not published for pretraining."""
    nesterov: bool = True
    """Whether Muon looks one step ahead. Not published."""
    newton_schulz_steps: int = 5
    """Iterations of Muon's orthogonalisation."""
    newton_schulz_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """In which they are computed. Not published; bfloat16 is usual."""
    b1: float = 0.9
    """Decay of AdamW's first moment. Not published."""
    b2: float = 0.95
    """Decay of AdamW's second moment. Not published."""
    eps: float = 1e-8
    """Added to the root of AdamW's second moment. Not published."""
    clip_norm: float = 1.0
    """Longest gradient, over all parameters; longer ones are scaled down to it. 0 is no limit. Not
    published."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Course of the learning rate, see `schedules.learning_rate`."""
    warmup_steps: int = 0
    """Updates before the peak. Not published."""
    final_ratio: float = 1 / 3
    """Of the last learning rate to the peak; of the base phase 2e-4 to 6e-4 (as above)."""
    decay_fraction: float = 0.2
    """Part of the run in which a "wsd" schedule falls. Not published."""

    def __post_init__(self) -> None:
        _check(self)


def _check(config: OptimizerConfig) -> None:
    choices = {
        "kind": ("muon", "adamw"),
        "newton_schulz_dtype": ("bfloat16", "float32"),
        "schedule": schedules.KINDS,
    }
    below_one = ("momentum", "b1", "b2")
    at_most_one = ("final_ratio", "decay_fraction")
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if name in choices:
            good = value in choices[name]
            wanted = "one of " + ", ".join(choices[name])
        elif name == "nesterov":
            good, wanted = isinstance(value, bool), "true or false"
        elif isinstance(field.default, int):
            least = 1 if name == "newton_schulz_steps" else 0
            good = isinstance(value, int) and not isinstance(value, bool) and value >= least
            wanted = f"a whole number of {least} or more"
        else:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            positive = name in ("learning_rate", "eps")
            most = 1.0 if name in below_one + at_most_one else float("inf")
            good = number and (value > 0 if positive else value >= 0)
            good = good and (value <= most if name in at_most_one else value < most)
            wanted = "positive" if positive else "0 or more"
            if name in below_one + at_most_one:
                wanted = "from 0 to 1" if name in at_most_one else "from 0 to below 1"
        if not good:
            raise ConfigError(f"{name} must be {wanted}, not {value!r}")


def rule(path: str) -> str:
    """The rule of a leaf, by its path ("layers/mlp/experts/down_proj").

    Raises:
      ConfigError: `RULES` names no such leaf.
    """
    parts = path.split("/")
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    found = next((RULES[end] for end in ends if end in RULES), None)
    if found is None:
        raise ConfigError(f"the optimizer has no rule for the parameter {path!r}")
    return found


def rules(params: Any) -> Any:
    """A tree like `params` ("params" collection, stacked or not) with the rule of every leaf.

    Raises:
      ConfigError: a leaf without a rule.
    """

    def of_leaf(path: Any, _: Any) -> str:
        return rule(jax.tree_util.keystr(path, simple=True, separator="/"))

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """The learning rate of each update, numbered from 0; AdamW's is `adamw_ratio` times it.

    Raises:
      ConfigError: its phases do not fit into the run.
    """
    return schedules.learning_rate(
        config.schedule,
        config.learning_rate,
        total_steps,
        warmup_steps=config.warmup_steps,
        final_ratio=config.final_ratio,
        decay_fraction=config.decay_fraction,
    )


def build(
    config: OptimizerConfig,
    total_steps: int,
    *,
    mesh: Mesh | None = None,
    full_sharding: bool = True,
    kernels: str | None = None,
) -> optax.GradientTransformation:
    """The optimizer of a "params" collection, stacked or not; all that it keeps is float32.

    Args:
      config: its settings.
      total_steps: updates of the run, for the schedule.
      mesh: on which gradients and parameters lie as global arrays, sharded in any way; None is one
        device.
      full_sharding: parameters may be divided like the optimizer's state; otherwise all devices
        have them (but for experts, on the `expert` axis), and matrices' updates are sent to all of
        them in the dtype they were computed in.
      kernels: implementation of Newton-Schulz; None is the default.

    Raises:
      ConfigError: the schedule does not fit into the run; from `init`, a leaf without a rule.
    """

    def adamw(decay: float, ratio: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.float32),
            optax.add_decayed_weights(decay),
            optax.scale(ratio),
        )

    def muon(parts: int) -> optax.GradientTransformation:
        direction = scale_by_muon(
            config.momentum,
            config.nesterov,
            steps=config.newton_schulz_steps,
            dtype=jnp.dtype(config.newton_schulz_dtype),
            parts=parts,
            mesh=mesh,
            whole=not full_sharding,
            implementation=kernels,
        )
        return optax.chain(direction, optax.add_decayed_weights(config.weight_decay))

    is_muon = config.kind == "muon"
    ratio = config.adamw_ratio if is_muon else 1.0
    decayed, plain = adamw(config.weight_decay, ratio), adamw(0.0, ratio)
    by_rule = {
        MATRIX: muon(1) if is_muon else decayed,
        GATE_UP: muon(2) if is_muon else decayed,
        TABLE: decayed,
        VECTOR: plain,
    }
    clipping = _clip(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clipping,
        optax.partition(by_rule, rules),
        optax.scale_by_learning_rate(schedule(config, total_steps)),
    )


def _clip(longest: float) -> optax.GradientTransformationExtraArgs:
    """As `optax.clip_by_global_norm`, but for what XLA makes of it: divided by the norm, not
    multiplied, all gradients are written to memory once more. Who knows the norm can give it as
    `norm`."""

    def update(
        updates: Any, state: Any, params: Any = None, *, norm: jax.Array | None = None, **_: Any
    ) -> tuple[Any, Any]:
        if norm is None:
            norm = optax.global_norm(updates)
        factor = jnp.where(norm < longest, 1.0, longest / norm)
        return jax.tree.map(lambda x: x * factor, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
