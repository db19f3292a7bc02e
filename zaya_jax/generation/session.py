"""A conversation that does not read again what it has read before."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from zaya_jax.errors import InputError
from zaya_jax.generation.batching import bucket
from zaya_jax.generation.engine import Engine
from zaya_jax.generation.rows import Generation, Interrupted, Prefix, fitted
from zaya_jax.generation.sampling import Sampling
from zaya_jax.text.tools import THINK, parse_tool_calls

Message = dict[str, Any]
NEXT_TURN: list[Message] = [
    {"role": "assistant", "content": "x"},
    {"role": "user", "content": "x"},
]


class Session:
    """A conversation with a model, turn by turn.

    Each turn's prompt is rendered from all messages, since templates may change earlier ones (many
    drop their reasoning). Where it begins, token by token, with what the model has read before,
    that is not read again. Two beginnings are kept: all up to the end of the last answer, and as
    much of the last prompt as the next one has too, whatever the template makes of the answer.

    Args:
      engine: of a model with a tokenizer.
      tools: functions that the model may call, as JSON schemas.
      enable_thinking: False asks for answers without reasoning.
      system: the system message.

    Attributes:
      messages: {"role", "content"} each. An assistant message holds what the model wrote, reasoning
        included; its calls of tools are in `tool_calls`, and not in the content.
      reused: tokens of the last prompt that had been read before.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        tools: Sequence[dict[str, Any]] = (),
        enable_thinking: bool = True,
        system: str | None = None,
    ):
        if engine.tokenizer is None:
            raise InputError("a conversation needs a tokenizer, which this checkpoint has not")
        self.engine, self.tools, self.enable_thinking = engine, tools, enable_thinking
        self._tokenizer, self._system = engine.tokenizer, system
        self._nothing = engine.read([], 1)
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the system message."""
        system = {"role": "system", "content": self._system}
        self.messages: list[Message] = [] if self._system is None else [system]
        self.reused = 0
        self._marks: list[Prefix] = []

    def send(
        self,
        text: str,
        sampling: Sampling,
        on_text: Callable[[str], None] | None = None,
        *,
        role: str = "user",
    ) -> Generation:
        """Adds a message and the model's answer to it.

        Ctrl-C ends the answer, which is kept as far as it came. Where there is none (an error, NaN,
        Ctrl-C before the first token), the message is not added either.

        Args:
          text: the message.
          sampling: how to answer it.
          on_text: called with each new piece of the answer, which begins with `<think>` also where
            the prompt has opened the reasoning.
          role: "user", or "tool" for the result of a call.

        Raises:
          InputError: the template refuses the message, or it leaves no room in the context.
          KeyboardInterrupt: on Ctrl-C before the first token.
        """
        messages = [*self.messages, {"role": role, "content": text}]
        rendered = self._render(messages)
        prompt = self._tokenizer.encode(rendered)
        opening = _opening(rendered)
        pieces = iter([opening])

        def give(_: int, piece: str) -> None:
            if on_text is not None:
                on_text(next(pieces, "") + piece)

        start, lasting = self._read(prompt, messages, sampling)
        try:
            (result,) = self.engine.run([prompt], sampling, give, prefix=start, keep=True)
        except Interrupted as interrupted:
            (result,) = interrupted.results
            if not result.tokens:
                raise
        end, result.end = result.end, None
        if result.finish_reason != "nan":
            self.messages = [*messages, self._answer(opening + (result.text or ""))]
            self._marks = [fitted(mark) for mark in (lasting, end) if mark is not None]
        return result

    def _render(self, messages: Sequence[Message]) -> str:
        return self._tokenizer.template.render(
            messages, enable_thinking=self.enable_thinking, tools=self.tools
        )

    def _read(
        self, prompt: list[int], messages: Sequence[Message], sampling: Sampling
    ) -> tuple[Prefix, Prefix]:
        """What has been read of the prompt, and of the part of it that the next one will share."""
        limit = self.engine.config.max_position_embeddings
        if len(prompt) >= limit:
            raise InputError(
                f"the conversation would have {len(prompt)} tokens, which leaves no room in the "
                f"context of {limit}"
            )
        next_prompt = self._tokenizer.encode(self._render([*messages, *NEXT_TURN]))
        shared = _common_prefix(prompt, next_prompt)
        start, lasting = self._last_mark(prompt), self._last_mark(shared)
        self.reused = len(start.tokens)
        if len(start.tokens) < len(shared):
            capacity = bucket(min(len(prompt) + sampling.max_new_tokens, limit), 64)
            start = lasting = self.engine.read(shared, capacity, start)
        return start, lasting

    def _last_mark(self, tokens: list[int]) -> Prefix:
        """The longest mark that the tokens begin with."""
        marks = [self._nothing, *self._marks]
        fitting = [mark for mark in marks if tokens[: len(mark.tokens)] == mark.tokens]
        return max(fitting, key=lambda mark: len(mark.tokens))

    def _answer(self, text: str) -> Message:
        content, calls = parse_tool_calls(text, self.tools)
        if not calls:
            return {"role": "assistant", "content": text}
        functions = [{"name": call.name, "arguments": call.arguments} for call in calls]
        return {
            "role": "assistant",
            "content": content.rstrip(),
            "tool_calls": [{"type": "function", "function": function} for function in functions],
        }


def _opening(prompt: str) -> str:
    """The end of the prompt from `<think>` on, where it opens the reasoning."""
    end = len(prompt.rstrip())
    return prompt[end - len(THINK) :] if prompt[:end].endswith(THINK) else ""


def _common_prefix(a: list[int], b: list[int]) -> list[int]:
    pairs = zip(a, b, strict=False)
    return [x for x, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
