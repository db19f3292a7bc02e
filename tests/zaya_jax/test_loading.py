"""Loading and saving: identity, and one clear error for every kind of damage."""

import json
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CONFIGS, ODD, TINY, logits, random_params, random_tokens
from safetensors.numpy import load_file, save_file

import zaya_jax
from convert.conversion import convert
from convert.mapping import mapping
from zaya_jax import CheckpointError, ConfigError, Zaya, ZayaConfig, init, loading

GOLDEN = Path(__file__).parent.parent / "golden"
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """An intact checkpoint; tests damage copies of it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    Zaya(random_params(TINY), TINY).save(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_json(file: Path, change) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def edit_header(folder: Path, change) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = change(data[8 : 8 + length])
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_save_then_load_is_the_identity(tmp_path, name, dtype):
    config = CONFIGS[name]
    params = jax.tree.map(lambda x: x, random_params(config))
    params["params"] = jax.tree.map(lambda x: x.astype(dtype), params["params"])
    Zaya(params, config).save(tmp_path / "model")
    loaded = zaya_jax.load(tmp_path / "model")
    assert loaded.config == config
    for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(params)


def test_a_file_written_by_transformers_comes_back_bit_for_bit(tmp_path):
    zaya_jax.load(GOLDEN / "sliding").save(tmp_path / "out")
    before, after = (folder / WEIGHTS for folder in (GOLDEN / "sliding", tmp_path / "out"))
    assert {k: v.tobytes() for k, v in load_file(before).items()} == {
        k: v.tobytes() for k, v in load_file(after).items()
    }
    theirs = json.loads((GOLDEN / "sliding" / CONFIG).read_text())
    ours = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert ZayaConfig.from_hf(ours) == ZayaConfig.from_hf(theirs)


def test_shards_with_an_index_load_like_one_file(tmp_path, saved):
    model = zaya_jax.load(saved)
    convert(saved, tmp_path / "sharded", "hf", max_shard_bytes=20_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    again = zaya_jax.load(tmp_path / "sharded")
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_dtype_converts_all_but_the_balancing_biases(saved):
    for dtype in ("bfloat16", jnp.bfloat16, np.float32):
        model = zaya_jax.load(saved, dtype)
        assert {x.dtype for x in jax.tree.leaves(model.params["params"])} == {jnp.dtype(dtype)}
        assert {x.dtype for x in jax.tree.leaves(model.params["balancing"])} == {
            np.dtype("float32")
        }


def test_a_bit_equal_tied_head_is_accepted(folder):
    edit_tensors(
        folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()})
    )
    zaya_jax.load(folder)


def test_the_mapping_is_the_modules_own_tree():
    for config in (TINY, ODD, ZayaConfig.preset("nano")):
        tree = jax.eval_shape(lambda c=config: init(c, jax.random.key(0)))
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        shapes = {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
            for path, leaf in leaves
        }
        assert {path: entry.shape for path, entry in mapping(config).items()} == shapes
        names = [entry.name for entry in mapping(config).values()]
        assert len(set(names)) == len(names)


def test_saving_replaces_a_checkpoint_but_nothing_else(monkeypatch, tmp_path, saved):
    model = zaya_jax.load(saved)
    model.save(tmp_path / "model")
    model.save(tmp_path / "model")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match=r"mine: holds 'thesis\.txt' too, so it is not"):
        model.save(tmp_path / "mine")
    (tmp_path / "model" / ".git").mkdir()
    with pytest.raises(CheckpointError, match=r"model: holds '\.git' too"):
        model.save(tmp_path / "model")
    (tmp_path / "model" / ".git").rmdir()
    (tmp_path / "note").write_text("")
    with pytest.raises(CheckpointError, match="note: is a file"):
        model.save(tmp_path / "note")
    (tmp_path / "note").unlink()
    monkeypatch.chdir(tmp_path / "model")
    with pytest.raises(CheckpointError, match="is the current directory"):
        model.save(".")
    with pytest.raises(CheckpointError, match=r"thesis\.txt.*: cannot be written"):
        model.save(tmp_path / "mine" / "thesis.txt" / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "model"]


def test_an_interrupted_save_leaves_the_old_checkpoint(monkeypatch, tmp_path, saved):
    model = zaya_jax.load(saved)
    model.save(tmp_path / "model")

    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("convert.safetensors_write.os.fsync", no_space)
    with pytest.raises(CheckpointError, match="No space left on device"):
        model.save(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    zaya_jax.load(tmp_path / "model")


def test_an_interrupt_at_the_last_moment_brings_the_old_checkpoint_back(
    monkeypatch, tmp_path, saved
):
    model, rename = zaya_jax.load(saved), Path.rename
    model.save(tmp_path / "model")

    def interrupted(source, target):
        if source.name == "new":
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save(tmp_path / "model")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    zaya_jax.load(tmp_path / "model")


def test_values_that_do_not_fit_the_dtype_are_refused(folder):
    edit_tensors(folder, lambda t: t.update({NORM: np.full(32, 1e6, np.float32)}))
    with pytest.raises(CheckpointError, match=r"norm.* has values too large for float16"):
        zaya_jax.load(folder, "float16")
    zaya_jax.load(folder, "bfloat16")


def copy_tokenizer(folder: Path) -> None:
    """nano's tokenizer, so that a template beside it is read, and room for its tokens."""
    shutil.copy(loading.NANO / "tokenizer.json", folder)
    edit_json(folder / CONFIG, lambda c: c.update(vocab_size=400))


