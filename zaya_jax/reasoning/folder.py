"""Complete rounds on disk, behind which a run goes on."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zaya_jax.errors import InputError
from zaya_jax.reasoning.solution import Candidate, Round

RUN = "run.json"


class Folder:
    """The folder of one run: `run.json`, and a file for each complete round with a line for each
    question. Files appear when they are complete.

    Args:
      path: made where it is missing.
      identity: what the rounds depend on, by name.

    Raises:
      InputError: the folder cannot be written, or is of another run.
    """

    def __init__(self, path: Path | str, identity: dict[str, Any]):
        self._path = Path(path)
        file = self._path / RUN
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            if file.exists():
                self._check(json.loads(file.read_text(encoding="utf-8")), identity)
            else:
                self._write(file, [identity])
        except OSError as error:
            raise InputError(f"{file}: cannot be written ({error.strerror})") from None
        except json.JSONDecodeError:
            raise InputError(f"{file}: is no JSON; name another folder") from None

    def read(self, number: int) -> list[Round] | None:
        """That round of every question, or None where it is not complete.

        Raises:
          InputError: the file is damaged.
        """
        file = self._file(number)
        if not file.exists():
            return None
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
            return [Round([Candidate(**one) for one in json.loads(line)]) for line in lines]
        except (OSError, ValueError, TypeError):
            raise InputError(f"{file}: is damaged; without it the round is done again") from None

    def write(self, number: int, rounds: Sequence[Round]) -> None:
        """Keeps a round of every question. Raises InputError where that is not possible."""
        try:
            self._write(
                self._file(number),
                [[dataclasses.asdict(one) for one in round.candidates] for round in rounds],
            )
        except OSError as error:
            raise InputError(
                f"{self._file(number)}: cannot be written ({error.strerror})"
            ) from None

    def _file(self, number: int) -> Path:
        return self._path / f"round-{number}.jsonl"

    def _check(self, found: dict[str, Any], identity: dict[str, Any]) -> None:
        known = json.loads(json.dumps(identity))
        if different := [name for name in known if found.get(name) != known[name]]:
            raise InputError(
                f"{self._path}: holds a run with another {different[0]}; name another folder"
            )

    @staticmethod
    def _write(file: Path, lines: Sequence[Any]) -> None:
        """One line of JSON each; whole or not at all."""
        part = file.with_suffix(".part")
        with part.open("w", encoding="utf-8") as text:
            for line in lines:
                text.write(json.dumps(line, ensure_ascii=False) + "\n")
            text.flush()
            os.fsync(text.fileno())
        part.replace(file)
