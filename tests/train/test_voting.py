"""The embedded model learns to vote where candidates agree, and to try again where they do not."""

import itertools
import json

import pytest
from zaya_jax.generation.rows import Generation

import zaya_jax
from train.course.data import training_problems
from train.course.rollouts import rollouts
from train.course.solutions import another_way, worked
from train.course.voting import SETTINGS, most, vote, voting_examples, write_examples
from zaya_jax.evaluation.families import FAMILIES, is_held_out
from zaya_jax.reasoning.prompts import Prompts

TOKENIZER = zaya_jax.load().tokenizer
PROMPTS = Prompts(TOKENIZER)
AGAIN = "<think>\nagain\nso 7\n</think>\n\n7"


def group(*answers, right="7"):
    return [
        {
            "question": "3+4?",
            "tokens": TOKENIZER.encode(f"<think>\n3+4\nso {a}\n</think>\n\n{a}<|im_end|>"),
            "score": float(a == right),
            "target": AGAIN,
        }
        for a in answers
    ]


@pytest.mark.parametrize(
    "answers, top",
    [("7789", "7"), ("7788", None), ("6789", None), ("7778", "7"), ("77889", None), ("7", None)],
)
def test_the_vote_is_of_the_answer_that_is_more_frequent_than_every_other(answers, top):
    assert most(list(answers)) == top


def shown(example):
    """The answers of the candidates in a prompt, and whether they are of a second round."""
    text = TOKENIZER.decode(example["prompt"])
    blocks = [b.partition("\n</candidate>")[0] for b in text.split("<candidate>\n")[1:]]
    assert len(blocks) == SETTINGS.C
    return [b.rpartition("so ")[2].strip() for b in blocks]


def test_a_response_depends_on_what_the_prompt_shows_and_on_nothing_else():
    found = list(voting_examples(group(*"77777889"), TOKENIZER, each=300))
    votes = {text: 0 for text in (vote("7"), AGAIN)}
    for example in found:
        text = TOKENIZER.decode(example["response"]).removesuffix("<|im_end|>")
        top = most(shown(example))
        assert text == (AGAIN if top is None else vote(top))
        votes[text] += 1
    assert min(votes.values()) > 20
    alike = sum(len(set(shown(example))) == 1 for example in found)
    assert 0 < alike < 0.25 * len(found)  # agreement teaches little


def test_a_wrong_vote_is_not_learned():
    found = list(voting_examples(group(*"88889977"), TOKENIZER, each=300))
    assert found and all(most(shown(example)) in (None, "7") for example in found)
    assert not list(voting_examples(group(*"8888"), TOKENIZER, each=50))
    assert not list(voting_examples(group(*"777"), TOKENIZER))  # too few to choose from


def test_candidates_that_never_ended_agree_with_none():
    cut = [{**one, "tokens": one["tokens"][:6]} for one in group(*"7777")]
    for example in voting_examples(cut, TOKENIZER):
        assert TOKENIZER.decode(example["response"]) == AGAIN + "<|im_end|>"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_other_way_reaches_the_same_answer(family):
    for problem in itertools.islice(training_problems(family), 50):
        steps, answer = another_way(problem)
        assert answer == worked(problem).answer
        if family in ("chain_sum", "long_chain_sum"):
            assert steps[-1].rpartition(" ")[2] == answer
    assert (steps != worked(problem).steps) == (family.endswith("chain_sum") or "leg" in family)


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
