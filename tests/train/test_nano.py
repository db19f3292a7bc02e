"""The embedded model: held-out means held out, worked solutions are right, and it has learned."""

import json

import jax
import jax.numpy as jnp
import pytest

import zaya_jax
from zaya_jax import InputError, ZayaConfig
from zaya_jax.cli.main import main
from zaya_jax.evaluation.accuracy import evaluate
from zaya_jax.evaluation.families import (
    FAMILIES,
    best_constant_accuracy,
    distinct_answers,
    fingerprint,
    held_out,
    held_out_problems,
)
from zaya_jax.loading import NANO
from zaya_jax.model import parameter_counts


@pytest.fixture(scope="module")
def model():
    return zaya_jax.load()


def test_held_out_problems_are_distinct_and_the_same_every_time():
    drawn = held_out_problems(200)
    assert len({fingerprint(problem.question) for problem in drawn}) == len(drawn) == 200
    assert {problem.family for problem in drawn} == set(FAMILIES)
    assert [p.question for p in drawn[:5]] == [p.question for p in held_out_problems(5)]
    assert best_constant_accuracy(drawn) < 0.2
    for bad in (0, 10_000):
        with pytest.raises(InputError, match="held-out problems"):
            held_out("gcd", bad)


def test_nano_is_small_and_what_its_preset_says(model):
    assert model.config == ZayaConfig.preset("nano")
    assert 1e6 < parameter_counts(model.config)[0] < 4e6
    assert sum(file.stat().st_size for file in NANO.iterdir()) <= 8e6
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params["params"])} == {
        jnp.dtype("bfloat16")
    }


@pytest.mark.slow
def test_nano_answers_problems_it_has_never_seen(model):
    """Above 80% on a family with thousands of answers, where a constant answer gets under 5%."""
    (result,) = evaluate(model, held_out("spell_backward", 100))
    assert distinct_answers("spell_backward", 5000) > 1000
    assert result.accuracy > 0.8 and result.constant < 0.05


@pytest.mark.slow
def test_the_demo_streams_answers_and_grades(tmp_path, capsys):
    file = tmp_path / "demo.json"
    main(["demo", "--problems", "12", "--shown", "1", "--json", str(file)])
    shown = capsys.readouterr().out
    assert "</think>" in shown and "tokens/s" in shown
    results = json.loads(file.read_text())
    assert sum(result["problems"] for result in results) == 12
