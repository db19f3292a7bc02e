"""Examples from which the embedded model learns to vote."""

import json
from collections import Counter

import pytest

import zaya_jax
from train.course.rollouts import rollouts
from train.course.voting import SETTINGS, leading, vote, voting_examples, write_examples
from zaya_jax.evaluation.families import FAMILIES, is_held_out
from zaya_jax.generation.rows import Generation
from zaya_jax.reasoning.prompts import Prompts

TOKENIZER = zaya_jax.load().tokenizer
PROMPTS = Prompts(TOKENIZER)


def group(answers, right="7"):
    return [
        {
            "question": "3+4?",
            "tokens": TOKENIZER.encode(f"<think>\n3+4\nso {a}\n</think>\n\n{a}<|im_end|>"),
            "score": float(a == right),
        }
        for a in answers
    ]


@pytest.mark.parametrize(
    "answers, first",
    [("7789", "7"), ("7788", "78"), ("6789", "6789"), ("77889", "78"), ([None, None, "7"], "7")],
)
def test_those_lead_than_whom_none_is_more_frequent(answers, first):
    assert leading(answers) == list(first)
    assert leading([None]) == []


def shown(example):
    """The answers of the candidates in a prompt."""
    text = TOKENIZER.decode(example["prompt"])
    blocks = [b.partition("\n</candidate>")[0] for b in text.split("<candidate>\n")[1:]]
    assert len(blocks) == SETTINGS.C
    return [b.rpartition("so ")[2].strip() for b in blocks]


def test_the_leading_answer_is_learned_and_among_several_the_right_one(monkeypatch):
    monkeypatch.setattr("train.course.voting.TRIES", 400)
    found = list(voting_examples(group("77777889"), TOKENIZER, each=400))
    patterns = set()
    for example in found:
        answers = shown(example)
        assert TOKENIZER.decode(example["response"]) == vote("7") + "<|im_end|>"
        assert "7" in leading(answers)
        patterns.add(tuple(sorted(Counter(answers).values())))
    assert patterns == {(4,), (1, 3), (1, 1, 2), (2, 2)}
    alike = sum(len(set(shown(example))) == 1 for example in found)
    assert 0 < alike < 0.1 * len(found)  # agreement teaches little
    again = voting_examples(group("77777889"), TOKENIZER, each=400)
    assert list(again) == found
    assert len(list(voting_examples(group("77777889"), TOKENIZER, each=3))) == 3


def test_a_wrong_vote_is_not_learned():
    found = list(voting_examples(group("88889977"), TOKENIZER))
    assert found and all("7" in leading(shown(example)) for example in found)
    assert not list(voting_examples(group("8888"), TOKENIZER))
    assert not list(voting_examples(group("777"), TOKENIZER))  # too few to choose from


def test_candidates_that_never_ended_have_no_vote():
    cut = [{**one, "tokens": one["tokens"][:6]} for one in group("8888")]
    for example in voting_examples([*cut, *group("7")], TOKENIZER):
        assert TOKENIZER.decode(example["response"]) == vote("7") + "<|im_end|>"


class Guesser:
    """Stands for a model whose rollouts are right half of the time."""

    tokenizer = TOKENIZER

    @property
    def engine(self):
        return self

    def run(self, prompts, sampling, batch_size):
        for number, prompt in enumerate(prompts):
            question = TOKENIZER.decode(prompt).split("user\n")[1].partition("<|im_end|>")[0]
            answer = self.known[question.strip()] if number % 2 else f"{number}"
            text = f"<think>\nso {answer}\n</think>\n\n{answer}"
            yield Generation(text, TOKENIZER.encode(text + "<|im_end|>"), [], [], None, "stop")


def test_the_course_writes_its_examples_whole_and_keeps_held_out_questions_apart(
    tmp_path, monkeypatch
):
    (tmp_path / "held_out").mkdir()
    asked = []
    model = Guesser()

    def known(_, problems, seed):
        problems = list(problems)
        asked.append(problems)
        model.known = {p.question.strip(): p.answer for p in problems}
        return rollouts(model, problems, seed)

    monkeypatch.setattr("train.course.voting.rollouts", known)
    write_examples(model, tmp_path, 40)
    held, trained = asked
    assert all(is_held_out(p.question) for p in held)
    assert not any(is_held_out(p.question) for p in trained)
    assert {p.family for p in trained} == set(FAMILIES)
    for file in (tmp_path / "aggregation.jsonl", tmp_path / "held_out" / "aggregation.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(rows) == 40 and set(rows[0]) == {"prompt", "response"}
    assert not list(tmp_path.rglob("*.part"))
