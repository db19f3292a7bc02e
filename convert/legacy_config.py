"""The legacy Zyphra `config.json` (ZAYA1-base, ZAYA1-reasoning-base, ZAYA1-8B-legacy) to and from
our configuration.

The legacy model has two layers for each of ours: attention in the even ones, experts in the odd
ones. Some of its configs list a value for every layer.
"""

from collections.abc import Mapping
from typing import Any

from zaya_jax.config import FULL, IGNORED, SLIDING, Rope, ZayaConfig
from zaya_jax.errors import ConfigError

# Switches that every released model has in this position: another one would be another model.
_FIXED = {
    "activation_func": "swiglu",
    "add_bias_linear": False,
    "cca": True,
    "clamp_temp": False,
    "gated_linear_unit": True,
    "moe_router_topk": 1,
    "normalization": "RMSNorm",
    "scale_residual_merge": True,
    "zaya_use_eda": True,
    "zaya_use_mod": True,
}
_FIXED_WHERE_GIVEN = {
    "hidden_act": "silu",
    "ignore_mod_in_zaya_block": False,
    "num_experts_per_tok": 1,
    "use_lora_att": False,
    "use_rope_scaling": False,
    "zaya_inhibitory": False,
}
# Keys that say nothing about the forward pass, besides those of the current layout.
_IGNORED = IGNORED | {
    "activation_func_fp8_input_store",
    "apply_rope_fusion",
    "ar_threshold",
    "bias_activation_fusion",
    "chunk_size",
    "fused_add_norm",
    "lora_rank",
    "mamba_cache_dtype",
    "mamba_chunk_size",
    "num_attention_heads_list",
    "residual_in_fp32",
    "zaya_high_prec",
    "zaya_mod_per",
    "zaya_p_switch",
    "zaya_parallel_scan_thres",
}
# Fields that have the same name and meaning in both.
_SAME = (
    "vocab_size",
    "hidden_size",
    "cca_time0",
    "cca_time1",
    "max_position_embeddings",
    "tie_word_embeddings",
    "lm_head_bias",
    "attention_bias",
    "bos_token_id",
    "pad_token_id",
)
_STALE_LAYERS, _BASE_LAYERS = 120, 80  # that ZAYA1-base's config names, and that it has
_MOST_LAYERS = 2048


def read_legacy(values: Mapping[str, Any], layers: int) -> ZayaConfig:
    """The configuration in the contents of a legacy `config.json`.

    Args:
      values: its contents.
      layers: that the tensors belong to, by which ZAYA1-base is known, whose config names 120 and
        has 80; 0 if that is not known.

    Raises:
      ConfigError: naming the key that is unknown, out of range, contradicts another one, or
        describes a model that no released checkpoint is.
    """
    keys = _Keys(values)
    if (kind := keys.take("model_type", "zaya")) != "zaya":
        raise ConfigError(f"model_type is {kind!r}, not 'zaya'")
    for name, fixed in (_FIXED | _FIXED_WHERE_GIVEN).items():
        if (value := keys.take(name, fixed)) != fixed:
            raise ConfigError(
                f"{name} is {value!r}: no released model has it, only {fixed!r} is read"
            )
    blocks, experts = _layers(keys, layers)
    attention, mlps = range(0, 2 * blocks, 2), range(1, 2 * blocks, 2)
    heads = keys.take_each("cca_num_q_heads", attention)
    all_heads = keys.take("num_attention_heads", ZayaConfig.num_attention_heads)
    hidden = keys.take_each("ffn_hidden_size", mlps)
    hidden = keys.take_each("ffn_hidden_size_list", mlps, hidden)
    hidden = 2 * ZayaConfig.moe_intermediate_size if hidden is None else hidden
    if not isinstance(hidden, int) or hidden % 2:
        raise ConfigError(f"ffn_hidden_size must be an even number, got {hidden!r}")
    groups = keys.take_each("num_query_groups_list", attention)
    groups = keys.take_each("num_query_groups", attention, groups)
    groups = keys.take_each("num_key_value_heads", attention, groups)
    head_dim = keys.take_each("kv_channels", attention)
    head_dim = keys.take_each("head_dim", attention, head_dim)
    size = keys.values.get("hidden_size", ZayaConfig.hidden_size)
    if head_dim is None and heads is not None and isinstance(all_heads, int) and all_heads > 0:
        head_dim = size // all_heads if isinstance(size, int) else None
    fields: dict[str, Any] = {
        "num_hidden_layers": blocks,
        "num_experts": experts,
        "num_attention_heads": all_heads if heads is None else heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "moe_intermediate_size": hidden // 2,
        "router_hidden_size": keys.take_each("zaya_mlp_expansion", mlps),
        "rms_norm_eps": keys.take("norm_epsilon"),
        "skip_expert": keys.take("skip_expert", "identity"),
        **_attention_types(keys, attention),
        **{name: keys.take(name) for name in _SAME},
    }
    if (eos := keys.take("eos_token_id")) is not None:
        fields["eos_token_ids"] = tuple(eos) if isinstance(eos, list) else (eos,)
    keys.check_all_taken()
    return ZayaConfig(**{name: value for name, value in fields.items() if value is not None})


