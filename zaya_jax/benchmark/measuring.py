"""What our measuring processes share: repeated timing, and one JSON object a line."""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zaya_jax.memory import peak_memory


def measure(case: str, tokens: int, run: Callable[[], float], repeats: int) -> None:
    """Reports a case's speed.

    Args:
      case: its name.
      tokens: that one run reads or decodes.
      run: does the work and returns its seconds. The first run, which also compiles, is not among
        those that count.
      repeats: runs that count.
    """
    begin = time.perf_counter()
    run()
    warm_up = time.perf_counter() - begin
    before, begin = _busy_elsewhere(), time.perf_counter()
    times = [run() for _ in range(repeats)]
    others = (_busy_elsewhere() - before) / (time.perf_counter() - begin)
    report(
        variant="zaya-jax",
        case=case,
        tokens_per_second=round(tokens / statistics.median(times), 2),
        best=round(tokens / min(times), 2),
        seconds=round(statistics.median(times), 4),
        other_processes=round(others, 2),
        warm_up=round(warm_up, 2),
    )


def measure_steps(
    variant: str, tokens: int, step: Callable[[], tuple[float, float]], steps: int
) -> None:
    """Reports the speed of training.

    Args:
      variant: its name.
      tokens: of one step.
      step: takes one and returns its seconds and loss. The first one is not among those
        that count.
      steps: that count.
    """
    warm_up, loss = step()
    before, begin = _busy_elsewhere(), time.perf_counter()
    times, losses = zip(*(step() for _ in range(steps)), strict=True)
    others = (_busy_elsewhere() - before) / (time.perf_counter() - begin)
    report(
        variant=variant,
        case="training",
        tokens_per_second=round(tokens / statistics.median(times), 2),
        best=round(tokens / min(times), 2),
        seconds=round(statistics.median(times), 4),
        other_processes=round(others, 2),
        warm_up=round(warm_up, 2),
        losses=[loss, *losses],
        peak_rss=peak_memory(),
    )


def report(**values: Any) -> None:
    """Prints them for `processes.run`."""
    print(json.dumps(values), flush=True)


def _busy_elsewhere() -> float:
    """CPU seconds that other processes than this one have used since some moment; 0 where the
    system does not tell."""
    try:
        user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    except OSError:
        return 0.0
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - time.process_time()
