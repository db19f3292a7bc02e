"""Any layout into any other, bit for bit, or not at all."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoints import checkpoint, tensors
from helpers import CONFIGS, ODD, ORACLE, TINY, assert_close, random_params
from legacy import as_base, legacy_config, legacy_tensors, write_legacy_copy
from safetensors.numpy import load_file, save_file

import zaya_jax
from convert import safetensors_write
from convert.checkpoint import layout_of, open_checkpoint
from convert.conversion import convert, plan, skip_is_reachable
from convert.full_size import BASE_MEMORY, run
from convert.mapping import mapping
from convert.synthetic import write_synthetic
from convert.verify import compare
from zaya_jax import CheckpointError, ConfigError, Zaya
from zaya_jax.cli.main import main

GOLDEN = Path(__file__).parent.parent / "golden"
NANO = Path(zaya_jax.__file__).parent / "nano"
LAYOUTS = ("hf", "hf-legacy", "orbax")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "route", [("hf", "orbax"), ("hf", "hf-legacy"), ("hf-legacy", "orbax")], ids="-".join
)
def test_there_and_back_again_is_the_identity(tmp_path, name, route):
    first, second = route
    start = tmp_path / "start"
    convert(checkpoint(tmp_path / "made", CONFIGS[name]), start, first)
    convert(start, tmp_path / "there", second)
    convert(tmp_path / "there", tmp_path / "back", first)
    assert [layout_of(tmp_path / f) for f in ("start", "there", "back")] == [first, second, first]
    assert tensors(tmp_path / "back") == tensors(start) != {}
    before, after = (zaya_jax.loading.read_config(tmp_path / f) for f in ("start", "back"))
    # A class that no token reaches gets the meaning that is usual in a layout.
    assert replace(before, skip_expert="zero") == replace(after, skip_expert="zero")


def test_mixed_dtypes_are_kept(tmp_path):
    """Also of float32 balancing biases among bfloat16, and of a single odd one."""
    source = checkpoint(tmp_path / "source", TINY)
    changed = load_file(source / "model.safetensors")
    for name in changed:
        if "experts" in name:
            changed[name] = changed[name].astype(jax.numpy.bfloat16)
    changed["model.norm.weight"] = changed["model.norm.weight"].astype(np.float16)
    save_file(changed, source / "model.safetensors")
    for layout in ("hf-legacy", "orbax"):
        convert(source, tmp_path / layout, layout)
        convert(tmp_path / layout, tmp_path / f"{layout}-back", "hf")
        assert tensors(tmp_path / f"{layout}-back") == tensors(source)


def test_dtype_changes_all_but_the_balancing_biases(tmp_path):
    source = checkpoint(tmp_path / "source", TINY)
    for layout in LAYOUTS:
        convert(source, tmp_path / layout, layout, dtype=np.dtype(jax.numpy.bfloat16))
        for path, leaf in open_checkpoint(tmp_path / layout).leaves.items():
            assert leaf.dtype == ("float32" if "balancing_biases" in path else "bfloat16")
        assert json.loads((tmp_path / layout / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_are_of_the_size_asked_for(tmp_path):
    source = checkpoint(tmp_path / "source", TINY)
    for layout in ("hf", "hf-legacy"):
        convert(source, tmp_path / layout, layout, max_shard_bytes=20_000)
        sizes = [f.stat().st_size for f in (tmp_path / layout).glob("*.safetensors")]
        assert len(sizes) > 3 and max(sizes) < 30_000
        assert not compare(source, tmp_path / layout)


def test_tokenizer_template_and_generation_files_come_along(tmp_path):
    source = shutil.copytree(NANO, tmp_path / "source")
    files = "tokenizer.json tokenizer_config.json tokenizer.model chat_template.jinja"
    files += " generation_config.json special_tokens_map.json added_tokens.json"
    for name in files.split():
        if not (source / name).exists():
            (source / name).write_text(f'{{"of": "{name}"}}')
    for layout in LAYOUTS:
        convert(source, tmp_path / layout, layout)
        for name in files.split():
            assert (tmp_path / layout / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("base", [False, True], ids=["8B", "base"])
@pytest.mark.parametrize(
    "name", [f.parent.name for f in sorted(GOLDEN.glob("*/reference.safetensors"))]
)
def test_a_legacy_checkpoint_gives_the_logits_of_transformers(tmp_path, name, base):
    """Legacy files made by a second hand: loaded as they are, and converted by us."""
    if base and json.loads((GOLDEN / name / "config.json").read_text())["hidden_size"] % 16:
        pytest.fail("the base form derives head_dim from hidden_size")
    folder = write_legacy_copy(GOLDEN / name, tmp_path / "legacy", base)
    reference = load_file(GOLDEN / name / "reference.safetensors")
    skip = zaya_jax.load(GOLDEN / name).config.skip_expert
    convert(folder, tmp_path / "hf", "hf", skip=skip)
    assert not compare(GOLDEN / name, tmp_path / "hf")
    loaded = [tmp_path / "hf"] + [folder] * (skip == "identity")
    for place in loaded:
        model = zaya_jax.load(place, "float32")
        out = model.logits(reference["ids"], lengths=reference["lengths"])
        real = [np.asarray(row)[:n] for row, n in zip(out, reference["lengths"], strict=True)]
        assert_close(np.concatenate(real), reference["logits"], 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sliding", "attention_bias", "untied_bias"])
def test_transformers_computes_the_same_of_what_we_converted(oracle, tmp_path, name):
    """A second hand's legacy checkpoint, through Orbax, in the reference environment."""
    folder = write_legacy_copy(GOLDEN / name, tmp_path / "legacy")
    convert(folder, tmp_path / "orbax", "orbax")
    convert(tmp_path / "orbax", tmp_path / "hf", "hf", skip="zero")
    ids = GOLDEN / name / "reference.safetensors"
    script = Path(__file__).parent.parent / "oracle" / "logits.py"
    arguments = [ORACLE, script, tmp_path / "hf", ids, tmp_path / "logits.safetensors"]
    subprocess.run(list(map(str, arguments)), check=True)
    theirs = load_file(tmp_path / "logits.safetensors")["logits"]
    assert_close(theirs, load_file(ids)["logits"], 1e-5)