def write_legacy(config: ZayaConfig) -> dict[str, Any]:
    """The contents of a legacy `config.json` that `read_legacy` reads back as this model.

    Raises:
      ConfigError: the legacy layout cannot express it.
    """
    config.check_is_zaya()
    sliding = SLIDING in config.layer_types
    rope, factor = config.rope, config.rope.partial_rotary_factor
    if sliding and FULL not in config.layer_types:
        factor = config.sliding_rope.partial_rotary_factor
    elif sliding and config.sliding_rope.partial_rotary_factor != factor:
        raise ConfigError("a legacy config has one partial_rotary_factor for all layers")
    if sliding and config.sliding_window == 1:
        raise ConfigError("a legacy config has no sliding_window of 1: there, 0 means no window")
    values = {name: getattr(config, name) for name in _SAME}
    eos = config.eos_token_ids
    values |= _FIXED | {
        "architectures": ["ZayaForCausalLM"],
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
        "ffn_hidden_size": 2 * config.moe_intermediate_size,
        "head_dim": config.head_dim,
        "kv_channels": config.head_dim,
        "model_type": "zaya",
        "norm_epsilon": config.rms_norm_eps,
        "num_attention_heads": config.num_attention_heads,
        "num_experts": config.num_experts,
        "num_hidden_layers": 2 * config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "num_query_groups": config.num_key_value_heads,
        "partial_rotary_factor": factor,
        "rope_scaling": False,
        "rope_theta": rope.theta,
        "swa_rotary_base": config.sliding_rope.theta,
        "zaya_mlp_expansion": config.router_hidden_size,
    }
    if sliding and config.sliding_window is not None:
        window = config.sliding_window - 1
        kinds = config.layer_types
        values["swa_layers"] = [n for k in kinds for n in (window if k == SLIDING else 0, 0)]
    if config.skip_expert != "identity":
        values["skip_expert"] = config.skip_expert
    return values


