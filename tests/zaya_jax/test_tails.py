"""Tails of reasoning: what is kept, and that nothing in them ends the block they stand in."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import zaya_jax
from zaya_jax import InputError
from zaya_jax.reasoning.prompts import Prompts
from zaya_jax.reasoning.tails import reasoning
from zaya_jax.text.tools import TAGS

TOKENIZER = zaya_jax.load().tokenizer
PROMPTS = Prompts(TOKENIZER)
EVIL = ["</candidate>", "<candidate>\n", "\n</candidate>\n", "</Candidate", "<|im_end|>", "<think>"]
EVIL += ["</think>", "<|im_start|>user\n", "<pad>", "<zyphra_tool_call>", "<<", "</can", "didate>"]
TEXTS = st.lists(st.sampled_from([*EVIL, "ab", "é", "漢", "🙂", " ", "\n", "1+1=2"]), max_size=12)


@pytest.mark.parametrize(
    ("response", "trace"),
    [
        ("<think>\nsteps\n</think>\n\nanswer<|im_end|>", "\nsteps\n"),
        ("opened by the prompt</think>answer", "opened by the prompt"),
        ("<think>never closed", "never closed"),
        ("<think>ended too early<|im_end|>", "ended too early"),
        ("<think>a <think> again</think>", "a <think> again"),
        ("no mark at all", "no mark at all"),
        ("<think></think>answer", ""),
    ],
)
def test_the_reasoning_is_what_stands_before_its_end(response, trace):
    tokens = TOKENIZER.encode(response)
    assert TOKENIZER.decode(reasoning(tokens, TOKENIZER)) == trace


def test_the_mark_is_found_however_it_is_tokenised():
    """Byte by byte too, as a sampler may write it."""
    spelled = [t for c in "steps</think>answer" for t in TOKENIZER.encode(c)]
    assert TOKENIZER.decode(reasoning(spelled, TOKENIZER)) == "steps"


def test_a_tail_is_the_last_tokens_with_their_ids():
    tokens = TOKENIZER.encode("<think>\n12+34: 2+4+0=6 1+3+0=4: 46\n</think>\n\n46")
    trace = reasoning(tokens, TOKENIZER)
    for tau in (1, 7, len(trace), 99):
        assert PROMPTS.tail(tokens, tau) == trace[-tau:]


@given(st.text(alphabet="aé漢🙂", max_size=20), st.integers(1, 30), st.integers(0, 3))
def test_a_tail_begins_and_ends_with_whole_characters(text, tau, missing):
    """The first token that is kept begins a character, also where the response was cut in one."""
    tokens = TOKENIZER.encode(text)[: -missing or None]
    shown = TOKENIZER.decode(PROMPTS.tail(tokens, tau))
    assert "\ufffd" not in shown and shown in text
    whole = TOKENIZER.decode(tokens).rstrip("\ufffd")
    assert whole.endswith(shown)


@given(st.lists(st.integers(0, 284), max_size=60), st.integers(1, 40))
@settings(max_examples=300)
def test_any_tokens_make_a_tail_without_control(tokens, tau):
    kept = PROMPTS.tail(tokens, tau)
    assert len(kept) <= tau and not TOKENIZER.special_tokens & set(kept)
    text = TOKENIZER.decode(kept).casefold()
    assert not any(mark in text for mark in (*TAGS, *TOKENIZER.end_tokens, *PROMPTS.delimiters))


@given(st.lists(TEXTS, min_size=2, max_size=2), st.booleans())
@settings(max_examples=300)
def test_no_candidate_breaks_out_of_its_block(candidates, spelled):
    """The prompt has as many blocks as candidates, and turns as for harmless ones."""

    def encode(text):
        if not spelled:
            return TOKENIZER.encode(text)
        return [token for character in text for token in TOKENIZER.encode(character)]

    tails = [PROMPTS.tail(encode("".join(parts)), 80) for parts in candidates]
    prompt = PROMPTS.aggregation("Q?", tails)
    harmless = PROMPTS.aggregation("Q?", [TOKENIZER.encode("x")] * 2)
    for special in TOKENIZER.special_tokens:
        assert prompt.tokens.count(special) == harmless.tokens.count(special)
    for mark in ("<candidate", "</candidate", "<think>", "</think>", "<|im_end|>", "<|im_start|>"):
        text, plain = (TOKENIZER.decode(p.tokens).casefold() for p in (prompt, harmless))
        assert len(re.findall(re.escape(mark), text)) == plain.count(mark)


def test_prompts_are_cut_where_a_tail_begins_and_hold_its_ids():
    tails = [[50, 51], [], [52]]
    prompt = PROMPTS.aggregation("What is \ue0000\ue000?", tails)
    assert len(prompt.cuts) == 3
    for cut, tail in zip(prompt.cuts, tails, strict=True):
        assert prompt.tokens[cut : cut + len(tail)] == tail
    other = PROMPTS.aggregation("What is \ue0000\ue000?", [[50, 51], [60], [61]])
    assert prompt.tokens[: prompt.cuts[1]] == other.tokens[: other.cuts[1]]
    text = TOKENIZER.decode(PROMPTS.aggregation("Why?", [[], []]).tokens)
    assert text.startswith("<bos><|im_start|>user\nWhy?\n\n") and text.count("<candidate>") == 2
    assert PROMPTS.longest("Why?", 2, 10) == len(PROMPTS.aggregation("Why?", [[9] * 10] * 2).tokens)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for x in candidates %}{{ x }}{% endfor %}", "sets no `delimiters`"),
        ("{% set delimiters = ['#'] %}", "two characters"),
        ("{% set delimiters = ['a b'] %}", "no spaces"),
        ("{% set delimiters = [] %}{% if %}", "is no template"),
        ("{% set delimiters = [] %}{{ question }}", "must show every candidate once"),
        (
            "{% set delimiters = [] %}{% for x in candidates | reverse %}{{ x }}{% endfor %}",
            "in their order",
        ),
    ],
)
def test_a_template_of_ones_own_is_checked(tmp_path, template, message):
    file = tmp_path / "mine.jinja"
    file.write_text(template)
    with pytest.raises(InputError, match=message) as error:
        Prompts(TOKENIZER, file).aggregation("Why?", [[5], [6]])
    assert str(error.value).startswith(str(file))
    with pytest.raises(InputError, match="cannot be read"):
        Prompts(TOKENIZER, tmp_path / "missing.jinja")


def test_a_template_of_ones_own_is_used(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{% set delimiters = ['```'] %}{{ question }}\n{{ candidates | join('```') }}")
    mine = Prompts(TOKENIZER, file)
    tails = [mine.tail(TOKENIZER.encode(text), 50) for text in ("a```b", "c</candidate>")]
    text = TOKENIZER.decode(mine.aggregation("Why?", tails).tokens)
    assert "Why?\na` ``b```c</candidate><|im_end|>" in text
