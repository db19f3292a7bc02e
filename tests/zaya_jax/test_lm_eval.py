"""The plug-in for lm-eval: what it computes is what lm-eval's `hf` model and our own evaluation
compute, in lm-eval's own runs."""

import dataclasses
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import datasets
import jax
import lm_eval
import numpy as np
import pytest
from helpers import ORACLE, random_params
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, hash_args
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import zaya_jax
from zaya_jax import InputError, ZayaError
from zaya_jax.evaluation import lm_eval_command, lm_eval_model, scoring
from zaya_jax.evaluation.accuracy import evaluate
from zaya_jax.evaluation.families import held_out
from zaya_jax.evaluation.lm_eval_model import ZayaLM
from zaya_jax.evaluation.scoring import score
from zaya_jax.layouts import for_cpu, stack
from zaya_jax.loading import save

ROOT = Path(__file__).parent.parent.parent
TASKS = Path(__file__).parent / "lm_eval_task"
FAMILIES = ("letter_counting", "gcd", "long_chain_sum", "fraction_simplification")
PROBLEMS = [problem for family in FAMILIES for problem in held_out(family, 5)]
# Not periodic: where two windows of a text hold the same tokens, lm-eval 0.4.13 takes the wrong
# part of the logits that it keeps for both.
LONG = " ".join(f"{i * i} naïve words, {i} of them;" for i in range(100))
CHATS = [
    [{"role": "user", "content": "What is 2 + 3?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "The answer is "}],
]


@pytest.fixture(scope="module")
def nano():
    return zaya_jax.load(dtype="float32")


@pytest.fixture(scope="module")
def model():
    return ZayaLM(dtype="float32")


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def write_checkpoint(folder: Path, nano, params, begins: bool = False) -> str:
    """A checkpoint in float32 whose tokenizer transformers reads as it is; if asked for, one that
    begins texts with the beginning-of-sequence token."""
    save(params, nano.config, folder, nano.tokenizer)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **nano.tokenizer.template.tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(nano.tokenizer.template.source)
    if begins:
        core = Tokenizer.from_file(str(folder / "tokenizer.json"))
        bos = ("<bos>", nano.config.bos_token_id)
        core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[bos])
        core.save(str(folder / "tokenizer.json"))
    return str(folder)


def scored_pairs(nano) -> list[tuple[str, str]]:
    """Contexts and continuations of every kind, half of them such as greedy decoding gives."""
    pairs = [
        ("", "a text without context"),
        ("", "<bos>one that brings its own beginning"),
        ("<bos>What is 2 + 3?", " 5"),
        ("naïve 日本語 😀", " é—ß 🎉"),
        *(("one context,", f" {letter}") for letter in "abcba"),
        ("spaces at the end  ", "move over"),
        (LONG[:900], LONG[900:1000]),
        (LONG, " a context too long"),
        ("x", LONG[:990]),
        *((problem.question + "\n", problem.answer) for problem in PROBLEMS[::3]),
    ]
    prompts = [
        nano.tokenizer.template.render([{"role": "user", "content": p.question}])
        for p in PROBLEMS[::2]
    ]
    for prompt, result in zip(prompts, nano.generate(prompts, 64, temperature=0), strict=True):
        pairs.append((prompt + result.text[:20], result.text[20:]))
    return pairs


@pytest.mark.slow
def test_scores_equal_those_of_lm_evals_hf_model(nano, tmp_path):
    """Trained and random weights; tokenizers and settings with and without a first token; short
    windows."""
    if not ORACLE.exists():
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing("the PyTorch reference environment is not built (make oracle)")
    random = random_params(nano.config)
    embedding = random["params"]["embed_tokens"]
    embedding["weight"] = 0.1 * embedding["weight"]  # else each token costs 50 nats
    pairs = scored_pairs(nano)
    plain = write_checkpoint(tmp_path / "nano", nano, nano.params)
    begins = write_checkpoint(tmp_path / "begins", nano, nano.params, begins=True)
    drawn = write_checkpoint(tmp_path / "random", nano, random)
    short = [pair for pair in pairs if len(pair[1]) < 50]
    cases = [
        (plain, {}, pairs),
        (drawn, {}, pairs),
        (begins, {}, short),
        (begins, {"add_bos_token": False}, short[:4]),
        (plain, {"add_bos_token": True, "max_length": 100, "enable_thinking": False}, short),
    ]
    texts = ["What is 2 + 3?", "", "é", "<bos>begins", LONG[:1000], LONG]
    jobs = [
        {
            "folder": folder,
            "options": options,
            "pairs": some,
            "texts": texts,
            "chats": CHATS if "enable_thinking" in options else CHATS[2:],
        }
        for folder, options, some in cases
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    script, out = ROOT / "tests" / "oracle" / "lm_eval_hf.py", tmp_path / "out.json"
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    subprocess.run([ORACLE, "-E", script, tmp_path / "jobs.json", out], check=True, env=offline)
    greedy = []
    for (folder, options, some), expected in zip(cases, json.loads(out.read_text()), strict=True):
        ours = ZayaLM(folder, "float32", **options)
        found = ours.loglikelihood(requests("loglikelihood", *some), disable_tqdm=True)
        logprobs, flags = zip(*found, strict=True)
        expected_logprobs, expected_flags = zip(*expected["pairs"], strict=True)
        np.testing.assert_allclose(logprobs, expected_logprobs, rtol=0, atol=1e-3)
        assert flags == expected_flags
        greedy += flags
        each = [(text,) for text in texts]
        found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", *each), True)
        # lm-eval adds up in float32, whose last digit is larger than the bound beyond 10,000.
        np.testing.assert_allclose(found, expected["texts"], rtol=1e-6, atol=1e-3)
        prompts = [
            ours.apply_chat_template(chat, chat[-1]["role"] == "user") for chat in jobs[0]["chats"]
        ]
        assert prompts[-1] == expected["chats"][-1]
    prompts = [ours.apply_chat_template(chat, chat[-1]["role"] == "user") for chat in CHATS]
    assert prompts == expected["chats"]
    assert 10 < sum(greedy) < len(greedy) - 10


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What lm-eval makes of its command line, offline, on the embedded model."""
    folder = tmp_path_factory.mktemp("results")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder)}
    model_args = "dtype=float32,think_end_token=</think>,batch_size=auto"
    command = f"""run --model zaya --model_args {model_args} --tasks nano_answers
        --include_path {TASKS} --apply_chat_template --output_path {folder} --log_samples"""
    module = "zaya_jax.evaluation.lm_eval_command"
    subprocess.run(
        [sys.executable, "-m", module, *command.split()],
        cwd=ROOT,
        env=os.environ | offline,
        check=True,
    )
    (file,) = folder.rglob("results_*.json")
    return json.loads(file.read_text())["results"]


def test_the_tasks_hold_held_out_problems():
    rows = json.loads((TASKS / "problems.json").read_text())
    assert [(row["question"], row["answer"]) for row in rows] == [
        (problem.question, problem.answer) for problem in PROBLEMS
    ]
    assert all(row["choices"][row["label"]] == row["answer"] for row in rows)


@pytest.mark.slow
def test_the_command_line_finds_our_own_accuracy(nano, results):
    ours = evaluate(nano, PROBLEMS)
    accuracy = sum(each.accuracy * each.problems for each in ours) / len(PROBLEMS)
    assert results["nano_answers"]["exact_match,none"] == pytest.approx(accuracy)
    assert 0.1 < accuracy < 1


@pytest.mark.slow
def test_an_evaluation_in_python_chooses_as_the_logits_do(nano, monkeypatch, tmp_path):
    """Also: what was computed once is taken from lm-eval's cache."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    lm_eval_command.register_models()

    def run() -> dict:
        return lm_eval.simple_evaluate(
            model="zaya",
            model_args="dtype=float32",
            tasks=["nano_choices"],
            task_manager=TaskManager(include_path=str(TASKS)),
            use_cache=str(tmp_path / "answers"),
        )

    first = run()
    right = []
    for row in json.loads((TASKS / "problems.json").read_text()):
        context = f"{row['question']}\n\nAnswer:"
        sums = [_log_probability(nano, context, f" {choice}") for choice in row["choices"]]
        right.append(int(np.argmax(sums)) == row["label"])
    assert first["results"]["nano_choices"]["acc,none"] == pytest.approx(np.mean(right))
    assert 0 < sum(right) < len(right)
    monkeypatch.setattr(lm_eval_model, "iterate_scores", None)
    assert (
        run()["results"]["nano_choices"]["acc,none"] == first["results"]["nano_choices"]["acc,none"]
    )


def _log_probability(nano, context: str, continuation: str) -> float:
    """From all logits, without the plug-in's encoding and scoring."""
    tokens = nano.tokenizer.encode(context + continuation)
    start = len(nano.tokenizer.encode(context))
    padded = np.pad(tokens, (0, 256 - len(tokens)))
    logits = np.asarray(nano.logits([padded], [len(tokens)])[0], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(logprobs[i - 1, tokens[i]] for i in range(start, len(tokens)))


def test_lm_eval_finds_the_model_by_entry_point():
    (point,) = entry_points(group=lm_eval_command.GROUP, name="zaya")
    assert point.load() is ZayaLM


def test_importing_the_package_imports_no_lm_eval():
    code = "import sys, zaya_jax.cli.main; assert 'lm_eval' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_results_keep_their_order_and_are_cached_as_lm_eval_does(model, capsys):
    model.set_cache_hook(hook := CacheHook(None))
    pairs = requests("loglikelihood", ("a", " long one"), ("b", "c"), ("a", "b"), ("b", "c"))
    alone = [model.loglikelihood([pair], disable_tqdm=True)[0][0] for pair in pairs]
    hook.dbdict = {}
    capsys.readouterr()
    found = model.loglikelihood(pairs, disable_tqdm=True)
    assert capsys.readouterr().err == ""
    np.testing.assert_allclose([logprob for logprob, _ in found], alone, rtol=1e-5)
    texts = requests("loglikelihood_rolling", ("abc",), ("a text that is longer",))
    found += model.loglikelihood_rolling(texts)
    prompts = requests("generate_until", ("2 + 3 =", {"until": ["\n"], "max_gen_toks": 3}))
    found += model.generate_until(prompts)
    shown = capsys.readouterr().err
    assert "Scoring" in shown and "Generating" in shown
    for request, result in zip([*pairs, *texts, *prompts], found, strict=True):
        assert hook.dbdict[hash_args(request.request_type, request.args)] == result


def test_generation_is_ours_up_to_a_stop_string(model, nano):
    question = PROBLEMS[-1].question
    prompt = model.apply_chat_template([{"role": "user", "content": question}])
    (plain,) = nano.generate(prompt, 300, temperature=0)
    settings = {"until": ["</think>", ""], "max_gen_toks": 300}
    found = model.generate_until(requests("generate_until", (prompt, settings), (prompt, {})), True)
    assert found == [plain.text.partition("</think>")[0], plain.text]
    # Behind the end of the reasoning only, a stop string counts.
    thinking = ZayaLM(dtype="float32", think_end_token="</think>")
    settings = {"until": plain.answer.text[1], "max_gen_toks": 300}
    found = thinking.generate_until(requests("generate_until", (prompt, settings)), True)
    assert found == [plain.answer.text.partition(plain.answer.text[1])[0]]


def test_a_context_without_room_for_the_answer_is_cut_on_the_left(nano, caplog):
    short = ZayaLM(dtype="float32", max_length=40)
    tokens = nano.tokenizer.encode(LONG)
    (expected,) = nano.generate([tokens[-30:]], 10, temperature=0)
    with caplog.at_level("WARNING", "lm_eval"):
        settings = {"max_gen_toks": 10, "until": []}
        (found,) = short.generate_until(requests("generate_until", (LONG, settings)), True)
    assert found == expected.text
    assert "1 of 1 contexts were cut on the left to fit 40 tokens" in caplog.text


def test_equal_prompts_draw_samples_of_their_own_in_any_batch(monkeypatch):
    settings = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 32, "until": []}
    prompts = requests("generate_until", *[("What", settings)] * 4)
    together = ZayaLM(dtype="float32").generate_until(prompts, True)
    assert len(set(together)) == 4
    monkeypatch.setattr(lm_eval_model, "ROUNDS", 1)
    apart = ZayaLM(dtype="float32", batch_size=1).generate_until(prompts, True)
    assert len(set(apart)) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrainde": "x"}, "unknown model argument 'pretrainde': one of pretrained, dtype"),
        ({"pretrained": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"dtype": "int8"}, "dtype must be float32, bfloat16 or float16"),
        ({"max_length": 5000}, "max_length must be in 1 .. 1024"),
        ({"batch_size": 0}, "batch_size must be a number of rows from 1 on"),
        ({"batch_size": "many"}, "batch_size must be a number of rows from 1 on"),
    ],
)
def test_bad_model_arguments_are_named(arguments, message):
    with pytest.raises(ZayaError, match=message) as error:
        ZayaLM(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gen_toks": 1024}, "max_gen_toks 1024 must be in 1 .. 1023"),
        ({"num_beams": 4}, "no beam search"),
        ({"penalty": 1.0}, "unknown generation setting 'penalty'"),
        ({"temperature": -1, "do_sample": True}, "temperature is out of range"),
    ],
)
def test_bad_generation_settings_are_named(model, settings, message):
    with pytest.raises(InputError, match=message):
        model.generate_until(requests("generate_until", ("a", settings)), True)


