"""Rollouts become examples of aggregation that hold what Markovian RSA would show."""

import json

import pytest

import zaya_jax
from train.aggregation import aggregation_examples, main, read_rollouts
from train.config import ModelConfig
from train.data.config import DataConfig, Source
from train.data.examples import Encoder
from train.data.records import BadRecord
from zaya_jax import ConfigError, DataError
from zaya_jax.reasoning.prompts import Prompts

MODEL = zaya_jax.load()
TOKENIZER = MODEL.tokenizer
PROMPTS = Prompts(TOKENIZER)


def rollout(question, steps, answer, score):
    tokens = TOKENIZER.encode(f"<think>\n{steps}\n</think>\n\n{answer}<|im_end|>")
    return {"question": question, "tokens": tokens, "score": score}


ROLLOUTS = [rollout("1+1?", f"step {n}", n, float(n < 2)) for n in range(6)]
ROLLOUTS += [rollout("2+2?", "s", 5, 0.0) for _ in range(6)]  # nobody is right
ROLLOUTS += [rollout("3+3?", "s", 6, 1.0) for _ in range(3)]  # too few


def test_candidates_are_tails_as_in_a_round_and_the_target_is_a_correct_rollout_beside_them():
    found = list(aggregation_examples(ROLLOUTS, TOKENIZER, C=4, tau=5, each=8, seed=1))
    assert len(found) == 8
    tails = {n: PROMPTS.tail(one["tokens"], 5) for n, one in enumerate(ROLLOUTS[:6])}
    shown = set()
    for example in found:
        text = TOKENIZER.decode(example["prompt"])
        numbers = [n for n, tail in tails.items() if TOKENIZER.decode(tail) in text]
        assert len(numbers) == 4 and example["response"] in [r["tokens"] for r in ROLLOUTS[:2]]
        assert (
            ROLLOUTS.index(next(r for r in ROLLOUTS if r["tokens"] == example["response"]))
            not in numbers
        )
        orders = [text.index(TOKENIZER.decode(tails[n])) for n in numbers]
        ordered = [n for _, n in sorted(zip(orders, numbers, strict=True))]
        assert example["prompt"] == PROMPTS.aggregation("1+1?", [tails[n] for n in ordered]).tokens
        shown.add(tuple(ordered))
    assert len(shown) > 3
    again = aggregation_examples(ROLLOUTS, TOKENIZER, C=4, tau=5, each=8, seed=1)
    assert list(again) == found


def test_a_target_is_learned_where_there_is_one():
    given = [{**one, "target": "<think>\nlook\n</think>\n\n4"} for one in ROLLOUTS[6:12]]
    (example,) = aggregation_examples(given, TOKENIZER, C=4, tau=5)
    assert TOKENIZER.decode(example["response"]) == "<think>\nlook\n</think>\n\n4<|im_end|>"


def test_a_broken_rollout_is_named_by_its_line(tmp_path):
    file = tmp_path / "rollouts.jsonl"
    good = json.dumps(ROLLOUTS[0])
    file.write_text(good + "\n" + good + "\n")
    assert list(read_rollouts(file)) == [ROLLOUTS[0]] * 2
    for bad in ("{", "[]", '{"question": "x", "tokens": ["a"], "score": 1}', '{"question": 1}'):
        file.write_text(f"{good}\n{bad}\n")
        with pytest.raises(DataError, match=r"rollouts.jsonl:2: is no rollout"):
            list(read_rollouts(file))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_rollouts(tmp_path / "missing"))


def encoder(length=50):
    return Encoder.of(TOKENIZER, MODEL.config, "tokens", length, "skip")


def test_only_the_response_is_learned_and_ids_stay_as_they_are():
    """Also ids that no tokenisation of their text gives."""
    response = [*TOKENIZER.encode("<"), *TOKENIZER.encode("think>é"), 2]
    (example,) = encoder().examples({"prompt": [1, 50, 51], "response": response, "weight": 0.5})
    assert example.tokens == [1, 50, 51, *response]
    assert example.spans == [(3, 3 + len(response), 0.5)] and example.bytes == len("<think>é") + 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response": [1]}, "`prompt` is no list of token ids"),
        ({"prompt": [], "response": [1]}, "`prompt` is no list"),
        ({"prompt": [1], "response": "x"}, "`response` is no list"),
        ({"prompt": [1], "response": [320]}, "holds 320, which is no token of 320"),
        ({"prompt": [1], "response": [True]}, "holds True"),
        ({"prompt": [1], "response": [1] * 50}, "51 tokens, more than the 50 of a row"),
    ],
)
def test_records_that_are_no_tokens(fields, message):
    with pytest.raises(BadRecord, match=message):
        encoder().examples(fields)


def test_sources_of_tokens_fit_fine_tuning_only_where_they_are_not_split():
    assert Source(path="x", format="tokens").resolved_on_long == "skip"
    with pytest.raises(ConfigError, match="on_long must be skip for format tokens"):
        Source(path="x", format="tokens", on_long="trim")
    assert DataConfig(sources=(Source(path="x", format="tokens"),)) and ModelConfig(preset="nano")


def test_the_command_writes_what_the_function_gives(tmp_path, capsys):
    source, made = tmp_path / "rollouts.jsonl", tmp_path / "examples.jsonl"
    source.write_text("".join(json.dumps(one) + "\n" for one in ROLLOUTS))
    main(source, made, C=4, tau=5, each=2)
    wanted = list(aggregation_examples(ROLLOUTS, TOKENIZER, C=4, tau=5, each=2))
    assert [json.loads(line) for line in made.read_text().splitlines()] == wanted
    assert "2 examples" in capsys.readouterr().out
    source.write_text("{\n")
    with pytest.raises(SystemExit, match=r"rollouts.jsonl:1: is no rollout"):
        main(source, made)
    assert len(made.read_text().splitlines()) == 2 and sorted(tmp_path.iterdir()) == [made, source]
