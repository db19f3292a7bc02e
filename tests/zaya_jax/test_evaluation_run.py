"""An evaluation from its questions to its results: what it keeps, and how it goes on."""

import dataclasses
import fcntl
import json

import jax
import numpy as np
import pytest

import zaya_jax
from zaya_jax.errors import InputError
from zaya_jax.evaluation import run
from zaya_jax.evaluation.checkers import Checked
from zaya_jax.evaluation.run import PRESETS, Settings, evaluate
from zaya_jax.evaluation.tasks import Question, Task, load_task
from zaya_jax.generation.rows import Generation, Interrupted
from zaya_jax.generation.sampling import Sampling
from zaya_jax.reasoning.settings import Settings as RsaSettings

SETTINGS = Settings(
    samples=4, sampling=Sampling(temperature=1.5, top_p=1, seed=3), budget=48, batch_size=4
)
ROUNDS = RsaSettings(N=4, C=2, T=1, beta=48, tau=16, final_budget=32)


@pytest.fixture(scope="module")
def model():
    return zaya_jax.load()


@pytest.fixture(scope="module")
def task():
    return load_task("nano:chain_sum", 6)


@pytest.fixture(scope="module")
def whole(model, task, tmp_path_factory):
    """A folder in which an evaluation ran without interruption, and its results."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, evaluate(model, task, SETTINGS, folder)


def lines(folder):
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def same(folder, other):
    """Bit for bit, but for the order in which settings were asked."""
    files = ("records.jsonl", "results.json", "settings.json")
    return all((folder / name).read_bytes() == (other / name).read_bytes() for name in files)


class Answering:
    """Stands for an engine, and answers what it is told to."""

    def __init__(self, tokenizer, answer):
        self.tokenizer, self.answer, self.asked = tokenizer, answer, []

    def run(self, prompts, sampling, **_):
        self.asked += sampling
        texts = [self.answer(self.tokenizer.decode(prompt)) for prompt in prompts]
        return [
            Generation(text, [5, 6], [-1.0, -2.0], [-1.0, -2.0], np.empty((0, 0)), "stop")
            for text in texts
        ]


def answering(model, answer, context=1024):
    """The model with an engine that answers what it is told to."""
    config = dataclasses.replace(model.config, max_position_embeddings=context)
    fake = dataclasses.replace(model, config=config)
    fake.__dict__["engine"] = Answering(model.tokenizer, answer)
    return fake


def question(id, text, expected="1", place="here"):
    return Question(id, "g", text, expected, lambda _: Checked(1.0, "1"), place)


def test_every_sample_is_recorded_and_summed_up(whole, task):
    folder, results = whole
    records = lines(folder)
    asked = [(q.id, sample) for q in task.questions for sample in range(4)]
    assert [(r["id"], r["sample"]) for r in records] == asked
    for record, q in zip(records[::4], task.questions, strict=True):
        assert record["question"] == q.text and record["expected"] == q.expected
        assert record["correct"] == (record["answer"] == q.expected) == (record["score"] == 1)
        assert record["logprob"] <= 0 and record["finish_reason"] in ("stop", "length")
        assert "note" not in record
    correct = np.reshape([r["correct"] for r in records], (6, 4))
    tokens = np.array([r["tokens"] for r in records])
    metrics = results["all"]
    assert metrics == results["groups"]["chain_sum"]
    assert metrics["avg@4"]["value"] == pytest.approx(correct.mean())
    assert metrics["pass@4"]["value"] == pytest.approx(correct.any(axis=1).mean())
    assert metrics["tokens"]["total"] == tokens.sum() and tokens.max() <= 48
    cut = sum(r["finish_reason"] == "length" for r in records)
    assert metrics["tokens"]["truncated"] == pytest.approx(cut / 24)
    assert 0 < correct.mean() < 1, "the temperature makes some samples right and some wrong"
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))


def test_an_interrupted_evaluation_keeps_what_is_done_and_goes_on(
    model, task, whole, tmp_path, monkeypatch
):
    """Ctrl-C while some rows of the second slice are finished and others are not."""
    monkeypatch.setattr(run, "SLICE", 2)
    real, calls = model.engine.run, []

    def interrupted(*arguments, **options):
        calls.append(len(arguments[0]))
        results = real(*arguments, **options)
        if len(calls) < 2:
            return results
        for result in results[::2]:
            result.finish_reason = "interrupted"
        raise Interrupted(results)

    monkeypatch.setattr(model.engine, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, task, SETTINGS, tmp_path)
    assert calls == [8, 8] and len(lines(tmp_path)) == 12

    def counted(*arguments, **options):
        calls.append(len(arguments[0]))
        return real(*arguments, **options)

    monkeypatch.setattr(model.engine, "run", counted)
    notes = []
    evaluate(model, task, SETTINGS, tmp_path, on_note=notes.append)
    assert sum(calls[2:]) == 12, "finished samples are not generated again"
    assert notes == [f"{tmp_path}: 12 of 24 samples are there already"]
    assert same(tmp_path, whole[0])


def test_an_interrupted_check_keeps_the_samples_before_it(model, tmp_path):
    def check(response):
        if response == "stop":
            raise KeyboardInterrupt
        return Checked(1.0, response)

    questions = [Question(f"q{i}", "g", text, "1", check, "") for i, text in enumerate("ab")]
    fake = answering(model, lambda prompt: "stop" if "b" in prompt.split("user")[1] else "a")
    with pytest.raises(KeyboardInterrupt):
        evaluate(fake, Task("t", questions), Settings(budget=8), tmp_path)
    assert [record["id"] for record in lines(tmp_path)] == ["q0"]


@pytest.mark.parametrize("left", [0, 1, -1])
def test_a_torn_last_line_is_dropped_and_made_again(model, task, whole, tmp_path, left):
    """Nothing, one byte, or all but the end of the last line got to the disk."""
    folder, _ = whole
    complete, last = (folder / "records.jsonl").read_bytes()[:-1].rsplit(b"\n", 1)
    (tmp_path / "settings.json").write_bytes((folder / "settings.json").read_bytes())
    part = last if left == -1 else last[:left]
    (tmp_path / "records.jsonl").write_bytes(complete + b"\n" + part)
    notes = []
    evaluate(model, task, SETTINGS, tmp_path, on_note=notes.append)
    torn = f"{tmp_path / 'records.jsonl'}: the last line was torn and is dropped"
    assert (torn in notes) == bool(part)
    assert same(tmp_path, folder)


def test_a_damaged_folder_is_one_line_and_stays_as_it_is(model, task, whole, tmp_path):
    folder, _ = whole
    for name in ("settings.json", "records.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    records = tmp_path / "records.jsonl"
    good = records.read_text().splitlines()

    def refused(content, message):
        records.write_text(content)
        with pytest.raises(InputError) as error:
            evaluate(model, task, SETTINGS, tmp_path)
        assert message in str(error.value) and "\n" not in str(error.value)
        assert records.read_text() == content

    where = f"{records}, line 3: "
    refused("\n".join([*good[:2], good[2][:-9], *good[3:], ""]), f"{where}is damaged; take the")
    refused("\n".join([*good[:2], "[]", ""]), f"{where}is damaged")
    refused("\n".join([*good[:2], good[0], ""]), f"{where}sample 0 of chain_sum-0 is there twice")
    foreign = good[2].replace("chain_sum-0", "chess-0")
    refused("\n".join([*good[:2], foreign, ""]), f"{where}sample 2 of chess-0 is not of this")
    (tmp_path / "settings.json").write_text("{")
    refused(good[0] + "\n", "settings.json: is damaged")
    (tmp_path / "settings.json").unlink()
    refused(good[0] + "\n", "records.jsonl: has no settings.json beside it")


def test_other_settings_than_the_folders_are_refused_by_name(model, task, whole):
    folder, _ = whole
    before = (folder / "records.jsonl").read_bytes()
    sampling = dataclasses.replace(SETTINGS.sampling, seed=4)
    for other, message in [
        (dataclasses.replace(SETTINGS, samples=5), "made with samples 4, not 5"),
        (dataclasses.replace(SETTINGS, budget=50), "made with max_new_tokens 48, not 50"),
        (dataclasses.replace(SETTINGS, batch_size=8), "made with batch_size 4, not 8"),
        (dataclasses.replace(SETTINGS, sampling=sampling), "made with seed 3, not 4"),
        (dataclasses.replace(SETTINGS, samples=4, rsa=ROUNDS), "made with rsa.N None, not 4"),
    ]:
        with pytest.raises(InputError, match=message):
            evaluate(model, task, other, folder)
    with pytest.raises(InputError, match="made with model None, not 'x'"):
        evaluate(model, task, SETTINGS, folder, described={"model": "x"})
    trained = dataclasses.replace(
        model, params=jax.tree.map(lambda leaf: leaf * 1.01, model.params)
    )
    with pytest.raises(InputError, match="made with weights"):
        evaluate(trained, task, SETTINGS, folder)
    changed = dataclasses.replace(task.questions[0], expected="5")
    other_task = dataclasses.replace(task, questions=[changed, *task.questions[1:]])
    with pytest.raises(InputError, match="made with questions"):
        evaluate(model, other_task, SETTINGS, folder)
    assert (folder / "records.jsonl").read_bytes() == before


def test_a_folder_belongs_to_one_process_at_a_time(model, task, tmp_path):
    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is writing there"):
            evaluate(model, task, SETTINGS, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        evaluate(model, task, SETTINGS, tmp_path / "file")


@pytest.mark.parametrize(
    "text, budget, message",
    [
        (" ", 8, "line 2: the question is empty"),
        ("x" * 3000, 8, "leaves no room in the context of 1024"),
        ("why " * 200, 900, "do not fit the context of 1024: max_new_tokens can be"),
        ("\udcff", 8, "line 2: "),
    ],
)
def test_questions_that_do_not_fit_are_named_before_anything_is_generated(
    model, tmp_path, text, budget, message
):
    fake = answering(model, lambda prompt: "1")
    task = Task("t", [question("good", "1?"), question("bad", text, place="file, line 2")])
    with pytest.raises(InputError) as error:
        evaluate(fake, task, Settings(budget=budget), tmp_path)
    assert message in str(error.value) and "file, line 2" in str(error.value)
    assert not fake.engine.asked and not list(tmp_path.iterdir())


def test_rounds_that_do_not_fit_are_named_before_anything_is_generated(model, tmp_path):
    fake = answering(model, lambda prompt: "1")
    task = Task("t", [question("q", "1?", place="file, line 1")])
    long = RsaSettings(N=4, C=4, T=1, beta=320, tau=200)
    with pytest.raises(InputError, match=r"file, line 1: round 1 can need .* the context of 1024"):
        evaluate(fake, task, Settings(samples=4, rsa=long), tmp_path)
    assert not list(tmp_path.iterdir())


def test_settings_that_contradict_each_other_are_refused():
    for values, message in [
        ({"samples": 0}, "samples must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"budget": 0}, "max_new_tokens must be at least 1"),
        ({"samples": 2, "sampling": Sampling(temperature=0)}, "2 greedy samples would all be"),
        ({"samples": 2, "rsa": ROUNDS}, "samples are its N=4 candidates"),
    ]:
        with pytest.raises(InputError, match=message):
            Settings(**values)


def test_a_sample_does_not_depend_on_what_else_is_asked(model, whole, tmp_path):
    evaluate(model, load_task("nano:chain_sum", 2), SETTINGS, tmp_path)
    assert lines(tmp_path) == lines(whole[0])[:8]


def test_samples_have_seeds_of_their_own(model, tmp_path):
    fake = answering(model, lambda prompt: "1")
    task = Task("t", [question("a", "1?"), question("b", "1?")])
    evaluate(fake, task, Settings(samples=50, sampling=Sampling(seed=7)), tmp_path)
    seeds = [sampling.seed for sampling in fake.engine.asked]
    assert len(set(seeds)) == 100
    assert {sampling.max_new_tokens for sampling in fake.engine.asked} <= set(range(900, 1024))


def test_presets_are_those_of_the_authors():
    assert PRESETS["math"] == {"temperature": 1.0, "top_p": 0.95, "top_k": 0}
    assert PRESETS["code"] == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert PRESETS["greedy"]["temperature"] == 0


def test_an_answer_without_end_of_reasoning_counts_as_none(model, tmp_path):
    file = tmp_path / "one.jsonl"
    file.write_text('{"question": "1+1?", "answer": "2"}\n')
    fake = answering(model, lambda prompt: r"<think>it is \boxed{2}")
    results = evaluate(fake, load_task(str(file)), Settings(budget=8), tmp_path / "out")
    assert results["all"]["avg@1"] == {"value": 0.0, "interval": None}
    assert lines(tmp_path / "out")[0]["answer"] is None


def test_majorities_outvote_single_samples(model, tmp_path):
    file, given = tmp_path / "one.jsonl", iter(["2", "2", "3", "0.5"] * 2)
    file.write_text('{"question": "1+1?", "answer": "2"}\n{"question": "1+2?", "answer": "3"}\n')
    fake = answering(model, lambda prompt: rf"<think>hm</think>\boxed{{{next(given)}}}")
    settings = Settings(samples=4, budget=8)
    metrics = evaluate(fake, load_task(str(file)), settings, tmp_path / "out")["all"]
    assert metrics["avg@4"]["value"] == pytest.approx(3 / 8)
    assert metrics["maj@4"]["value"] == 0.5 and metrics["pass@4"]["value"] == 1
    assert metrics["tokens"]["total"] == 16


@pytest.mark.slow
def test_markovian_rsa_is_scored_by_its_last_round_and_goes_on(model, task, tmp_path, monkeypatch):
    settings = Settings(samples=4, sampling=Sampling(seed=1), batch_size=8, rsa=ROUNDS)
    task = dataclasses.replace(task, questions=task.questions[:3])
    results = evaluate(model, task, settings, tmp_path / "whole")
    records = lines(tmp_path / "whole")
    assert len(records) == 12 and max(record["tokens"] for record in records) <= 32
    metrics = results["all"]
    assert metrics["avg@4"]["value"] == pytest.approx(np.mean([r["correct"] for r in records]))
    every = sum(record["rounds"]["generated_tokens"] for record in records[::4])
    assert metrics["tokens"]["total"] == every > sum(record["tokens"] for record in records)

    real, calls = model.engine.run, []

    def interrupted(*arguments, **options):
        if len(calls) == 3:
            raise Interrupted([])
        calls.append(0)
        return real(*arguments, **options)

    monkeypatch.setattr(model.engine, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, task, settings, tmp_path / "part")
    assert len(lines(tmp_path / "part")) == 8, "two problems side by side, then one"
    monkeypatch.setattr(model.engine, "run", real)
    evaluate(model, task, settings, tmp_path / "part")
    assert same(tmp_path / "part", tmp_path / "whole")


def test_known_solutions_pass_humaneval_and_others_do_not(model, tmp_path):
    task = load_task("humaneval", 3)
    known = {q.text: q.expected for q in task.questions}

    def answer(prompt):
        text = next(text for text in known if text in prompt)
        code = text.split("```python\n")[1].removesuffix("```") + known[text]
        if text == task.questions[2].text:
            code = "import os\nos._exit(0)"
        return f"<think>```python\nhm\n```</think>Here it is.\n```python\n{code}\n```\nDone."

    fake = answering(model, answer, context=1 << 14)
    results = evaluate(fake, task, Settings(budget=8), tmp_path)
    records = lines(tmp_path)
    assert [record["correct"] for record in records] == [True, True, False]
    assert records[2]["note"] and "def " in records[0]["answer"]
    assert "maj@1" not in results["all"] and results["all"]["noted"] == 1
