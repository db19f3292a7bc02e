"""The canonical tree in the form a program wants."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zaya_jax.config import ZayaConfig
from zaya_jax.errors import ConfigError


def stack(params: dict[str, Any], config: ZayaConfig) -> dict[str, Any]:
    """One leaf per kind with a leading layer axis, so that a scan runs the layers; shares no
    buffers.

    Layer 0's router has no `router_states_scale`: it gets ones, which its zero input state leaves
    without effect.

    Raises:
      ConfigError: layers of both attention types rotate different numbers of channels.
    """
    if len(rotary := {config.layer_rope(t).partial_rotary_factor for t in config.layer_types}) > 1:
        raise ConfigError(
            f"layers with different partial_rotary_factor {sorted(rotary)} cannot be stacked"
        )
    first, *rest = params["params"]["layers"]
    ones = jnp.ones_like(first["mlp"]["gate"]["router_mlp"]["norm"]["weight"])
    gate = {**first["mlp"]["gate"], "router_states_scale": ones}
    first = {**first, "mlp": {**first["mlp"], "gate": gate}}
    layers = {"params": (first, *rest), "balancing": params["balancing"]["layers"]}
    return {
        name: {**params[name], "layers": jax.tree.map(lambda *x: jnp.stack(x), *layers[name])}
        for name in ("params", "balancing")
    }


def unstack(params: dict[str, Any]) -> dict[str, Any]:
    """The canonical tree of a stacked one, without layer 0's synthetic scale."""
    count = params["balancing"]["layers"]["mlp"]["gate"]["balancing_biases"].shape[0]

    def layer(tree: Any, index: int) -> Any:
        return jax.tree.map(lambda x: x[index], tree)

    out = {
        name: {**params[name], "layers": [layer(params[name]["layers"], i) for i in range(count)]}
        for name in ("params", "balancing")
    }
    del out["params"]["layers"][0]["mlp"]["gate"]["router_states_scale"]
    return {name: {**tree, "layers": tuple(tree["layers"])} for name, tree in out.items()}


def split_experts(params: dict[str, Any]) -> dict[str, Any]:
    """The canonical tree with a tuple of one array per expert, [2 F, D] and [D, F], in place of
    each of the experts' arrays.

    XLA's CPU backend then reads the chosen experts in place; it would copy them out of one array.
    There the new arrays share the old ones' memory; elsewhere they are copies.
    """

    def split(leaf: jax.Array) -> tuple[jax.Array, ...]:
        if leaf.devices() != {jax.devices("cpu")[0]}:
            return tuple(leaf)
        return tuple(jax.device_put(part, may_alias=True) for part in np.asarray(leaf))

    def layer(tree: dict[str, Any]) -> dict[str, Any]:
        experts = {name: split(leaf) for name, leaf in tree["mlp"]["experts"].items()}
        return {**tree, "mlp": {**tree["mlp"], "experts": experts}}

    layers = tuple(layer(tree) for tree in params["params"]["layers"])
    return {**params, "params": {**params["params"], "layers": layers}}
