"""Answer-preserving trimming: conversations made to fit by cutting reasoning, never answers
(ZAYA1-8B technical report, arXiv 2605.05365)."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from train.data.conversations import Message, Reasoning, conversation_pieces, split_reasoning
from zaya_jax.text.tokenizer import Tokenizer
from zaya_jax.text.tools import END_THINK, THINK

Outcome = Literal["whole", "cut", "deleted", "dropped"]
OUTCOMES: tuple[Outcome, ...] = ("whole", "cut", "deleted", "dropped")
# A cut changes how its neighbours are tokenised; no further than this was ever seen.
NEARBY_CUTS = 4


class Trimmed(NamedTuple):
    """What became of a conversation."""

    messages: list[Message] | None  # None where it was dropped
    outcome: Outcome
    tokens: int  # before
    tokens_kept: int  # after; 0 where it was dropped


def trim(
    messages: Sequence[Message],
    budget: int,
    tokenizer: Tokenizer,
    tools: Sequence[Message] = (),
) -> Trimmed:
    """Makes a conversation fit into `budget` tokens after the chat template.

    1. One that fits is kept whole.
    2. Else the last assistant turn loses the end of its reasoning, the part just before
       `</think>`: as many whole tokens of it stay as fit.
    3. If that is not enough, the reasoning blocks of earlier assistant turns are deleted, with the
       empty lines after them; then step 2 again.
    4. If it is still too long, it is dropped.

    Prompts, `</think>` and answers (tool calls too) stay as they are. A turn without `</think>` is
    all answer.

    Args:
      messages: as `ChatTemplate.render` takes them; not changed.
      budget: tokens of the whole rendered conversation.
      tools: the functions on offer.

    Raises:
      InputError: malformed messages or tools, or ones that the template refuses.
    """
    lengths: dict[str, int] = {}

    def count(conversation: Sequence[Message]) -> int:
        pieces = conversation_pieces(conversation, tokenizer, tools)
        new = {piece.text for piece in pieces} - lengths.keys()
        lengths.update((text, len(tokenizer.encode(text))) for text in new)
        return sum(lengths[piece.text] for piece in pieces)

    before = count(messages)
    if before <= budget:
        return Trimmed(list(messages), "whole", before, before)
    attempts: list[tuple[Outcome, list[Message]]] = [("cut", list(messages))]
    if (without := _without_earlier_reasoning(messages)) != attempts[0][1]:
        attempts.append(("deleted", without))
    for outcome, conversation in attempts:
        if (cut := _cut_to_fit(conversation, budget, tokenizer, count)) is not None:
            return Trimmed(cut, outcome, before, count(cut))
    return Trimmed(None, "dropped", before, 0)


def _cut_to_fit(
    messages: list[Message],
    budget: int,
    tokenizer: Tokenizer,
    count: Callable[[Sequence[Message]], int],
) -> list[Message] | None:
    """The conversation with as much of its last reasoning as fits; None where nothing helps."""
    if (total := count(messages)) <= budget:
        return messages
    turns = _assistant_turns(messages)
    last = turns[-1] if turns else 0
    reasoning = split_reasoning(messages[last].get("content") or "") if turns else None
    if reasoning is None:
        return None
    cuts, kept = _possible_cuts(reasoning.text, tokenizer)

    def conversation(cut: int) -> list[Message]:
        text = reasoning.opening + reasoning.text[: cuts[cut]] + reasoning.closing
        return [*messages[:last], {**messages[last], "content": text}, *messages[last + 1 :]]

    # Tokens on both sides of a cut may join or part, so a guess is only nearly right.
    over, cut = total - budget, len(cuts) - 1
    while over > 0:
        if cut == 0:
            return None
        cut = min(cut - 1, max(0, bisect_right(kept, kept[cut] - over) - 1))
        over = count(conversation(cut)) - budget
    best = cut
    while cut + 1 < len(cuts) and cut < best + NEARBY_CUTS:
        cut += 1
        if count(conversation(cut)) <= budget:
            best = cut
    return conversation(best)


def _possible_cuts(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Where a text can be cut between two tokens and not inside a character: how many characters,
    and how many tokens, are before each such place. The first is the beginning."""
    ends = tokenizer.encode_with_ends(text)[1]
    cuts, kept = [0], [0]
    for number, end in enumerate(ends, 1):
        if end > cuts[-1]:
            cuts.append(end)
            kept.append(number)
        elif end == cuts[-1]:
            kept[-1] = number
    return cuts, kept


def _without_earlier_reasoning(messages: Sequence[Message]) -> list[Message]:
    shorter = list(messages)
    for number in _assistant_turns(messages)[:-1]:
        message = messages[number]
        reasoning = split_reasoning(message.get("content") or "")
        if reasoning is not None:
            answer = _answer(reasoning)
            if answer.strip() or message.get("tool_calls"):  # there are no empty turns
                shorter[number] = {**message, "content": answer}
    return shorter


def _answer(reasoning: Reasoning) -> str:
    head, answer = reasoning.opening.removesuffix(THINK), reasoning.closing.removeprefix(END_THINK)
    return head + answer if head.strip() else answer.lstrip("\n")


def _assistant_turns(messages: Sequence[Message]) -> list[int]:
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]
