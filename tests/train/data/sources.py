"""What the tests of training data share: a tokenizer of bytes, its model, and files of records."""

import json
import random
from pathlib import Path

from train.data.config import DataConfig, Source
from zaya_jax.loading import NANO, read_config
from zaya_jax.text.tokenizer import Tokenizer

MODEL = read_config(NANO)
TOKENIZER = Tokenizer.from_folder(NANO, MODEL)
BOS, EOS = 1, 2


def text(random: random.Random, size: int) -> str:
    return "".join(random.choice("abcdefgh ijklmnop") for _ in range(size - 1)) + "."


def write_lines(file: Path, records) -> Path:
    """Records as JSONL; bytes stand as they are."""
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    return file


def documents(seed: int, count: int, longest: int = 200) -> list[dict]:
    chance = random.Random(seed)
    return [
        {"text": f"{seed}.{n} " + text(chance, chance.randint(1, longest))} for n in range(count)
    ]


def conversation(*turns: str, system: str | None = None, **fields) -> dict:
    """Turns of the user and the assistant alternate."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]
    first = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": first + messages, **fields}


def config_of(folder: Path, *sources: Source, **fields) -> DataConfig:
    return DataConfig(sources, cache=str(folder / "cache"), **{"workers": 0, **fields})