def test_what_cannot_be_scored_is_named(model):
    for pair, message in {
        ("a", ""): "request 0 has an empty continuation",
        ("", "<bos>"): "the continuation adds no token",
        ("a", "b" * 1100): "longer than max_length 1024",
    }.items():
        with pytest.raises(InputError, match=message):
            model.loglikelihood(requests("loglikelihood", pair), True)
    with pytest.raises(InputError, match="enable_thinking=True has no meaning"):
        ZayaLM(enable_thinking=True).loglikelihood(requests("loglikelihood", ("a", "b")))


def test_the_command_ends_with_one_line_on_bad_arguments(monkeypatch, capsys):
    command = "lm-eval run --model zaya --model_args max_length=0 --tasks nano_choices"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--include_path", str(TASKS)])
    with pytest.raises(SystemExit) as error:
        lm_eval_command.main()
    shown = capsys.readouterr().err
    assert error.value.code == 2 and "Traceback" not in shown
    assert shown.strip().splitlines()[-1].startswith("zaya: max_length must be in 1 .. 1024")


def drawn_pairs(*sizes: tuple[int, int]) -> list[tuple[list[int], list[int]]]:
    """Random tokens: contexts and continuations of those lengths."""
    rng = np.random.default_rng(0)
    return [tuple(rng.integers(3, 280, size).tolist() for size in pair) for pair in sizes]


