"""A checkpoint's own tokenizer and chat template."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream

from convert.safetensors_io import read_json
from zaya_jax.config import ZayaConfig
from zaya_jax.errors import CheckpointError
from zaya_jax.text.chat import ChatTemplate

TOKENIZER = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"
CARRIED = (TOKENIZER, TEMPLATE, SETTINGS, "special_tokens_map.json", "generation_config.json")


class Tokenizer:
    """Text to token ids and back. No special token is ever added: a rendered prompt has its own."""

    def __init__(self, core: tokenizers.Tokenizer, template: ChatTemplate, files: dict[str, bytes]):
        self._core = core
        self.template = template
        self._files = files

    @classmethod
    def from_folder(cls, folder: Path, config: ZayaConfig) -> "Tokenizer | None":
        """The tokenizer of a checkpoint folder, or None where it has none."""
        file = folder / TOKENIZER
        if not file.exists():
            return None
        try:
            core = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file}: not a tokenizer ({error})") from None
        if (size := core.get_vocab_size()) > config.vocab_size:
            raise CheckpointError(
                f"{file}: has {size} tokens, more than the model's vocab_size {config.vocab_size}"
            )
        files = {name: (folder / name).read_bytes() for name in CARRIED if (folder / name).exists()}
        settings = read_json(folder / SETTINGS) if SETTINGS in files else {}
        source = settings.get("chat_template")
        if TEMPLATE in files:
            source = files[TEMPLATE].decode("utf-8")
        bos = core.id_to_token(config.bos_token_id) or ""
        return cls(core, ChatTemplate(source if isinstance(source, str) else None, bos), files)

    def encode(self, text: str) -> list[int]:
        return self._core.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int], *, skip_special: bool = False) -> str:
        return self._core.decode(list(tokens), skip_special_tokens=skip_special)

    def encode_chat(
        self, messages: Sequence[dict[str, Any]], *, enable_thinking: bool = True
    ) -> list[int]:
        """Tokens of a conversation, up to where the assistant's answer begins."""
        return self.encode(self.template.render(messages, enable_thinking=enable_thinking))

    def stream(self, stop: Sequence[str] = ()) -> "TextStream":
        return TextStream(self._core, tuple(stop))

    def save(self, folder: Path) -> None:
        """Writes the files it was read from."""
        for name, content in self._files.items():
            (folder / name).write_bytes(content)


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
        piece = self._decoder.step(self._core, token)
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
            self.text += self._core.decode(self._pending, skip_special_tokens=False)
            self._pending = []
        end = len(self.text)
        if not final:
            end -= max((self._overlap(stop) for stop in self._stop), default=0)
        piece = self.text[self._given : end]
        self._given = max(self._given, end)
        return piece

    def _overlap(self, stop: str) -> int:
        """How much of the end of the text could be the beginning of `stop`."""
        sizes = range(min(len(stop) - 1, len(self.text)), 0, -1)
        return next((size for size in sizes if self.text.endswith(stop[:size])), 0)
