"""The one table between our parameter tree and the tensors of a checkpoint, in every layout.

The tree has one leaf per tensor of the current Hugging Face layout, in its orientation, so that
conversion is renaming; in the legacy layout each expert is a tensor of its own.
"""

from typing import Literal, NamedTuple

from zaya_jax.config import ZayaConfig


class Entry(NamedTuple):
    """One leaf of the tree.

    Attributes:
      name: of its tensor in the current Hugging Face layout.
      legacy: of its tensor in the legacy Zyphra layout, or of one for each row of its first axis.
      shape: of the leaf.
      transform: how the legacy tensors become the leaf.
      always_float32: whatever the dtype of the others.
    """

    name: str
    legacy: tuple[str, ...]
    shape: tuple[int, ...]
    transform: Literal["rename", "stack"] = "rename"
    always_float32: bool = False


# Where the parts of our layer i are in the legacy layout, which has two layers for each of ours: in
# layer 2i + 0, 1 or 2, under that name. It scales residuals as a sub-layer begins, we as one ends.
_LEGACY = {
    "input_layernorm": (0, "input_norm"),
    "self_attn/qkv_proj/q_proj": (0, "self_attn.qkv.linear_q"),
    "self_attn/qkv_proj/k_proj": (0, "self_attn.qkv.linear_k"),
    "self_attn/qkv_proj/v_proj_current": (0, "self_attn.qkv.val_proj1"),
    "self_attn/qkv_proj/v_proj_delayed": (0, "self_attn.qkv.val_proj2"),
    "self_attn/qkv_proj/conv_qk_depthwise": (0, "self_attn.qkv.conv_qk.0"),
    "self_attn/qkv_proj/conv_qk_grouped": (0, "self_attn.qkv.conv_qk.1"),
    "self_attn/qk_norm/temp": (0, "self_attn.qkv.temp"),
    "self_attn/o_proj": (0, "self_attn.o_proj"),
    "post_attention_residual_scale": (1, "res_scale"),
    "post_attention_layernorm": (1, "input_norm"),
    "mlp/gate/down_proj": (1, "zaya_block.router.down_proj"),
    "mlp/gate/router_states_scale": (1, "zaya_block.router.router_states_scale"),
    "mlp/gate/router_mlp/norm": (1, "zaya_block.router.rmsnorm_eda"),
    "mlp/gate/router_mlp/fc1": (1, "zaya_block.router.router_mlp.0"),
    "mlp/gate/router_mlp/fc2": (1, "zaya_block.router.router_mlp.2"),
    "mlp/gate/router_mlp/out_proj": (1, "zaya_block.router.router_mlp.4"),
    "mlp/gate/balancing_biases": (1, "zaya_block.router.balancing_biases"),
    "mlp/experts/gate_up_proj": (1, "zaya_block.experts.local_experts.{}.linear_fc1.weight"),
    "mlp/experts/down_proj": (1, "zaya_block.experts.local_experts.{}.linear_fc2.weight"),
    "post_mlp_residual_scale": (2, "res_scale"),
}


def mapping(config: ZayaConfig) -> dict[str, Entry]:
    """Every leaf of the tree, by its path ("params/layers/0/mlp/experts/down_proj"). Raises
    ConfigError where the model is no ZAYA."""
    config.check_is_zaya()
    size = (config.hidden_size,)
    vocabulary = (config.vocab_size, config.hidden_size)
    first = "model.layers.0.res_scale"
    table = {
        "params/embed_tokens/weight": _entry("model.embed_tokens.weight", vocabulary),
        "params/input_hidden_states_scale": _entry(
            "model.input_hidden_states_scale", size, f"{first}.hidden_states_scale"
        ),
        "params/input_hidden_states_bias": _entry(
            "model.input_hidden_states_bias", size, f"{first}.hidden_states_bias"
        ),
        "params/norm/weight": _entry("model.norm.weight", size, "model.final_norm.weight"),
    }
    if not config.tie_word_embeddings:
        table["params/lm_head/weight"] = _entry("lm_head.weight", vocabulary)
    if config.lm_head_bias:
        table["params/lm_head/bias"] = _entry("lm_head.bias", (config.vocab_size,))
    biases = "mlp/gate/balancing_biases"
    for i in range(config.num_hidden_layers):
        for path, shape in _layer_shapes(config, first=i == 0).items():
            table[f"params/layers/{i}/{path}"] = _layer_entry(config, i, path, shape)
        entry = _layer_entry(config, i, biases, (config.num_experts + 1,))
        table[f"balancing/layers/{i}/{biases}"] = entry._replace(always_float32=True)
    return table


