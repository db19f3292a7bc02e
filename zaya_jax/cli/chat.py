"""`zaya chat`: a conversation in the terminal."""

import contextlib
import dataclasses
import datetime
import io
import json
import re
import select
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from rich.text import Text

from zaya_jax.cli.output import check_destination, console, load_model, messages, streaming
from zaya_jax.errors import InputError, ZayaError
from zaya_jax.generation.rows import Generation, OnText
from zaya_jax.generation.sampling import Sampling
from zaya_jax.generation.session import Session
from zaya_jax.text.tools import END_THINK, THINK, ToolCall, ToolCallParser, check_tools

HELP = """\
/reset      begin a new conversation
/tool TEXT  give the result of a tool call
/help       show this
/exit       leave, as Ctrl-D does
Ctrl-C stops an answer. A message that begins with a slash needs a space before it."""


@dataclasses.dataclass
class Chat:
    """Talk with a model (by default the embedded one).

    Reads from standard input, where it is no terminal, one message a line.
    """

    model: str | None = None
    """Checkpoint folder or Hugging Face hub id."""
    system: str | None = None
    """The system message."""
    no_thinking: bool = False
    """Ask for answers without reasoning."""
    hide_thinking: bool = False
    """Do not show the reasoning."""
    tools: Path | None = None
    """A JSON file with a list of functions that the model may call. You give their results."""
    history: Path | None = None
    """Append the conversation to this file, a JSON object a line, and offer the messages that are
    already in it with the up key. By default nothing is kept."""
    max_new_tokens: int = 2048
    """Longest answer, reasoning included."""
    temperature: float = 1.0
    """0 takes the most probable token."""
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A string that ends the answer; may be given several times."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the parameters; by default that of the checkpoint."""

    def run(self) -> None:
        check_destination(self.history)
        sampling = Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            stop=self.stop,
        )
        tools = [] if self.tools is None else _read_tools(self.tools)
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if interactive:
            _edit_lines(self.history)
        elif isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # refused later, in one line
        session = Session(
            load_model(self.model, self.dtype).engine,
            tools=tools,
            enable_thinking=not self.no_thinking,
            system=self.system,
        )
        conversation = _Conversation(session, sampling, self.hide_thinking, _History(self.history))
        conversation.run(interactive)


