"""Records as tokens: what is learned, and with what weight."""

import dataclasses

import pytest
from sources import BOS, EOS, MODEL, TOKENIZER, conversation

from train.data.examples import Encoder
from train.data.records import BadRecord
from zaya_jax import ConfigError
from zaya_jax.text.chat import ChatTemplate
from zaya_jax.text.tokenizer import Tokenizer

NO_BOS = dataclasses.replace(MODEL, bos_token_id=None)
# Reasoning of a turn goes when others follow, and the prompt opens the block.
FORGETFUL = """{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role != "assistant" %}{{ m.content }}{% elif loop.last %}<think>{{ m.content }}{% else %}\
<think>{{ m.content.split("</think>")[-1] }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>{% endif %}"""


def encode(fields, length=1000, on_long=None, model=MODEL, tokenizer=TOKENIZER):
    format = "chat" if "messages" in fields else "text"
    on_long = on_long or ("trim" if format == "chat" else "split")
    return Encoder.of(tokenizer, model, format, length, on_long).examples(fields)


def learned(example) -> list[str]:
    return [TOKENIZER.decode(example.tokens[s.start : s.end]) for s in example.spans]


def test_a_document_is_learned_whole_between_its_marks():
    [example] = encode({"text": "Grüße\n"})
    assert example.tokens == [BOS, *TOKENIZER.encode("Grüße\n"), EOS]
    assert example.spans == [(0, len(example.tokens), 1.0)] and example.bytes == 8
    [example] = encode({"text": "Grüße\n", "weight": 0.5}, model=NO_BOS)
    assert example.tokens == [*TOKENIZER.encode("Grüße\n"), EOS]
    assert example.spans[0].weight == 0.5
    assert example.bytes == 7  # nothing predicts the first token


def test_a_long_document_becomes_consecutive_pieces():
    text = "Grüße, 三🦓 " * 9
    pieces = encode({"text": text}, length=16)
    assert [t for p in pieces for t in p.tokens] == [BOS, *TOKENIZER.encode(text), EOS]
    assert all(len(p.tokens) == 16 for p in pieces[:-1]) and 0 < len(pieces[-1].tokens) <= 16
    whole = len(text.encode())
    # One token in each later piece is not predicted; a byte is at most a character's four.
    assert whole - 4 * len(pieces) <= sum(p.bytes for p in pieces) < whole
    with pytest.raises(BadRecord, match=r"\d+ tokens, more than the 16"):
        encode({"text": text}, length=16, on_long="skip")


def test_exactly_the_assistants_turns_are_learned():
    fields = conversation("Q1", "<think>\nR\n</think>\n\nA1", "Q2", "A <|im_end|> B", system="S")
    [example] = encode(fields)
    text = TOKENIZER.template.render(fields["messages"], add_generation_prompt=False)
    assert TOKENIZER.decode(example.tokens) == text
    turns = ["<think>\nR\n</think>\n\nA1<|im_end|>", "A <|im_end|> B<|im_end|>"]
    assert learned(example) == turns
    assert example.bytes == sum(len(turn) for turn in turns) - 2 * len("<|im_end|>")
    assert {span.weight for span in example.spans} == {1.0}


def test_prompts_are_tokenised_as_generation_does():
    """The response begins with a line break, as the prompt ends: no token may join them."""
    fields = conversation("Q", "\n\nA")
    [example] = encode(fields)
    prompt = TOKENIZER.encode_chat(fields["messages"][:1])
    assert example.tokens[: len(prompt)] == prompt and example.spans[0].start == len(prompt)


def test_a_turn_can_be_left_out_and_a_record_weighted():
    fields = conversation("Q1", "A1", "Q2", "A2", weight=3)
    fields["messages"][1]["train"] = False
    [example] = encode(fields)
    assert learned(example) == ["A2<|im_end|>"] and example.spans[0].weight == 3.0


