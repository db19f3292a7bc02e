"""A safetensors file or an index that wants to harm."""

import json
import random
import shutil
import struct
import time

import pytest
from helpers import TINY, random_params
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.checkpoint import open_checkpoint
from zaya_jax import CheckpointError, ConfigError, Zaya

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    Zaya(random_params(TINY), TINY).save(folder)
    return folder


def read_all(folder):
    """Everything that a conversion would read; at most a second of it."""
    begin = time.monotonic()
    try:
        for leaf in open_checkpoint(folder).leaves.values():
            leaf.read()
    except CheckpointError as error:
        assert "\n" not in str(error)
        outcome = "error"
    else:
        outcome = "read"
    assert time.monotonic() - begin < 5
    return outcome


def test_500_mutated_headers_are_read_or_refused_in_one_line(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    data = (saved / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    rng = random.Random(0)
    numbers = [-1, 0, 1, 7, 2**31, 2**40, 2**63, 2**64, -(2**63), 1e30, 0.5, True, None, "8", []]
    outcomes = {"error": 0, "read": 0}
    for i in range(500):
        if i % 2:  # bytes anywhere, the length included
            text = bytearray(data[: 8 + length])
            for _ in range(rng.randint(1, 6)):
                text[rng.randrange(len(text))] = rng.randrange(256)
        else:  # values where they hurt
            changed = json.loads(json.dumps(header))
            name = rng.choice([n for n in changed if n != "__metadata__"])
            entry = changed[name]
            match rng.randrange(6):
                case 0:
                    entry["data_offsets"][rng.randrange(2)] = rng.choice(numbers)
                case 1:
                    entry["shape"] = [rng.choice(numbers) for _ in range(rng.randint(0, 4))]
                case 2:
                    entry["dtype"] = rng.choice(["F64", "I8", "BF16", "F8_E4M3", 3, None, "\0"])
                case 3:
                    changed[rng.choice(["", "../x", "a" * 10_000, "\ud800"])] = changed.pop(name)
                case 4:
                    changed[name] = rng.choice([None, [], 5, "x", {}])
                case 5:
                    entry["shape"] = [2**32, 2**32, 0]
                    entry["data_offsets"] = [0, 0]
            body = json.dumps(changed).encode()
            text = bytearray(struct.pack("<Q", len(body)) + body)
        (folder / WEIGHTS).write_bytes(bytes(text) + data[8 + length :])
        outcomes[read_all(folder)] += 1
    assert outcomes["error"] > 300, outcomes


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_bytes_for_a_file(tmp_path_factory, saved, data):
    folder = tmp_path_factory.mktemp("bytes")
    shutil.copy(saved / "config.json", folder)
    (folder / WEIGHTS).write_bytes(data)
    assert read_all(folder) == "error"


def test_a_header_that_claims_to_be_huge_is_not_allocated(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    for length in (2**63, 2**64 - 1, 2**40, (folder / WEIGHTS).stat().st_size):
        (folder / WEIGHTS).write_bytes(
            struct.pack("<Q", length) + (saved / WEIGHTS).read_bytes()[8:]
        )
        with pytest.raises(CheckpointError, match="not a safetensors file, or truncated within"):
            open_checkpoint(folder)


HUGE = int("9" * 4300)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [HUGE] * 3000, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-HUGE, HUGE]},
        {"dtype": "F32", "shape": [1] * 1000, "data_offsets": [0, 4]},
        {"dtype": "F\n\x1b[31mfoo", "shape": [1], "data_offsets": [0, 4]},
    ],
    ids=["shape", "offsets", "axes", "dtype"],
)
def test_numbers_and_names_that_no_honest_file_has(saved, tmp_path, entry):
    folder = shutil.copytree(saved, tmp_path / "model")
    body = json.dumps({"model.norm.weight": entry}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(body)) + body + b"0000")
    assert read_all(folder) == "error"
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    assert "\x1b" not in str(error.value) and len(str(error.value)) < 20_000


def test_very_many_names_take_no_time(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    entry = json.dumps({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
    body = ("{" + ",".join(f'"{i}":{entry}' for i in range(50_000)) + "}").encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(body)) + body)
    assert read_all(folder) == "error"


def test_a_header_is_not_read_beyond_what_any_checkpoint_needs(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    with open(folder / WEIGHTS, "wb") as file:  # sparse: takes no room
        file.write(struct.pack("<Q", 10**12 - 8))
        file.truncate(10**12)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        open_checkpoint(folder)


@pytest.mark.parametrize("layers", [10**6, 10**9, 10**20])
@pytest.mark.parametrize("dropped", ["layer_types", ""])
def test_a_config_of_very_many_layers_is_refused_at_once(saved, tmp_path, layers, dropped):
    folder = shutil.copytree(saved, tmp_path / "model")
    values = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": layers}
    values.pop(dropped, None)
    (folder / "config.json").write_text(json.dumps(values))
    begin = time.monotonic()
    with pytest.raises(ConfigError, match="num_hidden_layers must be at most 1024"):
        open_checkpoint(folder)
    assert time.monotonic() - begin < 5


def test_a_shard_name_too_long_for_any_disk(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    index = {"weight_map": {"model.norm.weight": "a" * 300 + ".safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="of the index is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/../../x.safetensors", "..", "", "a\0b"]
)
def test_an_index_cannot_lead_out_of_the_folder(saved, tmp_path, name):
    folder = shutil.copytree(saved, tmp_path / "model")
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is not the name of a safetensors file"):
        open_checkpoint(folder)


def test_no_module_of_ours_unpickles():
    import pathlib

    import convert
    import zaya_jax

    for package in (convert, zaya_jax):
        for file in pathlib.Path(package.__file__).parent.rglob("*.py"):
            text = file.read_text()
            assert "pickle" not in text and "torch.load" not in text, file
