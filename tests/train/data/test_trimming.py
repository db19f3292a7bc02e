"""Answer-preserving trimming: the four steps, and what holds of every result."""

import json
import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import TOKENIZER, conversation, write_lines
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from train.data.conversations import conversation_pieces, split_reasoning
from train.data.trim_file import trim_file
from train.data.trimming import trim
from zaya_jax import DataError, InputError
from zaya_jax.cli.main import main
from zaya_jax.text.chat import ChatTemplate
from zaya_jax.text.tokenizer import Tokenizer


def merging_tokenizer() -> Tokenizer:
    """Bytes with merges, no token of its own for `</think>`: cuts change their neighbours."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    corpus = ["the cat sat on the mat </think> and then the other cat sat too <think>\n\n"] * 9
    corpus += ["one two three four five six seven </think>\n\nénd énd", "..</ .</ x</ y</ \n</"] * 9
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(t, special=True) for t in ("<|im_end|>", "<|im_start|>")],
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    return Tokenizer(core, ChatTemplate(None, {"bos_token": ""}), {})


TOKENIZERS = {"bytes": TOKENIZER, "merges": merging_tokenizer()}
WORDS = st.sampled_from(
    ["the ", "cat", " sat", "on", "\n", "é", "三", "🦓", ".", "<", "x ", "ones"]
)
PROSE = st.lists(WORDS, max_size=25).map("".join)
NONEMPTY = st.lists(WORDS, min_size=1, max_size=8).map("".join).map(lambda s: "a" + s)


@st.composite
def turns(draw):
    """Of the user and the assistant, most of them with reasoning."""
    result = []
    for _ in range(draw(st.integers(1, 3))):
        answer = draw(NONEMPTY)
        if draw(st.integers(0, 4)):
            answer = f"<think>\n{draw(PROSE)}\n</think>\n\n{answer}"
        result += [draw(NONEMPTY), answer]
    return result


def count(messages, tokenizer) -> int:
    """Tokens of the conversation as it is trained on."""
    return sum(len(tokenizer.encode(p.text)) for p in conversation_pieces(messages, tokenizer))


def answer(message) -> str:
    reasoning = split_reasoning(message["content"])
    text = message["content"] if reasoning is None else reasoning.closing
    return text.removeprefix("</think>").lstrip("\n")


def with_reasoning(messages, size):
    """The last turn's reasoning cut after some characters."""
    reasoning = split_reasoning(messages[-1]["content"])
    content = reasoning.opening + reasoning.text[:size] + reasoning.closing
    return [*messages[:-1], {**messages[-1], "content": content}]


def without_earlier(messages):
    return [
        {**m, "content": answer(m)}
        if m["role"] == "assistant" and m is not messages[-1] and "</think>" in m["content"]
        else m
        for m in messages
    ]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=100)
@given(turns=turns(), less=st.integers(-2, 120))
def test_the_four_steps(name, turns, less):
    tokenizer = TOKENIZERS[name]
    messages = conversation(*turns)["messages"]
    total = count(messages, tokenizer)
    budget = max(1, total - less)
    result = trim(messages, budget, tokenizer)
    assert result.tokens == total
    if result.outcome == "whole":
        assert total <= budget and result.messages == messages
        return
    assert total > budget
    candidates = [messages, without_earlier(messages)]
    last = split_reasoning(messages[-1]["content"])
    sizes = range(len(last.text) + 1) if last else [0]
    fits = [
        [n for n in sizes if count(with_reasoning(c, n) if last else c, tokenizer) <= budget]
        for c in candidates
    ]
    if result.outcome == "dropped":
        assert result.messages is None and result.tokens_kept == 0
        assert not fits[0] or not last  # step 2 could not help
        assert 0 not in fits[1]
        return
    kept = result.messages
    assert result.tokens_kept == count(kept, tokenizer) <= budget
    base = candidates[0] if result.outcome == "cut" else candidates[1]
    if result.outcome == "deleted":
        assert not last or 0 not in fits[0]
    assert kept[:-1] == base[:-1]
    assert kept[-1] == base[-1] if not last else kept[-1]["content"].endswith(last.closing)
    if last:
        remaining = split_reasoning(kept[-1]["content"])
        assert remaining.opening == last.opening and last.text.startswith(remaining.text)
        # As long as possible: no later cut between two tokens fits.
        ends = set(tokenizer.encode_with_ends(last.text)[1])
        fitting = fits[0] if result.outcome == "cut" else fits[1]
        assert len(remaining.text) == max(n for n in fitting if n in ends | {0})
    again = trim(kept, budget, tokenizer)
    assert again.outcome == "whole" and again.messages == kept


