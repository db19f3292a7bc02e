"""A training run from its first step, or from where it was interrupted, to its last."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from train.checkpoints import Checkpoints, Saved
from train.config import TrainConfig, to_json
from train.data.batch import Batch
from train.data.batches import Batches
from train.feeding import held_out_evaluation, to_devices
from train.flops import training_flops
from train.metrics import Tracker, tracking
from train.optimizer import schedule
from train.setup import (
    Setup,
    check_alike,
    check_same,
    check_tokenizer,
    first_state,
    prepare,
    run_folder,
    write_model,
)
from train.step import Metrics, TrainState, compiled, make_step
from zaya_jax.compilation import use_persistent_cache
from zaya_jax.errors import ZayaError
from zaya_jax.memory import peak_memory


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
      step: the last one that was taken.
      finished: False where the run was told to stop before its last step.
      metrics: of the last step, and of the last evaluation.
    """

    step: int
    finished: bool
    metrics: dict[str, float]


class Watcher(Protocol):
    """Somebody who looks on."""

    def begin(self, phase: str, step: int, total: int) -> None:
        """A run goes on behind a step, of so many."""

    def say(self, line: str) -> None:
        """Something happened."""

    def show(self, step: int, values: dict[str, Any]) -> None:
        """Numbers of a step."""


class Silent:
    """Nobody looks on."""

    def begin(self, phase: str, step: int, total: int) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def show(self, step: int, values: dict[str, Any]) -> None:
        pass


def train(config: TrainConfig, run: Path, watcher: Watcher) -> Outcome:
    """Trains, or goes on training: the same call again continues behind the newest checkpoint.

    Args:
      config: of the run.
      run: its folder: checkpoints, metrics.jsonl, the model's config and tokenizer.
      watcher: is told what happens.

    Raises:
      ZayaError: the configuration does not fit, or is another than the run was begun with; no
        checkpoint is undamaged; too many steps had to be skipped.
    """
    use_persistent_cache()
    check_tokenizer(config)
    setup = prepare(config, run)
    with contextlib.ExitStack() as opened:
        opened.enter_context(run_folder(run))
        checkpoints = Checkpoints(run, config.checkpoint, watcher.say)
        opened.callback(checkpoints.close)
        check_same(config, checkpoints.newest_config(), run)
        write_model(setup, run)
        data = Batches(
            config.data, setup.tokenizer, setup.model, rows=config.rows, length=config.context
        )
        check_alike(config, data.get_state())
        restored = checkpoints.restore(setup.like)
        if restored is None:
            at, state, values = 0, first_state(setup), {}
            watcher.say(f"{run}: begins")
        else:
            at, state, saved = restored
            data.set_state(saved.data)
            values = saved.metrics
            watcher.say(f"{run}: goes on behind step {at}")
        watcher.begin(config.phase, at, config.steps)
        tracker = opened.enter_context(tracking(run, at, config.trackers))
        stop = opened.enter_context(stopping())
        loop = _Loop(setup, state, data, checkpoints, tracker, watcher, stop)
        return loop.run(at, values)


