"""`train.speed`: both sides train the same model, and the report says what was measured."""

from pathlib import Path

import pytest
from helpers import BENCH as TINY

from convert.synthetic import write_synthetic
from train import speed
from train.speed import PYTHON, Comparison, compare
from zaya_jax import ZayaError


def turn(variant: str, tokens_per_second: float, peak_rss: int, **values):
    result = {"variant": variant, "case": "training", "tokens_per_second": tokens_per_second}
    more = {"peak_rss": peak_rss, "other_processes": 0.0, "losses": [6.0, 5.5]}
    return {**result, **more, **values}


@pytest.mark.skipif(not PYTHON.exists(), reason="needs `make oracle`")
def test_both_sides_train_the_same_model_on_the_same_tokens(tmp_path):
    write_synthetic(TINY, tmp_path, "float32")
    measured = compare("tiny", tmp_path, "2x16", 2, 1, ("grouped_mm+float32",), PYTHON)
    (ours,), (theirs,) = measured.ours, measured.reference
    assert len(ours["losses"]) == len(theirs["losses"]) == 3
    assert measured.distance < 0.05
    assert ours["losses"][2] < ours["losses"][0] - 0.01  # it learns, and so by the same steps
    for side in (ours, theirs):
        assert side["peak_rss"] > 10**8
        assert side["tokens_per_second"] == pytest.approx(32 / side["seconds"], rel=0.1)
    assert measured.ratio == ours["tokens_per_second"] / theirs["tokens_per_second"]


def test_medians_of_the_turns_are_compared_with_the_fastest_variant(monkeypatch):
    speeds = {"slow": iter([100.0]), "fast": iter([200.0, 190.0, 210.0, 900.0])}
    own = iter([400.0, 420.0, 50.0])

    def measure(command):
        if "train.speed_ours" in command:
            return turn("zaya-jax", next(own), 900)
        if command[-1] == "broken":
            return {"variant": "broken", "case": "training", "skipped": "RuntimeError: no"}
        return turn(command[-1], next(speeds[command[-1]]), 1000)

    monkeypatch.setattr(speed, "_measure", measure)
    measured = compare("small", Path("m"), "4x256", 1, 3, ("slow", "broken", "fast"), Path("p"))
    assert (measured.ratio, measured.memory, measured.distance) == (400 / 210, 0.9, 0.0)
    text = "\n".join(measured.lines())
    assert "transformers, fast: 210 tokens/s" in text and "zaya-jax: 400 tokens/s" in text
    assert "1.90 (to reach: 2.0), of memory 0.90" in text and "busy" not in text
    saved = measured.as_json()
    assert saved["ratio"] == measured.ratio and len(saved["variants"]) == 3


def test_a_busy_machine_is_told():
    busy = turn("zaya-jax", 1.0, 1, other_processes=0.5)
    measured = Comparison("small", [], [busy], [turn("fast", 1.0, 1)])
    assert "not to be relied on" in measured.lines()[-1]


def test_other_losses_and_no_variant_are_errors(monkeypatch):
    def losses_of(reference):
        def measure(command):
            return turn(command[-1], 1.0, 1, losses=reference if "p" in command[0] else [6.0])

        monkeypatch.setattr(speed, "_measure", measure)
        monkeypatch.setattr(speed.sys, "executable", "ours")
        return compare("small", Path("m"), "1x8", 1, 1, ("fast",), Path("p"))

    assert losses_of([6.05]).distance == pytest.approx(0.05)
    with pytest.raises(ZayaError, match="not the same model"):
        losses_of([6.2])
    with pytest.raises(ZayaError, match="not the same model"):
        losses_of([float("nan")])
    skipped = {"variant": "fast", "case": "training", "skipped": "ImportError: torch"}
    monkeypatch.setattr(speed, "_measure", lambda command: dict(skipped))
    with pytest.raises(ZayaError, match="no variant: ImportError: torch"):
        compare("small", Path("m"), "1x8", 1, 1, ("fast",), Path("p"))


def test_variants_that_are_none_are_refused():
    with pytest.raises(ZayaError, match=r"^eagre: no variant; those are grouped_mm"):
        speed.main(variants=("eagre",))