def drop(name):
    return lambda f: edit_tensors(f, lambda t: t.pop(name))


def put(name, value):
    return lambda f: edit_tensors(f, lambda t: t.update({name: value}))


def truncate(count):
    return lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:count])


def set_config(**values):
    return lambda f: edit_json(f / CONFIG, lambda c: c.update(values))


def shard(change):
    """Splits the checkpoint in two shards with an index, and damages them."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(tensors)
        parts = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
        for file, part in parts.items():
            save_file({name: tensors[name] for name in part}, folder / file)
        places = {name: file for file, part in parts.items() for name in part}
        (folder / INDEX).write_text(json.dumps({"weight_map": places}))
        change(folder)

    return damage


def duplicate_in_header(header: bytes) -> bytes:
    entry = header[header.index(b'"model.norm.weight"') :].rstrip()
    entry = entry[: entry.index(b"}") + 1]
    return header.rstrip()[:-1] + b"," + entry + b"}"


def duplicate_across_shards(folder: Path) -> None:
    tensors = load_file(folder / "b.safetensors")
    name, value = next(iter(load_file(folder / "a.safetensors").items()))
    save_file({**tensors, name: value}, folder / "b.safetensors")


NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
DAMAGE = {
    "missing tensor": (drop(NORM), r"1 problems: missing tensor 'model.norm.weight' \(32,\)"),
    "unknown tensor": (put("model.extra", np.ones(3)[:0]), "dtype 'F64'"),
    "unknown name": (
        put("model.extra", np.ones(3, np.float32)),
        r"1 problems: unknown tensor 'model.extra' \(3,\)",
    ),
    "misshapen": (
        put(GATE_UP, np.ones((4, 32, 48), np.float32)),
        r"gate_up_proj' has shape \(4, 32, 48\), expected \(4, 48, 32\)",
    ),
    "several at once": (
        lambda f: (drop(NORM)(f), put("model.extra", np.ones(3, np.float32))(f)),
        r"2 problems: missing tensor 'model.norm.weight' .*; unknown tensor 'model.extra'",
    ),
    "integer tensor": (put(NORM, np.ones(32, np.int64)), "'model.norm.weight' has dtype 'I64'"),
    "untied head though tied": (
        put("lm_head.weight", np.ones((64, 32), np.float32)),
        "lm_head.weight differs from the embedding, but tie_word_embeddings is true",
    ),
    "truncated data": (truncate(-100), "model.safetensors: truncated: tensor .* ends at byte"),
    "truncated header": (truncate(100), "not a safetensors file, or truncated within its header"),
    "empty file": (truncate(0), "not a safetensors file"),
    "header no JSON": (
        lambda f: edit_header(f, lambda h: b"x" + h[1:]),
        "safetensors header is not valid JSON",
    ),
    "header a list": (lambda f: edit_header(f, lambda h: b"[]"), "header is not a JSON object"),
    "damaged entry": (
        lambda f: edit_header(f, lambda h: h.replace(b'"shape":[32]', b'"shape":"32"', 1)),
        "damaged header entry for tensor",
    ),
    "bytes do not fit": (
        lambda f: edit_header(f, lambda h: h.replace(b'"shape":[32]', b'"shape":[33]', 1)),
        r"128 bytes do not fit \(33,\)",
    ),
    "duplicate in one file": (
        lambda f: edit_header(f, duplicate_in_header),
        "duplicate tensor 'model.norm.weight' in model.safetensors",
    ),
    "duplicate across shards": (
        shard(duplicate_across_shards),
        "duplicate tensor .* in 'a.safetensors' and 'b.safetensors'",
    ),
    "missing shard": (
        shard(lambda f: (f / "b.safetensors").unlink()),
        "shard 'b.safetensors' of the index is missing; missing tensor",
    ),
    "index names a tensor the shard lacks": (
        shard(
            lambda f: edit_json(
                f / INDEX, lambda i: i["weight_map"].update({EMBED: "b.safetensors"})
            )
        ),
        f"tensor '{EMBED}' is in 'a.safetensors', the index says 'b.safetensors'",
    ),
    "index without map": (
        shard(lambda f: (f / INDEX).write_text("{}")),
        "index.json: has no weight_map",
    ),
    "index leaves the folder": (
        shard(lambda f: edit_json(f / INDEX, lambda i: i["weight_map"].update(x="../a"))),
        r"shard '\.\./a' is not the name of a safetensors file",
    ),
    "index names a folder": (
        shard(lambda f: edit_json(f / INDEX, lambda i: i["weight_map"].update(x=".."))),
        r"shard '\.\.' is not the name of a safetensors file",
    ),
    "weights a folder": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()),
        "model.safetensors: cannot be read",
    ),
    "dtype a list": (
        lambda f: edit_header(f, lambda h: h.replace(b'"dtype":"F32"', b'"dtype":["F3"]', 1)),
        "damaged header entry for tensor",
    ),
    "nesting without end": (
        lambda f: (f / CONFIG).write_text("[" * 200_000),
        "config.json: not valid JSON",
    ),
    "template a folder": (
        lambda f: (copy_tokenizer(f), (f / "chat_template.jinja").mkdir()),
        "chat_template.jinja: cannot be read",
    ),
    "template not text": (
        lambda f: (copy_tokenizer(f), (f / "chat_template.jinja").write_bytes(b"\xff")),
        "chat_template.jinja: holds no chat template",
    ),
    "template broken": (
        lambda f: (copy_tokenizer(f), (f / "chat_template.jinja").write_text("{% if %}")),
        "chat_template.jinja: chat template:",
    ),
    "template a number": (
        lambda f: (
            copy_tokenizer(f),
            (f / "tokenizer_config.json").write_text('{"chat_template": 5}'),
        ),
        "tokenizer_config.json: holds no chat template",
    ),
    "index no JSON": (shard(lambda f: (f / INDEX).write_text("{")), "index.json: not valid JSON"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has neither model.safetensors nor"),
    "no config": (lambda f: (f / CONFIG).unlink(), "config.json: no such file"),
    "config no JSON": (lambda f: (f / CONFIG).write_text("{,}"), "config.json: not valid JSON"),
    "config a list": (lambda f: (f / CONFIG).write_text("[]"), "config.json: not a JSON object"),
    "config not text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe{"), "not valid JSON"),
    "config of another size": (
        set_config(moe_intermediate_size=20),
        r"4 problems: tensor .*gate_up_proj' has shape \(4, 48, 32\), expected \(4, 40, 32\)",
    ),
    "config with more layers": (
        set_config(num_hidden_layers=3, layer_types=["hybrid"] * 3),
        "missing tensor 'model.layers.2.input_layernorm.weight'",
    ),
    "config untied": (set_config(tie_word_embeddings=False), "missing tensor 'lm_head.weight'"),
    "tokenizer damaged": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "tokenizer.json: not a tokenizer",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_error(folder, name):
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises((CheckpointError, ConfigError), match=message) as error:
        zaya_jax.load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_paths_that_are_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "file").write_text("")
    for path, message in {
        tmp_path / "nowhere": "nowhere: no such folder",
        tmp_path / "file": "file: is a file, expected a checkpoint folder",
        "x" * 5000: "no path can be that long",
        "./nowhere": "nowhere: no such folder",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            zaya_jax.load(path)
    with pytest.raises(CheckpointError, match="someone/something: no such folder, and not loaded"):
        zaya_jax.load("someone/something")
    with pytest.raises(ConfigError, match="dtype must be float32, bfloat16 or float16, got 'int8'"):
        zaya_jax.load(dtype="int8")


# Resident memory of the process, now and at its highest since the last reset (Linux).
MEMORY = """
import re, jax, numpy as np, zaya_jax