class _Loop:
    """The steps, and everything between them."""

    def __init__(
        self,
        setup: Setup,
        state: TrainState,
        data: Batches,
        checkpoints: Checkpoints,
        tracker: Tracker,
        watcher: Watcher,
        stop: Callable[[int], bool],
    ) -> None:
        self.setup, self.state, self.data, self.checkpoints = setup, state, data, checkpoints
        self.tracker, self.watcher, self.stop = tracker, watcher, stop
        shardings = jax.tree.map(lambda x: x.sharding, setup.like)
        self.take_step = make_step(
            setup.config, setup.model, setup.mesh, setup.rule, setup.balancer, shardings
        )
        self.evaluate = held_out_evaluation(setup)
        self.restores = 0
        self.values: dict[str, Any] = {}

    def run(self, at: int, values: dict[str, float]) -> Outcome:
        """From behind step `at`, whose numbers are given, to the last one, or until told to
        stop."""
        self.values, config = {**values}, self.setup.config
        if at >= config.steps:
            return Outcome(at, True, self.values)
        clock = Clock(self.setup, int(values.get("tokens", 0)))
        batch, place = self._next()
        self.take_step = compiled(self.take_step, self.state, batch)
        stopped = False
        due = False
        while at < config.steps and not stopped:
            self.state, metrics = self.take_step(self.state, batch)
            taken = place  # the data go on there behind this step
            batch, place = self._next()  # read while the devices compute
            metrics = jax.device_get(metrics)
            at += 1
            clock.count(metrics)
            stopped = self.stop(at) and at < config.steps
            if not metrics.accepted:
                self.watcher.say(
                    f"step {at} is skipped: loss {metrics.loss:.4g}, "
                    f"gradient {metrics.grad_norm:.4g}"
                )
                if metrics.in_a_row > config.faults.skips:
                    at, clock.tokens = self._go_back(at)
                    continue
            self._report(at, metrics, clock, stopped)
            due |= at % config.checkpoint.every == 0
            # Among bad steps nothing is saved: to go back there would not help.
            if stopped or at == config.steps or (due and metrics.accepted):
                self.values["tokens"] = clock.tokens
                self.checkpoints.save(at, self.state, self._saved(taken))
                self.restores, due = 0, False
        self.checkpoints.wait()
        return Outcome(at, at >= config.steps, self.values)

    def _next(self) -> tuple[Batch, dict[str, Any]]:
        """The next batch on the devices, and where the data go on behind it."""
        plan = next(self.data)
        return to_devices(plan, self.setup.mesh), self.data.get_state()

    def _saved(self, place: dict[str, Any]) -> Saved:
        numbers = {k: float(v) for k, v in self.values.items() if not isinstance(v, list)}
        known = {name: value for name, value in numbers.items() if np.isfinite(value)}
        return Saved(place, to_json(self.setup.config), known)

    def _report(self, at: int, metrics: Metrics, clock: "Clock", stopped: bool) -> None:
        config = self.setup.config
        last = stopped or at == config.steps
        if last or at == 1 or at % config.log_every == 0:
            rate = schedule(config.optimizer, config.steps)(metrics.updates)
            values = {**numbers(metrics), "learning_rate": float(rate), **clock.read(at)}
            self._log(at, {**values, "packing": self.data.efficiency})
        if self.evaluate and (at == config.steps or at % config.evaluation.every == 0):
            self._log(at, self.evaluate(self.state.params))

    def _log(self, at: int, values: dict[str, Any]) -> None:
        self.values |= values
        self.tracker.log(at, values)
        self.watcher.show(at, values)

    def _go_back(self, at: int) -> tuple[int, int]:
        """To the newest checkpoint, whose step and number of tokens are returned; the data go on
        behind the bad ones."""
        self.restores += 1
        limit = self.setup.config.faults.restores
        if self.restores > limit:
            raise ZayaError(f"step {at}: too many steps had to be skipped, {limit} times in a row")
        self.checkpoints.wait()
        for leaf in jax.tree.leaves(self.state):
            leaf.delete()  # there may be no memory for another one
        restored = self.checkpoints.restore(self.setup.like)
        if restored is None:
            raise ZayaError(f"step {at}: too many steps had to be skipped before a checkpoint")
        step_number, self.state, saved = restored
        self.watcher.say(f"step {at}: back to the checkpoint of step {step_number}")
        return step_number, int(saved.metrics["tokens"])


class Clock:
    """Speed, since the last reading."""

    def __init__(self, setup: Setup, tokens: int) -> None:
        self._setup, self._steps = setup, 0
        self._begin = self._last = time.perf_counter()
        self.tokens, self._since = tokens, 0

    def count(self, metrics: Metrics) -> None:
        self._steps += 1
        self.tokens += int(metrics.tokens)
        self._since += int(metrics.tokens)

    def read(self, at: int) -> dict[str, float]:
        """Tokens of the run, seconds of this call, tokens/s since the last reading, the utilisation
        of the declared peak, the expected seconds to the end, and bytes of memory."""
        config, now = self._setup.config, time.perf_counter()
        speed = self._since / (now - self._last)
        self._last, self._since = now, 0
        values = {
            "tokens": self.tokens,
            "seconds": now - self._begin,
            "tokens_per_second": speed,
            "seconds_left": (now - self._begin) / self._steps * (config.steps - at),
            "memory": float(memory_in_use()),
        }
        if config.peak_tflops is not None:
            peak = config.peak_tflops * 1e12 * self._setup.mesh.size
            values["mfu"] = speed * training_flops(self._setup.model, config.context) / peak
        return values


def memory_in_use() -> int:
    """Bytes: at most so far, of the first device, or of this process where devices do not count."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    return peak_memory()


def numbers(metrics: Metrics) -> dict[str, Any]:
    """A step's metrics as they are logged."""
    load = metrics.load
    return {
        "loss": float(metrics.loss),
        "perplexity": float(np.exp(metrics.loss)),
        "grad_norm": float(metrics.grad_norm),
        "z_loss": float(metrics.penalty),
        "entropy": float(np.mean(load.entropy)),
        "max_over_mean": float(np.max(load.max_over_mean)),
        "dead_experts": int(np.sum(load.dead)),
        "entropy_by_layer": np.asarray(load.entropy).tolist(),
        "max_over_mean_by_layer": np.asarray(load.max_over_mean).tolist(),
        "dead_experts_by_layer": np.asarray(load.dead).tolist(),
        "trained_tokens": float(metrics.weight),
        "skipped": int(metrics.skipped),
    }


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[int], bool]]:
    """Whether the run was told to stop, by SIGTERM or Ctrl-C, as a function of the step; a second
    Ctrl-C ends the process at once. Several processes stop behind the same step, told by SIGTERM
    alone."""
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    told: list[int] = []

    def tell(number: int, frame: Any) -> None:
        if told and number == signal.SIGINT:
            raise KeyboardInterrupt
        told.append(number)

    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: bool(told)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
