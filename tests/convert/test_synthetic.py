import json
import math
from collections import namedtuple

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CONFIGS, random_tokens, run

import zaya_jax
from convert import synthetic
from convert.folder import INDEX
from convert.mapping import mapping
from convert.safetensors_read import SINGLE, read_folder
from convert.synthetic import main, write_synthetic
from zaya_jax import CheckpointError

# The smallest width at which the balance of random routers says something.
CONFIG = zaya_jax.ZayaConfig(
    vocab_size=512,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    head_dim=16,
    num_experts=8,
    moe_intermediate_size=48,
    router_hidden_size=48,
)
Usage = namedtuple("Usage", "free")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    write_synthetic(CONFIG, folder)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_is_there_and_varies(name, tmp_path):
    config = CONFIGS[name]
    write_synthetic(config, tmp_path, "float32")
    found, problems = read_folder(tmp_path)
    expected = {entry.name: entry.shape for entry in mapping(config).values()}
    assert not problems and {n: tensor.shape for n, tensor in found.items()} == expected
    for tensor in found.values():
        values = tensor.read()
        assert np.isfinite(values).all() and values.any(), tensor.name
        assert values.std() > 0 or values.size == 1, tensor.name


def test_loads_as_the_same_configuration_and_dtype(folder):
    model = zaya_jax.load(folder)
    assert model.config == CONFIG
    assert model.params["params"]["norm"]["weight"].dtype == jnp.bfloat16
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_every_expert_gets_its_share(folder):
    model = zaya_jax.load(folder)
    out = run(model.params, CONFIG, random_tokens(0, 8, 128, vocab=CONFIG.vocab_size))
    load = np.asarray(out.expert_counts[:, :-1]) / out.expert_counts.sum(1, keepdims=True)
    entropy = -(load * np.log(np.maximum(load, 1e-9))).sum(1) / math.log(CONFIG.num_experts)
    assert np.isfinite(out.hidden).all() and not out.expert_counts[:, -1].any()
    assert entropy.mean() > 0.93 and entropy.min() > 0.88, entropy


def test_seed_decides_and_shards_do_not(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "SHARD_BYTES", 50_000)
    write_synthetic(CONFIG, tmp_path / "same")
    write_synthetic(CONFIG, tmp_path / "other", seed=1)
    assert (tmp_path / "same" / INDEX).exists() and (folder / SINGLE).exists()
    first, same, other = (
        {name: tensor.read().tobytes() for name, tensor in read_folder(place)[0].items()}
        for place in (folder, tmp_path / "same", tmp_path / "other")
    )
    assert first == same and all(first[name] != other[name] for name in first)


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic.shutil, "disk_usage", lambda _: Usage(free=2e9))
    config = zaya_jax.ZayaConfig.preset("zaya1_8b")
    with pytest.raises(CheckpointError, match=r"needs 17\.7 GB, only 2\.0 GB are free"):
        write_synthetic(config, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="new or an empty folder"):
        write_synthetic(CONFIG, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main("giant", tmp_path / "model")
    assert stop.value.code == 2
    assert "unknown preset 'giant'" in capsys.readouterr().err.splitlines()[0]
