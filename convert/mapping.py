"""The one table between our parameter tree and the tensors of a checkpoint.

Conversion is renaming: the tree has one leaf per Hugging Face tensor, in its orientation.
"""

from typing import NamedTuple

from zaya_jax.config import ZayaConfig


class Entry(NamedTuple):
    """One tensor of a checkpoint."""

    name: str  # in the current Hugging Face layout
    shape: tuple[int, ...]
    always_float32: bool = False


def mapping(config: ZayaConfig) -> dict[str, Entry]:
    """Every leaf of the tree, by its path ("params/layers/0/mlp/gate/down_proj/weight")."""
    size = (config.hidden_size,)
    vocabulary = (config.vocab_size, config.hidden_size)
    shapes = {
        "embed_tokens/weight": vocabulary,
        "input_hidden_states_scale": size,
        "input_hidden_states_bias": size,
        "norm/weight": size,
    }
    table = {
        f"params/{path}": Entry(f"model.{_dotted(path)}", shape) for path, shape in shapes.items()
    }
    if not config.tie_word_embeddings:
        table["params/lm_head/weight"] = Entry("lm_head.weight", vocabulary)
    if config.lm_head_bias:
        table["params/lm_head/bias"] = Entry("lm_head.bias", (config.vocab_size,))
    biases = "mlp/gate/balancing_biases"
    for i in range(config.num_hidden_layers):
        for path, shape in _layer_shapes(config, first=i == 0).items():
            name = f"model.layers.{i}.{_dotted(path)}"
            table[f"params/layers/{i}/{path}"] = Entry(name, shape)
        name = f"model.layers.{i}.{_dotted(biases)}"
        classes = config.num_experts + 1
        table[f"balancing/layers/{i}/{biases}"] = Entry(name, (classes,), always_float32=True)
    return table


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
