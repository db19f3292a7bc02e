"""Pictures of a run's metrics."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.metrics import FILE, read
from zaya_jax.errors import InputError

# A picture each: its name, the label of its axis, and the numbers in it.
PLOTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "loss": ("nats a token", ("loss", "held_out_loss")),
    "gradient": ("norm before clipping", ("grad_norm",)),
    "learning_rate": ("learning rate", ("learning_rate",)),
    "balance": ("normalised entropy of the experts' load", ("entropy", "entropy_by_layer")),
    "speed": ("tokens/s", ("tokens_per_second",)),
}


def plot(run: Path) -> list[Path]:
    """Writes RUN/plots/NAME.png for each of `PLOTS` that the run has numbers for; their paths.

    Raises:
      InputError: the folder has no metrics.
    """
    records = read(run / FILE)
    if not records:
        raise InputError(f"{run}: has no {FILE} with metrics of a run")
    folder = run / "plots"
    folder.mkdir(exist_ok=True)
    written = []
    for name, (label, values) in PLOTS.items():
        if any(value in record for record in records for value in values):
            written.append(_picture(folder / f"{name}.png", label, values, records))
    return written


def _picture(
    file: Path, label: str, names: Sequence[str], records: Sequence[dict[str, Any]]
) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in names:
        points = {r["step"]: r[name] for r in records if name in r}  # the last of a step counts
        if not points:
            continue
        if isinstance(next(iter(points.values())), list):
            axes.plot(list(points), list(points.values()), color="0.8", linewidth=0.8, zorder=0)
        else:
            axes.plot(list(points), list(points.values()), label=name.replace("_", " "))
    axes.set(xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    return file
