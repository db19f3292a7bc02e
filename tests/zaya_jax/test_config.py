"""Configurations: both ways, and every bad value named."""

import dataclasses

import pytest

from zaya_jax import PRESETS, ConfigError, Rope, ZayaConfig


@pytest.mark.parametrize("name", PRESETS)
def test_hugging_face_form_round_trips(name):
    config = ZayaConfig.preset(name)
    assert ZayaConfig.from_hf(config.to_hf()) == config
    assert hash(config) == hash(ZayaConfig.from_hf(config.to_hf()))


def test_defaults_are_those_of_the_8b_model_and_nothing_is_mutable():
    config = ZayaConfig.preset("zaya1_8b")
    assert config == ZayaConfig.from_hf({"model_type": "zaya"}) == ZayaConfig()
    assert config.layer_types == ("hybrid",) * 40 and config.conv_channels == 1280
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1  # type: ignore[misc]


def test_oddities_of_released_configs_are_read():
    rope = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    config = ZayaConfig.from_hf(
        {
            "rope_parameters": {"rope_type": "default", "hybrid": rope},  # a stray key of the hub's
            "eos_token_id": [1, 106],
            "pad_token_id": None,
            "bos_token_id": None,
            "rope_scaling": None,
            "tokenizer_class": "GemmaTokenizer",
            "transformers_version": "5.23.0",
            "torch_dtype": "bfloat16",
        }
    )
    assert config.rope == Rope(1e6, 0.25) and config.bos_token_id is None
    assert config.eos_token_ids == (1, 106) and config.to_hf()["eos_token_id"] == [1, 106]
    plain = {
        "rope_theta": 1e4
    }  # as in transformers, the whole head rotates where no factor is given
    assert ZayaConfig.from_hf({"rope_parameters": {"hybrid": plain}}).rope == Rope(1e4, 1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_sise": 3}, "unknown field 'hidden_sise'"),
        ({"hidden_size": 0}, "hidden_size must be positive, got 0"),
        ({"hidden_size": "64"}, "hidden_size has the wrong type: '64'"),
        ({"hidden_size": 64.5}, "hidden_size has the wrong type"),
        ({"num_hidden_layers": True}, "num_hidden_layers has the wrong type"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be positive"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be below 1"),
        ({"hidden_size": None}, "hidden_size has the wrong type: None"),
        ({"layer_types": 5}, "layer_types has the wrong type"),
        ({"layer_types": [None, "hybrid"]}, "layer_types must be a list of names"),
        ({"sliding_window": 2**40}, "sliding_window must be positive and fit 32 bits"),
        (
            {"rope_parameters": {"hybrid": {"rope_theta": float("inf")}}},
            "theta must be positive and finite",
        ),
        ({"attention_bias": 1}, "attention_bias has the wrong type: 1"),
        ({"num_attention_heads": 5}, "5 is not a multiple of num_key_value_heads 2"),
        (
            {"num_key_value_heads": 1, "head_dim": 9},
            r"num_key_value_heads \* head_dim must be even",
        ),
        ({"num_experts": 300}, "num_experts must be at most 254"),
        ({"num_experts_per_tok": 2}, "num_experts_per_tok must be 1"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"model_type": "llama"}, "model_type is 'llama', not 'zaya'"),
        ({"layer_types": ["hybrid"]}, "layer_types names 1 layers, num_hidden_layers is 40"),
        ({"layer_types": ["full"] * 40}, "layer_types has 'full'"),
        ({"layer_types": "hybrid"}, "layer_types has the wrong type"),
        ({"layer_types": ["hybrid_sliding"] * 40}, "sliding_window must be set"),
        ({"sliding_window": 0}, "sliding_window must be positive"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters has 'rope_theta'"),
        ({"rope_parameters": 5}, "rope_parameters must be an object"),
        ({"rope_parameters": {}}, "rope_parameters has no entry for 'hybrid' layers"),
        (
            {"rope_parameters": {"hybrid": {"rope_type": "yarn", "rope_theta": 1}}},
            "rope_type 'yarn' is not supported",
        ),
        ({"rope_parameters": {"hybrid": {"rope_theta": -1}}}, "theta must be positive"),
        (
            {"rope_parameters": {"hybrid": {"rope_theta": 1, "partial_rotary_factor": 2}}},
            r"partial_rotary_factor must be in \(0, 1\]",
        ),
        (
            {
                "head_dim": 6,
                "rope_parameters": {"hybrid": {"rope_theta": 1, "partial_rotary_factor": 0.5}},
            },
            "rotates an odd number of channels",
        ),
        ({"skip_expert": "drop"}, "skip_expert must be zero or identity"),
        ({"eos_token_id": []}, "eos_token_ids must name at least one token"),
        ({"eos_token_id": 300000}, "eos_token_ids 300000 is outside the vocabulary of 262272"),
        ({"bos_token_id": -1}, "bos_token_id -1 is outside the vocabulary"),
        ({"ffn_hidden_size": 4096}, "'ffn_hidden_size' belongs to a legacy Zyphra config"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        ZayaConfig.from_hf(values)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match="unknown preset 'big': one of zaya1_8b,"):
        ZayaConfig.preset("big")


def test_how_to_compute_is_in_no_checkpoint():
    config = dataclasses.replace(ZayaConfig.preset("nano"), kernels="pallas", remat="full")
    assert ZayaConfig.from_hf(config.to_hf()) == ZayaConfig.preset("nano")
    for field in ("kernels", "remat"):
        with pytest.raises(ConfigError, match=f"unknown field '{field}'"):
            ZayaConfig.from_hf({field: "full"})
        with pytest.raises(ConfigError, match=f"{field} has the wrong type: 'some'"):
            ZayaConfig(**{field: "some"})
