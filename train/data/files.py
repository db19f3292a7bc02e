"""Files of a source, here or at any fsspec URL: finding them, reading them, knowing their
content."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from zaya_jax.errors import DataError

# A file that was changed this shortly ago could change again without a trace in its times.
SETTLED_SECONDS = 2.0
# What object stores tell of a file's content.
REMOTE_HASHES = ("ETag", "etag", "md5Hash", "Content-MD5")
BLOCK = 1 << 20


class File(NamedTuple):
    """A file of some file system."""

    system: Any
    path: str

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The content, decompressed where the name says that it is compressed.

        Raises:
          DataError: it cannot be read.
        """
        with reading(self.path), self.system.open(self.path, "rb", compression="infer") as stream:
            yield stream

    def identity(self, memory: Path) -> str:
        """A hash of the content: the store's own one, or SHA-256, which for a file here is
        remembered in the folder `memory` for as long as the file stays untouched."""
        with reading(self.path):
            facts = self.system.info(self.path)
            for name in REMOTE_HASHES:
                if facts.get(name):
                    return f"{name}:{facts[name]}:{facts.get('size')}"
            if isinstance(self.system, LocalFileSystem):
                return local_hash(Path(self.path), memory)
            with self.system.open(self.path, "rb") as stream:
                return _hash(stream)


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Turns whatever a file system, decompressor or reader fails with into a DataError."""
    try:
        yield
    except DataError:
        raise
    except GeneratorExit:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{path}: cannot be read ({str(reason).partition(chr(10))[0]})") from None


def find_files(url: str) -> list[File]:
    """The files of a path, glob or URL, by name.

    Raises:
      DataError: there are none, or it is a folder.
    """
    with reading(url):
        system, path = fsspec.core.url_to_fs(os.path.expanduser(url))
        if system.isfile(path):
            return [File(system, path)]
        if system.isdir(path):
            raise DataError(f"{url}: is a folder; give the files in it, like {url}/*.jsonl")
        found = system.glob(path) if fsspec.core.has_magic(path) else []
        files = sorted(str(name) for name in found if system.isfile(name))
    if not files:
        raise DataError(f"{url}: no such file")
    return [File(system, name) for name in files]


def local_hash(path: Path, memory: Path) -> str:
    """SHA-256 of a file here."""
    state = path.stat()
    facts = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    note = memory / f"{name}.json"
    with contextlib.suppress(OSError, ValueError):
        remembered = json.loads(note.read_text())
        if remembered["facts"] == facts:
            return remembered["sha256"]
    with open(path, "rb") as stream:
        found = _hash(stream)
    if time.time() - max(state.st_mtime, state.st_ctime) > SETTLED_SECONDS:
        temporary = note.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):  # it is then hashed again the next time
            memory.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"facts": facts, "sha256": found}))
            temporary.replace(note)
    return found


def _hash(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := stream.read(BLOCK):
        digest.update(block)
    return digest.hexdigest()
