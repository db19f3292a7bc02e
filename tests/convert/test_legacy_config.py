"""Legacy configs: every key and oddity, and what is refused."""

import contextlib
from dataclasses import replace

import pytest
from helpers import CONFIGS, ODD
from legacy import as_base, legacy_config

from convert.legacy_config import read_legacy, write_legacy
from zaya_jax import ConfigError, Rope, ZayaConfig

EIGHT = ZayaConfig.preset("zaya1_8b")
VALUES = legacy_config(EIGHT.to_hf())


@pytest.mark.parametrize("config", [*CONFIGS.values(), EIGHT], ids=[*CONFIGS, "8B"])
def test_what_is_written_is_read_back(config):
    identity = replace(config, skip_expert="identity")
    assert read_legacy(write_legacy(identity), 0) == identity
    assert read_legacy(write_legacy(replace(config, skip_expert="zero")), 0).skip_expert == "zero"
    assert read_legacy(legacy_config(config.to_hf()), 0) == identity


def test_the_74b_config_has_windows_of_previous_tokens():
    config = ZayaConfig.preset("zaya1_74b_preview")
    values = write_legacy(config)
    assert values["swa_layers"] == [4096, 0, 0, 0] * 30
    assert read_legacy(values, 0) == config


def test_the_base_config_lists_every_layer_and_counts_them_wrongly():
    values = as_base(VALUES)
    assert values["num_hidden_layers"] == 120 and values["num_attention_heads"] == 16
    assert read_legacy(values, 80) == read_legacy(VALUES, 80)


def test_a_stale_number_of_layers_gives_way_to_the_tensors():
    """Of ZAYA1-base alone: another model of 120 layers, of which some are missing, is damaged."""
    stale = VALUES | {"num_hidden_layers": 120}
    assert read_legacy(stale, 80).num_hidden_layers == 40
    for found in (0, 78, 118, 119, 120):
        assert read_legacy(stale, found).num_hidden_layers == 60


def test_absent_keys_have_defaults():
    absent = "tie_word_embeddings partial_rotary_factor attention_bias rope_theta rope_scaling"
    switches = "cca zaya_use_mod zaya_use_eda scale_residual_merge normalization activation_func"
    drop = {*absent.split(), *switches.split(), "kv_channels", "num_query_groups", "eos_token_id"}
    values = {name: value for name, value in VALUES.items() if name not in drop}
    config = read_legacy(values, 80)
    assert config == replace(EIGHT, skip_expert="identity")
    assert config.rope == Rope(5e6, 0.5) and config.tie_word_embeddings
    assert read_legacy({"ffn_hidden_size": 4096}, 80) == config


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 5e6, "partial_rotary_factor": 0.5}, "rope_theta": None},
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"clamp_temp": False, "add_bias_linear": False},
        {"clamp_temp": None},
        {"swa_layers": [0] * 80},
        {"swa_layers": None, "swa_rotary_base": None},
        {"transformers_version": "4.57.1", "zaya_high_prec": True, "residual_in_fp32": False},
        {"zaya_mlp_expansion": [0, 256] * 40},
        {"ffn_hidden_size": None, "ffn_hidden_size_list": [0, 4096] * 60},
        {"num_query_groups_list": [2, 0] * 40, "cca_num_q_heads": [8, 0] * 40},
        {"zaya_layers": ["a", 16] * 40, "num_hidden_layers": 120},
        {"eos_token_id": [106]},
    ],
    ids=lambda change: ",".join(change),
)
def test_other_spellings_of_the_same_model(change):
    assert read_legacy(VALUES | change, 80) == read_legacy(VALUES, 80)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clamp_temp": True}, "clamp_temp is True: no released model has it"),
        ({"zaya_use_mod": False}, "zaya_use_mod is False"),
        ({"zaya_use_eda": False}, "zaya_use_eda is False"),
        ({"scale_residual_merge": False}, "scale_residual_merge is False"),
        ({"cca": False}, "cca is False"),
        ({"gated_linear_unit": False}, "gated_linear_unit is False"),
        ({"add_bias_linear": True}, "add_bias_linear is True"),
        ({"activation_func": "gelu"}, "activation_func is 'gelu'"),
        ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm'"),
        ({"moe_router_topk": 2}, "moe_router_topk is 2"),
        ({"model_type": "llama"}, "model_type is 'llama', not 'zaya'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling: rope_type 'yarn'"),
        ({"rope_scaling": True}, "rope_scaling must be an object"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is 5000000.0, rope_parameters says"),
        ({"rope_parameters": {"rope_theta": 5e6, "factor": 2}}, "unknown field 'factor'"),
        ({"swa_layers": [4, 0, 8, 0] * 20}, r"windows of 4, 8: only one size can be converted"),
        ({"swa_layers": [4, 0]}, "swa_layers must list 80 layers"),
        ({"swa_layers": ["x", 0] * 40}, "swa_layers has a window of 'x'"),
        ({"sliding_window": 4096}, "sliding_window is 4096, but swa_layers says none"),
        ({"num_hidden_layers": 79}, "num_hidden_layers must be even and at most 2048 .* got 79"),
        ({"num_hidden_layers": "80"}, "num_hidden_layers must be even"),
        ({"num_hidden_layers": 10**20}, "num_hidden_layers must be even and at most 2048"),
        ({"swa_rotary_base": [1]}, r"sliding_rope: theta must be positive and finite, got \[1\]"),
        ({"rope_theta": "x"}, "rope: theta must be positive and finite, got 'x'"),
        ({"zaya_layers": ["a", 16, 16, "a"]}, "zaya_layers must alternate 'a' and one number"),
        ({"zaya_layers": ["a", 16, "a", 8]}, "zaya_layers must alternate 'a' and one number"),
        ({"zaya_layers": ["a", 8] * 40}, "num_experts is 16, zaya_layers says 8"),
        ({"zaya_layers": ["a"]}, "zaya_layers must list pairs"),
        ({"ffn_hidden_size_list": [0, 4096, 0, 2048] * 20}, "ffn_hidden_size_list differs between"),
        ({"ffn_hidden_size_list": [0, 4096]}, "ffn_hidden_size_list lists 2 layers of 80"),
        ({"ffn_hidden_size_list": [0, 2048] * 40}, "is 2048, another key says 4096"),
        ({"num_query_groups": 4}, "num_key_value_heads is 2, another key says 4"),
        ({"ffn_hidden_size": 4095}, "ffn_hidden_size must be an even number, got 4095"),
        ({"vocab_size": "many"}, "vocab_size has the wrong type"),
        ({"hidden_size": -1}, "hidden_size must be positive"),
        ({"frobnicate": 1}, "unknown field 'frobnicate' in a legacy config"),
        ({"skip_expert": "double"}, "skip_expert must be zero or identity"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_another_model_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message) as error:
        read_legacy(VALUES | change, 80)
    assert "\n" not in str(error.value)


def test_any_junk_is_a_config_error():
    names = [*VALUES, "swa_layers", "zaya_layers", "cca_num_q_heads", "rope_parameters"]
    junks = ([], {}, "x", -3, 1.5, [None], ["a"], {"rope_theta": "x"}, True, [[1]] * 80, 10**20)
    for values in (VALUES, as_base(VALUES)):
        for name in names:
            for junk in junks:
                with contextlib.suppress(ConfigError):
                    read_legacy(values | {name: junk}, 80)


def test_unused_windows_do_not_survive_and_need_not():
    config = replace(ODD, layer_types=("hybrid",) * 3, skip_expert="identity")
    again = read_legacy(write_legacy(config), 0)
    assert again == replace(config, sliding_window=None)
