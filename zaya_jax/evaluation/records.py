"""The folder of an evaluation: its settings, a line for each sample, and the results."""

import fcntl
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from zaya_jax.errors import InputError

SETTINGS, RECORDS, RESULTS = "settings.json", "records.jsonl", "results.json"

Record = dict[str, Any]
Key = tuple[str, int]  # id of the problem, number of the sample


class Records:
    """The samples of an evaluation that are done, in memory and on disk.

    A line that was being written when the process died is dropped; everything before it counts.

    Args:
      path: the folder, made where it is missing; `lock` in it is held by one process at a time.
      settings: what the samples depend on, by name.
      keys: of all samples of the evaluation, in the order that the file has in the end.

    Attributes:
      done: the records so far.
      dropped: whether a torn line was.

    Raises:
      InputError: the folder cannot be written, is in use, was made with other settings, or holds a
        line that is none of this evaluation.
    """

    def __init__(self, path: Path, settings: dict[str, Any], keys: Sequence[Key]):
        self.path, self.file, self._keys = path, path / RECORDS, list(keys)
        self.done: dict[Key, Record] = {}
        self.dropped = False
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / "lock", "w")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"{error.filename}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._settle(settings)
            self._read()
        except BlockingIOError:
            self.close()
            raise InputError(f"{path}: another process is writing there") from None
        except OSError as error:
            self.close()
            raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from None
        except InputError:
            self.close()
            raise

    def close(self) -> None:
        """Lets other processes have the folder."""
        self._lock.close()

    def append(self, records: Iterable[Record]) -> None:
        """Adds samples that are not there yet; they are on the disk when this returns. Raises
        InputError where that is not possible."""
        new = [record for record in records if _key(record) not in self.done]
        if not new:
            return
        try:
            with open(self.file, "ab") as file:
                file.write("".join(map(_line, new)).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"{self.file}: cannot be written ({error.strerror})") from None
        self.done.update((_key(record), record) for record in new)

    def missing(self) -> list[Key]:
        """Samples that are still to be made, in order."""
        return [key for key in self._keys if key not in self.done]

    def finish(self, results: dict[str, Any]) -> None:
        """Writes the results, and the records in order: they do not tell how often the run was
        interrupted."""
        _replace(self.file, "".join(_line(self.done[key]) for key in self._keys))
        _replace(self.path / RESULTS, _pretty(results))

    def _settle(self, settings: dict[str, Any]) -> None:
        """Writes the settings, or compares them with those that are there."""
        file = self.path / SETTINGS
        if not file.exists():
            if self.file.exists():
                raise InputError(f"{self.file}: has no {SETTINGS} beside it; choose another folder")
            _replace(file, _pretty(settings))
            return
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise InputError(f"{file}: is damaged; choose another folder") from None
        for name in [*settings, *there]:
            was, now = there.get(name), json.loads(json.dumps(settings.get(name)))
            if was != now:
                raise InputError(
                    f"{self.path}: was made with {name} {was!r:.60}, not {now!r:.60}; "
                    f"choose another folder"
                )

    def _read(self) -> None:
        if not self.file.exists():
            return
        data = self.file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            self.dropped = True
            os.truncate(self.file, len(whole))
        known = set(self._keys)
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            place = f"{self.file}, line {number}"
            try:
                record = json.loads(line)
                key = _key(record)
                float(record["score"]), int(record["tokens"]), record["finish_reason"]
            except (ValueError, TypeError, KeyError):
                raise InputError(
                    f"{place}: is damaged; take the line out, and its sample is made again"
                ) from None
            if key not in known or key in self.done:
                state = "there twice" if key in self.done else "not of this evaluation"
                raise InputError(f"{place}: sample {key[1]} of {key[0]} is {state}")
            self.done[key] = record


def _key(record: Record) -> Key:
    return record["id"], record["sample"]


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def _pretty(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def _replace(file: Path, text: str) -> None:
    """Writes a file that is either there whole or not at all."""
    new = file.with_name(f"{file.name}.new")
    with open(new, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(new, file)