def test_a_cut_uses_the_budget_exactly():
    messages = conversation("Q", "<think>\n" + "step " * 100 + "\n</think>\n\nAnswer.")["messages"]
    total = count(messages, TOKENIZER)
    for budget in range(total - 300, total):
        result = trim(messages, budget, TOKENIZER)
        assert (result.outcome, result.tokens_kept) == ("cut", budget)


def test_no_character_is_cut_in_two():
    messages = conversation("Q", "<think>" + "三" * 40 + "</think>A")["messages"]
    total = count(messages, TOKENIZER)
    for budget in range(total - 30, total):
        kept = trim(messages, budget, TOKENIZER)
        assert set(split_reasoning(kept.messages[-1]["content"]).text) == {"三"}
        assert budget - 2 <= kept.tokens_kept <= budget


def test_earlier_reasoning_goes_only_when_cutting_the_last_is_not_enough():
    first, last = "r" * 50, "s" * 20
    messages = conversation(
        "Q", f"<think>\n{first}\n</think>\n\nA", "Q2", f"<think>\n{last}\n</think>\n\nB"
    )["messages"]
    total = count(messages, TOKENIZER)
    reasoning = len(f"\n{last}\n")
    cut = trim(messages, total - reasoning, TOKENIZER)
    assert cut.outcome == "cut" and cut.messages[-1]["content"] == "<think></think>\n\nB"
    deleted = trim(messages, total - reasoning - 1, TOKENIZER)
    assert deleted.outcome == "deleted" and deleted.messages[1]["content"] == "A"
    assert deleted.messages[3] == messages[3]  # the last reasoning fits again, and is kept whole


def test_an_answer_without_reasoning_is_never_cut():
    messages = conversation("Q", "long answer " * 10)["messages"]
    assert trim(messages, count(messages, TOKENIZER) - 1, TOKENIZER).outcome == "dropped"
    unclosed = conversation("Q", "<think>\nnever closed")["messages"]
    assert trim(unclosed, count(unclosed, TOKENIZER) - 1, TOKENIZER).outcome == "dropped"


