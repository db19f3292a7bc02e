"""The mini-course's long reasoning is what answer-preserving trimming is made for."""

import itertools

from train.course.data import records
from train.course.phases import PHASES
from train.data.trimming import trim
from zaya_jax import ZayaConfig
from zaya_jax.loading import NANO
from zaya_jax.text.tokenizer import Tokenizer


def test_trimming_keeps_every_prompt_and_answer_of_midtraining():
    """Some reasoning is cut and some deleted; questions and answers are what they were."""
    tokenizer = Tokenizer.from_folder(NANO, ZayaConfig.preset("nano"))
    budget, outcomes = PHASES["midtrain"].context, []
    for row in itertools.islice(records("midtrain"), 400):
        trimmed = trim(row["messages"], budget, tokenizer)
        outcomes.append(trimmed.outcome)
        if trimmed.messages is None:
            continue
        assert trimmed.tokens_kept <= budget
        for before, after in zip(row["messages"], trimmed.messages, strict=True):
            if before["role"] == "user":
                assert before == after
            answer = before["content"].rpartition("</think>")[2].strip()
            assert after["content"].rpartition("</think>")[2].strip() == answer
    assert outcomes.count("cut") > 20 and outcomes.count("deleted") > 0
    assert outcomes.count("dropped") < 4
