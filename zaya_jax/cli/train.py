"""`zaya train`: pretraining, midtraining, fine-tuning, and the course that makes nano."""

import contextlib
import dataclasses
import importlib.util
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from jax._src.distributed import global_state  # jax.process_count() would start the devices
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from zaya_jax.cli.output import console, find_devices, show
from zaya_jax.errors import ConfigError, ZayaError
from zaya_jax.sharding import simulate_devices


@dataclasses.dataclass
class Train:
    """Train a model through one of its phases, or go on where a run was interrupted.

    The same command again continues behind the newest checkpoint in --out. SIGTERM and Ctrl-C save
    and stop. `zaya train nano` runs the whole course of the embedded model.
    """

    phase: tyro.conf.Positional[Literal["pretrain", "midtrain", "sft", "nano"]]
    config: str | None = None
    """A TOML file, or the name of a preset."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A value of the configuration, as key=value; again for more. Like optimizer.learning_rate=1e-3
    or data.sources.0.weight=2."""
    out: Path | None = None
    """Folder of the run; by default runs/ and the name of the configuration and phase."""
    dry_run: bool = False
    """Print parameters, mesh, memory and schedule, and train nothing."""
    length: float = 1.0
    """Of the course, as a part of the whole (nano only)."""
    distributed: bool = False
    """One of several processes, which JAX finds by Slurm, Open MPI or Kubernetes."""
    coordinator: str | None = None
    """One of several processes: host:port of the first one, with --num-processes and
    --process-id."""
    num_processes: int | None = None
    process_id: int | None = None

    def run(self) -> None:
        if missing := [name for name in ("optax", "grain") if not _installed(name)]:
            raise ZayaError(f"{missing[0]} is missing: pip install 'zaya-jax[train]'")
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's; the run speaks for itself
        self._connect()
        if self.phase == "nano":
            self._course()
            return
        if self.length != 1.0:
            raise ConfigError("--length is of the course: zaya train nano")
        from train.config import load_config

        config = load_config(self.phase, self.config, self.set)
        devices = config.mesh.data * config.mesh.expert * config.mesh.context
        simulate_devices(devices // (global_state.num_processes or 1))
        find_devices()
        from train.dry_run import describe
        from train.run import train
        from train.setup import prepare

        if self.dry_run:
            show("What would be trained", describe(prepare(config)))
            return
        stem = Path(self.config).stem if self.config else "default"
        out = self.out or Path("runs") / f"{stem}-{self.phase}"
        with watching() as watcher:
            outcome = train(config, out, watcher)
        last = f"step {outcome.step} of {config.steps}"
        if not outcome.finished:
            watcher.say(f"stopped and saved behind {last}; the same command goes on from there")
            return
        loss = outcome.metrics.get("loss", math.nan)  # a checkpoint keeps none that is no number
        watcher.say(f"{out}: {last}, loss {loss:.4f}")

    def _connect(self) -> None:
        """Joins the other processes of the run."""
        explicit = (self.coordinator, self.num_processes, self.process_id)
        if any(value is not None for value in explicit):
            if None in explicit:
                raise ConfigError("--coordinator, --num-processes and --process-id go together")
        elif not self.distributed:
            return
        try:
            jax.distributed.initialize(*explicit)
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(f"the processes of the run cannot connect: {reason}") from None

    def _course(self) -> None:
        if self.config or self.set or self.dry_run or self.distributed or self.coordinator:
            raise ConfigError("zaya train nano takes --out and --length alone")
        from train.course.run import course

        find_devices()
        with watching() as watcher:
            course(self.out or Path("runs/nano"), watcher, self.length)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class Lines:
    """A line for whatever happens, as logs want it."""

    def __init__(self) -> None:
        self._total = 0

    def begin(self, phase: str, step: int, total: int) -> None:
        self._total = total

    def say(self, line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, step: int, values: dict[str, Any]) -> None:
        self.say(f"step {step}/{self._total}  {summary(values)}")


class Bar(Lines):
    """A progress bar with the newest numbers, for terminals; what happens scrolls above it."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress
        self._task = progress.add_task("")

    def begin(self, phase: str, step: int, total: int) -> None:
        super().begin(phase, step, total)
        self._progress.reset(self._task, completed=step, total=total, description=phase)

    def show(self, step: int, values: dict[str, Any]) -> None:
        if "held_out_loss" in values:
            super().show(step, values)
        else:
            self._progress.update(self._task, completed=step, description=summary(values))


@contextlib.contextmanager
def watching() -> Iterator[Any]:
    """Who looks on at a run: a progress bar on a terminal, plain lines elsewhere, nobody in all
    processes but the first."""
    from train.run import Silent

    if jax.process_index() > 0:
        yield Silent()
    elif not console.is_terminal:
        yield Lines()
    else:
        columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
            yield Bar(progress)


SHOWN = {
    "loss": "loss {:.4f}",
    "grad_norm": "gradient {:.2f}",
    "entropy": "balance {:.3f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
    "gigabytes": "{:.2f} GB",
    "held_out_loss": "held out: loss {:.4f}",
    "held_out_perplexity": "perplexity {:.2f}",
    "bits_per_byte": "{:.3f} bits a byte",
}


def summary(values: dict[str, Any]) -> str:
    """The numbers of a step on one line."""
    if "memory" in values:
        values = {**values, "gigabytes": values["memory"] / 1e9}
    parts = [text.format(values[name]) for name, text in SHOWN.items() if name in values]
    if seconds := values.get("seconds_left"):
        parts.append(f"{seconds / 60:.0f} min left")
    return "  ".join(parts)
