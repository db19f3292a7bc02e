"""A run's configuration: every key known, every value typed, the same after every journey."""

import dataclasses
import json
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config import PRESET_FOLDER, TrainConfig, from_json, load_config, new_model, presets
from train.config import to_json as as_json
from train.settings import assign, build, plain
from zaya_jax.errors import ConfigError

SOURCE = ["data.sources=[{path='x.jsonl', format='chat'}]"]
STARTED = [*SOURCE, "start_from='runs/before'"]


@dataclasses.dataclass(frozen=True)
class Inner:
    number: int = 1
    ratio: float = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = Inner()
    maybe: int | None = None
    several: tuple[Inner, ...] = ()
    flag: bool = False


values = st.fixed_dictionaries(
    {"name": st.text()},
    optional={
        "inner": st.builds(Inner, st.integers(), st.floats(allow_nan=False)).map(plain),
        "maybe": st.integers(),
        "several": st.lists(st.builds(Inner, st.integers()).map(plain)),
        "flag": st.booleans(),
    },
)


@given(values)
def test_what_is_built_is_what_was_given(given_values):
    built = build(Outer, given_values)
    again = build(Outer, json.loads(json.dumps(plain(built))))
    assert built == again
    assert {name: plain(built)[name] for name in given_values} == given_values


