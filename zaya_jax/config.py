"""The architecture of a ZAYA model as one frozen value, and its Hugging Face form (spec: ZAYA1-8B
`config.json`)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Self

from zaya_jax.errors import ConfigError

MOST_LAYERS = 1024  # that no model comes near: what a mistyped number would build must fit
FULL, SLIDING = "hybrid", "hybrid_sliding"

# Keys of a Hugging Face config that say nothing about the forward pass. `rope_type` once strayed to
# the top level.
IGNORED = frozenset(
    [
        "_attn_implementation",
        "_name_or_path",
        "add_cross_attention",
        "architectures",
        "attention_dropout",
        "auto_map",
        "chunk_size_feed_forward",
        "dtype",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "problem_type",
        "return_dict",
        "pruned_heads",
        "rope_type",
        "router_aux_loss_coef",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_cache",
    ]
)
# Keys that ZAYA fixes: another value would be another model.
_FIXED = {"hidden_act": "silu", "num_experts_per_tok": 1}
# Null means the default here; padding is masked whatever its token.
_NULL_IS_DEFAULT = frozenset({"layer_types", "pad_token_id"})
# Fields that say how to compute, and are in no checkpoint.
_NOT_OF_THE_MODEL = ("kernels", "remat")
# Fields that only ZAYA's values of are in any checkpoint.
_OF_ZAYA = {"attention": "cca", "router": "mlp", "residual_scaling": True}
_CHOICES = {
    "attention": ("cca", "gqa"),
    "router": ("mlp", "linear"),
    "skip_expert": ("zero", "identity"),
}
_LEGACY = frozenset(
    {"ffn_hidden_size", "ffn_hidden_size_list", "zaya_mlp_expansion", "zaya_layers"}
)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding of one layer type: base theta and the rotated part of each head."""

    theta: float
    partial_rotary_factor: float = 0.5

    @classmethod
    def from_hf(cls, layer_type: str, entry: Any) -> Self:
        where = f"rope_parameters[{layer_type!r}]"
        if not isinstance(entry, Mapping) or "rope_theta" not in entry:
            raise ConfigError(f"{where} must be an object with rope_theta, got {entry!r}")
        if entry.get("rope_type", "default") != "default":
            raise ConfigError(
                f"{where}: rope_type {entry['rope_type']!r} is not supported, only 'default'"
            )
        if unknown := sorted(set(entry) - {"rope_theta", "rope_type", "partial_rotary_factor"}):
            raise ConfigError(f"{where}: unknown field {unknown[0]!r}")
        return cls(entry["rope_theta"], entry.get("partial_rotary_factor", 1.0))

    def to_hf(self) -> dict[str, Any]:
        return {
            "partial_rotary_factor": self.partial_rotary_factor,
            "rope_theta": self.theta,
            "rope_type": "default",
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZayaConfig:
    """Architecture of a ZAYA model; field names are those of the Hugging Face config, defaults
    those of ZAYA1-8B.

    Hashable, so that it can be a static argument of `jax.jit`. Raises `ConfigError`, naming the
    field, on a value that no ZAYA model can have.

    Attributes:
      layer_types: one of "hybrid" (full attention) and "hybrid_sliding" per layer; () means all
        full.
      sliding_window: tokens a sliding layer sees, the current one included.
      rope, sliding_rope: rotary embedding of the two layer types.
      skip_expert: output for a token routed to the router's last class: "zero" (transformers, vLLM)
        or "identity" (the legacy code: its normed input times its probability). Not a Hugging Face
        field.
      attention, router, residual_scaling: parts of ZAYA, in whose place other models have plain
        ones: "gqa" is grouped-query attention with the rotary embedding and nothing else, "linear"
        a router of one matrix, and without residual scaling outputs are added to the stream as they
        are. Such models can be trained, to compare ZAYA with; no checkpoint layout has them.
      bos_token_id: None where prompts begin without one.
      eos_token_ids: every token that ends a turn.
      kernels: what computes the ops, "xla" or "pallas"; None leaves it to the machine (Pallas on
        AMD GPUs). Not of the architecture, and in no checkpoint.
      remat: what the gradient of stacked layers computes again instead of keeping it: "none" of it,
        all but products with weights ("dots"), or all but each layer's input ("full"). Not of the
        architecture either.
    """

    vocab_size: int = 262272
    hidden_size: int = 2048
    num_hidden_layers: int = 40
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 128
    cca_time0: int = 2
    cca_time1: int = 2
    num_experts: int = 16
    moe_intermediate_size: int = 2048
    router_hidden_size: int = 256
    rms_norm_eps: float = 1e-5
    rope: Rope = Rope(5e6)
    sliding_rope: Rope = Rope(1e4)
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    max_position_embeddings: int = 131072
    tie_word_embeddings: bool = True
    lm_head_bias: bool = False
    attention_bias: bool = False
    skip_expert: Literal["zero", "identity"] = "zero"
    attention: Literal["cca", "gqa"] = "cca"
    router: Literal["mlp", "linear"] = "mlp"
    residual_scaling: bool = True
    bos_token_id: int | None = 2
    eos_token_ids: tuple[int, ...] = (106,)
    pad_token_id: int = 0
    kernels: Literal["xla", "pallas"] | None = None
    remat: Literal["none", "dots", "full"] = "none"

    def __post_init__(self) -> None:
        _check_types(self)
        if self.num_hidden_layers > MOST_LAYERS:
            raise ConfigError(f"num_hidden_layers must be at most {MOST_LAYERS}")
        if not self.layer_types:
            object.__setattr__(self, "layer_types", (FULL,) * max(self.num_hidden_layers, 0))
        _check_values(self)

    @property
    def groups(self) -> int:
        """Query heads per key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def conv_channels(self) -> int:
        """Channels of u, the queries and keys that CCA convolves."""
        return (self.num_attention_heads + self.num_key_value_heads) * self.head_dim

    @property
    def conv_tail(self) -> int:
        """Columns of u that decoding carries from token to token."""
        return self.cca_time0 + self.cca_time1 - 2

    @property
    def is_zaya(self) -> bool:
        """Whether no part of ZAYA is replaced by a plain one."""
        return all(getattr(self, name) == value for name, value in _OF_ZAYA.items())

    def check_is_zaya(self) -> None:
        """Raises `ConfigError`, naming the field, where this is a model to compare ZAYA with."""
        for name, value in _OF_ZAYA.items():
            if (found := getattr(self, name)) != value:
                raise ConfigError(
                    f"{name} is {found!r}, ZAYA's is {value!r}: other models can be trained, but "
                    "neither saved, converted nor generated with"
                )

    def layer_rope(self, layer_type: str) -> Rope:
        return self.sliding_rope if layer_type == SLIDING else self.rope

    def layer_window(self, layer_type: str) -> int | None:
        return self.sliding_window if layer_type == SLIDING else None

    @classmethod
    def preset(cls, name: str) -> Self:
        """A named configuration, one of `PRESETS`."""
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}: one of {', '.join(PRESETS)}")
        return cls(**PRESETS[name])

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """Reads the contents of a current-layout `config.json`. Raises `ConfigError` naming the
        field at fault."""
        values = dict(values)
        if legacy := sorted(_LEGACY & set(values)):
            raise ConfigError(
                f"{legacy[0]!r} belongs to a legacy Zyphra config, not to one of the current layout"
            )
        if (kind := values.get("model_type", "zaya")) != "zaya":
            raise ConfigError(f"model_type is {kind!r}, not 'zaya'")
        for name, fixed in _FIXED.items():
            if values.pop(name, fixed) != fixed:
                raise ConfigError(f"{name} must be {fixed!r}")
        layer_types = values.get("layer_types")
        if isinstance(layer_types, list):
            if not all(isinstance(kind, str) for kind in layer_types):
                raise ConfigError(f"layer_types must be a list of names, got {layer_types!r:.80}")
            values["layer_types"] = tuple(layer_types)
        fields: dict[str, Any] = {}
        rope = values.pop("rope_parameters", None)
        if rope is not None:
            fields |= _read_rope(rope, layer_types if isinstance(layer_types, list) else [])
        if "eos_token_id" in values:
            eos = values.pop("eos_token_id")
            fields["eos_token_ids"] = tuple(eos) if isinstance(eos, list) else (eos,)
        known = {field.name for field in dataclasses.fields(cls)}
        known -= {"rope", "sliding_rope", "eos_token_ids", *_NOT_OF_THE_MODEL, *_OF_ZAYA}
        for name, value in values.items():
            if name in known:
                if value is not None or name not in _NULL_IS_DEFAULT:
                    fields[name] = value
            elif name not in IGNORED and value is not None:
                raise ConfigError(f"unknown field {name!r}")
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json` that transformers and `from_hf` read back as this
        model. Raises `ConfigError` where this is no ZAYA."""
        self.check_is_zaya()
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        rope, sliding_rope, eos = (
            values.pop("rope"),
            values.pop("sliding_rope"),
            values.pop("eos_token_ids"),
        )
        for name in (*_NOT_OF_THE_MODEL, *_OF_ZAYA):
            del values[name]
        if values["skip_expert"] == "zero":
            del values["skip_expert"]
        return {
            **values,
            **_FIXED,
            "architectures": ["ZayaForCausalLM"],
            "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
            "layer_types": list(self.layer_types),
            "model_type": "zaya",
            "rope_parameters": {FULL: rope.to_hf(), SLIDING: sliding_rope.to_hf()},
        }


def is_legacy(values: Mapping[str, Any]) -> bool:
    """Whether the contents of a `config.json` are those of the legacy Zyphra layout."""
    return not _LEGACY.isdisjoint(values)


def _read_rope(rope: Any, layer_types: list[str]) -> dict[str, Rope]:
    if not isinstance(rope, Mapping):
        raise ConfigError(f"rope_parameters must be an object, got {rope!r}")
    entries = {name: entry for name, entry in rope.items() if name != "rope_type"}
    if unknown := sorted(set(entries) - {FULL, SLIDING}):
        raise ConfigError(f"rope_parameters has {unknown[0]!r}: expected {FULL!r} and {SLIDING!r}")
    for layer_type in sorted(set(layer_types or [FULL])):
        if entries.get(layer_type) is None:
            raise ConfigError(f"rope_parameters has no entry for {layer_type!r} layers")
    names = {FULL: "rope", SLIDING: "sliding_rope"}
    return {
        names[kind]: Rope.from_hf(kind, entry)
        for kind, entry in entries.items()
        if entry is not None
    }


def _check_types(config: ZayaConfig) -> None:
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), field.default
        if field.name in ("sliding_window", "bos_token_id"):
            good = value is None or _is_int(value)
        elif field.name == "kernels":
            good = value in (None, "xla", "pallas")
        elif field.name == "remat":
            good = value in ("none", "dots", "full")
        elif isinstance(default, bool):
            good = isinstance(value, bool)
        elif isinstance(default, int):
            good = _is_int(value)
        elif isinstance(default, float):
            good = _is_number(value)
        else:
            good = isinstance(value, type(default))
        if not good:
            raise ConfigError(f"{field.name} has the wrong type: {value!r}")