def copies(config: ZayaConfig) -> dict[str, str]:
    """Tensors that a checkpoint may hold and that are dropped, in both layouts, by the path of the
    leaf that each must equal bit for bit."""
    return {"lm_head.weight": "params/embed_tokens/weight"} if config.tie_word_embeddings else {}


def _entry(name: str, shape: tuple[int, ...], legacy: str | None = None) -> Entry:
    return Entry(name, (name if legacy is None else legacy,), shape)


def _layer_entry(config: ZayaConfig, layer: int, path: str, shape: tuple[int, ...]) -> Entry:
    stem = next(stem for stem in _LEGACY if path == stem or path.startswith(f"{stem}/"))
    offset, name = _LEGACY[stem]
    number = 2 * layer + offset
    end = number == 2 * config.num_hidden_layers
    legacy = f"{'model' if end else f'model.layers.{number}'}.{name}{_dotted(path[len(stem) :])}"
    ours = f"model.layers.{layer}.{_dotted(path)}"
    if "{}" not in legacy:
        return Entry(ours, (legacy,), shape)
    return Entry(ours, tuple(map(legacy.format, range(config.num_experts))), shape, "stack")


def _dotted(path: str) -> str:
    return path.replace("/", ".")


def _layer_shapes(config: ZayaConfig, first: bool) -> dict[str, tuple[int, ...]]:
    c = config
    size, width, experts, hidden = (
        c.hidden_size,
        c.router_hidden_size,
        c.num_experts,
        c.moe_intermediate_size,
    )
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    qkv, gate = "self_attn/qkv_proj", "mlp/gate"
    linears = {
        f"{qkv}/q_proj": (queries, size),
        f"{qkv}/k_proj": (keys, size),
        f"{qkv}/v_proj_current": (keys // 2, size),
        f"{qkv}/v_proj_delayed": (keys // 2, size),
        "self_attn/o_proj": (size, queries),
    }
    biased = {
        f"{qkv}/conv_qk_depthwise": (c.conv_channels, 1, c.cca_time0),
        f"{qkv}/conv_qk_grouped": (c.conv_channels, c.head_dim, c.cca_time1),
        f"{gate}/down_proj": (width, size),
        f"{gate}/router_mlp/fc1": (width, width),
        f"{gate}/router_mlp/fc2": (width, width),
    }
    if c.attention_bias:
        biased |= linears
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm/weight": (size,),
        "post_attention_layernorm/weight": (size,),
        "self_attn/qk_norm/temp": (c.num_key_value_heads,),
        f"{gate}/router_mlp/norm/weight": (width,),
        f"{gate}/router_mlp/out_proj/weight": (experts + 1, width),
        "mlp/experts/gate_up_proj": (experts, 2 * hidden, size),
        "mlp/experts/down_proj": (experts, size, hidden),
    }
    if not first:
        shapes[f"{gate}/router_states_scale"] = (width,)
    for scaling in ("post_attention_residual_scale", "post_mlp_residual_scale"):
        for part in (
            "hidden_states_scale",
            "hidden_states_bias",
            "residual_scale",
            "residual_bias",
        ):
            shapes[f"{scaling}/{part}"] = (size,)
    shapes |= {f"{path}/weight": shape for path, shape in (linears | biased).items()}
    shapes |= {f"{path}/bias": (shape[0],) for path, shape in biased.items()}
    return shapes
