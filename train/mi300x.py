"""Checks and measures everything that needs an AMD GPU, on a machine that has one: `make mi300x`.

Meant to take about ten minutes, which nobody has timed, and writes one JSON file that can be
attached to a pull request. Elsewhere it skips what needs a GPU, and says so.
"""

import dataclasses
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from pallas_kernels import selection
from pallas_kernels.launch import architecture
from pallas_kernels.moe import api as moe
from pallas_kernels.rocm.cases import TOKENS, ZAYA1_8B, Case, cases
from train.course.data import WRITTEN, write
from train.course.run import configuration
from train.metrics import FILE, read
from train.run import Silent, train
from zaya_jax.loading import load
from zaya_jax.model import forward, head

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
PACKAGES = ("jax", "jaxlib", "jax-rocm7-plugin", "jax-rocm7-pjrt", "jax-cuda12-plugin")
LOGITS, RESULTS = 1e-4, 3e-2  # differences allowed, of the largest value
REPETITIONS = 20  # that must give the same bits: races show so
COUNTS = (8, 512, 8192, 32768, 131072)  # of tokens, that experts are timed with
STEPS = 100

Details = dict[str, Any]


def parity(kernels: Literal["xla", "pallas"]) -> Details:
    """Golden logits of PyTorch's model, in float32."""
    from safetensors.numpy import load_file

    worst = {}
    for folder in sorted(file.parent for file in GOLDEN.glob("*/reference.safetensors")):
        model, reference = load(folder, "float32"), load_file(folder / "reference.safetensors")
        config = dataclasses.replace(model.config, kernels=kernels)
        ids, lengths = (jnp.asarray(reference[name]) for name in ("ids", "lengths"))
        out = forward(model.params, config, ids, new_lengths=lengths)
        rows = np.asarray(head(model.params, config, out.hidden))
        logits = np.concatenate([row[:n] for row, n in zip(rows, lengths.tolist(), strict=True)])
        worst[folder.name] = _distance(logits, reference["logits"])
    return {"passed": max(worst.values()) < LOGITS, "differences": worst}


def kernel(case: Case) -> Details:
    """One op at the size of the 8B model beside its XLA reference, again and again."""
    args = case.example()
    ours, theirs = jax.jit(case.kernels), jax.jit(case.reference)
    first = jax.block_until_ready(ours(*args))
    expected = jax.block_until_ready(theirs(*args))
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(expected), strict=True)
    difference = max(_distance(a, b) for a, b in pairs)
    again = [jax.block_until_ready(ours(*args)) for _ in range(REPETITIONS)]
    repeats = all(
        bool(jnp.array_equal(a, b))
        for result in again
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(result), strict=True)
    )
    seconds, reference = _seconds(ours, args), _seconds(theirs, args)
    return {
        "passed": repeats and difference < RESULTS,
        "difference": difference,
        "same_bits": repeats,
        "seconds": seconds,
        "xla_seconds": reference,
        "speedup": reference / seconds,
    }


def by_tokens() -> Details:
    """Our mixture of experts beside the library's grouped products: seconds of a forward pass of
    the 8B model's experts, for some numbers of tokens. `moe.api.LIBRARY` should be where they
    cross."""
    (case,) = [c for c in cases(ZAYA1_8B, "moe") if c.name == "moe forward"]
    seconds = {}
    for tokens in COUNTS:
        resized = [
            a.update(shape=(tokens, *a.shape[1:])) if a.shape[0] == TOKENS else a for a in case.args
        ]
        args = case._replace(args=tuple(resized)).example()
        seconds[tokens] = {
            name: _seconds(jax.jit(partial(moe.moe, implementation=name)), args)
            for name in ("pallas", "ragged")
        }
    return {"passed": True, "seconds": seconds}


def training(steps: int = STEPS) -> Details:
    """The first phase of nano's course, for some steps: the loss must fall."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        write(out / "data", documents={name: 500 for name in WRITTEN})
        config = configuration("pretrain", out)
        config = dataclasses.replace(config, steps=steps, log_every=max(steps // 10, 1))
        train(config, out / "pretrain", Silent())
        records = [line for line in read(out / "pretrain" / FILE) if "loss" in line]
    losses = [line["loss"] for line in records]
    return {
        "passed": losses[-1] < 0.7 * losses[0],
        "losses": losses,
        "tokens_per_second": records[-1]["tokens_per_second"],
    }


def bench(folder: Path) -> Details:
    """`zaya bench` of the small and the medium model, in bfloat16."""
    file = folder / "bench.json"
    command = [sys.executable, "-m", "zaya_jax.cli.main", "bench", "--dtypes", "bfloat16"]
    options = ["--platform", "rocm", "--repeats", "2", "--json", str(file)]
    ended = subprocess.run([*command, *options], check=False)
    measured = json.loads(file.read_text()) if file.exists() else None
    return {"passed": ended.returncode == 0, "measured": measured}


def _distance(ours: Any, theirs: Any) -> float:
    """The largest difference, of the largest value."""
    ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))


def _seconds(f: Callable[..., Any], args: Any, runs: int = 10) -> float:
    """The median time of some runs, after one that compiles."""
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def _machine() -> Details:
    device = jax.devices()[0]
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=GOLDEN.parent
    )
    return {
        "devices": [d.device_kind for d in jax.devices()],
        "architecture": architecture(),
        "platform": device.client.platform_version,
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def main(out: Path = Path("mi300x.json")) -> None:
    """Runs every check, and writes what it found; exit code 1 if one failed.

    Args:
      out: the report.
    """
    try:
        selection.requested()
    except ValueError as error:
        sys.exit(str(error))
    on_amd = (architecture() or "").startswith("gfx")
    tasks: list[tuple[str, bool, Callable[[], Details]]] = [
        ("parity of XLA", False, lambda: parity("xla")),
        ("parity of our kernels", True, lambda: parity("pallas")),
        *[(case.name, True, lambda case=case: kernel(case)) for case in cases(ZAYA1_8B)],
        ("experts by tokens", True, by_tokens),
        ("training", False, training),
        ("zaya bench", True, lambda: bench(out.resolve().parent)),
    ]
    report: dict[str, Any] = {"machine": _machine(), "checks": {}}
    for name, needs_gpu, task in tasks:
        begin = time.perf_counter()
        if needs_gpu and not on_amd:
            details: Details = {"skipped": "needs an AMD GPU"}
        else:
            try:
                details = task()
            except Exception as error:  # the rest of the report is worth having
                details = {"passed": False, "error": f"{type(error).__name__}: {error}"[:1000]}
        seconds = time.perf_counter() - begin
        report["checks"][name] = {**details, "took_seconds": round(seconds, 1)}
        state = "skipped" if "skipped" in details else "ok" if details["passed"] else "FAILED"
        print(f"{name}: {state} ({seconds:.0f} s)", flush=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{out}: {'on ' + str(architecture()) if on_amd else 'NOT on an AMD GPU'}")
    sys.exit(any(check.get("passed") is False for check in report["checks"].values()))


if __name__ == "__main__":
    tyro.cli(main)
