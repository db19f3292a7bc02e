"""Legacy Zyphra checkpoints made from current ones by a second hand, after the specification and
without the mapping table, which it tests."""

import json
import re
import shutil
from pathlib import Path

from safetensors.numpy import load_file, save_file

WEIGHTS, CONFIG = "model.safetensors", "config.json"
ATTENTION = {
    "self_attn.qkv_proj.q_proj": "self_attn.qkv.linear_q",
    "self_attn.qkv_proj.k_proj": "self_attn.qkv.linear_k",
    "self_attn.qkv_proj.v_proj_current": "self_attn.qkv.val_proj1",
    "self_attn.qkv_proj.v_proj_delayed": "self_attn.qkv.val_proj2",
    "self_attn.qkv_proj.conv_qk_depthwise": "self_attn.qkv.conv_qk.0",
    "self_attn.qkv_proj.conv_qk_grouped": "self_attn.qkv.conv_qk.1",
    "self_attn.qk_norm.temp": "self_attn.qkv.temp",
    "self_attn.o_proj": "self_attn.o_proj",
    "input_layernorm": "input_norm",
}
ROUTER = {
    "router_mlp.norm": "rmsnorm_eda",
    "router_mlp.fc1": "router_mlp.0",
    "router_mlp.fc2": "router_mlp.2",
    "router_mlp.out_proj": "router_mlp.4",
}


def legacy_tensors(tensors: dict, blocks: int) -> dict:
    out = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match is None:
            name = name.replace("model.norm.", "model.final_norm.")
            name = name.replace("model.input_", "model.layers.0.res_scale.")
            out[name] = tensor
            continue
        block, rest = int(match[1]), match[2]
        even, odd, after = (f"model.layers.{2 * block + n}" for n in range(3))
        if rest.startswith("mlp.experts."):
            part = {"gate_up_proj": "linear_fc1", "down_proj": "linear_fc2"}[rest.split(".")[-1]]
            for e, expert in enumerate(tensor):
                where = f"{odd}.zaya_block.experts.local_experts.{e}"
                out[f"{where}.{part}.weight"] = expert.copy()
        elif rest.startswith("mlp.gate."):
            rest = rest.removeprefix("mlp.gate.")
            for ours, theirs in ROUTER.items():
                rest = rest.replace(ours, theirs)
            out[f"{odd}.zaya_block.router.{rest}"] = tensor
        elif rest.startswith("post_attention_layernorm"):
            out[f"{odd}.input_norm.weight"] = tensor
        elif rest.startswith("post_attention_residual_scale."):
            out[f"{odd}.res_scale.{rest.split('.')[1]}"] = tensor
        elif rest.startswith("post_mlp_residual_scale."):
            where = "model" if block == blocks - 1 else after
            out[f"{where}.res_scale.{rest.split('.')[1]}"] = tensor
        else:
            for ours, theirs in ATTENTION.items():
                if rest.startswith(ours):
                    out[f"{even}.{theirs}{rest.removeprefix(ours)}"] = tensor
    return out


def legacy_config(values: dict) -> dict:
    """As ZAYA1-8B-legacy writes it: numbers that hold for all layers."""
    full = values["rope_parameters"]["hybrid"]
    out = {
        "activation_func": "swiglu",
        "architectures": ["ZayaForCausalLM"],
        "attention_bias": values["attention_bias"],
        "bias_activation_fusion": True,
        "bos_token_id": values["bos_token_id"],
        "cca": True,
        "cca_time0": values["cca_time0"],
        "cca_time1": values["cca_time1"],
        "eos_token_id": values["eos_token_id"],
        "ffn_hidden_size": 2 * values["moe_intermediate_size"],
        "gated_linear_unit": True,
        "head_dim": values["head_dim"],
        "hidden_size": values["hidden_size"],
        "kv_channels": values["head_dim"],
        "lm_head_bias": values["lm_head_bias"],
        "mamba_cache_dtype": "float32",
        "max_position_embeddings": values["max_position_embeddings"],
        "model_type": "zaya",
        "moe_router_topk": 1,
        "norm_epsilon": values["rms_norm_eps"],
        "normalization": "RMSNorm",
        "num_attention_heads": values["num_attention_heads"],
        "num_experts": values["num_experts"],
        "num_hidden_layers": 2 * values["num_hidden_layers"],
        "num_key_value_heads": values["num_key_value_heads"],
        "num_query_groups": values["num_key_value_heads"],
        "pad_token_id": values["pad_token_id"],
        "partial_rotary_factor": full["partial_rotary_factor"],
        "residual_in_fp32": True,
        "rope_scaling": False,
        "rope_theta": full["rope_theta"],
        "scale_residual_merge": True,
        "sliding_window": None,
        "tie_word_embeddings": values["tie_word_embeddings"],
        "use_cache": True,
        "vocab_size": values["vocab_size"],
        "zaya_mlp_expansion": values["router_hidden_size"],
        "zaya_use_eda": True,
        "zaya_use_mod": True,
    }
    kinds = values["layer_types"]
    if "hybrid_sliding" in kinds:
        window = values["sliding_window"] - 1
        out["swa_layers"] = [n for k in kinds for n in (window if "sliding" in k else 0, 0)]
        out["swa_rotary_base"] = values["rope_parameters"]["hybrid_sliding"]["rope_theta"]
    return out


def as_base(values: dict) -> dict:
    """The same as ZAYA1-base writes it: a list entry for every layer, a stale number of them, and
    heads of the width that the hidden size would have without compression."""
    out = {name: value for name, value in values.items() if name not in ("head_dim", "kv_channels")}
    blocks = values["num_hidden_layers"] // 2
    out["zaya_layers"] = ["a", out.pop("num_experts")] * blocks
    out["cca_num_q_heads"] = [values["num_attention_heads"], 0] * blocks
    out["num_attention_heads"] = values["hidden_size"] // values["head_dim"]
    out["num_query_groups_list"] = [out.pop("num_query_groups"), 0] * blocks
    out["ffn_hidden_size_list"] = [0, out.pop("ffn_hidden_size")] * (blocks + 20)
    out["zaya_mlp_expansion"] = [0, values["zaya_mlp_expansion"]] * blocks
    out["num_hidden_layers"] = 120
    return out


def write_legacy_copy(source: Path, folder: Path, base: bool = False) -> Path:
    """A legacy copy of a current checkpoint of one file."""
    folder.mkdir()
    values = json.loads((source / CONFIG).read_text())
    config = legacy_config(values)
    (folder / CONFIG).write_text(json.dumps(as_base(config) if base else config))
    tensors = legacy_tensors(load_file(source / WEIGHTS), values["num_hidden_layers"])
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for name in ("tokenizer.json", "generation_config.json"):
        if (source / name).exists():
            shutil.copy(source / name, folder)
    return folder
