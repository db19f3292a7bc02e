"""`zaya plot`: pictures of a run."""

import dataclasses
from pathlib import Path

import tyro

from zaya_jax.cli.output import console
from zaya_jax.errors import ZayaError


@dataclasses.dataclass
class Plot:
    """Write the curves of a run (loss, gradient, balance, speed) as PNG files into RUN/plots."""

    path: tyro.conf.Positional[Path]
    """Folder of the run."""

    def run(self) -> None:
        try:
            from train.plotting import plot

            files = plot(self.path)
        except ModuleNotFoundError as error:
            raise ZayaError(
                f"pictures need the extra `train`: pip install 'zaya-jax[train]' "
                f"(there is no {error.name})"
            ) from None
        for file in files:
            console.print(str(file), markup=False, highlight=False, soft_wrap=True)
