"""Conversations as the chat template renders them, in pieces that are learned or only context."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from zaya_jax.errors import InputError
from zaya_jax.text.tokenizer import Tokenizer
from zaya_jax.text.tools import END_THINK, THINK

Message = dict[str, Any]


class Piece(NamedTuple):
    """Part of a rendered conversation; pieces are tokenised one by one."""

    text: str
    learned: bool = False
    end_token: str = ""  # that ends the turn, and `text`


class Reasoning(NamedTuple):
    """The content of a message around its first reasoning block."""

    opening: str  # up to `<think>`, with it
    text: str
    closing: str  # from `</think>` on, with the answer


def conversation_pieces(
    messages: Sequence[Message], tokenizer: Tokenizer, tools: Sequence[Message] = ()
) -> list[Piece]:
    """The rendered conversation, cut where each of the assistant's turns begins and ends.

    A turn begins where the prompt of generation would end, so that prompts are tokenised as they
    are there, and ends with its end-of-turn token. Its message is learned unless it says
    `"train": false`.

    Raises:
      InputError: what the template refuses; or it renders a turn, after the prompt that it makes
        for the same turn, differently or without an end.
    """

    def render(count: int, add_generation_prompt: bool) -> str:
        return tokenizer.template.render(
            messages[:count], tools=tools, add_generation_prompt=add_generation_prompt
        )

    whole = render(len(messages), False)
    pieces, done = [], 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if number == 0:
            raise InputError("message 0 is the assistant's, with nothing before it to answer")
        start = len(prompt := render(number, True))
        if not whole.startswith(prompt) or start < done:
            raise InputError(f"message {number} is not rendered after the prompt for it")
        up_to_turn = whole if number + 1 == len(messages) else render(number + 1, False)
        end, end_token = _end_of_turn(whole, start, up_to_turn, tokenizer)
        if end < 0:
            raise InputError(
                f"message {number} is rendered without an end of turn "
                f"({', '.join(tokenizer.end_tokens)})"
            )
        pieces += [
            Piece(whole[done:start]),
            Piece(whole[start:end], message.get("train", True), end_token),
        ]
        done = end
    return [*pieces, Piece(whole[done:])]


def split_reasoning(content: str) -> Reasoning | None:
    """A message's reasoning, or None where there is no closed block. Without `<think>` before
    `</think>`, the prompt opened the block."""
    opened, end_think, answer = content.partition(END_THINK)
    if not end_think:
        return None
    head, think, text = opened.partition(THINK)
    if not think:
        return Reasoning("", opened, end_think + answer)
    return Reasoning(head + think, text, end_think + answer)


def _end_of_turn(whole: str, start: int, up_to_turn: str, tokenizer: Tokenizer) -> tuple[int, str]:
    """Where a turn ends, and with what; -1 where it does not."""
    if whole.startswith(up_to_turn):  # the last one: the content may have others
        return max(
            (at + len(token) if at >= 0 else -1, token)
            for token in tokenizer.end_tokens
            for at in [whole.rfind(token, start, len(up_to_turn))]
        )
    # The template renders the turn otherwise when others follow: without its reasoning.
    ends = [(whole.find(token, start), token) for token in tokenizer.end_tokens]
    at, token = min((end for end in ends if end[0] >= 0), default=(-1, ""))
    return (at + len(token) if at >= 0 else -1), token
