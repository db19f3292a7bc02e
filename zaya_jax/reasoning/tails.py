"""Tails of reasoning, cut on tokens, that cannot break out of the block they are put in."""

import re
from collections.abc import Sequence

from zaya_jax.text.tokenizer import Piece, Tokenizer
from zaya_jax.text.tools import END_THINK, TAGS, THINK

SPECIAL = "<|"  # how the texts of most special tokens begin


def reasoning(tokens: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The tokens of a response between `<think>` and `</think>`; to its end where the block was
    never closed, from its beginning where the prompt opened it. An end of turn is left out, and
    so are the first bytes of a character that was not finished."""
    pieces = tokenizer.pieces(tokens)
    text = "".join(piece.text for piece in pieces)
    closed = text.find(END_THINK)
    end = len(text) if closed < 0 else closed
    opened = text.find(THINK, 0, end)
    start = 0 if opened < 0 else opened + len(THINK)
    ends = [at for stop in tokenizer.end_tokens if (at := text.find(stop, start, end)) >= 0]
    return _between(pieces, start, min([end, *ends]))


def tail(
    tokens: Sequence[int], tau: int, tokenizer: Tokenizer, delimiters: Sequence[str]
) -> list[int]:
    """The last tokens of a response's reasoning, at most tau of them.

    They begin at a whole character. Tokens keep their ids, but for those that would end the block
    or the turn: special tokens, tags, and the delimiters are spelled with a space behind their
    first character.
    """
    trace = reasoning(tokens, tokenizer)
    safe = _neutralised(tokenizer.pieces(trace)[-tau:], tokenizer, delimiters)
    count, kept = 0, []
    for piece in reversed(safe):
        count += len(piece.tokens)
        if count > tau:
            break
        kept.append(piece)
    return [token for piece in reversed(kept) for token in piece.tokens]


def _between(pieces: Sequence[Piece], start: int, end: int) -> list[int]:
    """Tokens of the pieces that lie wholly between two places of the text."""
    found: list[int] = []
    place = 0
    for piece in pieces:
        if start <= place and place + len(piece.text) <= end:
            found.extend(piece.tokens)
        place += len(piece.text)
    return found


def _neutralised(
    pieces: Sequence[Piece], tokenizer: Tokenizer, delimiters: Sequence[str]
) -> list[Piece]:
    """The pieces, with those spelled anew that hold a part of something forbidden."""
    forbidden = (*delimiters, *TAGS, *tokenizer.end_tokens, SPECIAL)
    pattern = re.compile("|".join(map(re.escape, forbidden)), re.IGNORECASE)
    safe = list(pieces)
    while (span := _forbidden(safe, pattern, tokenizer.special_tokens)) is not None:
        first, last = span
        text = "".join(piece.text for piece in safe[first:last])
        apart = pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        if apart == text:  # a special token that is no tag
            apart = f"{text[:1]} {text[1:]}"
        spelled = [t for t in tokenizer.encode(apart) if t not in tokenizer.special_tokens]
        safe[first:last] = tokenizer.pieces(spelled)
    return safe


def _forbidden(
    pieces: Sequence[Piece], pattern: re.Pattern[str], special: frozenset[int]
) -> tuple[int, int] | None:
    """The first run of pieces, [first, last), that holds something forbidden."""
    for number, piece in enumerate(pieces):
        if any(token in special for token in piece.tokens):
            return number, number + 1
    match = pattern.search("".join(piece.text for piece in pieces))
    if match is None:
        return None
    place, inside = 0, []
    for number, piece in enumerate(pieces):
        if place < match.end() and match.start() < place + len(piece.text):
            inside.append(number)
        place += len(piece.text)
    return inside[0], inside[-1] + 1
