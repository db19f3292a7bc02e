"""Folders of checkpoints: finding them here or on the hub, and replacing them at once and whole."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from zaya_jax.errors import CheckpointError

CONFIG = "config.json"
CHECKSUMS = "checksums.json"
# Files that go wherever the weights go.
CARRIED = (
    "tokenizer.json",
    "tokenizer.model",
    "chat_template.jinja",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
WEIGHTS = "weights"
INDEX = "model.safetensors.index.json"
_OWN = {CONFIG, CHECKSUMS, WEIGHTS, INDEX, *CARRIED}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", f"{WEIGHTS}/*")


def find(path_or_hub_id: str | os.PathLike[str], hub_files: Sequence[str] = HUB_FILES) -> Path:
    """The folder of a checkpoint; downloaded where the name is that of a repository on the Hugging
    Face hub and no such folder is here. A download that was interrupted goes on, and one that is
    complete serves without a network.

    Raises:
      CheckpointError: neither is there.
    """
    name = os.fspath(path_or_hub_id)
    try:
        path = Path(name)
        if path.is_dir():
            return path
        if path.exists():
            raise CheckpointError(f"{path}: is a file, expected a checkpoint folder")
    except OSError:
        raise CheckpointError(f"{name[:80]}...: no path can be that long") from None
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise CheckpointError(f"{name}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(hub_files)))
    except Exception as error:  # whatever the network fails with
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{name}: no such folder, and not loaded from the hub: {reason}"
        ) from None


def read_carried(folder: Path) -> dict[str, bytes]:
    """The contents of the files that go wherever the weights go. Raises CheckpointError."""
    try:
        return {name: (folder / name).read_bytes() for name in CARRIED if (folder / name).exists()}
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})") from None


@contextlib.contextmanager
def replacing(path: Path, overwrite: bool = True) -> Iterator[Path]:
    """A new folder to write a checkpoint into, which takes the place of `path` when the block ends;
    a checkpoint that is there stays until then, and for good if the block raises.

    What a killed process left behind is removed, and a checkpoint that it was about to replace is
    put back.

    Raises:
      CheckpointError: the path holds something else than a checkpoint, or cannot be written; or
        something at all, without `overwrite`.
    """
    path = path.resolve()
    temporary = path.parent / f".{path.name}.unfinished"
    folder, replaced = temporary / "new", temporary / "old"
    try:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        _check_replaceable(path, overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
            _sync(folder)
            _swap_in(folder, path, replaced)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        where = error.filename or path
        raise CheckpointError(f"{where}: cannot be written ({error.strerror or error})") from None


def _check_replaceable(path: Path, overwrite: bool) -> None:
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: is a file, so no checkpoint is written there")
    if Path.cwd().is_relative_to(path):
        raise CheckpointError(f"{path}: is the current directory; give a folder of its own")
    entries = sorted(path.iterdir()) if path.exists() else []
    for entry in entries:
        own = entry.name in _OWN or entry.suffix == ".safetensors"
        if entry.name == WEIGHTS:  # Orbax's, or anybody's
            own = (entry / "_CHECKPOINT_METADATA").exists()
        if not own:
            raise CheckpointError(f"{path}: holds {entry.name!r} too, so it is not replaced")
    if entries and not overwrite:
        raise CheckpointError(f"{path}: exists; say --overwrite to replace the checkpoint")


def _swap_in(folder: Path, path: Path, replaced: Path) -> None:
    """Moves the new folder to `path`, and the old one back if that is interrupted."""
    if path.exists():
        path.rename(replaced)
    try:
        folder.rename(path)
    except BaseException:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        raise
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Makes the names of a folder's files last, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