class _Keys:
    """The keys of a config that nobody has asked for yet; null is the same as absent."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = {name: value for name, value in values.items() if value is not None}

    def take(self, name: str, default: Any = None) -> Any:
        return self.values.pop(name, default)

    def take_each(self, name: str, places: range, known: Any = None) -> Any:
        """The value that all of these layers share, of a number or a list with one for each layer;
        None where there is none. Raises ConfigError where it is not `known`, if something is."""
        value = self.take(name)
        if isinstance(value, list):
            if len(value) < places.stop - 1:  # some are longer than the model
                raise ConfigError(f"{name} lists {len(value)} layers of {len(places) * 2}")
            different = {repr(value[i]): value[i] for i in places}
            if len(different) > 1:
                raise ConfigError(f"{name} differs between layers: {', '.join(sorted(different))}")
            (value,) = different.values()
        if value is not None and known is not None and value != known:
            raise ConfigError(f"{name} is {value!r}, another key says {known!r}")
        return known if value is None else value

    def check_all_taken(self) -> None:
        if unknown := sorted(self.values.keys() - _IGNORED):
            raise ConfigError(f"unknown field {unknown[0]!r} in a legacy config")


def _layers(keys: _Keys, found: int) -> tuple[int, int | None]:
    """Our layers, and the experts of each."""
    listed, number = keys.take("zaya_layers"), keys.take("num_hidden_layers")
    experts = keys.take("num_experts")
    if listed is None:
        number = 2 * ZayaConfig.num_hidden_layers if number is None else number
        number = found if (number, found) == (_STALE_LAYERS, _BASE_LAYERS) else number
        if not isinstance(number, int) or not 2 <= number <= _MOST_LAYERS or number % 2:
            raise ConfigError(
                f"num_hidden_layers must be even and at most {_MOST_LAYERS} in a legacy config, "
                f"got {number!r:.80}"
            )
        return number // 2, experts
    if not isinstance(listed, list) or len(listed) % 2 or not listed:
        raise ConfigError(f"zaya_layers must list pairs of layers, got {listed!r:.80}")
    if any(kind != "a" for kind in listed[::2]) or len(set(map(repr, listed[1::2]))) > 1:
        raise ConfigError("zaya_layers must alternate 'a' and one number of experts")
    if experts is not None and experts != listed[1]:
        raise ConfigError(f"num_experts is {experts!r}, zaya_layers says {listed[1]!r}")
    return len(listed) // 2, listed[1]


def _attention_types(keys: _Keys, attention: range) -> dict[str, Any]:
    """The fields that say how each layer attends: its type, window and rotary embedding."""
    flat = keys.take("rope_parameters", {})
    scaling = keys.take("rope_scaling", False)
    for name, value in {"rope_parameters": flat, "rope_scaling": scaling or {}}.items():
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be an object, got {value!r}")
        if (kind := value.get("rope_type", value.get("type", "default"))) != "default":
            raise ConfigError(f"{name}: rope_type {kind!r} is not supported, only 'default'")
        known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if unknown := sorted(value.keys() - known):
            raise ConfigError(f"{name}: unknown field {unknown[0]!r}")
    theta = _agree(keys, "rope_theta", flat, ZayaConfig.rope.theta)
    factor = _agree(keys, "partial_rotary_factor", flat, ZayaConfig.rope.partial_rotary_factor)
    sliding_theta = keys.take("swa_rotary_base", ZayaConfig.sliding_rope.theta)
    windows = keys.take("swa_layers", [0] * attention.stop)
    if not isinstance(windows, list) or len(windows) < len(attention) * 2:
        raise ConfigError(f"swa_layers must list {len(attention) * 2} layers, got {windows!r:.80}")
    windows = [windows[i] for i in attention]
    sizes = {repr(window): window for window in windows if window}
    if len(sizes) > 1:
        raise ConfigError(
            f"swa_layers has windows of {', '.join(sorted(sizes))}: only one size can be converted"
        )
    (window,) = sizes.values() or (None,)
    if window is not None and (not isinstance(window, int) or window < 0):
        raise ConfigError(f"swa_layers has a window of {window!r}")
    if (said := keys.take("sliding_window")) is not None and said not in (window, _plus(window)):
        raise ConfigError(f"sliding_window is {said!r}, but swa_layers says {window or 'none'}")
    return {
        "layer_types": tuple(SLIDING if w else FULL for w in windows),
        "sliding_window": _plus(window),
        "rope": Rope(theta, factor),
        "sliding_rope": Rope(sliding_theta, factor) if sizes else Rope(sliding_theta),
    }


def _plus(window: int | None) -> int | None:
    """Previous tokens as a window that contains the current one too."""
    return None if window is None else window + 1


def _agree(keys: _Keys, name: str, flat: Mapping[str, Any], default: float) -> float:
    """A value that may stand at the top, in `rope_parameters`, or in both places."""
    values = [v for v in (keys.take(name), flat.get(name)) if v is not None]
    if len(values) == 2 and values[0] != values[1]:
        raise ConfigError(f"{name} is {values[0]!r}, rope_parameters says {values[1]!r}")
    return values[0] if values else default
