"""The embedded model: held-out means held out, worked solutions are right, and it has learned."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zaya_jax
from train import balancing
from train.packing import batches, tokenize
from train.problems import SOLVERS, TRAINING_SEED, examples, solution, training_problems
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
    is_held_out,
    problems,
)
from zaya_jax.loading import NANO
from zaya_jax.model import parameter_counts

SAMPLE = 2000


@pytest.fixture(scope="module")
def model():
    return zaya_jax.load()


def first(stream, count=SAMPLE):
    return list(itertools.islice(stream, count))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_training_question_is_held_out(family):
    reserved = {problem.question for problem in held_out(family)}
    reserved_words = {fingerprint(question) for question in reserved}
    for problem in first(training_problems(family)):
        assert problem.question not in reserved
        assert fingerprint(problem.question) not in reserved_words


def test_the_removal_removes_something():
    """Unfiltered, the families repeat held-out questions by chance."""
    drawn = first(problems("gcd", TRAINING_SEED), 20_000)
    overlap = sum(is_held_out(problem.question) for problem in drawn)
    assert overlap > 10
    swapped = fingerprint("What is 38 * 47?") == fingerprint("What is 47 * 38?")
    assert swapped and fingerprint("What is 38 * 47?") != fingerprint("What is 38 * 48?")


def test_held_out_problems_are_distinct_and_the_same_every_time():
    drawn = held_out_problems(200)
    assert len({fingerprint(problem.question) for problem in drawn}) == len(drawn) == 200
    assert {problem.family for problem in drawn} == set(FAMILIES)
    assert [p.question for p in drawn[:5]] == [p.question for p in held_out_problems(5)]
    assert best_constant_accuracy(drawn) < 0.2
    for bad in (0, 10_000):
        with pytest.raises(InputError, match="held-out problems"):
            held_out("gcd", bad)


def test_every_worked_answer_gets_full_score_and_a_wrong_one_is_refused(monkeypatch):
    for example in first(examples(), 300):
        thinking, _, answer = example.response.partition("</think>\n\n")
        assert thinking.startswith("<think>\n") and answer
    (problem,) = held_out("chain_sum", 1)
    monkeypatch.setitem(SOLVERS, "chain_sum", lambda _: (["?"], "1234567"))
    with pytest.raises(ValueError, match="worked answer '1234567' is wrong"):
        solution(problem)


def test_packing_cuts_nothing_and_learns_responses_only(model):
    (eos,) = model.config.eos_token_ids
    stream = [tokenize(example, model.tokenizer, eos) for example in first(examples(), 200)]
    seen = []
    for batch in first(batches(iter(stream), 2, 256), 4):
        for row in range(2):
            for segment in range(1, batch.segment_ids[row].max() + 1):
                where = np.flatnonzero(batch.segment_ids[row] == segment)
                assert (np.diff(where) == 1).all()
                tokens = batch.tokens[row, where].tolist()
                learned = batch.targets[row, where[batch.mask[row, where]]].tolist()
                seen.append((tokens, tokens[len(tokens) - len(learned) :] == learned))
    originals = {tuple(example.tokens): example.prompt for example in stream}
    for tokens, response_only in seen:
        assert tuple(tokens) in originals and response_only
    assert len(seen) > 10


def test_training_sees_the_tokens_that_generation_sees(model):
    (example,) = first(examples(), 1)
    (eos,) = model.config.eos_token_ids
    tokens, prompt = tokenize(example, model.tokenizer, eos)
    message = [{"role": "user", "content": example.question}]
    assert tokens[:prompt] == model.tokenizer.encode_chat(message)
    rendered = model.tokenizer.template.render(message) + example.response
    assert tokens == [*model.tokenizer.encode(rendered), eos]


def test_balancing_evens_out_a_skewed_load_and_leaves_the_skip_class():
    """Tokens with fixed random preferences, most of them for expert 0."""
    experts = 4
    scores = jax.random.normal(jax.random.key(0), (4096, experts + 1)) + jnp.eye(experts + 1)[0] * 2
    probabilities = jax.nn.softmax(scores)
    biases = {"layers": ({"b": jnp.array([0.0] * experts + [-1.0])},)}
    state = balancing.OPTIMIZER.init(biases)

    def counts(biases):
        chosen = jnp.argmax(probabilities + biases["layers"][0]["b"], axis=-1)
        return jnp.bincount(chosen, length=experts + 1)[None]

    start = float(balancing.entropy(counts(biases)))
    for _ in range(400):
        gradient = balancing.pseudo_gradients(biases, counts(biases))
        updates, state = balancing.OPTIMIZER.update(gradient, state, biases)
        biases = jax.tree.map(jnp.add, biases, updates)
    assert start < 0.8 and float(balancing.entropy(counts(biases))) > 0.98
    assert biases["layers"][0]["b"][-1] == -1


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