def _check_values(config: ZayaConfig) -> None:
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(message)

    for name in [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "cca_time0",
        "cca_time1",
        "num_experts",
        "moe_intermediate_size",
        "router_hidden_size",
        "max_position_embeddings",
        "rms_norm_eps",
    ]:
        require(getattr(config, name) > 0, f"{name} must be positive, got {getattr(config, name)}")
    require(config.rms_norm_eps < 1, f"rms_norm_eps must be below 1, got {config.rms_norm_eps}")
    require(
        config.num_experts <= 254,
        f"num_experts must be at most 254 (recorded in uint8), got {config.num_experts}",
    )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    require(
        heads % kv_heads == 0,
        f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}",
    )
    require(
        kv_heads * config.head_dim % 2 == 0,
        "num_key_value_heads * head_dim must be even (value shift halves it)",
    )
    require(
        len(config.layer_types) == config.num_hidden_layers,
        f"layer_types names {len(config.layer_types)} layers, "
        f"num_hidden_layers is {config.num_hidden_layers}",
    )
    for layer_type in config.layer_types:
        require(
            layer_type in (FULL, SLIDING),
            f"layer_types has {layer_type!r}: expected {FULL!r} or {SLIDING!r}",
        )
    if SLIDING in config.layer_types:
        require(
            config.sliding_window is not None,
            "sliding_window must be set for 'hybrid_sliding' layers",
        )
    require(
        config.sliding_window is None or 0 < config.sliding_window < 2**31,
        f"sliding_window must be positive and fit 32 bits, got {config.sliding_window}",
    )
    for kind in (FULL, SLIDING):
        name, rope = "rope" if kind == FULL else "sliding_rope", config.layer_rope(kind)
        require(
            _is_number(rope.theta) and 0 < rope.theta < 1e30,
            f"{name}: theta must be positive and finite, got {rope.theta!r}",
        )
        factor = rope.partial_rotary_factor
        require(
            _is_number(factor) and 0 < factor <= 1,
            f"{name}: partial_rotary_factor must be in (0, 1], got {factor}",
        )
        rotary = int(config.head_dim * factor)
        require(
            rotary % 2 == 0 or kind not in config.layer_types,
            f"{name}: partial_rotary_factor {factor} rotates an odd number of channels ({rotary})",
        )
    for name, choices in _CHOICES.items():
        value = getattr(config, name)
        require(value in choices, f"{name} must be {' or '.join(choices)}: {value!r}")
    require(len(config.eos_token_ids) > 0, "eos_token_ids must name at least one token")
    for name, ids in {
        "bos_token_id": () if config.bos_token_id is None else (config.bos_token_id,),
        "pad_token_id": (config.pad_token_id,),
        "eos_token_ids": config.eos_token_ids,
    }.items():
        for token in ids:
            require(_is_int(token), f"{name} has the wrong type: {token!r}")
            require(
                0 <= token < config.vocab_size,
                f"{name} {token} is outside the vocabulary of {config.vocab_size}",
            )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


PRESETS: dict[str, dict[str, Any]] = {
    "zaya1_8b": {},
    "zaya1_74b_preview": dict(
        hidden_size=4096,
        num_hidden_layers=60,
        num_attention_heads=16,
        num_experts=24,
        moe_intermediate_size=4096,
        rope=Rope(1e7),
        layer_types=(SLIDING, FULL) * 30,
        sliding_window=4097,
    ),
    # The embedded model; its vocabulary is the tokenizer in zaya_jax/nano.
    "nano": dict(
        vocab_size=320,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=32,
        num_experts=8,
        moe_intermediate_size=192,
        router_hidden_size=32,
        rope=Rope(1e5),
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_ids=(2,),
    ),
    # Benchmark sizes.
    "small": dict(
        vocab_size=32000,
        hidden_size=512,
        num_hidden_layers=8,
        head_dim=64,
        moe_intermediate_size=512,
        router_hidden_size=64,
    ),
    "medium": dict(
        vocab_size=32000,
        hidden_size=1024,
        num_hidden_layers=12,
        moe_intermediate_size=1024,
        router_hidden_size=128,
    ),
}
