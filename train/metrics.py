"""Where a run's numbers go: metrics.jsonl, and TensorBoard and Weights & Biases if asked for."""

import contextlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from zaya_jax.errors import ZayaError

FILE = "metrics.jsonl"
Record = Mapping[str, Any]  # numbers, or lists of them, one for each layer


class Tracker(Protocol):
    """Something that takes a step's numbers."""

    def log(self, step: int, values: Record) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line, without numbers that are none. What is there of later steps than
    `step` is dropped: the run goes on from there, and takes them again."""

    def __init__(self, run: Path, step: int) -> None:
        file = run / FILE
        kept = [line for line in read(file) if line["step"] <= step]
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(unfinished, file)
        self._file = file.open("a")

    def log(self, step: int, values: Record) -> None:
        known = {name: value for name, value in values.items() if _is_known(value)}
        self._file.write(json.dumps({"step": step, **known}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: Path, step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: Record) -> None:
        for name, value in _flat(values):
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project "zaya-jax" named as the run's folder, which keeps its id; a run that is
    restarted goes on in it. Steps are a metric: those of Weights & Biases only ever grow, and a run
    may go back."""

    def __init__(self, run: Path, step: int) -> None:
        import wandb

        file = run / "wandb-id"
        if not file.exists():
            file.write_text(uuid.uuid4().hex)
        self._run = wandb.init(
            project="zaya-jax",
            name=run.absolute().name,
            id=file.read_text(),
            resume="allow",
            dir=str(run),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Record) -> None:
        self._run.log({"step": step, **dict(_flat(values))})

    def close(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, Callable[[Path, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


@contextlib.contextmanager
def tracking(run: Path, step: int, names: Sequence[str]) -> Iterator[Tracker]:
    """All trackers as one; they are closed in the end, whatever happens. Of several processes, the
    first one's numbers are kept.

    Args:
      run: the run's folder.
      step: the run goes on behind this one.
      names: of trackers beside metrics.jsonl.

    Raises:
      ZayaError: a tracker's package is not installed, or it does not start.
    """
    if jax.process_index() > 0:
        yield _All([])
        return
    with contextlib.ExitStack() as opened:
        trackers: list[Tracker] = [JsonLines(run, step)]
        opened.callback(trackers[0].close)
        for name in names:
            try:
                tracker = _TRACKERS[name](run, step)
            except ModuleNotFoundError:
                raise ZayaError(f"trackers: {name} needs pip install 'zaya-jax[{name}]'") from None
            except Exception as error:  # as without a login or a network
                raise ZayaError(f"trackers: {name} does not start ({error})") from None
            trackers.append(tracker)
            opened.callback(tracker.close)
        yield _All(trackers)


class _All:
    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def log(self, step: int, values: Record) -> None:
        for tracker in self._trackers:
            tracker.log(step, values)

    def close(self) -> None:
        """Each is closed by itself."""


def read(file: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, without a last line that a killed process left unfinished,
    or others that are damaged; none where there is no file."""
    if not file.exists():
        return []
    records = []
    for line in file.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def _flat(values: Record) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, list):
            yield from ((f"{name}/{i}", number) for i, number in enumerate(value))
        else:
            yield name, value


def _is_known(value: Any) -> bool:
    return isinstance(value, list) or math.isfinite(value)
