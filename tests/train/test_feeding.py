"""Held-out batches on the devices."""

import json

import pytest

from train import feeding
from train.config import load_config
from train.setup import prepare
from train.step import new_params


def test_an_evaluation_takes_no_more_rows_at_a_time_than_a_part_of_a_step(tmp_path, monkeypatch):
    """What does not fit into memory at once in training does not in an evaluation either."""
    lines = (json.dumps({"text": str(n) * 20}) + "\n" for n in range(40))
    (tmp_path / "held.jsonl").write_text("".join(lines))
    source = f"[{{path='{tmp_path}/held.jsonl'}}]"
    settings = [f"data.sources={source}", f"evaluation.data.sources={source}", "context=32"]
    settings += [f"evaluation.data.cache={tmp_path}", "rows=8", "accumulate=4"]
    seen = []
    monkeypatch.setattr(feeding, "to_devices", lambda plan, mesh: seen.append(len(plan)) or plan)
    monkeypatch.setattr(feeding.jax, "jit", lambda f: lambda *_: (1.0, 1.0))
    evaluate = feeding.held_out_evaluation(prepare(load_config("pretrain", "tiny", settings)))
    evaluate({})
    assert len(seen) >= 10 and set(seen) == {2}


def test_a_held_out_token_counts_once_whatever_its_weight(tmp_path):
    """Bits per byte are those of the text."""
    found = []
    for name, weights in {"plain": [1.0], "weighted": [0.5, 3.0]}.items():
        file = tmp_path / f"{name}.jsonl"
        records = [{"text": str(n) * 20, "weight": weights[n % len(weights)]} for n in range(40)]
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        settings = [f"data.sources=[{{path='{file}'}}]", "context=32"]
        settings += [f"evaluation.data.sources=[{{path='{file}'}}]"]
        settings += [f"evaluation.data.cache={tmp_path}"]
        setup = prepare(load_config("pretrain", "tiny", settings))
        params = new_params(setup.model, 0, True)
        found.append(feeding.held_out_evaluation(setup)(params))
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert 2 < found[0]["bits_per_byte"] < 20
