"""A checkpoint's own tokenizer and chat template."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream

from convert.folder import beside, read_carried
from convert.safetensors_read import read_json
from zaya_jax.config import ZayaConfig
from zaya_jax.errors import CheckpointError, InputError
from zaya_jax.text.chat import ChatTemplate

TOKENIZER = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"
END_OF_TURN = "<|im_end|>"


class Piece(NamedTuple):
    """Tokens that make up whole characters together, and these."""

    tokens: list[int]
    text: str


class Tokenizer:
    """Text to token ids and back. No special token is ever added: a rendered prompt has its own."""

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        template: ChatTemplate,
        files: dict[str, bytes],
        end_tokens: Sequence[str] = (END_OF_TURN,),
    ):
        self._core = core
        self.template = template
        self.files = files  # that it was read from, by name
        self.end_tokens = tuple(end_tokens)  # that may end a turn, as text

    @classmethod
    def from_folder(cls, folder: Path, config: ZayaConfig) -> "Tokenizer | None":
        """The tokenizer of a checkpoint folder, or None where it has none."""
        folder = beside(folder)
        file = folder / TOKENIZER
        if not file.exists():
            return None
        try:
            core = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file}: not a tokenizer ({error})") from None
        core.no_truncation()
        core.no_padding()
        if (size := core.get_vocab_size()) > config.vocab_size:
            raise CheckpointError(
                f"{file}: has {size} tokens, more than the model's vocab_size {config.vocab_size}"
            )
        files = read_carried(folder)
        ids = {
            "bos_token": config.bos_token_id,
            "eos_token": config.eos_token_ids[0],
            "pad_token": config.pad_token_id,
        }
        tokens = {name: "" if i is None else core.id_to_token(i) or "" for name, i in ids.items()}
        ends = [text for i in config.eos_token_ids if (text := core.id_to_token(i))]
        return cls(core, _template(folder, files, tokens), files, ends)

    def encode(self, text: str) -> list[int]:
        try:
            return self._core.encode(text, add_special_tokens=False).ids
        except TypeError:  # what the library says of a lone surrogate
            raise InputError("the prompt is no valid Unicode text") from None

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Tokens, and where each one's text ends, in characters. Of the tokens that make up one
        character together, each ends where it does."""
        encoding = self._core.encode(text, add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets]

    @cached_property
    def special_tokens(self) -> frozenset[int]:
        """Tokens that control the model and are no text, like those around turns."""
        added = self._core.get_added_tokens_decoder().items()
        return frozenset(number for number, token in added if token.special)

    def pieces(self, tokens: Sequence[int]) -> list[Piece]:
        """The tokens in the shortest runs of whole characters. The first tokens of a character that
        is not finished at the end are left out."""
        stream, run, found = self.stream(), [], []
        for token in tokens:
            stream.add(token)
            run.append(int(token))
            if text := stream.take():
                found.append(Piece(run, text))
                run = []
        return found

    @property
    def fingerprint(self) -> str:
        """A hash of everything that the tokens of a text or conversation depend on."""
        core = self.files.get(TOKENIZER) or self._core.to_str().encode()
        rest = json.dumps([self.template.source, self.template.tokens, self.end_tokens])
        return hashlib.sha256(hashlib.sha256(core).digest() + rest.encode()).hexdigest()

    def decode(self, tokens: Sequence[int]) -> str:
        return self._core.decode(list(tokens), skip_special_tokens=False)

    def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        enable_thinking: bool = True,
        tools: Sequence[dict[str, Any]] = (),
    ) -> list[int]:
        """Tokens of a conversation, up to where the assistant's answer begins."""
        return self.encode(
            self.template.render(messages, enable_thinking=enable_thinking, tools=tools)
        )

    def stream(self, stop: Sequence[str] = ()) -> "TextStream":
        return TextStream(self._core, tuple(stop))


def _template(folder: Path, files: dict[str, bytes], tokens: dict[str, str]) -> ChatTemplate:
    """The checkpoint's chat template: a file of its own, or part of the settings, or ours."""
    file, source = folder / TEMPLATE, None
    try:
        if TEMPLATE in files:
            source = files[TEMPLATE].decode("utf-8")
        elif SETTINGS in files:
            file = folder / SETTINGS
            source = read_json(file).get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {entry["name"]: entry["template"] for entry in source}["default"]
        if not isinstance(source, str | None):
            raise TypeError
        return ChatTemplate(source, tokens)
    except (UnicodeDecodeError, TypeError, KeyError):
        raise CheckpointError(f"{file}: holds no chat template that can be read") from None
    except TemplateError as error:
        raise CheckpointError(f"{file}: chat template: {error}") from None


class TextStream:
    """Text of a growing list of tokens, given out in whole characters and never past a stop
    string."""

    def __init__(self, core: tokenizers.Tokenizer, stop: tuple[str, ...]):
        self._core, self._stop = core, stop
        self._decoder = DecodeStream(skip_special_tokens=False)
        self._pending: list[int] = []  # tokens of a character that is not whole yet
        self._given = 0
        self.text = ""

    def add(self, token: int) -> bool:
        """Appends a token; True where the text now holds a stop string, before which it is cut."""
        try:
            piece = self._decoder.step(self._core, token)
        except Exception:  # the library gives up on bytes that form no character, and stays so
            piece = self._decode_pending(token)
            self._decoder = DecodeStream(skip_special_tokens=False)
        self._pending = [*self._pending, token] if piece is None else []
        self.text += piece or ""
        cuts = [self.text.find(stop) for stop in self._stop if stop in self.text]
        if cuts:
            self.text, self._pending = self.text[: min(cuts)], []
        return bool(cuts)

    def take(self, *, final: bool = False) -> str:
        """What is new since the last call; the start of a possible stop string is held back until
        `final`."""
        if final and self._pending:
            self.text += self._decode_pending()
            self._pending = []
        end = len(self.text)
        if not final:
            end -= max((self._overlap(stop) for stop in self._stop), default=0)
        piece = self.text[self._given : end]
        self._given = max(self._given, end)
        return piece

    def _decode_pending(self, *more: int) -> str:
        return self._core.decode([*self._pending, *more], skip_special_tokens=False)

    def _overlap(self, stop: str) -> int:
        """How much of the end of the text could be the beginning of `stop`."""
        sizes = range(min(len(stop) - 1, len(self.text)), 0, -1)
        return next((size for size in sizes if self.text.endswith(stop[:size])), 0)
