"""Tokenizer, chat template, reasoning, and text that streams in whole characters."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from zaya_jax import CheckpointError, InputError, ZayaConfig
from zaya_jax.text.chat import ChatTemplate, split_thinking
from zaya_jax.text.tokenizer import TextStream, Tokenizer

SPECIAL = ["<pad>", "<bos>", "<|im_end|>", "<|im_start|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte tokenizer whose post-processor would add tokens, as the real one does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    core = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <|im_end|>", special_tokens=[("<bos>", 1), ("<|im_end|>", 2)]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    core.save(str(folder / "tokenizer.json"))
    return folder


CONFIG = ZayaConfig(vocab_size=300, num_hidden_layers=1, bos_token_id=1, eos_token_ids=(2,))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_folder(folder, CONFIG)


@given(text=st.text())
def test_text_round_trips_without_added_tokens(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and (text or ids == [])


def test_rendered_prompts_are_encoded_as_they_stand(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\n"}]
    text = (
        "<bos><|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.template.render(messages) == text
    ids = tokenizer.encode_chat(messages)
    assert ids[:2] == [1, 3] and ids.count(1) == 1 and ids[-1] != 2
    assert tokenizer.decode(ids) == text
    quiet = tokenizer.template.render(messages, enable_thinking=False)
    assert quiet == text + "<think>\n</think>\n\n"


def test_the_checkpoints_own_template_wins(folder, tmp_path):
    config = {"chat_template": "old {{ messages[0].content }}"}
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    messages = [{"role": "user", "content": "x"}]
    assert Tokenizer.from_folder(tmp_path, CONFIG).template.render(messages) == "old x"
    (tmp_path / "chat_template.jinja").write_text("new {{ messages[0].content | tojson }}")
    loaded = Tokenizer.from_folder(tmp_path, CONFIG)
    assert loaded.template.render(messages) == 'new "x"'
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert loaded.files[name] == (tmp_path / name).read_bytes()


def test_a_template_sees_what_transformers_gives_it(folder, tmp_path):
    """Named templates, special tokens, JSON options, dates, and marked assistant text."""
    source = (
        "{{ bos_token }}{{ eos_token }}{{ pad_token }} {% generation %}x{% endgeneration %} "
        "{{ messages | tojson(separators=(',', ':'), ensure_ascii=True) }} {{ strftime_now('%Y') }}"
    )
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": source}]
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    text = Tokenizer.from_folder(tmp_path, CONFIG).template.render([{"role": "a", "content": "é"}])
    assert text.startswith('<bos><|im_end|><pad> x [{"role":"a","content":"\\u00e9"}] 20')


def test_a_template_cannot_reach_python():
    template = ChatTemplate("{{ messages.__class__.__mro__ }}", {})
    with pytest.raises(InputError, match="chat template refuses"):
        template.render([{"role": "user", "content": "x"}])


def test_truncation_and_padding_of_the_tokenizer_file_are_off(folder, tmp_path):
    core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.enable_truncation(5)
    core.enable_padding(length=12)
    core.save(str(tmp_path / "tokenizer.json"))
    text = "longer than five"
    assert len(Tokenizer.from_folder(tmp_path, CONFIG).encode(text)) == len(text)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        (["hi"], "message 0 is not an object with a role"),
        ([{"content": "hi"}], "message 0 is not an object with a role"),
        ([{"role": "user", "content": "a"}, {"role": "user"}], "message 1 has no text content"),
    ],
)
def test_bad_messages_are_named(messages, message):
    with pytest.raises(InputError, match=message):
        ChatTemplate(None, {}).render(messages)


@pytest.mark.parametrize("source", ["{{ raise_exception('no system role') }}", "{{ 1 / 0 }}"])
def test_a_template_that_refuses_is_named(source):
    with pytest.raises(InputError, match=r"refuses these messages: (no system role|division)"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


def test_a_tokenizer_larger_than_the_model_is_refused(folder):
    small = ZayaConfig(vocab_size=100, num_hidden_layers=1, bos_token_id=1, eos_token_ids=(2,))
    with pytest.raises(CheckpointError, match="260 tokens, more than the model's vocab_size 100"):
        Tokenizer.from_folder(folder, small)


@pytest.mark.parametrize(
    ("response", "thinking", "answer"),
    [
        ("<think>\na + b\n</think>\n\n7", "a + b", "7"),
        ("a + b\n</think>\n\n7", "a + b", "7"),  # the prompt opened the block
        ("<think>\nnot done", "not done", ""),
        ("7", "", "7"),
        ("<think>\n</think>\n\n7", "", "7"),
        ("<think>x</think>y</think>z", "x", "y</think>z"),
        ("", "", ""),
    ],
)
def test_reasoning_is_split_from_the_answer(response, thinking, answer):
    assert split_thinking(response) == (thinking, answer)


@given(text=st.text(min_size=1), stop=st.text(min_size=1, max_size=3))
def test_streams_give_whole_characters_and_never_a_stop_string(tokenizer, text, stop):
    stream, pieces = tokenizer.stream([stop]), []
    for token in tokenizer.encode(text):
        stopped = stream.add(token)
        pieces.append(stream.take(final=stopped))
        assert "\ufffd" not in pieces[-1] or "\ufffd" in text
        if stopped:
            break
    pieces.append(stream.take(final=True))
    assert "".join(pieces) == stream.text == text.partition(stop)[0]


def test_a_cut_character_shows_at_the_end_only(tokenizer):
    stream = tokenizer.stream()
    for token in tokenizer.encode("a€")[:-1]:
        stream.add(token)
    assert stream.take() == "a"
    assert stream.take(final=True) == "\ufffd"


def test_bytes_that_form_no_character_do_not_end_a_stream():
    """In the byte-fallback form of Gemma's tokenizer, whose stream decoder gives up on them."""
    pieces = ["<0x0A>", "<0xF0>", "a", "<0xE2>", "<0x82>", "<0xAC>", "▁b"]
    core = tokenizers.Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True)
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence(steps)
    for tokens, wanted in (([0, 1, 2, 6], "a b"), ([2, 3, 4, 5, 6], "a€ b"), ([1, 1, 2, 2], "aa")):
        stream = TextStream(core, ())
        for token in tokens:
            stream.add(token)
        stream.take(final=True)
        assert stream.text.replace("\ufffd", "").strip() == wanted