def test_the_hub_cache_serves_without_a_network(tmp_path, monkeypatch):
    """As huggingface_hub lays it out."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny"
    checkpoint(tmp_path / "source", TINY)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tmp_path / "source", repository / "snapshots" / commit)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    zaya = [sys.executable, "-m", "zaya_jax.cli.main", "convert", "someone/tiny"]
    subprocess.run([*zaya, str(tmp_path / "out"), "--to", "orbax"], env=environment, check=True)
    assert not compare(tmp_path / "source", tmp_path / "out")


@pytest.mark.slow
def test_memory_is_that_of_two_tensors_in_every_direction(tmp_path):
    """With the tensors of the 8B model, of which the embedding is the largest, and few layers."""
    config = replace(zaya_jax.ZayaConfig.preset("zaya1_8b"), num_hidden_layers=2, layer_types=())
    needed, free = 6e9, shutil.disk_usage(tmp_path).free
    if free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of disk, {free / 1e9:.1f} GB are free")
    write_synthetic(config, tmp_path / "hf")
    largest = 2 * config.vocab_size * config.hidden_size
    for start, end in (
        *(("hf", "orbax"), ("orbax", "hf-legacy"), ("hf-legacy", "orbax")),
        *(("orbax", "hf"), ("hf", "hf-legacy"), ("hf-legacy", "hf")),
    ):
        arguments = ["convert", tmp_path / start, tmp_path / end, "--to", end, "--overwrite"]
        _, peak = run(*arguments)
        print(f"{start} -> {end}: peak {peak / 1e9:.2f} GB")
        assert peak < BASE_MEMORY + 2 * largest
        if start != "hf":
            shutil.rmtree(tmp_path / start)


def test_we_write_the_legacy_layout_as_a_second_hand_would(tmp_path):
    for name, config in CONFIGS.items():
        source = checkpoint(tmp_path / name, config)
        convert(source, tmp_path / f"{name}-legacy", "hf-legacy")
        wanted = legacy_tensors(load_file(source / "model.safetensors"), config.num_hidden_layers)
        found = load_file(tmp_path / f"{name}-legacy" / "model.safetensors")
        assert found.keys() == wanted.keys()
        assert all((found[n] == wanted[n]).all() for n in found)
        written = json.loads((tmp_path / f"{name}-legacy" / "config.json").read_text())
        theirs = legacy_config(config.to_hf())
        same = written.keys() & theirs.keys()
        assert len(same) > 25 and {n: written[n] for n in same} == {n: theirs[n] for n in same}


def test_both_forms_of_a_legacy_config_are_the_same_model(tmp_path):
    config = zaya_jax.ZayaConfig.preset("zaya1_8b")
    values = legacy_config(config.to_hf())
    from convert.legacy_config import read_legacy

    expected = json.loads(json.dumps(values))
    assert read_legacy(expected, 80).num_hidden_layers == 40
    assert read_legacy(as_base(values), 80) == read_legacy(values, 80)


@pytest.mark.parametrize(
    ("biases", "reachable"),
    [
        ([0, 0, -1], False),  # as released: probability 1 would tie, and the first one wins
        ([0.01, -0.3, -1], False),
        ([0, 0, -0.99], True),
        ([0, 0, 0], True),
        ([1.5, 0, 0.4], False),
        ([-0.2, -0.3, -1.1], True),
    ],
)
def test_whether_a_token_can_reach_the_skip_class(biases, reachable):
    """By the formula, and by trying probabilities."""
    biases = np.array(biases, np.float32)
    assert skip_is_reachable(biases) == reachable
    logits = np.random.default_rng(0).standard_normal((100_000, 3)) * 4
    logits[:, -1] += np.linspace(-5, 30, len(logits))
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    assert ((p + biases).argmax(1) == 2).any() == reachable


def test_a_reachable_skip_class_is_converted_only_with_its_meaning_said(tmp_path):
    params = random_params(TINY, skip_bias=-1.5)
    biases = params["balancing"]["layers"][-1]["mlp"]["gate"]  # in a single layer, the last
    biases["balancing_biases"] = biases["balancing_biases"].at[-1].set(0.05)
    Zaya(params, TINY).save(source := tmp_path / "source")
    with pytest.raises(
        CheckpointError, match=r"reach the skip class, which means 'zero' here and "
    ):
        convert(source, tmp_path / "legacy", "hf-legacy")
    assert not (tmp_path / "legacy").exists()
    tokens = np.arange(3, 63).reshape(2, 30)
    for skip in ("zero", "identity"):
        convert(source, tmp_path / skip, "hf-legacy", skip=skip)
        assert zaya_jax.load(tmp_path / skip).config.skip_expert == skip
        convert(tmp_path / skip, tmp_path / f"{skip}-orbax", "orbax")  # which keeps the meaning
        assert zaya_jax.load(tmp_path / f"{skip}-orbax").config.skip_expert == skip
    with pytest.raises(CheckpointError, match="means 'identity' here and 'zero' in the current"):
        convert(tmp_path / "identity-orbax", tmp_path / "hf", "hf")
    before = zaya_jax.load(source).logits(tokens)
    np.testing.assert_array_equal(zaya_jax.load(tmp_path / "zero").logits(tokens), before)
    assert np.abs(zaya_jax.load(tmp_path / "identity").logits(tokens) - before).max() > 1e-3


def test_what_the_legacy_layout_cannot_express_is_refused(tmp_path):
    one = checkpoint(tmp_path / "one", replace(ODD, sliding_window=1))
    with pytest.raises(ConfigError, match="no sliding_window of 1"):
        convert(one, tmp_path / "out", "hf-legacy")
    rope = zaya_jax.Rope(1e4, 0.25)
    two = checkpoint(tmp_path / "two", replace(ODD, rope=rope))
    with pytest.raises(ConfigError, match="one partial_rotary_factor for all layers"):
        convert(two, tmp_path / "out", "hf-legacy")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_config_and_tensors_of_different_layouts_are_refused(tmp_path):
    legacy = write_legacy_copy(GOLDEN / "sliding", tmp_path / "legacy")
    shutil.copy(GOLDEN / "sliding" / "config.json", legacy)
    with pytest.raises(CheckpointError, match=r"config.json has the current .*zaya_block.* legacy"):
        open_checkpoint(legacy)
    mixed = write_legacy_copy(GOLDEN / "sliding", tmp_path / "mixed")
    shutil.copy(GOLDEN / "sliding" / "model.safetensors", mixed)
    with pytest.raises(CheckpointError, match=r"config.json has the legacy .*mlp.gate.* current"):
        open_checkpoint(mixed)


def test_legacy_problems_name_the_tensor(tmp_path):
    legacy = write_legacy_copy(GOLDEN / "sliding", tmp_path / "legacy")
    found = load_file(legacy / "model.safetensors")
    expert = "model.layers.3.zaya_block.experts.local_experts.2.linear_fc1.weight"
    changed = dict(found)
    del changed[expert]
    changed["model.layers.0.res_scale.residual_scale"] = np.ones(64, np.float32)
    save_file(changed, legacy / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(legacy)
    assert f"2 problems: missing tensor '{expert}'" in str(error.value)
    assert "unknown tensor 'model.layers.0.res_scale.residual_scale'" in str(error.value)
    save_file(found | {expert: found[expert].astype(np.float16)}, legacy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"local_experts.0.linear_fc1.* are .* and float16"):
        open_checkpoint(legacy)


def test_a_tied_head_that_repeats_the_embedding_is_dropped(tmp_path):
    for name, folder in (
        ("hf", checkpoint(tmp_path / "hf", TINY)),
        ("legacy", write_legacy_copy(tmp_path / "hf", tmp_path / "legacy")),
    ):
        found = load_file(folder / "model.safetensors")
        embedding = found["model.embed_tokens.weight"]
        save_file(found | {"lm_head.weight": embedding.copy()}, folder / "model.safetensors")
        convert(folder, tmp_path / f"{name}-out", "hf")
        assert "lm_head.weight" not in tensors(tmp_path / f"{name}-out")
        save_file(found | {"lm_head.weight": embedding + 1}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the embedding"):
            convert(folder, tmp_path / "out", "hf")


def test_a_head_that_differs_late_from_the_embedding_is_no_copy(tmp_path):
    """Beyond the first rows that are compared at a time."""
    source = checkpoint(tmp_path / "source", replace(TINY, vocab_size=5000))
    found = load_file(source / "model.safetensors")
    head = found["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    save_file(found | {"lm_head.weight": head}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the embedding"):
        open_checkpoint(source)


def test_dry_run_shows_every_tensor_and_writes_nothing(tmp_path):
    source = checkpoint(tmp_path / "source", TINY)
    rows = list(plan(source, "hf-legacy", dtype=np.dtype(np.float16)).rows())
    targets = [row[2] for row in rows]
    assert targets == [name for entry in mapping(TINY).values() for name in entry.legacy]
    text = "\n".join(" ".join(row) for row in rows)
    assert all(entry.name in text for entry in mapping(TINY).values())
    assert (
        "model.layers.1.mlp.experts.down_proj[2] float32 "
        "model.layers.3.zaya_block.experts.local_experts.2.linear_fc2.weight float16 32x24"
    ) in text
    assert "model.norm.weight float32 model.final_norm.weight float16 32" in text
    assert "lm_head" not in text
    found = load_file(source / "model.safetensors")
    copy = {"lm_head.weight": found["model.embed_tokens.weight"].copy()}
    save_file(found | copy, source / "model.safetensors")
    (*_, last) = plan(source, "hf").rows()
    assert " ".join(last).strip() == "lm_head.weight  dropped: a copy of the embedding"
    assert sorted(tmp_path.iterdir()) == [source]


def test_dry_run_refuses_what_the_run_would(tmp_path, capsys):
    one = checkpoint(tmp_path / "one", replace(ODD, sliding_window=1))
    tiny = checkpoint(tmp_path / "tiny", TINY)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for arguments, message in (
        ([one, tmp_path / "out", "--to", "hf-legacy"], "no sliding_window of 1"),
        ([tiny, one, "--to", "hf"], "one: exists; say --overwrite"),
        ([tiny, tmp_path / "loop", "--to", "hf"], "loop': cannot be written"),
        ([tiny, tmp_path / "out", "--to", "orbax", "--mesh", "expert=0"], "mesh 'expert=0'"),
        ([tiny, tmp_path / "out", "--to", "hf", "--mesh", "data=1"], "a mesh is for Orbax"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["convert", *map(str, arguments), "--dry-run"])
        assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_dtype_is_said_as_elsewhere_and_only_those_that_models_have(tmp_path):
    source = checkpoint(tmp_path / "source", TINY)
    for number, dtype in enumerate(("bfloat16", jax.numpy.bfloat16, np.dtype(np.float16))):
        convert(source, tmp_path / str(number), "orbax", dtype=dtype)
    for dtype in ("int8", np.dtype("int8"), "float64", "nonsense"):
        with pytest.raises(ConfigError, match="dtype must be float32, bfloat16 or float16"):
            convert(source, tmp_path / "out", "orbax", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_tensors_are_made_a_few_at_a_time(monkeypatch, tmp_path):
    """However many there are: what is written and the two that are made ahead."""
    alive, most = 0, 0
    lock = __import__("threading").Lock()

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            with lock:
                alive -= 1

    def make():
        nonlocal alive, most
        array = np.zeros(1000, np.float32).view(Counted)
        with lock:
            alive += 1
            most = max(most, alive)
        time.sleep(0.001)
        return array

    planned = [
        safetensors_write.Planned(str(i), np.dtype(np.float32), (1000,), make) for i in range(50)
    ]
    safetensors_write.write_folder(tmp_path, planned, 10_000)
    assert most <= 2 + safetensors_write._AHEAD
