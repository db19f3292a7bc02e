"""Folders of checkpoints: finding them here or on the hub, and replacing them at once and whole."""

import contextlib
import fcntl
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
CHECKPOINTS = "checkpoints"  # of a training run, by step
INDEX = "model.safetensors.index.json"
_OWN = {CONFIG, CHECKSUMS, INDEX, *CARRIED}
_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_OF_ORBAX = re.compile(
    r"_CHECKPOINT_METADATA|_METADATA|_sharding|array_metadatas|commit_success\.txt|d"
    r"|manifest\.ocdbt|ocdbt\.process_\d+"
)
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
            return _newest(path)
        if path.exists():
            raise CheckpointError(f"{path}: is a file, expected a checkpoint folder")
        if (moved := unfinished(path) / "old").is_dir():
            raise CheckpointError(f"{path}: was interrupted while being replaced; it is in {moved}")
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


def _newest(folder: Path) -> Path:
    """The newest checkpoint of a training run; any other folder itself."""
    if not ((folder / CONFIG).exists() and (folder / CHECKPOINTS).is_dir()):
        return folder
    if not (steps := _steps(folder)):
        raise CheckpointError(f"{folder}: is a training run without a checkpoint yet")
    return folder / CHECKPOINTS / str(max(steps))


def _steps(run: Path) -> list[int]:
    return [int(e.name) for e in (run / CHECKPOINTS).iterdir() if e.name.isdecimal()]


def has_checkpoint(folder: Path) -> bool:
    """Whether a folder is that of a training run with a complete checkpoint."""
    is_run = (folder / CONFIG).exists() and (folder / CHECKPOINTS).is_dir()
    return is_run and bool(_steps(folder))


def beside(folder: Path) -> Path:
    """Where the config and the tokenizer of a checkpoint are: beside its weights; those of a
    training run share the run's."""
    of_run = folder.name.isdecimal() and folder.parent.name == CHECKPOINTS
    return folder.parent.parent if of_run and not (folder / CONFIG).exists() else folder


def read_carried(folder: Path) -> dict[str, bytes]:
    """The contents of the files that go wherever the weights go. Raises CheckpointError."""
    folder = beside(folder)
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
      CheckpointError: `check_destination` refuses it, it cannot be written, or another process is
        writing there.
    """
    path = resolved(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(unfinished(path)) as temporary:
            _put_back(path)
            check_destination(path, overwrite)
            folder, replaced = temporary / "new", temporary / "old"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)
            folder.mkdir()
            yield folder
            _sync(folder)
            _swap_in(folder, path, replaced)
    except OSError as error:
        where = error.filename or path
        raise CheckpointError(f"{where}: cannot be written ({error.strerror or error})") from None


def resolved(path: Path) -> Path:
    """A path without links. Raises CheckpointError where there can be none."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r}: cannot be written ({error})") from None


def unfinished(path: Path) -> Path:
    """Where the checkpoint that is to become `path` is made."""
    return path.parent / f".{path.name}.unfinished"


def recover(path: Path) -> None:
    """Puts a checkpoint back that was about to be replaced when its process was killed. Raises
    CheckpointError where another one is writing."""
    if os.path.exists(unfinished(path) / "old"):
        with _locked(unfinished(path)):
            _put_back(path)


def _put_back(path: Path) -> None:
    replaced = unfinished(path) / "old"
    if replaced.is_dir() and not (path.exists() and any(path.iterdir())):
        if path.exists():
            path.rmdir()
        replaced.rename(path)


def check_destination(path: Path, overwrite: bool) -> None:
    """Raises CheckpointError where a path holds something else than a checkpoint, so that it must
    not be replaced; or something at all, without `overwrite`."""
    path = resolved(path)
    if not os.path.exists(path):  # which a name too long does not trouble
        return
    if not path.is_dir():
        raise CheckpointError(f"{path}: is a file, so no checkpoint is written there")
    if Path.cwd().is_relative_to(path):
        raise CheckpointError(f"{path}: is the current directory; give a folder of its own")
    if path.is_mount():
        raise CheckpointError(f"{path}: is where a disk is mounted; give a folder in it")
    names = {entry.name for entry in path.iterdir()}
    for name in sorted(names):
        if not _is_ours(path / name):
            raise CheckpointError(f"{path}: holds {name!r} too, so it is not replaced")
    if names and CONFIG not in names:
        raise CheckpointError(f"{path}: has no {CONFIG}, so it is no checkpoint and not replaced")
    if names and not overwrite:
        raise CheckpointError(f"{path}: exists; say --overwrite to replace the checkpoint")


def _is_ours(entry: Path) -> bool:
    """Whether something in a folder belongs to a checkpoint."""
    if entry.name == WEIGHTS:  # Orbax's, or anybody's
        return entry.is_dir() and all(_OF_ORBAX.fullmatch(e.name) for e in entry.iterdir())
    return entry.is_file() and (entry.name in _OWN or _SHARD.fullmatch(entry.name) is not None)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """A folder for this process alone, which is removed in the end unless it still holds what was
    moved away."""
    if folder.exists() and {entry.name for entry in folder.iterdir()} - {"lock", "new", "old"}:
        raise CheckpointError(f"{folder}: is in the way; it is no unfinished checkpoint of ours")
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_same = os.fstat(lock.fileno()).st_ino == os.stat(lock.name).st_ino
        except (BlockingIOError, FileNotFoundError):
            is_same = False
        if not is_same:
            raise CheckpointError(f"{folder}: another process is writing there")
        try:
            yield folder
        finally:
            shutil.rmtree(folder / "new", ignore_errors=True)
            if not (folder / "old").exists():
                shutil.rmtree(folder, ignore_errors=True)


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
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Makes the names of a folder's files last, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
