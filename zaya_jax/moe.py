"""The mixture-of-experts half of a layer: a router with depth averaging, and top-1 experts with a
skip class."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pallas_kernels.router import api as router
from zaya_jax.config import ZayaConfig
from zaya_jax.layers import INIT, Scale, linear, parameter
from zaya_jax.parallel import by_rows, expert_parallel_moe

# The collection of the balancing biases, which gradients and the optimizer never see.
BALANCING = "balancing"


class Affine(nn.Module):
    """Weight [out, in] and bias of a linear map that a kernel applies."""

    features: int
    inputs: int
    use_bias: bool = True

    @nn.compact
    def __call__(self) -> tuple[jax.Array, ...]:
        weight = self.param("weight", INIT, (self.features, self.inputs))
        if not self.use_bias:
            return (weight,)
        return weight, self.param("bias", nn.initializers.zeros, (self.features,))


class RouterMLP(nn.Module):
    """Parameters of the router after its down-projection."""

    config: ZayaConfig

    @nn.compact
    def __call__(self, depth_scale: jax.Array | None) -> router.Weights:
        width, classes = self.config.router_hidden_size, self.config.num_experts + 1
        return router.Weights(
            depth_scale,
            Scale(width, name="norm")(),
            *Affine(width, width, name="fc1")(),
            *Affine(width, width, name="fc2")(),
            *Affine(classes, width, use_bias=False, name="out_proj")(),
        )


class Router(nn.Module):
    """Chooses each token's expert; `first` is layer 0, which has no earlier router to average
    with."""

    config: ZayaConfig
    first: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, previous: jax.Array | None, forced: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        width, classes = self.config.router_hidden_size, self.config.num_experts + 1
        weight, bias = Affine(width, x.shape[-1], name="down_proj")()
        states = linear(x, weight.astype(jnp.float32), bias)
        depth_scale = None
        if not self.first:
            depth_scale = self.param("router_states_scale", nn.initializers.ones, (width,))
        biases = balancing_biases(self, classes)
        weights = RouterMLP(self.config, name="router_mlp")(depth_scale)
        c = self.config

        def route(rows: Any, shared: Any) -> Any:
            states, previous, forced = rows
            weights, biases = shared
            return router.route(
                states, previous, weights, biases, c.rms_norm_eps, forced, implementation=c.kernels
            )

        rows, shared = (states, previous, forced), (weights, biases)
        return by_rows(route, rows, shared, c.kernels)


class LinearRouter(nn.Module):
    """A plain router, to compare with: one matrix. It hands on the state that it was given."""

    config: ZayaConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, previous: jax.Array | None, forced: jax.Array | None
    ) -> tuple[jax.Array | None, jax.Array, jax.Array]:
        classes = self.config.num_experts + 1
        (weight,) = Affine(classes, x.shape[-1], use_bias=False, name="out_proj")()
        scores = linear(x, weight.astype(jnp.float32))
        return previous, *router.choose(scores, balancing_biases(self, classes), forced)


def balancing_biases(module: nn.Module, classes: int) -> jax.Array:
    """Float32 [classes] of a router, in a collection of their own; new ones let no token skip."""
    biases = module.variable(
        BALANCING, "balancing_biases", lambda: jnp.zeros((classes,)).at[-1].set(-1.0)
    )
    value: jax.Array = biases.value
    return value


class Experts(nn.Module):
    """Gated MLPs, one token through one of them."""

    config: ZayaConfig

    @nn.compact
    def __call__(self, x: jax.Array, expert: jax.Array, weight: jax.Array) -> jax.Array:
        experts, hidden = self.config.num_experts, self.config.moe_intermediate_size
        size = x.shape[-1]
        gate_up = parameter(self, "gate_up_proj", INIT, (experts, 2 * hidden, size))
        down = parameter(self, "down_proj", INIT, (experts, size, hidden))
        out = expert_parallel_moe(
            x.reshape(-1, size).astype(down[0].dtype),
            expert.reshape(-1),
            weight.reshape(-1),
            gate_up,
            down,
            implementation=self.config.kernels,
        )
        return out.reshape(x.shape)


class MoE(nn.Module):
    """[B, S, D] -> float32 [B, S, D], the router state for the next layer, and the experts
    chosen."""

    config: ZayaConfig
    first: bool

    def setup(self) -> None:
        plain = self.config.router == "linear"
        self.gate = LinearRouter(self.config) if plain else Router(self.config, self.first)
        self.experts = Experts(self.config)

    def __call__(
        self,
        x: jax.Array,
        previous: jax.Array | None,
        valid: jax.Array,
        forced: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        states, expert, weight = self.gate(x, previous, forced)
        expert = jnp.where(valid, expert, router.FREE)  # padding goes through no expert
        out = self.experts(x, expert, weight)
        if self.config.skip_expert == "identity":
            skipped = expert == self.config.num_experts
            out = jnp.where(skipped[..., None], weight[..., None] * x, out)
        unknown = (expert > self.config.num_experts) & valid  # forced to a class there is not
        out = jnp.where(unknown[..., None], jnp.nan, out)
        return out, states, expert.astype(jnp.uint8)
