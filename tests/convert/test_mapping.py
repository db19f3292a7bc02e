"""The table itself, and the page that is made of it."""

import pytest
from helpers import CONFIGS

from convert.mapping import mapping
from convert.mapping_page import PAGE, page
from zaya_jax import ZayaConfig


def test_the_page_is_the_table():
    assert PAGE.read_text() == page(), "run python -m convert.mapping_page"


@pytest.mark.parametrize("config", [*CONFIGS.values(), ZayaConfig.preset("zaya1_8b")])
def test_no_two_leaves_share_a_name(config):
    table = mapping(config)
    for names in (
        [entry.name for entry in table.values()],
        [name for entry in table.values() for name in entry.legacy],
    ):
        assert len(set(names)) == len(names)


def test_counts_of_the_released_checkpoints():
    """2,483 legacy tensors, as others counted in ZAYA1-base."""
    table = mapping(ZayaConfig.preset("zaya1_8b"))
    legacy = [name for entry in table.values() for name in entry.legacy]
    assert len(legacy) == 2483


def test_residual_scales_shift_by_one():
    table = mapping(ZayaConfig.preset("zaya1_8b"))

    def legacy(path):
        return table[f"params/{path}"].legacy

    assert legacy("input_hidden_states_bias") == ("model.layers.0.res_scale.hidden_states_bias",)
    block = "post_attention_residual_scale/residual_bias"
    assert legacy(f"layers/7/{block}") == ("model.layers.15.res_scale.residual_bias",)
    block = "post_mlp_residual_scale/residual_scale"
    assert legacy(f"layers/7/{block}") == ("model.layers.16.res_scale.residual_scale",)
    assert legacy(f"layers/39/{block}") == ("model.res_scale.residual_scale",)
