"""The canonical tree in the form a program wants."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.product import streamed
from zaya_jax.config import ZayaConfig
from zaya_jax.errors import ConfigError

# The projections of attention that read the same input, in the order in which they are fused.
PROJECTIONS = ("q_proj", "k_proj", "v_proj_current", "v_proj_delayed")
CONVOLUTIONS = ("conv_qk_depthwise", "conv_qk_grouped")


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
    if config.router == "mlp":
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
    out["params"]["layers"][0]["mlp"]["gate"].pop("router_states_scale", None)
    return {name: {**tree, "layers": tuple(tree["layers"])} for name, tree in out.items()}


def split_experts(params: dict[str, Any]) -> dict[str, Any]:
    """The canonical tree with a tuple of one array per expert, [2 F, D] and [D, F], in place of
    each of the experts' arrays: XLA's CPU backend reads the chosen experts of those in place, and
    would copy them out of one array.

    On the CPU the new arrays share the old ones' memory; elsewhere they are copies.
    """
    layers = []
    for layer in params["params"]["layers"]:
        experts = {name: _split(leaf) for name, leaf in layer["mlp"]["experts"].items()}
        layers.append({**layer, "mlp": {**layer["mlp"], "experts": experts}})
    return {**params, "params": {**params["params"], "layers": tuple(layers)}}


def for_cpu(params: dict[str, Any], config: ZayaConfig, *, consume: bool = False) -> dict[str, Any]:
    """The form in which XLA's CPU backend decodes fastest.

    Large matrices are `streamed`, each expert's apart, and the head's beside the embedding even
    where they are tied; queries, keys and values are one matrix; what is computed in float32,
    routers and convolutions, is held in it; and layer 0 gets the synthetic scale that makes all
    layers one program. The results are those of the canonical form, up to the order of summation.

    Args:
      params: canonical.
      config: the architecture.
      consume: takes the tree's leaves out of it, one layer at a time, so that memory holds one copy
        of the model and one layer: `params` is of no more use.

    Raises:
      ConfigError: the model is no ZAYA.
    """
    config.check_is_zaya()
    tree = dict(params["params"])
    head = tree.get("lm_head", {})
    weight = tree["embed_tokens"]["weight"] if config.tie_word_embeddings else head["weight"]
    layers = []
    for layer in params["params"]["layers"]:
        layers.append(_layer_for_cpu(layer, config))
        jax.block_until_ready(layers[-1])
        if consume:
            layer.clear()
    tree["lm_head"] = {**head, "weight": streamed(weight)}
    if consume and not config.tie_word_embeddings:
        head.clear()
    return {**params, "params": {**tree, "layers": tuple(layers)}}


def is_for_cpu(params: dict[str, Any]) -> bool:
    """Whether these came out of `for_cpu`."""
    layers = params["params"]["layers"]
    return isinstance(layers, tuple) and "fused" in layers[0]["self_attn"].get("qkv_proj", {})


def _layer_for_cpu(layer: dict[str, Any], config: ZayaConfig) -> dict[str, Any]:
    def in_float32(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    mlp, attention = layer["mlp"], layer["self_attn"]
    experts = {name: tuple(map(streamed, _split(leaf))) for name, leaf in mlp["experts"].items()}
    gate = in_float32(mlp["gate"])
    if "router_states_scale" not in gate:
        gate["router_states_scale"] = jnp.ones_like(gate["router_mlp"]["norm"]["weight"])
    qkv = dict(attention["qkv_proj"])
    parts = [qkv.pop(name) for name in PROJECTIONS]
    fused = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    qkv["fused"] = {**fused, "weight": streamed(fused["weight"])}
    qkv |= in_float32({name: qkv[name] for name in CONVOLUTIONS})
    o_proj = {**attention["o_proj"], "weight": streamed(attention["o_proj"]["weight"])}
    return {
        **layer,
        "mlp": {"gate": gate, "experts": experts},
        "self_attn": {**attention, "qkv_proj": qkv, "o_proj": o_proj},
    }


def _split(leaf: jax.Array) -> tuple[jax.Array, ...]:
    """Its parts along the first axis; on the CPU, without copying them."""
    if leaf.devices() == {jax.devices("cpu")[0]}:
        return tuple(jax.device_put(part, may_alias=True) for part in np.asarray(leaf))
    return tuple(leaf)