class _Conversation:
    """Takes what the user types: messages and commands."""

    def __init__(
        self, session: Session, sampling: Sampling, hide_thinking: bool, history: "_History"
    ):
        self.session, self.sampling, self.history = session, sampling, history
        self.hide_thinking = hide_thinking
        self.calls = 0  # of the last answer, which have no result yet

    def run(self, interactive: bool) -> None:
        """Until the end of the input; KeyboardInterrupt on the second Ctrl-C in a row."""
        warned = not interactive
        if interactive:
            _say("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        while True:
            try:
                text = _read_message(interactive)
            except EOFError:
                if interactive:
                    _say("")
                return
            except KeyboardInterrupt:
                if warned:
                    raise
                _say("\nCtrl-C again leaves, as Ctrl-D does")
                warned = True
                continue
            warned = not interactive
            if text == "/exit":
                return
            if text.startswith("/"):
                self._command(*text.split(maxsplit=1))
            elif text:
                self._send(text.strip())

    def _command(self, name: str, text: str = "") -> None:
        match name:
            case "/help":
                _say(HELP)
            case "/reset":
                self.session.reset()
                self.history.begin()
                self.calls = 0
                _say("a new conversation begins")
            case "/tool":
                self._give_result(text)
            case _:
                _say(f"{name} is no command; /help lists them")

    def _give_result(self, text: str) -> None:
        """Results of several calls are collected; the last one lets the model go on."""
        if not text:
            _say("give a result, as in: /tool 21 degrees")
        elif self.calls == 0:
            _say("no tool call waits for a result")
        elif self.calls == 1:
            self._send(text, role="tool")
        else:
            self.session.messages.append({"role": "tool", "content": text})
            self.calls -= 1
            _say(_wanted(self.calls))

    def _send(self, text: str, role: str = "user") -> None:
        start = time.perf_counter()
        try:
            with streaming("Thinking") as write:
                printer = _Printer(self.session.tools, write, self.hide_thinking)
                result = self.session.send(text, self.sampling, printer.feed, role=role)
                printer.finish()
            self._report(result, time.perf_counter() - start)
        except (ZayaError, jax.errors.JaxRuntimeError) as error:
            _complain(str(error).partition("\n")[0])
        except KeyboardInterrupt:
            _say("stopped")

    def _report(self, result: Generation, seconds: float) -> None:
        if result.error is not None:
            _complain(result.error)
            return
        reasons = {
            "length": f"cut at --max-new-tokens {self.sampling.max_new_tokens}",
            "context": "the context is full, /reset begins a new conversation",
            "interrupted": "stopped",
        }
        count = len(result.tokens)
        speed = f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s"
        reused = f"{self.session.reused} prompt tokens reused"
        _say("; ".join(filter(None, (reasons.get(result.finish_reason), speed, reused))))
        self.calls = len(self.session.messages[-1].get("tool_calls", ()))
        if self.calls:
            _say(_wanted(self.calls))
        self.history.add(self.session.messages)


class _Printer:
    """Prints an answer as it comes: reasoning dim or not at all, calls as `name(arguments)`."""

    def __init__(self, tools: Sequence[dict[str, Any]], write: OnText, hide_thinking: bool):
        self.parser, self.hide_thinking = ToolCallParser(tools), hide_thinking
        self.write = write
        self.thinking = False
        self.last = ""  # what was shown last

    def feed(self, piece: str) -> None:
        self._print(self.parser.feed(piece))

    def finish(self) -> None:
        self._print(self.parser.finish())

    def _print(self, events: list[str | ToolCall]) -> None:
        for event in events:
            if isinstance(event, ToolCall):
                line_break = "\n" if self.last and not self.last.endswith("\n") else ""
                self._show(line_break + _as_line(event))
                continue
            for part in re.split(f"({THINK}|{END_THINK})", event):
                self.thinking |= part == THINK
                self._show_text(part)
                self.thinking &= part != END_THINK

    def _show_text(self, text: str) -> None:
        if self.thinking and self.hide_thinking:
            return
        if not self.last:
            text = text.lstrip()
        if self.thinking and console.is_terminal:
            self.write(0, "")
            console.print(Text(text, style="dim"), end="", soft_wrap=True)
            self.last = text or self.last
        else:
            self._show(text)

    def _show(self, text: str) -> None:
        if text:
            self.write(0, text)
            self.last = text


class _History:
    """Appends messages to a file, if there is one, each with the time its conversation began."""

    def __init__(self, file: Path | None):
        self.file = file
        self.begin()

    def begin(self) -> None:
        self.conversation = datetime.datetime.now().astimezone().isoformat(timespec="microseconds")
        self.written = 0

    def add(self, conversation: list[dict[str, Any]]) -> None:
        """Appends what is new in the conversation."""
        if self.file is None:
            return
        rows = [{"conversation": self.conversation, **m} for m in conversation[self.written :]]
        try:
            with self.file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            raise ZayaError(f"{self.file}: cannot be written ({error.strerror})") from None
        self.written = len(conversation)


def _say(text: str, style: str = "dim") -> None:
    messages.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _complain(error: str) -> None:
    _say(f"zaya: {error}", style="red")


def _wanted(calls: int) -> str:
    return f"/tool TEXT gives a result; {calls} wanted"


def _as_line(call: ToolCall) -> str:
    values = (f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in call.arguments.items())
    return f"{call.name}({', '.join(values)})"


def _read_message(interactive: bool) -> str:
    """A line; on a terminal also those pasted with it."""
    if not interactive:
        return input().rstrip()
    lines = [input("> ")]
    with contextlib.suppress(EOFError):
        while select.select([sys.stdin], [], [], 0.05)[0]:
            lines.append(input())
    return "\n".join(lines).rstrip()


def _edit_lines(history: Path | None) -> None:
    """Line editing, with what the user wrote before in reach of the up key."""
    try:
        import readline
    except ImportError:  # not everywhere
        return
    readline.parse_and_bind("set enable-bracketed-paste on")
    if history is None or not history.exists():
        return
    try:
        with history.open(encoding="utf-8") as lines:
            for message in map(json.loads, lines):
                if message["role"] == "user":
                    readline.add_history(message["content"])
    except OSError as error:
        raise ZayaError(f"{history}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise ZayaError(f"{history}: not a history of zaya chat") from None


def _read_tools(file: Path) -> list[dict[str, Any]]:
    try:
        return check_tools(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON ({error})") from None