def test_tool_calls_and_their_results_stay():
    call = {"name": "f", "arguments": {"x": 1}}
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "<think>" + "r" * 90 + "</think>", "tool_calls": [call]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "<think>" + "s" * 90 + "</think>It is 42."},
    ]
    tools = [{"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}}]
    whole = trim(messages, 10_000, TOKENIZER, tools)
    assert whole.tokens > count(messages, TOKENIZER)  # the tools count too
    result = trim(messages, whole.tokens - 150, TOKENIZER, tools)
    assert result.outcome == "deleted"
    assert result.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert result.messages[2] == messages[2]
    assert result.messages[3]["content"].endswith("</think>It is 42.")


def test_malformed_messages_are_refused():
    with pytest.raises(InputError, match="content"):
        trim([{"role": "user", "content": 3}], 10, TOKENIZER)


RECORDS = [
    conversation("Q", "<think>short</think>A", source="é"),
    b'{"messages":[{"role":"user","content":"x"},{"role":"assistant","content":"y"}], "n":1.50}',
    conversation("Q", "<think>" + "r" * 300 + "</think>A", tag=1),
    conversation("Q", "a" * 300),
    {"text": "no conversation"},
    b'{"messages": [',
    b"\xff",
]


def test_a_file_is_trimmed_line_by_line(tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", RECORDS)
    output, report = tmp_path / "out.jsonl", tmp_path / "report.json"
    options = ["--budget", "100", "--max-bad-share", "0.5", "--json", str(report)]
    main(["data", "trim", str(source), str(output), *options])
    lines = output.read_bytes().splitlines()
    assert lines[:2] == source.read_bytes().splitlines()[:2]  # to the byte
    cut = json.loads(lines[2])
    assert cut["tag"] == 1 and cut["messages"][1]["content"].endswith("r</think>A")
    assert count(cut["messages"], TOKENIZER) == 100 and len(lines) == 3
    values = json.loads(report.read_text())
    outcomes = values["outcomes"]
    assert [outcomes[name]["records"] for name in ("whole", "cut", "deleted", "dropped")] == [
        2,
        1,
        0,
        1,
    ]
    assert outcomes["cut"]["tokens_kept"] == 100 < outcomes["cut"]["tokens"]
    assert values["bad"] == 3
    shown = capsys.readouterr()
    assert "kept whole" in shown.out
    for place in ("in.jsonl:5: no field", "in.jsonl:6: invalid JSON", "in.jsonl:7: invalid UTF-8"):
        assert place in shown.err


def test_output_appears_only_when_it_is_complete(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", RECORDS)
    output = tmp_path / "out.jsonl"
    output.write_text("before")
    with pytest.raises(DataError, match=r"3 of 7 records are bad.*max_bad_share.*in\.jsonl:5"):
        trim_file(str(source), output, 100, TOKENIZER, workers=0)
    assert output.read_text() == "before"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in.jsonl", "in.jsonl", "--budget", "9"], "is the source too"),
        (["missing.jsonl", "out.jsonl", "--budget", "9"], "missing.jsonl: no such file"),
        (["in.jsonl", "none/out.jsonl", "--budget", "9"], "cannot be written"),
        (["in.jsonl", ".", "--budget", "9"], "cannot be written"),
        (["in.jsonl", "out.jsonl", "--budget", "0"], "at least 1 token"),
        (["in.jsonl", "out.jsonl", "--budget", "9", "--max-bad-share", "2"], "max_bad_share"),
        (["in.jsonl", "out.jsonl", "--budget", "9", "--model", "none"], "none: no such folder"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "in.jsonl", RECORDS[:1])
    with pytest.raises(SystemExit) as error:
        main(["data", "trim", *arguments])
    assert error.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("zaya: ") and message in line
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_link_to_the_source_is_the_source(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", RECORDS[:1])
    (tmp_path / "link.jsonl").symlink_to(source)
    with pytest.raises(DataError, match="is the source too"):
        trim_file(str(source), tmp_path / "link.jsonl", 100, TOKENIZER)


def test_without_the_extra_it_is_said_what_to_install(monkeypatch, capsys):
    for name in ("fsspec", "train.data.files", "train.data.trim_file"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(SystemExit):
        main(["data", "trim", "in.jsonl", "out.jsonl", "--budget", "9"])
    line = capsys.readouterr().err.strip()
    assert line.endswith("pip install 'zaya-jax[train]' (there is no fsspec)") and "\n" not in line


def test_a_turn_of_nothing_but_reasoning_is_not_emptied():
    """No turn is empty, so that what was trimmed can be read again."""
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>abc</think>"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": f"<think>{'long ' * 50}</think>answer"},
    ]
    shortest = [*messages[:3], {"role": "assistant", "content": "<think></think>answer"}]
    budget = count(shortest, TOKENIZER)
    trimmed = trim(messages, budget, TOKENIZER)
    assert trimmed.messages == shortest
    again = trim(trimmed.messages, budget, TOKENIZER)
    assert (again.outcome, again.messages) == ("whole", trimmed.messages)
    assert trim(messages, budget - 1, TOKENIZER).messages is None


def test_text_that_is_no_unicode_is_a_bad_record(tmp_path, capsys):
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": f"<think>{'long ' * 50}</think>answer"},
    ]
    records = [{"messages": turns}, {"messages": turns, "id": "\ud800"}]
    source, out = tmp_path / "long.jsonl", tmp_path / "short.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["--budget", "60", "--workers", "0", "--max-bad-share", "0.5"]
    main(["data", "trim", str(source), str(out), *arguments])
    assert len(out.read_text().splitlines()) == 1
