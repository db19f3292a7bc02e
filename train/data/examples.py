"""Records as tokens: documents, and conversations of which the assistant's turns are learned."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from train.data.config import OnLong
from train.data.conversations import Message, Piece, conversation_pieces
from train.data.records import BadRecord
from train.data.trimming import Outcome, trim
from zaya_jax.config import ZayaConfig
from zaya_jax.errors import ConfigError, InputError
from zaya_jax.text.tokenizer import Tokenizer

LARGEST_WEIGHT = 1e6
TOKEN_FIELDS = ("prompt", "response")


class Span(NamedTuple):
    """Tokens start .. end - 1 of an example, and the weight of each in the loss."""

    start: int
    end: int
    weight: float


class Example(NamedTuple):
    """What is packed whole."""

    tokens: list[int]
    spans: list[Span]  # of the tokens that are learned, in order
    bytes: int  # UTF-8 bytes of the text that is learned; end-of-turn tokens are none
    outcome: Outcome = "whole"  # of trimming


@dataclass(frozen=True)
class Encoder:
    """Turns the fields of a record into examples.

    Attributes:
      length: tokens that an example may have.
    """

    tokenizer: Tokenizer
    bos: int | None
    eos: int
    vocab_size: int
    format: str
    length: int
    on_long: OnLong

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, config: ZayaConfig, format: str, length: int, on_long: OnLong
    ) -> "Encoder":
        """Raises ConfigError where the length leaves no room for a token and the next one."""
        if length < 2:
            raise ConfigError(f"rows must have at least 2 tokens, got {length}")
        eos = config.eos_token_ids[0]
        return cls(tokenizer, config.bos_token_id, eos, config.vocab_size, format, length, on_long)

    def examples(self, fields: dict[str, Any]) -> list[Example]:
        """The examples of one record; several where a document is split. Raises BadRecord."""
        weight = _weight(fields)
        if self.format == "text":
            examples = self._document(fields, weight)
        elif self.format == "tokens":
            examples = [self._answered(fields, weight)]
        else:
            examples = [self._conversation(fields, weight)]
        return examples if weight else [e._replace(spans=[], bytes=0) for e in examples]

    def _document(self, fields: dict[str, Any], weight: float) -> list[Example]:
        text = fields.get("text")
        if not isinstance(text, str):
            raise BadRecord("no field `text`" if text is None else "the field `text` is no string")
        if not text.strip():
            raise BadRecord("empty text")
        total = _count_bytes(text)
        body, ends = self.tokenizer.encode_with_ends(text)
        first = [] if self.bos is None else [self.bos]
        tokens = [*first, *body, self.eos]
        if len(tokens) > self.length and self.on_long == "skip":
            raise BadRecord(f"{len(tokens)} tokens, more than the {self.length} of a row")
        if first and len(tokens) <= self.length:
            return [Example(tokens, [Span(0, len(tokens), weight)], total)]
        # Nothing predicts the first token of a piece, so its bytes are not learned.
        byte_ends = [*[0] * len(first), *_byte_ends(text, ends), total]
        pieces = []
        for start in range(0, len(tokens), self.length):
            piece = tokens[start : start + self.length]
            learned = byte_ends[start + len(piece) - 1] - byte_ends[start]
            pieces.append(Example(piece, [Span(0, len(piece), weight)], learned))
        return pieces

    def _conversation(self, fields: dict[str, Any], weight: float) -> Example:
        messages, tools = check_conversation(fields)
        outcome: Outcome = "whole"
        try:
            if self.on_long == "trim":
                trimmed = trim(messages, self.length, self.tokenizer, tools)
                if trimmed.messages is None:
                    raise BadRecord(
                        f"{trimmed.tokens} tokens, and without reasoning still more than the "
                        f"{self.length} of a row"
                    )
                messages, outcome = trimmed.messages, trimmed.outcome
            pieces = conversation_pieces(messages, self.tokenizer, tools)
            return self._learned(pieces, weight)._replace(outcome=outcome)
        except InputError as error:
            raise BadRecord(str(error)) from None

    def _answered(self, fields: dict[str, Any], weight: float) -> Example:
        """A prompt and its response, as token ids."""
        prompt, response = (_token_ids(fields, name, self.vocab_size) for name in TOKEN_FIELDS)
        tokens = [*prompt, *response]
        if len(tokens) > self.length:
            raise BadRecord(f"{len(tokens)} tokens, more than the {self.length} of a row")
        text = response[:-1] if response[-1] == self.eos else response
        spans = [Span(len(prompt), len(tokens), weight)]
        return Example(tokens, spans, _count_bytes(self.tokenizer.decode(text)))

    def _learned(self, pieces: list[Piece], weight: float) -> Example:
        tokens: list[int] = []
        spans, learned = [], 0
        for piece in pieces:
            start = len(tokens)
            tokens += self.tokenizer.encode(piece.text)
            if piece.learned:
                spans.append(Span(start, len(tokens), weight))
                learned += _count_bytes(piece.text) - _count_bytes(piece.end_token)
        if len(tokens) > self.length:
            raise BadRecord(f"{len(tokens)} tokens, more than the {self.length} of a row")
        return Example(tokens, spans, learned)


def check_conversation(fields: dict[str, Any]) -> tuple[list[Message], list[Any]]:
    """The fields `messages` and `tools` of a record.

    Raises:
      BadRecord: they are missing, mistyped or empty, or the assistant says nothing to learn. What
        a message must be like otherwise, the chat template checks.
    """
    messages, tools = fields.get("messages"), fields.get("tools") or []
    if not isinstance(messages, list):
        missing = messages is None
        raise BadRecord("no field `messages`" if missing else "the field `messages` is no list")
    if not isinstance(tools, list):
        raise BadRecord("the field `tools` is no list")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRecord(f"message {number} is not an object with a role")
        if not isinstance(message.get("train", True), bool):
            raise BadRecord(f"message {number}: `train` must be true or false")
        if message["role"] == "assistant" and not (
            message.get("tool_calls") or str(message.get("content") or "").strip()
        ):
            raise BadRecord(f"message {number} of the assistant is empty")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not any(message.get("train", True) for message in answers):
        raise BadRecord("empty: the assistant says nothing that is to be learned")
    return messages, tools


def _token_ids(fields: dict[str, Any], name: str, vocab_size: int) -> list[int]:
    ids = fields.get(name)
    if not isinstance(ids, list) or not ids:
        raise BadRecord(f"the field `{name}` is no list of token ids")
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise BadRecord(
                f"the field `{name}` holds {token!r:.20}, which is no token of {vocab_size}"
            )
    return ids


def _weight(fields: dict[str, Any]) -> float:
    weight = fields.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise BadRecord("the field `weight` is no number")
    if not 0 <= weight <= LARGEST_WEIGHT:
        raise BadRecord(f"the field `weight` must lie in 0 .. {LARGEST_WEIGHT:g}, got {weight}")
    return float(weight)


def _count_bytes(text: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise BadRecord(f"invalid Unicode at character {error.start}") from None


def _byte_ends(text: str, ends: Sequence[int]) -> Iterator[int]:
    """Where each token ends, from ends in characters to ends in bytes."""
    place = total = 0
    for end in ends:
        if end > place:
            total += _count_bytes(text[place:end])
            place = end
        yield total
