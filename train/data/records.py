"""Raw records of a source, one after the other, each with the place it comes from."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fsspec.utils import infer_compression

from train.data.config import Source
from train.data.files import File, find_files, local_hash, reading
from zaya_jax.errors import DataError
from zaya_jax.text.tools import parse_json

HUB = "hf://"
ARRAY_RECORD = ".array_record"
JSON_LINES = (".jsonl", ".json")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".lzma")


class Record(NamedTuple):
    """A record as it was found: nothing is checked yet."""

    file: str
    number: int  # of the line, or of the record in its file, from 1; 0 for a whole file
    content: Any  # a line of JSON or the text of a file, as bytes; or a dict

    @property
    def place(self) -> str:
        return f"{self.file}:{self.number}" if self.number else self.file

    @property
    def size(self) -> int:
        """Bytes, roughly."""
        return len(self.content) if isinstance(self.content, bytes) else 1000


class BadRecord(ValueError):
    """Why a record cannot be used."""


class Reader(Protocol):
    """A source that was found."""

    def identity(self, memory: Path) -> list[str]:
        """What changes with the content, and only then."""

    def __iter__(self) -> Iterator[Record]: ...


def open_source(source: Source) -> Reader:
    """Finds what a source names. Raises DataError where there is nothing, or no library for it."""
    path = source.path
    if path.startswith(HUB) or _saved_dataset(path) is not None:
        return DatasetReader(path.removeprefix(HUB))
    files = find_files(path)
    if all(file.path.endswith(ARRAY_RECORD) for file in files):
        return ArrayRecordReader(files)
    return FileReader(files, source.format != "text")


class FileReader:
    """Lines of JSON, or whole files that are a document each."""

    def __init__(self, files: list[File], only_lines: bool):
        self.files = files
        self.of_lines = [only_lines or _is_json_lines(file.path) for file in files]

    def identity(self, memory: Path) -> list[str]:
        kinds = ["whole", "lines"]
        return [
            f"{kinds[of_lines]}:{infer_compression(file.path)}:{file.identity(memory)}"
            for file, of_lines in zip(self.files, self.of_lines, strict=True)
        ]

    def __iter__(self) -> Iterator[Record]:
        for file, of_lines in zip(self.files, self.of_lines, strict=True):
            with file.open() as stream:
                if not of_lines:
                    yield Record(file.path, 0, stream.read())
                    continue
                for number, line in enumerate(stream, 1):
                    yield Record(file.path, number, line.rstrip(b"\r\n"))


class ArrayRecordReader:
    """Records of JSON in ArrayRecord files, which must be here."""

    def __init__(self, files: list[File]):
        import grain

        self.paths = [file.path for file in files]
        with reading(self.paths[0]):
            self.sources = [grain.sources.ArrayRecordDataSource([path]) for path in self.paths]

    def identity(self, memory: Path) -> list[str]:
        with reading(self.paths[0]):
            return [f"array_record:{local_hash(Path(path), memory)}" for path in self.paths]

    def __iter__(self) -> Iterator[Record]:
        for path, source in zip(self.paths, self.sources, strict=True):
            for index in range(len(source)):
                with reading(path):
                    content = source[index]
                yield Record(path, index + 1, content)


class DatasetReader:
    """Rows of a Hugging Face data set: NAME[:SPLIT] of the hub, or a folder that `datasets`
    wrote; by default the split `train`."""

    def __init__(self, name: str):
        try:
            import datasets
        except ModuleNotFoundError:
            raise DataError(
                f"{name}: reading it needs the extra `datasets`: pip install 'zaya-jax[datasets]'"
            ) from None
        self.name = name
        self.folder = None
        with reading(name):
            if (saved := _saved_dataset(name)) is not None:
                self.folder, split = saved
                found = datasets.load_from_disk(str(self.folder))
                if isinstance(found, datasets.DatasetDict):
                    found = self._split(found, split or "train")
                elif split:
                    raise DataError(f"{name}: has no splits")
            else:
                path, _, split = name.partition(":")
                found = datasets.load_dataset(path, split=split or "train")
        self.rows = found

    def _split(self, found: Any, split: str) -> Any:
        if split not in found:
            raise DataError(f"{self.name}: has no split {split!r}, but {', '.join(found)}")
        return found[split]

    def identity(self, memory: Path) -> list[str]:
        if self.folder is None:
            return [f"datasets:{self.rows._fingerprint}"]
        with reading(self.name):
            files = sorted({Path(entry["filename"]) for entry in self.rows.cache_files})
            return [f"datasets:{local_hash(file, memory)}" for file in files]

    def __iter__(self) -> Iterator[Record]:
        with reading(self.name):
            for number, row in enumerate(self.rows, 1):
                yield Record(self.name, number, _without_nulls(row))


def parse(record: Record) -> dict[str, Any]:
    """The fields of a record. Raises BadRecord."""
    content = record.content
    if isinstance(content, bytes):
        text = decode(content)
        if record.number == 0:
            return {"text": text}
        if not text.strip():
            raise BadRecord("empty line")
        try:
            content = parse_json(text)
        except ValueError as error:
            detail = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise BadRecord(f"invalid JSON ({detail})") from None
    if not isinstance(content, dict):
        raise BadRecord(f"not a JSON object, but {type(content).__name__}")
    return content


def decode(content: bytes) -> str:
    """UTF-8 as text. Raises BadRecord."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(f"invalid UTF-8 at byte {error.start}") from None


def _saved_dataset(path: str) -> tuple[Path, str] | None:
    """The folder that `save_to_disk` wrote, and what was said of a split."""
    for name, split in ((path, ""), path.rpartition(":")[::2]):
        folder = Path(name).expanduser()
        if name and any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
            return folder, split
    return None


def _is_json_lines(path: str) -> bool:
    for suffix in COMPRESSED:
        path = path.removesuffix(suffix)
    return path.endswith(JSON_LINES)


def _without_nulls(value: Any) -> Any:
    """Arrow gives every row every field that any row has, as None where a row has none."""
    if isinstance(value, dict):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value