@pytest.mark.parametrize("form", ["canonical", "decoding", "stacked"])
def test_scores_are_the_log_softmax_of_the_logits(nano, form):
    """In every form of the parameters, with rows of several buckets, more than make up a batch, and
    with logits that come in parts."""
    params = {
        "canonical": lambda: nano.params,
        "decoding": lambda: for_cpu(nano.params, nano.config),
        "stacked": lambda: stack(nano.params, nano.config),
    }[form]()
    sizes = [(1, 1), (5, 40), (90, 3), (33, 1), (1, 100), (40, 2), (7, 7)]
    pairs = drawn_pairs(*sizes)
    best = int(np.asarray(nano.logits([pairs[0][0]]))[0, -1].argmax())
    pairs[0] = (pairs[0][0], [best])
    found = score(dataclasses.replace(nano, params=params), pairs, batch_size=2)
    for (context, continuation), scores in zip(pairs, found, strict=True):
        logits = np.asarray(nano.logits([[*context, *continuation]])[0, len(context) - 1 : -1])
        logits = logits.astype(np.float64)
        all_logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = all_logprobs[np.arange(len(continuation)), continuation]
        np.testing.assert_allclose(scores.logprobs, expected, atol=1e-4)
        np.testing.assert_array_equal(scores.best, logits.argmax(-1) == continuation)
        assert scores.total == pytest.approx(expected.sum(), abs=1e-3)
    assert found[0].greedy and not found[1].greedy


