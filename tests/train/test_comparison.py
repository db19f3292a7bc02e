"""ZAYA beside a plain model: equal in parameters and tokens, and the page says what was found."""

import dataclasses
from pathlib import Path

import pytest

from train import comparison
from train.comparison import BEGIN, END, MODELS, load, main, with_table
from train.config import load_config, new_model
from train.course.run import configuration
from train.setup import prepare
from zaya_jax import InputError, ZayaConfig, ZayaError
from zaya_jax.model import parameter_counts

ROOT = Path(__file__).parents[2]
SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "moe_intermediate_size": 8, "num_experts": 2}


def architecture(name: str) -> ZayaConfig:
    course = configuration("pretrain", Path("unused"))
    return new_model(dataclasses.replace(course, model=MODELS[name]))


def test_both_models_have_as_many_parameters_and_one_has_nothing_of_zaya():
    zaya, plain = architecture("ZAYA"), architecture("plain")
    assert zaya == ZayaConfig.preset("nano")
    assert (plain.attention, plain.router, plain.residual_scaling) == ("gqa", "linear", False)
    for ours, theirs in zip(parameter_counts(zaya), parameter_counts(plain), strict=True):
        assert abs(theirs / ours - 1) < 0.01


def test_the_switches_can_be_set_like_every_other_value():
    sets = ["data.sources=[]", "model.attention=gqa", "model.router=linear"]
    config = load_config("pretrain", None, [*sets, "model.residual_scaling=false"])
    model = new_model(config)
    assert (model.attention, model.router, model.residual_scaling) == ("gqa", "linear", False)
    assert new_model(load_config("pretrain", None, sets[:1])).is_zaya


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The command, of models so small and runs so short that they learn nothing."""
    folder = tmp_path_factory.mktemp("comparison")
    file, page = folder / "figures.json", folder / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter")
    small = {name: dataclasses.replace(model, **SMALL) for name, model in MODELS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "MODELS", small)
        main(steps=2, seeds=2, rates=(0.02,), json=file, page=page)
    return file, page


def test_the_models_are_trained_on_the_same_tokens_and_seeds_differ(compared):
    found = load(compared[0])
    zaya, plain = found.results
    assert (zaya.model, plain.model, found.steps) == ("ZAYA", "plain", 2)
    assert zaya.tokens == plain.tokens and 0 < max(zaya.tokens) <= 2 * found.tokens_per_step
    for result in found.results:
        assert len(set(result.losses)) == 2 and all(5 < loss < 7 for loss in result.losses)
        assert result.mean == pytest.approx(sum(result.losses) / 2)
        assert result.spread == pytest.approx(abs(result.losses[0] - result.losses[1]))
    assert zaya.losses != plain.losses


def test_the_table_stands_between_the_markers_and_nowhere_else(compared):
    found, page = load(compared[0]), compared[1].read_text()
    assert page == with_table(page, found)
    assert page.startswith("before\n") and page.endswith("\nafter") and "old" not in page
    assert f"{found.results[1].losses[1]:.4f}" in page
    with pytest.raises(InputError, match="comparison: begin"):
        with_table("no markers", found)


def test_the_page_says_what_the_figures_say():
    page = (ROOT / "docs" / "training.md").read_text()
    assert with_table(page, load(ROOT / "docs" / "comparison.json")) == page


def test_nothing_goes_on_from_a_plain_model(tmp_path):
    """Its run has no config.json, by which checkpoints are known."""
    run = tmp_path / "plain"
    (run / "checkpoints" / "1").mkdir(parents=True)
    course = configuration("midtrain", tmp_path)
    with pytest.raises(ZayaError, match=r"config\.json"):
        prepare(dataclasses.replace(course, start_from=str(run)))
