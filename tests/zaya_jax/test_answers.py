"""Where a final answer stands, which answers are the same, and which one wins a vote."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zaya_jax.reasoning.answers import final_answer, majority, normalised


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("936", "936"),
        (r"First \boxed{1}, then so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"cut off in \boxed{12} and \boxed{\frac{3", "12"),
        ("Some words.\nAnswer: 17\n", "17"),
        ("**Final answer:** 3/4", "3/4"),
        ("Answer: 1\nNo.\nThe final answer is: 2", "2"),
        ("He pays 3 * 4 = 12.\n#### 12", "12"),
        ("  ", None),
        ("", None),
    ],
)
def test_the_last_announced_answer_counts(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("$1{,}234$", "1234"),
        ("1,234", "1234"),
        ("007", "7"),
        ("+7", "7"),
        ("7.0", "7"),
        ("7.50", "7.5"),
        (r"\text{Yes}.", "yes"),
        ("( 1, 2 )", "(1,2)"),
        ("$x$ ", "X"),
        ("{5}", "5"),
    ],
)
def test_the_same_answer_in_another_dress(one, other):
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(
    ("one", "other"), [("-7", "7"), ("1/2", "12"), ("0.5", "5"), ("1,2", "12"), ("100", "1")]
)
def test_other_answers_stay_apart(one, other):
    assert normalised(one) != normalised(other)


@given(st.text())
def test_normalising_twice_changes_nothing_more(text):
    once = normalised(text)
    assert normalised(once) == once


def test_most_votes_win_and_ties_go_to_the_most_probable():
    assert majority(["1", "2", "02", None], [-0.1, -3.0, -2.0, 0.0]) == 2
    assert majority(["1", "2"], [-0.2, -0.1]) == 1
    # by the mean of an answer's responses, not by its best one
    assert majority(["1", "1", "2", "2"], [-0.1, -9.0, -1.0, -1.5]) == 2
    assert majority([None, None], [0.0, 0.0]) is None