@pytest.mark.parametrize("fields", [{"text": "x"}, conversation("Q", "A")])
def test_nothing_is_learned_of_a_record_without_weight(fields):
    [example] = encode({**fields, "weight": 0})
    assert len(example.tokens) > 2 and example.spans == [] and example.bytes == 0


def test_tool_results_are_context_and_calls_are_learned():
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ]
    [example] = encode({"messages": messages, "tools": [{"name": "f"}]})
    first, second = learned(example)
    assert first.startswith("<zyphra_tool_call>\n<function=f>") and first.endswith("<|im_end|>")
    assert second == "It is 42.<|im_end|>"


def test_a_template_that_forgets_reasoning_still_shows_each_turn():
    template = ChatTemplate(FORGETFUL, TOKENIZER.template.tokens)
    tokenizer = Tokenizer(TOKENIZER._core, template, {})
    fields = conversation("Q1", "R1</think>A1", "Q2", "R2</think>A2")
    [example] = encode(fields, tokenizer=tokenizer)
    assert learned(example) == ["A1<|im_end|>", "R2</think>A2<|im_end|>"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages | length }} {{ messages[-1].content }}", "not rendered after the prompt"),
        ("{% for m in messages %}{{ m.content }}.{% endfor %}", "without an end of turn"),
    ],
)
def test_a_template_that_hides_where_turns_are_is_refused(source, message):
    tokenizer = Tokenizer(TOKENIZER._core, ChatTemplate(source, {}), {})
    with pytest.raises(BadRecord, match=message):
        encode(conversation("Q", "A"), tokenizer=tokenizer)


def test_long_conversations_are_trimmed_or_bad():
    fields = conversation("Q", "<think>" + "r" * 90 + "</think>A")
    [example] = encode(fields, length=60)
    assert len(example.tokens) == 60 and example.outcome == "cut"
    assert learned(example)[0].endswith("r</think>A<|im_end|>")
    with pytest.raises(BadRecord, match="more than the 60"):
        encode(fields, length=60, on_long="skip")
    with pytest.raises(BadRecord, match="without reasoning still more than the 60"):
        encode(conversation("Q", "A" * 90), length=60)


MESSAGES = conversation("Q", "A")["messages"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"txt": "x"}, "no field `text`"),
        ({"text": 3}, "`text` is no string"),
        ({"text": " \n"}, "empty text"),
        ({"text": "\ud800"}, "invalid Unicode"),
        ({"text": "x", "weight": "much"}, "`weight` is no number"),
        ({"text": "x", "weight": True}, "`weight` is no number"),
        ({"text": "x", "weight": -1}, "`weight` must lie in"),
        ({"text": "x", "weight": 10**400}, "`weight` must lie in"),
        ({"messages": None}, "no field `messages`"),
        ({"messages": "Q"}, "`messages` is no list"),
        ({"messages": []}, "empty"),
        ({"messages": ["Q", "A"]}, "message 0 is not an object"),
        ({"messages": [{"role": "user", "content": "Q"}]}, "nothing that is to be learned"),
        ({"messages": [MESSAGES[0], {**MESSAGES[1], "train": False}]}, "nothing that is"),
        ({"messages": [MESSAGES[0], {**MESSAGES[1], "train": "no"}]}, "true or false"),
        ({"messages": [MESSAGES[0], {"role": "assistant", "content": " "}]}, "is empty"),
        ({"messages": [MESSAGES[0], {"role": "assistant", "content": 3}]}, "no text content"),
        ({"messages": [{"role": "user", "content": "\ud800"}, MESSAGES[1]]}, "Unicode"),
        ({"messages": MESSAGES[1:]}, "nothing before it"),
        ({"messages": MESSAGES, "tools": "f"}, "`tools` is no list"),
        ({"messages": MESSAGES, "tools": [{}]}, "tool 0 needs a name"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(fields, reason):
    with pytest.raises(BadRecord, match=reason):
        encode(fields)


def test_a_row_needs_two_tokens():
    with pytest.raises(ConfigError, match="at least 2"):
        encode({"text": "x"}, length=1)