def memory(kind):
    return 1024 * int(re.search(kind + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

def reset_peak():
    open("/proc/self/clear_refs", "w").write("5")
    return memory("VmRSS")
"""


def in_subprocess(code: str, *arguments: object) -> str:
    script = MEMORY + textwrap.dedent(code)
    run = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_of_loading_is_within_a_fifth_of_the_weights(tmp_path, dtype):
    """Both read as stored and converted; memory before loading is not counted."""
    config = ZayaConfig.preset("small")
    params = init(config, jax.random.key(0), jnp.bfloat16)
    Zaya(params, config).save(tmp_path / "model")
    out = in_subprocess(
        """
        import sys
        jax.block_until_ready(jax.numpy.ones(3) + 1)
        before = reset_peak()
        model = zaya_jax.load(sys.argv[1], sys.argv[2])
        jax.block_until_ready(model.params)
        weights = sum(x.nbytes for x in jax.tree.leaves(model.params))
        print((memory("VmHWM") - before) / weights)
        """,
        tmp_path / "model",
        dtype,
    )
    print(f"peak while loading: {float(out):.3f} x the weights")
    assert float(out) <= 1.2


def test_experts_are_spread_over_a_mesh(saved):
    """On 8 simulated devices: the same logits, each device holding its own experts."""
    out = in_subprocess(
        """
        import sys
        jax.config.update("jax_num_cpu_devices", 8)
        tokens = np.arange(3, 35).reshape(2, 16)
        alone = zaya_jax.load(sys.argv[1]).logits(tokens)
        for data, expert in ((2, 4), (8, 1), (4, 2)):
            model = zaya_jax.load(sys.argv[1], mesh=zaya_jax.make_mesh(data, expert))
            leaf = model.params["params"]["layers"][0]["mlp"]["experts"]["down_proj"]
            assert leaf.addressable_shards[0].data.shape[0] == 4 // expert
            error = np.abs(model.logits(tokens) - alone).max()
            assert error < 2e-5 * np.std(alone), error
        try:
            zaya_jax.load(sys.argv[1], mesh=zaya_jax.make_mesh(1, 8))
        except zaya_jax.ConfigError as error:
            print(error)
        """,
        saved,
    )
    assert "num_experts 4 is not divisible by the expert axis of 8" in out


@pytest.mark.slow
def test_prefill_of_16k_tokens_needs_under_a_gigabyte_beyond_the_weights():
    out = in_subprocess(
        """
        from zaya_jax.generation.step import prefill_chunk
        config = zaya_jax.ZayaConfig.preset("small")
        params = jax.block_until_ready(zaya_jax.init(config, jax.random.key(0), "bfloat16"))
        tokens = np.random.default_rng(0).integers(3, 32000, (1, 16384)).astype(np.int32)
        before = reset_peak()
        state = zaya_jax.init_state(params, config, 1, 16384)
        out = prefill_chunk(params, config, tokens, np.array([16384]), state)
        assert np.isfinite(np.asarray(out.last_logits)).all()
        print(memory("VmHWM") - before)
        """
    )
    print(f"peak of a 16,384-token prefill: weights + {float(out) / 1e6:.0f} MB")
    assert float(out) < 1e9


def test_logits_equal_the_forward_pass(saved):
    model, tokens = zaya_jax.load(saved), random_tokens(0, 2, 12)
    np.testing.assert_array_equal(model.logits(tokens), logits(model.params, TINY, tokens))
    packed = model.logits(tokens, segment_ids=np.repeat([[1, 2]], [5, 7], axis=1).repeat(2, axis=0))
    np.testing.assert_allclose(packed[:, 5:], model.logits(tokens[:, 5:]), atol=1e-4)
    padded = model.logits(tokens, lengths=[12, 4])
    np.testing.assert_allclose(padded[1, :4], model.logits(tokens[1:, :4])[0], atol=1e-4)
