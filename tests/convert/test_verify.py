"""What `zaya verify` finds."""

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers import ODD, TINY, random_params
from safetensors.numpy import load_file, save_file

import zaya_jax
from convert.conversion import convert
from convert.verify import compare, verify
from zaya_jax import Zaya
from zaya_jax.cli.main import main
from zaya_jax.evaluation import known
from zaya_jax.evaluation.known import Known, check_known_outputs

WEIGHTS = "model.safetensors"
LAYOUTS = ("hf", "hf-legacy", "orbax")


@pytest.fixture
def folders(tmp_path):
    Zaya(random_params(TINY, skip_bias=-1.5), TINY).save(tmp_path / "source")
    for layout in LAYOUTS:
        convert(tmp_path / "source", tmp_path / layout, layout)
    return tmp_path


def edit(folder, name, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors[name])
    save_file(tensors, folder / WEIGHTS)


def test_a_sound_checkpoint_has_one_checksum_in_every_layout(folders):
    reports = [verify(folders / layout) for layout in LAYOUTS]
    assert len({report.checksum for report in reports}) == 1
    for report in reports:
        assert not report.problems and report.compared == len(report.checkpoint.leaves)
    scale = report.ranges["mlp/experts/down_proj"]
    tensors = load_file(folders / "source" / WEIGHTS)
    both = np.stack([tensors[f"model.layers.{i}.mlp.experts.down_proj"] for i in range(2)])
    assert (scale.least, scale.most, scale.count) == (both.min(), both.max(), both.size)
    assert scale.mean == pytest.approx(both.mean(), abs=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_found(folders, value):
    def spoil(tensor):
        tensor[1, 2] = value

    edit(folders / "hf", "model.layers.1.self_attn.o_proj.weight", spoil)
    (folders / "hf" / "checksums.json").unlink()
    (problem,) = verify(folders / "hf").problems
    nan = int(np.isnan(value))
    path = "params/layers/1/self_attn/o_proj/weight"
    assert problem == f"{path}: {nan} NaN and {1 - nan} infinite values"


def test_a_single_flipped_bit_is_found(folders):
    file = folders / "hf" / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (problem,) = verify(folders / "hf").problems
    assert problem.endswith("differs from its checksum in checksums.json")
    (difference,) = compare(folders / "hf", folders / "orbax")
    assert difference.startswith(problem.partition(":")[0]) and ": 1 of " in difference


def test_a_leaf_without_a_checksum_is_named(folders):
    file = folders / "hf" / "checksums.json"
    sums = json.loads(file.read_text())
    del sums["params/norm/weight"]
    file.write_text(json.dumps(sums))
    assert verify(folders / "hf").problems == ["checksums.json has no 'params/norm/weight'"]


def test_checksums_of_nothing_are_not_none(folders):
    (folders / "hf" / "checksums.json").write_text("{}")
    report = verify(folders / "hf")
    assert len(report.problems) == len(report.checkpoint.leaves)


def test_every_block_of_a_leaf_is_read_and_compared(folders, monkeypatch):
    """With blocks of two rows; the damage is in the last."""
    from convert import verify as module

    monkeypatch.setattr(module, "_BLOCK", 2 * 4 * TINY.hidden_size)

    def spoil(tensor):
        tensor[-1, -1] = np.nan

    edit(folders / "hf", "model.embed_tokens.weight", spoil)
    nan, checksum = verify(folders / "hf").problems
    assert "1 NaN" in nan and "differs from its checksum" in checksum
    (difference,) = compare(folders / "hf", folders / "orbax")
    assert "params/embed_tokens/weight: 1 of" in difference


def test_a_rope_that_no_layer_uses_is_no_difference(tmp_path):
    rope = zaya_jax.Rope(77.0, 1.0)
    config = replace(ODD, layer_types=("hybrid_sliding",) * 3, rope=rope)
    Zaya(random_params(config, skip_bias=-1.5), config).save(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "legacy", "hf-legacy")
    assert not compare(tmp_path / "hf", tmp_path / "legacy")


def test_comparing_names_dtypes_shapes_and_configs(folders):
    convert(folders / "hf", folders / "low", "orbax", dtype=np.dtype(np.float16))
    differences = compare(folders / "hf", folders / "low")
    assert len(differences) > 30 and all("float32" in line for line in differences)
    other = replace(TINY, moe_intermediate_size=16)
    Zaya(random_params(other), other).save(folders / "other")
    differences = compare(folders / "hf", folders / "other")
    assert "config: moe_intermediate_size is 24, and 16" in differences
    assert any(
        "gate_up_proj: float32 (4, 48, 32), and float32 (4, 32, 32)" in d for d in differences
    )


def run(*arguments) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code
    return 0


def test_the_exit_code_tells(folders, capsys):
    assert run("verify", folders / "orbax", "--json", folders / "out.json") == 0
    assert "sound" in capsys.readouterr().out
    assert json.loads((folders / "out.json").read_text())["sound"] is True
    assert run("verify", folders / "hf", "--against", folders / "hf-legacy") == 0
    assert "hold the same tensors" in capsys.readouterr().out
    edit(folders / "hf", "model.norm.weight", lambda t: t.fill(np.nan))
    assert run("verify", folders / "hf") == 1
    assert "params/norm/weight: 32 NaN" in capsys.readouterr().out
    assert run("verify", folders / "hf", "--against", folders / "orbax") == 1
    assert "params/norm/weight: 32 of 32 values differ" in capsys.readouterr().out
    out = folders / "out.json"
    assert run("verify", folders / "nowhere", "--json", out) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert json.loads(out.read_text())["sound"] is False  # not what an earlier run found
    assert run("verify", folders / "orbax", "--json", folders / "no" / "out.json") == 2
    assert "Reading" not in capsys.readouterr().err


def test_a_leaf_without_any_number_is_valid_json(folders):
    edit(folders / "hf", "model.norm.weight", lambda t: t.fill(np.nan))
    assert run("verify", folders / "hf", "--json", folders / "out.json") == 1
    text = (folders / "out.json").read_text()
    ranges = json.loads(text, parse_constant=lambda name: pytest.fail(name))["ranges"]
    assert ranges["norm/weight"] == {"count": 32, "nan": 32, "infinite": 0}


def test_known_outputs_are_compared(monkeypatch, capsys):
    """With nano's in place of those of the released weights, which are not here."""
    model = zaya_jax.load()
    tokens = (1, 9, 26, 53)
    logits = np.asarray(model.logits([tokens]))[0]
    (result,) = model.generate([list(tokens)], 8, temperature=0)
    right = Known(
        tokens,
        tuple(map(int, logits.argmax(-1))),
        tuple(map(tuple, logits[-3:, -3:].tolist())),
        tuple(map(int, result.tokens)),
    )
    assert check_known_outputs(zaya_jax.loading.NANO, right) == []
    wrong = Known(tokens, (0,) * 4, ((9.0,) * 3,) * 3, (0,) * 8)
    problems = check_known_outputs(zaya_jax.loading.NANO, wrong)
    assert [p.split()[0] for p in problems] == ["most", "logits", "greedy"]
    monkeypatch.setattr(known, "ZAYA1_8B", wrong)
    assert run("verify", zaya_jax.loading.NANO) == 0


def test_what_is_known_of_the_released_weights_is_what_the_specification_says():
    known_8b = known.ZAYA1_8B
    assert len(known_8b.tokens) == len(known_8b.argmax) == 11 and len(known_8b.greedy) == 16
    assert known.is_released("Zyphra/ZAYA1-8B") and not known.is_released("Zyphra/ZAYA1-base")
