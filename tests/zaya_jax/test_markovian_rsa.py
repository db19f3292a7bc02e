"""Markovian RSA as one algorithm: its special cases, what it shares, what it keeps, how it goes
on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import ODD, TINY, random_params

import zaya_jax
from zaya_jax import InputError, Interrupted, Zaya
from zaya_jax.generation import engine as engine_module
from zaya_jax.reasoning.markovian_rsa import markovian_rsa
from zaya_jax.reasoning.prompts import Prompts
from zaya_jax.reasoning.settings import PRESETS, Settings, fitting_preset
from zaya_jax.reasoning.tails import reasoning

QUESTION = "State the final answer to the following arithmetic problem: 361 + 575 ="
SMALL = Settings(N=4, C=2, T=2, beta=40, tau=16, final_budget=48)
NANO = zaya_jax.load(layout="decoding")
# Babbles to its budget, as no token ends its answers.
BABBLER = Zaya(
    random_params(dataclasses.replace(TINY, vocab_size=320)),
    dataclasses.replace(TINY, vocab_size=320, eos_token_ids=(319,), max_position_embeddings=400),
    NANO.tokenizer,
)


def outcome(solution):
    """All of it but what was read to get there."""
    return [
        [dataclasses.replace(one, read_tokens=0) for one in round.candidates]
        for round in solution.rounds
    ]


def test_every_round_is_returned_with_all_that_was_made_in_it():
    settings = dataclasses.replace(SMALL, beta=56, final_budget=64)  # room for an answer
    solution = NANO.markovian_rsa(QUESTION, settings, verifier=lambda answer: answer == "936")
    assert solution.question == QUESTION and len(solution.rounds) == 3
    prompts = Prompts(NANO.tokenizer)
    for number, round in enumerate(solution.rounds):
        assert len(round.candidates) == settings.N
        for one in round.candidates:
            assert len(one.tokens) <= settings.budget(number)
            assert one.text == NANO.tokenizer.decode(one.tokens).removesuffix("<|im_end|>")
            assert one.score == float(one.answer == "936") and one.logprob <= 0
            if number == 0:
                assert one.subset == [] and one.prompt_tokens == len(
                    prompts.question(QUESTION).tokens
                )
            else:
                assert one.subset == sorted(set(one.subset)) and len(one.subset) == settings.C
                tails = [solution.rounds[number - 1].candidates[i].tail for i in one.subset]
                assert one.prompt_tokens == len(prompts.aggregation(QUESTION, tails).tokens)
            kept = prompts.tail(one.tokens, settings.tau) if number < settings.T else []
            assert one.tail == kept
        assert round.mean_correctness == np.mean([one.score for one in round.candidates])
    candidates = [one for round in solution.rounds for one in round.candidates]
    assert solution.generated_tokens == sum(len(one.tokens) for one in candidates)
    assert solution.answer == "936" and solution.mean_correctness > 0
    assert json.loads(json.dumps(solution.as_json()))["answer"] == "936"


def test_what_a_candidate_saw_is_what_it_was_sampled_from():
    """Its tokens are likely under the prompt built from the tails it names, and not otherwise."""
    solution = BABBLER.markovian_rsa("Why?", SMALL, seed=3)
    prompts = Prompts(BABBLER.tokenizer)
    one = solution.rounds[1].candidates[2]
    before = solution.rounds[0].candidates
    prompt = prompts.aggregation("Why?", [before[i].tail for i in one.subset]).tokens
    logits = np.asarray(BABBLER.logits([[*prompt, *one.tokens]]))[0, len(prompt) - 1 : -1]
    logprobs = jax.nn.log_softmax(logits)[np.arange(len(one.tokens)), one.tokens]
    assert np.mean(logprobs) == pytest.approx(one.logprob, abs=1e-4)


def test_no_rounds_behind_the_first_are_parallel_sampling():
    settings = dataclasses.replace(SMALL, T=0)
    solution = NANO.markovian_rsa(QUESTION, settings, seed=7)
    ((round,), first) = solution.rounds, NANO.markovian_rsa(QUESTION, SMALL, seed=7).rounds[0]
    assert all(one.subset == [] and one.tail == [] for one in round.candidates)
    # The same seeds as in any first round, and a budget of the last.
    for one, other in zip(round.candidates, first.candidates, strict=True):
        assert one.tokens[: len(other.tokens)] == other.tokens
    message = [{"role": "user", "content": QUESTION}]
    free = NANO.generate([message] * 64, 48, temperature=1, top_p=1, batch_size=4)
    assert {len(r.tokens) for r in free} >= {len(one.tokens) for one in round.candidates}


def test_a_tail_as_long_as_a_response_shows_it_whole():
    """Recursive self-aggregation: nothing of the reasoning is cut."""
    settings = dataclasses.replace(SMALL, tau=SMALL.beta)
    solution = NANO.markovian_rsa(QUESTION, settings)
    for one in solution.rounds[0].candidates:
        assert one.tail == reasoning(one.tokens, NANO.tokenizer)


def test_one_candidate_goes_on_from_its_own_tail():
    """The Markovian thinker: a chain, of which each link sees only the end of the one before."""
    solution = BABBLER.markovian_rsa("Why?", N=1, C=1, T=5, beta=30, tau=12, final_budget=30)
    prompts = Prompts(BABBLER.tokenizer)
    for before, after in zip(solution.rounds, solution.rounds[1:], strict=False):
        (last,), (one,) = before.candidates, after.candidates
        assert one.subset == [0] and 0 < len(last.tail) <= 12
        assert one.prompt_tokens == len(prompts.aggregation("Why?", [last.tail]).tokens)


def test_a_seed_gives_the_same_again_and_another_one_something_else():
    first, again = (BABBLER.markovian_rsa("Why?", SMALL, seed=5) for _ in range(2))
    other = BABBLER.markovian_rsa("Why?", SMALL, seed=6)
    assert first == again and outcome(first) != outcome(other)
    subsets = [[one.subset for one in s.rounds[1].candidates] for s in (first, other)]
    assert subsets[0] != subsets[1]


def test_a_question_gets_the_same_alone_and_beside_others():
    both = markovian_rsa(BABBLER.engine, ["Why?", "How?"], SMALL, batch_size=4)
    for solution in both:
        (alone,) = markovian_rsa(BABBLER.engine, [solution.question], SMALL, batch_size=4)
        assert outcome(alone) == outcome(solution)


def test_subsets_are_uniform():
    settings = dataclasses.replace(SMALL, N=8, C=4, T=1, beta=16, final_budget=1)
    counts = np.zeros(8)
    for seed in range(40):
        for one in BABBLER.markovian_rsa("Why?", settings, seed=seed).rounds[1].candidates:
            counts[one.subset] += 1
    expected = 40 * 8 * 4 / 8
    assert np.abs(counts - expected).max() < 4 * np.sqrt(expected / 2)


@pytest.mark.parametrize("config", [TINY, ODD], ids=["tiny", "odd"])
def test_shared_beginnings_change_no_logit(config):
    """Bit for bit, of everything that is returned; and the logits are those of plain reading."""
    config = dataclasses.replace(config, vocab_size=320, eos_token_ids=(319,))
    model = Zaya(random_params(config), config, NANO.tokenizer)
    shared, unshared = (
        model.markovian_rsa("Why is it so?", SMALL, N=8, share=share) for share in (True, False)
    )
    assert outcome(shared) == outcome(unshared)
    assert unshared.read_tokens == unshared.prompt_tokens == shared.prompt_tokens
    assert shared.read_tokens < 0.6 * shared.prompt_tokens


def test_what_is_read_is_what_no_earlier_prompt_begins_with(monkeypatch):
    """Counted where it happens, against a count by hand over the returned subsets."""
    read = []

    def counted(params, config, tokens, new_lengths, state):
        read.append(int(new_lengths[0]))
        return prefill(params, config, tokens, new_lengths, state)

    prefill = engine_module.prefill_chunk
    monkeypatch.setattr(engine_module, "prefill_chunk", counted)
    solution = BABBLER.markovian_rsa("Why?", SMALL, N=8, seed=1)
    prompts = Prompts(BABBLER.tokenizer)
    wanted = len(prompts.question("Why?").tokens)
    for before, round in zip(solution.rounds, solution.rounds[1:], strict=False):
        beginnings = set()
        for one in round.candidates:
            tails = [before.candidates[i].tail for i in one.subset]
            tokens, cuts = prompts.aggregation("Why?", tails)
            start = 0
            for end in (*cuts, len(tokens)):
                if tuple(tokens[:end]) not in beginnings:
                    beginnings.add(tuple(tokens[:end]))
                    wanted += end - start
                start = end
    assert sum(read) == solution.read_tokens == wanted


def test_rows_are_replaced_as_they_finish(monkeypatch):
    """Eight candidates in two slots; the batch never waits for the longest of a pair."""
    sizes = []

    def counted(params, config, state, *rest):
        sizes.append(state.lengths.shape[0])
        return decode(params, config, state, *rest)

    decode = engine_module.decode_block
    monkeypatch.setattr(engine_module, "decode_block", counted)
    solution = NANO.markovian_rsa(QUESTION, N=8, T=0, batch_size=2)
    assert set(sizes) == {2}
    lengths = [len(one.tokens) for one in solution.rounds[0].candidates]
    assert len(sizes) <= sum(-(-n // engine_module.BLOCK) for n in lengths) / 2 + max(lengths) / 8


def test_memory_does_not_grow_with_what_was_thought(monkeypatch):
    """A chain that thinks more than fifty contexts keeps one row of bounded length."""
    capacities = set()

    def watched(params, config, state, *rest):
        capacities.add((state.lengths.shape[0], state.capacity))
        return decode(params, config, state, *rest)

    decode = engine_module.decode_block
    monkeypatch.setattr(engine_module, "decode_block", watched)
    context = 320
    config = dataclasses.replace(BABBLER.config, max_position_embeddings=context)
    model = Zaya(BABBLER.params, config, BABBLER.tokenizer)
    alive = []
    settings = Settings(N=1, C=1, T=130, beta=128, tau=64, final_budget=128)
    solution = model.markovian_rsa(
        "Why?",
        settings,
        on_round=lambda *_: alive.append(sum(x.nbytes for x in jax.live_arrays())),
    )
    assert solution.generated_tokens > 50 * context
    longest = Prompts(model.tokenizer).longest("Why?", 1, 64) + 128
    ((rows, capacity),) = capacities
    assert rows == 1 and longest <= capacity < longest + 64
    assert max(alive[5:]) == min(alive[5:])


def test_a_killed_run_goes_on_at_its_round(tmp_path):
    """Killed while the second round is decoded: the first is not done again, and the result is that
    of a run that nobody killed."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, signal, sys, zaya_jax\n"
        "def stop(number, piece):\n"
        "    if sys.argv[2] == 'kill' and os.path.exists(sys.argv[1] + '/round-0.jsonl'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "model = zaya_jax.load(layout='decoding')\n"
        f"solution = model.markovian_rsa({QUESTION!r}, N=4, C=2, T=2, beta=40, tau=16,\n"
        "    final_budget=48, folder=sys.argv[1], on_text=stop)\n"
    )
    folder = tmp_path / "rounds"
    killed = subprocess.run([sys.executable, script, folder, "kill"], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(os.listdir(folder)) == ["round-0.jsonl", "run.json"]
    asked = []
    solution = NANO.markovian_rsa(
        QUESTION, SMALL, folder=folder, on_text=lambda number, piece: asked.append(number)
    )
    whole = NANO.markovian_rsa(QUESTION, SMALL)
    assert outcome(solution) == outcome(whole)
    assert solution == NANO.markovian_rsa(QUESTION, SMALL, folder=folder, on_text=_never)
    assert set(asked) == set(range(4))


def _never(number, piece):
    raise AssertionError("a complete run was done again")


def test_an_interrupt_loses_no_complete_round(tmp_path):
    def stop(number, piece):
        if (tmp_path / "round-1.jsonl").exists():
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        NANO.markovian_rsa(QUESTION, SMALL, folder=tmp_path, on_text=stop)
    assert (tmp_path / "round-1.jsonl").exists() and not (tmp_path / "round-2.jsonl").exists()
    assert outcome(NANO.markovian_rsa(QUESTION, SMALL, folder=tmp_path)) == outcome(
        NANO.markovian_rsa(QUESTION, SMALL)
    )


def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path):
    NANO.markovian_rsa(QUESTION, SMALL, T=0, folder=tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for change, name in (
        ({"seed": 1}, "seed"),
        ({"N": 5}, "N"),
        ({"temperature": 0.5}, "temperature"),
    ):
        with pytest.raises(InputError, match=f"a run with another {name}"):
            NANO.markovian_rsa(QUESTION, SMALL, **{"T": 0, **change}, folder=tmp_path)
    with pytest.raises(InputError, match="another questions"):
        NANO.markovian_rsa("Why?", SMALL, T=0, folder=tmp_path)
    other = Zaya(jax.tree.map(lambda x: x + 1, NANO.params), NANO.config, NANO.tokenizer)
    with pytest.raises(InputError, match="another model"):
        other.markovian_rsa(QUESTION, SMALL, T=0, folder=tmp_path)
    assert before == {file: file.read_bytes() for file in tmp_path.iterdir()}
    (tmp_path / "round-0.jsonl").write_text('[{"text": ')
    with pytest.raises(InputError, match=r"round-0.jsonl: is damaged"):
        NANO.markovian_rsa(QUESTION, SMALL, T=0, folder=tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run.json: is no JSON"):
        NANO.markovian_rsa(QUESTION, SMALL, T=0, folder=tmp_path)
    with pytest.raises(InputError, match="cannot be written"):
        NANO.markovian_rsa(QUESTION, SMALL, T=0, folder=tmp_path / "run.json" / "below")


@pytest.mark.parametrize(
    ("question", "changes", "message"),
    [
        ("", {}, "the question is empty"),
        (" \n", {}, "the question is empty"),
        ("long " * 300, {}, r"the question has \d+ tokens, .* context of 1024"),
        ("long " * 190, {"tau": 40}, r"round 1 can need \d+ tokens of prompt \(question: \d+\)"),
        (QUESTION, {"final_budget": 1000}, "round 2 can need"),
        (QUESTION, {"beta": 1020, "tau": 8}, "round 0 can need"),
        (QUESTION, {"C": 5}, "C=5 candidates cannot be chosen from N=4"),
        (QUESTION, {"tau": 41}, "tail of tau=41 tokens is longer than a response of beta=40"),
        (QUESTION, {"N": 0}, "N must be a whole number from 1 on, got 0"),
        (QUESTION, {"T": 1.5}, "T must be a whole number"),
        (QUESTION, {"temperature": -1}, "temperature is out of range"),
        (QUESTION, {"K": 2}, "unknown setting 'K': one of N, C, T"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(tmp_path, question, changes, message):
    with pytest.raises(InputError, match=message) as error:
        NANO.markovian_rsa(question, SMALL, folder=tmp_path / "new", **changes)
    assert "\n" not in str(error.value) and not (tmp_path / "new").exists()


def test_other_refusals():
    with pytest.raises(InputError, match="unknown preset 'huge': one of light, recommended"):
        NANO.markovian_rsa(QUESTION, "huge")
    with pytest.raises(InputError, match="needs a tokenizer"):
        Zaya(BABBLER.params, BABBLER.config).markovian_rsa("Why?", SMALL)
    with pytest.raises(InputError, match="1 questions have 2 verifiers"):
        markovian_rsa(NANO.engine, [QUESTION], SMALL, verifiers=[float, float])


def test_presets_are_those_of_the_report():
    table = {
        "light": (2, 8, 4, 8, 4),
        "recommended": (2, 16, 4, 16, 4),
        "default": (2, 16, 4, 40, 4),
        "high": (8, 16, 4, 16, 4),
        "xhigh": (8, 32, 4, 32, 4),
    }
    for name, (T, N, C, beta, tau) in table.items():
        wanted = Settings(T=T, N=N, C=C, beta=beta * 1024, tau=tau * 1024, final_budget=40 * 1024)
        assert PRESETS[name] == wanted and wanted.temperature == wanted.top_p == 1
    assert fitting_preset(131_072) == "recommended" and fitting_preset(1024) == "nano"
