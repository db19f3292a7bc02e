"""Conversations: what is read once is not read again, and what the terminal makes of them."""

import io
import itertools
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import zaya_jax
from zaya_jax import Engine, Generation, InputError, Interrupted, Sampling
from zaya_jax.cli import chat
from zaya_jax.cli.main import main
from zaya_jax.generation.rows import Prefix
from zaya_jax.generation.session import Session
from zaya_jax.loading import NANO
from zaya_jax.text.chat import ChatTemplate
from zaya_jax.text.tokenizer import Tokenizer

# One bucket for everything: prompts in chunks of 16, room for the whole context.
GREEDY = Sampling(max_new_tokens=1024, temperature=0)
HOT = Sampling(max_new_tokens=1024, temperature=5.0, top_p=1, stop_tokens=range(3, 40))
QUESTIONS = [
    f"Spell this word backward (example: sun -> nus): {word}"
    for word in ("garden", "ocean", "learning")
]
# Drops earlier reasoning and opens that of the next answer, as many templates do.
FORGETFUL = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content.split("</think>")[-1] }}<|im_end|>
{% endfor %}<|im_start|>assistant
{{ "<think>\\n" }}"""


def with_template(tokenizer, source):
    names = {"bos_token": "<bos>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    return Tokenizer(tokenizer._core, ChatTemplate(source, names), {})


@pytest.fixture(scope="module")
def nano():
    return zaya_jax.load(dtype="float32")


@pytest.fixture
def engine(nano, monkeypatch):
    monkeypatch.setattr("zaya_jax.generation.engine.MAX_CHUNK", 16)
    return nano.engine


def check_turn(session, question, sampling=GREEDY):
    """The session's answer is the one to its whole prompt, read from the beginning. Returns the
    prompt and the answer."""
    messages = [*session.messages, {"role": "user", "content": question}]
    prompt = session.engine.tokenizer.encode_chat(messages, enable_thinking=session.enable_thinking)
    result = session.send(question, sampling)
    (wanted,) = session.engine.run([prompt], sampling)
    assert result.tokens == wanted.tokens and result.end is None
    np.testing.assert_allclose(result.logprobs, wanted.logprobs, atol=1e-3)
    return prompt, result


@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "hot"])
@pytest.mark.parametrize(
    ("template", "enable_thinking"),
    [
        pytest.param(None, True, id="reasoning"),
        pytest.param(None, False, id="no reasoning"),
        pytest.param(FORGETFUL, True, id="reasoning that is dropped"),
    ],
)
def test_answers_from_kept_state_equal_those_from_scratch(
    nano, engine, template, enable_thinking, sampling
):
    """Hot answers are babble, which is encoded to other tokens than those it was sampled as."""
    engine = Engine(nano.params, nano.config, with_template(nano.tokenizer, template))
    session = Session(engine, enable_thinking=enable_thinking)
    read = 0
    for question in QUESTIONS:
        prompt, _ = check_turn(session, question, sampling)
        assert session.reused >= read and len(session._marks) <= 2
        read = len(prompt) - 6  # all but what the template may put before an answer
    assert session.reused > 0


def test_an_answer_that_is_encoded_as_it_was_sampled_is_not_read_again(engine):
    session = Session(engine)
    prompt, result = check_turn(session, QUESTIONS[0])
    assert result.finish_reason == "stop" and session.reused == 0
    check_turn(session, QUESTIONS[1])
    assert session.reused == len(prompt) + len(result.tokens) - 1


def test_reset_forgets_all_but_the_system_message(engine):
    session = Session(engine, system="Be brief.")
    first = session.send(QUESTIONS[0], GREEDY)
    session.send(QUESTIONS[1], GREEDY)
    session.reset()
    assert session.messages == [{"role": "system", "content": "Be brief."}]
    assert session.send(QUESTIONS[0], GREEDY).tokens == first.tokens and session.reused == 0


def test_an_interrupted_answer_is_kept_as_far_as_it_came(engine):
    session = Session(engine)
    pieces = []

    def stop_at_second(piece):
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    result = session.send(QUESTIONS[0], GREEDY, stop_at_second)
    assert result.finish_reason == "interrupted" and result.text == "".join(pieces)
    assert session.messages[-1] == {"role": "assistant", "content": result.text}
    check_turn(session, QUESTIONS[1])
    assert session.reused > 0


def test_a_message_without_room_is_refused_and_leaves_the_session_as_it_was(engine):
    session = Session(engine)
    session.send(QUESTIONS[0], GREEDY)
    before = list(session.messages)
    with pytest.raises(InputError, match="tokens, which leaves no room in the context of 1024"):
        session.send("x" * 1100, GREEDY)
    assert session.messages == before
    check_turn(session, QUESTIONS[1])
    assert session.reused > 0


def test_a_session_needs_a_tokenizer(nano):
    with pytest.raises(InputError, match="needs a tokenizer"):
        Session(Engine(nano.params, nano.config))


class Scripted:
    """An engine whose model has learned its answers by heart; one may be an exception."""

    def __init__(self, nano, *answers, template=None):
        self.config = nano.config
        self.tokenizer = with_template(nano.tokenizer, template)
        self.answers, self.prompts = list(answers), []

    def read(self, tokens, capacity, prefix=None):
        return Prefix(tokens, SimpleNamespace(resize=lambda capacity: None), None, [])

    def run(self, prompts, sampling, on_text, *, prefix, keep):
        self.prompts.append(self.tokenizer.decode(prompts[0]))
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, Generation):
            return [answer]
        for start in range(0, len(answer), 3):
            on_text(0, answer[start : start + 3])
        return [generation(answer, "stop")]


def generation(text, finish, error=None):
    tokens = list(text.encode())
    return Generation(text, tokens, [], [], np.zeros((0, 1), np.uint8), finish, error)


def call(**arguments):
    values = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
    return f"<zyphra_tool_call>\n<function=look>\n{values}</function>\n</zyphra_tool_call>"


TOOLS = [{"name": "look", "parameters": {"properties": {"city": {"type": "string"}}}}]


def test_a_message_without_an_answer_is_taken_back(nano):
    nan = generation("ab", "nan", "the logits hold NaN")
    nothing = Interrupted([generation("", "interrupted")])
    session = Session(Scripted(nano, nan, nothing, "Yes."))
    assert session.send("a", GREEDY).error == "the logits hold NaN" and session.messages == []
    with pytest.raises(KeyboardInterrupt):
        session.send("b", GREEDY)
    session.send("c", GREEDY)
    assert [message["content"] for message in session.messages] == ["c", "Yes."]


def test_reasoning_that_the_prompt_opens_is_part_of_the_answer(nano):
    session, pieces = Session(Scripted(nano, "Hm.\n</think>\n\nYes.", template=FORGETFUL)), []
    session.send("a", GREEDY, pieces.append)
    assert "".join(pieces) == "<think>\nHm.\n</think>\n\nYes." == session.messages[-1]["content"]


def test_calls_are_rendered_again_as_the_model_wrote_them(nano):
    text = f"<think>\nHm.\n</think>\n{call(city='Rome')}"
    session = Session(Scripted(nano, text, "Warm."), tools=TOOLS)
    session.send("How is Rome?", GREEDY)
    function = {"name": "look", "arguments": {"city": "Rome"}}
    assert session.messages[-1] == {
        "role": "assistant",
        "content": "<think>\nHm.\n</think>",
        "tool_calls": [{"type": "function", "function": function}],
    }
    session.send("30 degrees", GREEDY, role="tool")
    first, second = session.engine.prompts
    assert second.startswith(first + text) and "30 degrees" in second


# The command


@pytest.fixture
def talk(nano, monkeypatch, capsys):
    """Runs `zaya chat` on lines of input with scripted answers; returns what it printed."""

    def run(lines, *answers, options=()):
        engine = Scripted(nano, *answers)
        monkeypatch.setattr(chat, "load_model", lambda *_: SimpleNamespace(engine=engine))
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        main(["chat", *options])
        shown = capsys.readouterr()
        return SimpleNamespace(out=shown.out, err=shown.err, prompts=engine.prompts)

    return run


def test_lines_are_answered_until_the_input_ends(talk):
    shown = talk(["one", "", " /two", "three"], "1", "2", "3", options=["--system", "Count."])
    assert shown.out == "1\n2\n3\n"
    assert "Count." in shown.prompts[0] and "user\n/two<|im_end|>" in shown.prompts[1]
    assert "prompt tokens reused" in shown.err


def test_commands(talk):
    lines = ["My name is Bob.", "/reset", "/help", "/teleport home", "Who am I?", "/exit", "more"]
    shown = talk(lines, "Hi Bob.", "Who knows?")
    assert shown.out == "Hi Bob.\nWho knows?\n"
    assert "Bob" in shown.prompts[0] and "Bob" not in shown.prompts[1]
    assert chat.HELP in shown.err and "a new conversation begins" in shown.err
    assert "/teleport is no command; /help lists them" in shown.err.splitlines()


def test_errors_are_one_line_and_the_conversation_goes_on(talk):
    nan = generation("", "nan", "prompt 0: the logits for position 9 hold NaN")
    shown = talk(["x" * 1100, "\udcff", "a", "b"], nan, "Still here.")
    errors = [line for line in shown.err.splitlines() if line.startswith("zaya: ")]
    assert "leaves no room in the context of 1024" in errors[0]
    assert errors[1:] == ["zaya: the prompt is no valid Unicode text", f"zaya: {nan.error}"]
    assert shown.out.strip() == "Still here."


def test_reasoning_can_be_hidden(talk):
    answer = "<think>\nHm <b>.\n</think>\n\nYes :smile:\t[x]"
    assert talk(["a"], answer).out == f"{answer}\n"
    hidden = talk(["a"], answer, options=["--hide-thinking"])
    assert hidden.out == "Yes :smile:\t[x]\n" and "Thinking" in hidden.err
    assert talk(["a"], "<think>\nHm", options=["--hide-thinking"]).out == "\n"


def test_tool_calls_are_shown_and_their_results_sent_together(talk, tmp_path):
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(TOOLS))
    answer = f"Look:\n{call(city='Rome', days='2')}\n{call(city='Oslo')}"
    lines = ["/tool early", "Weather?", "/tool", "/tool 30 degrees", '/tool {"degrees": 5}']
    shown = talk(lines, answer, "Warm and cold.", options=["--tools", str(file)])
    assert shown.out == 'Look:\nlook(city="Rome", days=2)\nlook(city="Oslo")\nWarm and cold.\n'
    assert "no tool call waits" in shown.err and "give a result" in shown.err
    assert "2 wanted" in shown.err and "1 wanted" in shown.err
    assert len(shown.prompts) == 2
    assert "30 degrees" in shown.prompts[1] and '{"degrees": 5}' in shown.prompts[1]


def test_the_history_grows_by_a_line_a_message(talk, tmp_path):
    file = tmp_path / "history.jsonl"
    talk(["a\u2028b", "c", "/reset", "d"], "1", "2", "3", options=["--history", str(file)])
    talk(["e"], "4", options=["--history", str(file)])
    rows = [json.loads(line) for line in file.open(encoding="utf-8")]
    assert [row["content"] for row in rows] == ["a\u2028b", "1", "c", "2", "d", "3", "e", "4"]
    conversations = itertools.groupby(rows, key=lambda row: row["conversation"])
    assert [len(list(group)) for _, group in conversations] == [4, 2, 2]


def test_bad_files_are_named_before_the_model_is_loaded(talk, capsys, tmp_path):
    broken, empty = tmp_path / "broken.json", tmp_path / "empty.json"
    broken.write_text("[")
    empty.write_text("{}")
    for options, message in [
        (["--tools", str(tmp_path / "none.json")], "none.json: cannot be read"),
        (["--tools", str(broken)], "broken.json: not valid JSON"),
        (["--tools", str(empty)], "empty.json: tools are not a list"),
        (["--history", str(tmp_path)], "cannot be written"),
        (["--temperature", "-1"], "temperature is out of range"),
    ]:
        with pytest.raises(SystemExit) as error:
            talk(["a"], options=options)
        assert error.value.code == 2 and message in capsys.readouterr().err


class Terminal:
    """A program at a terminal of its own."""

    def __init__(self, *command):
        self.ours, theirs = pty.openpty()
        ends = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
        self.process = subprocess.Popen(command, env=environment, **ends)
        os.close(theirs)
        self.shown = b""

    def type(self, text):
        os.write(self.ours, text.encode())

    def wait_for(self, text, seconds=60.0):
        """Reads on until behind the text; what came before it, or None if it does not come."""
        end = time.monotonic() + seconds
        while text.encode() not in self.shown:
            if time.monotonic() > end or not self._read(0.1):
                return None
        before, _, self.shown = self.shown.partition(text.encode())
        return before.decode(errors="replace")

    def _read(self, seconds):
        """False once the program has left."""
        if select.select([self.ours], [], [], seconds)[0]:
            try:
                self.shown += os.read(self.ours, 65536)
            except OSError:
                return False
        return True

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)


def test_ctrl_c_stops_the_answer_and_then_the_program(tmp_path):
    """Of a model that never stops by itself. What is pasted is one message."""
    folder, history = tmp_path / "endless", tmp_path / "history.jsonl"
    shutil.copytree(NANO, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 319}))
    zaya = Path(sys.executable).with_name("zaya")
    options = ["--model", folder, "--dtype", "float32", "--temperature", "0", "--history", history]
    terminal = Terminal(zaya, "chat", *options)
    try:
        for message, reasons in {"What is\n3 + 4?\n": True, "What is 5 + 6?\n": False}.items():
            assert terminal.wait_for("> ") is not None
            terminal.type(message)
            answer = terminal.wait_for("<|im_end|>")  # behind it, it goes on
            assert answer is not None and (not reasons or "\x1b[2m<think>" in answer)
            terminal.interrupt()
            assert terminal.wait_for("stopped") is not None
        assert terminal.wait_for("> ") is not None
        for _ in range(50):  # an interrupt between prompt and input waits for the next one
            terminal.interrupt()
            if terminal.wait_for("Ctrl-C again leaves", 1) is not None:
                break
        else:
            pytest.fail("no hint")
        while terminal.process.poll() is None:
            terminal.interrupt()
            terminal.wait_for("never shown", 1)
        assert terminal.process.returncode == 130 and b"Traceback" not in terminal.shown
    finally:
        terminal.process.kill()
        os.close(terminal.ours)
    rows = [json.loads(line) for line in history.open()]
    assert [row["role"] for row in rows] == ["user", "assistant"] * 2
    assert [rows[0]["content"], rows[2]["content"]] == ["What is\n3 + 4?", "What is 5 + 6?"]