def test_nothing_is_compiled_twice_within_a_bucket_and_few_logits_exist(nano, monkeypatch):
    programs = scoring._layer, scoring._embed, scoring._predict_chunk
    sizes = []

    def predict(params, config, hidden, rows, positions, tokens):
        sizes.append(len(rows))
        return programs[-1](params, config, hidden, rows, positions, tokens)

    monkeypatch.setattr(scoring, "_predict_chunk", predict)
    score(nano, drawn_pairs((30, 10), (20, 20), (4, 60)), batch_size=2)
    before = [program._cache_size() for program in programs]
    score(nano, drawn_pairs((40, 24), (2, 61), (50, 12), (33, 7), (60, 2)), batch_size=2)
    assert [program._cache_size() for program in programs] == before
    assert set(sizes) == {scoring.PREDICTED}


def test_a_context_with_many_short_answers_is_read_once(nano, monkeypatch):
    shapes = []

    def read(params, config, tokens, lengths):
        shapes.append(tokens.shape)
        return _read(params, config, tokens, lengths)

    _read = scoring._read
    monkeypatch.setattr(scoring, "_read", read)
    context = list(range(3, 60))
    found = score(nano, [(context, [token]) for token in range(10, 30)])
    assert shapes == [(1, 64)]
    assert len({scores.total for scores in found}) == 20


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([], [5]), "pair 1 has an empty context"),
        (([5], []), "pair 1 has an empty continuation"),
        (([5], [320]), "pair 1 has tokens outside the vocabulary of 320"),
        (([5], [-1]), "pair 1 has tokens outside"),
        (([5] * 1000, [5] * 26), "pair 1 has 1026 tokens; the model reads 1024"),
    ],
)
def test_pairs_that_no_model_could_score_are_named(nano, pair, message):
    with pytest.raises(InputError, match=message):
        score(nano, [([5], [6]), pair])


def test_logits_that_are_no_numbers_are_named(nano):
    params = jax.tree.map(lambda leaf: leaf, nano.params)
    params["params"]["norm"] = {"weight": nano.params["params"]["norm"]["weight"] * np.nan}
    with pytest.raises(ZayaError, match="pair 0: the model's logits hold NaN"):
        score(dataclasses.replace(nano, params=params), [([5], [6])])