@pytest.mark.parametrize(
    ("given_values", "message"),
    [
        ({}, "missing key 'name'"),
        ({"name": "a", "nome": 1}, "unknown key 'nome': one of name, inner"),
        ({"name": 1}, "name must be of type str, got 1"),
        ({"name": "a", "inner": {"number": "7"}}, "inner.number must be of type int, got '7'"),
        ({"name": "a", "inner": {"number": 1.5}}, "inner.number must be of type int, got 1.5"),
        ({"name": "a", "inner": {"number": True}}, "inner.number must be of type int, got True"),
        ({"name": "a", "inner": {"ratio": True}}, "inner.ratio must be of type float"),
        ({"name": "a", "inner": 3}, "inner must be a table, got 3"),
        ({"name": "a", "several": {}}, "several must be a list"),
        ({"name": "a", "several": [{"x": 1}]}, "unknown key 'several.0.x'"),
        ({"name": "a", "flag": 1}, "flag must be of type bool, got 1"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(given_values, message):
    with pytest.raises(ConfigError) as error:
        build(Outer, given_values)
    assert message in str(error.value)


def test_assignments_are_toml_and_reach_into_tables_and_lists():
    tables: dict = {"a": {"b": 1}, "list": [{"x": 1}, {"x": 2}]}
    for text in ("a.b=2.5", "a.c = true", "list.1.x=7", "new.deep=[1, 2]", "word=two words"):
        assign(tables, text)
    assert tables == {
        "a": {"b": 2.5, "c": True},
        "list": [{"x": 1}, {"x": 7}],
        "new": {"deep": [1, 2]},
        "word": "two words",
    }


@pytest.mark.parametrize("text", ["nothing", "=1", "a..b=1", "list.5.x=1", "list.y=1", "a.b.c=1"])
def test_assignments_that_reach_nothing_are_refused(text):
    with pytest.raises(ConfigError, match="--set"):
        assign({"a": {"b": 1}, "list": [{"x": 1}]}, text)


@pytest.mark.parametrize("name", presets())
def test_presets_are_complete_but_for_their_sources(name):
    values = tomllib.loads((PRESET_FOLDER / f"{name}.toml").read_text())
    phase = values.get("phase", "pretrain")
    config = load_config(phase, name, SOURCE)
    assert config.data.sources and from_json(json.loads(json.dumps(as_json(config)))) == config
    new_model(config)


def test_the_presets_of_the_8b_model_are_the_phases_of_the_report():
    base, midtrain, sft = (
        load_config(phase, f"zaya1_8b_{name}", SOURCE)
        for phase, name in [("pretrain", "base1"), ("midtrain", "midtrain"), ("sft", "sft")]
    )
    assert [c.context for c in (base, midtrain, sft)] == [4096, 32768, 131072]
    assert [c.rope_base for c in (base, midtrain, sft)] == [1e4, 1e6, 5e6]
    assert base.tokens_per_step == 16_777_216
    more = load_config("pretrain", "zaya1_8b_base2", SOURCE)
    assert more.tokens_per_step == base.tokens_per_step and more.start_from
    tokens = [c.tokens_per_step * c.steps for c in (base, more, midtrain, sft)]
    assert [round(t / 1e9) for t in tokens] == [8000, 4000, 1200, 660]
    assert new_model(base).hidden_size == 2048


@pytest.mark.parametrize(
    ("phase", "settings", "message"),
    [
        ("midtrain", SOURCE, "start_from must name the weights that midtrain starts from"),
        ("sft", [*STARTED, "data.sources.0.format=text"], "data.sources of sft must be chats"),
        ("pretrain", [*SOURCE, "rows=0"], "rows must be positive, got 0"),
        ("pretrain", [*SOURCE, "rows=6", "mesh.data=4"], "rows must divide by"),
        ("pretrain", [*SOURCE, "rows=4", "accumulate=3"], "x accumulate = 3, got 4"),
        ("pretrain", [*SOURCE, "context=10", "mesh.context=4"], "context must divide by"),
        ("pretrain", [*SOURCE, "mesh.expert=0"], "mesh.expert must be positive"),
        ("pretrain", [*SOURCE, "optimizer.kind=sgd"], "optimizer.kind must be one of muon, adamw"),
        ("pretrain", [*SOURCE, "optimizer.momentum=2"], "momentum"),
        ("pretrain", [*SOURCE, "checkpoint.milestone=150"], "multiple of checkpoint.every = 100"),
        ("pretrain", [*SOURCE, "faults.spike_factor=0.5"], "faults.spike_factor"),
        ("pretrain", [*SOURCE, "trackers=['mlflow']"], "trackers.0 must be one of tensorboard"),
        ("pretrain", [*SOURCE, "optimiser.kind=muon"], "unknown key 'optimiser'"),
        ("pretrain", [*SOURCE, "z_loss=-1.0"], "z_loss must not be negative"),
        ("pretrain", [*SOURCE, "peak_tflops=0"], "peak_tflops must be positive"),
        ("pretrain", [*SOURCE, "seed=4294967296"], "seed must lie in 0 .. 4294967295"),
        ("pretrain", [*SOURCE, "compute_dtype=float16"], "compute_dtype must be one of bfloat16"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_name(phase, settings, message):
    with pytest.raises(ConfigError) as error:
        load_config(phase, None, settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_with_the_name_of_a_preset_is_not_in_its_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert load_config("pretrain", "tiny", SOURCE).context == 128


def test_files_and_presets_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match="no file and no preset 'tinny': presets are tiny"):
        load_config("pretrain", "tinny")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config("pretrain", str(tmp_path / "none.toml"))
    (tmp_path / "bad.toml").write_text("rows = = 3")
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        load_config("pretrain", str(tmp_path / "bad.toml"))
    (tmp_path / "sft.toml").write_text("phase = 'sft'")
    with pytest.raises(ConfigError, match=r"configures sft, not pretrain"):
        load_config("pretrain", str(tmp_path / "sft.toml"))


def test_sizes_of_a_new_model_can_be_changed():
    settings = ["model.num_hidden_layers=3", "model.hidden_size=64", "model.vocab_size=500"]
    model = new_model(load_config("pretrain", None, [*SOURCE, *settings]))
    assert (model.num_hidden_layers, model.hidden_size, model.vocab_size) == (3, 64, 500)
    assert isinstance(load_config("pretrain", None, SOURCE), TrainConfig)
    with pytest.raises(ConfigError, match=r"model\.preset 'huge'"):
        new_model(load_config("pretrain", None, [*SOURCE, "model.preset=huge"]))
