"""Checkpoints of a run: all that the next step depends on, written by Orbax in the background.

    RUN/checkpoints/STEP/weights      the stacked parameters and balancing biases
                        /training     the optimizer's state, counters
                        /run          as JSON: where the data go on, the configuration, the
                                      step's metrics, checksums of all arrays and of itself

A checkpoint has its name when it is complete; what a killed run leaves beside is removed by the
next one. Arrays have the same shapes on every mesh, so any mesh restores them.
"""

import contextlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from convert.folder import CHECKPOINTS
from train.config import CheckpointConfig
from train.step import TrainState
from zaya_jax.errors import CheckpointError

_ITEMS = ("weights", "training", "run")


class Saved(NamedTuple):
    """What a checkpoint holds beside its arrays."""

    data: dict[str, Any]  # where the data go on
    config: dict[str, Any]
    metrics: dict[str, float]


class Checkpoints:
    """Those of one run.

    Args:
      run: its folder.
      config: what is kept.
      say: called with one line about a checkpoint that cannot be used.
    """

    def __init__(
        self, run: Path, config: CheckpointConfig, say: Callable[[str], None] = print
    ) -> None:
        self.folder = (run / CHECKPOINTS).absolute()
        self._say = say
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_kept(config), cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.folder, item_names=_ITEMS, options=options)

    def steps(self) -> list[int]:
        """Of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, saved: Saved) -> None:
        """Begins to write a checkpoint; the state may be donated afterwards. One of that step that
        is there already stays. Raises CheckpointError where this or the one before failed."""
        if step in self.steps():
            return
        sums = np.asarray(checksums(state)).tolist()
        run = {**saved._asdict(), "sums": sums}
        args = ocp.args.Composite(
            weights=ocp.args.StandardSave(state.params),
            training=ocp.args.StandardSave(_without_params(state)),
            run=ocp.args.JsonSave({**run, "sum": _sum(run)}),
        )
        with self._writing():
            self._manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Until everything is on disk. Raises CheckpointError where that failed."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits as `wait` does, and raises as it does."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax raises whatever its storage raises
            raise CheckpointError(f"{self.folder}: cannot be written ({_line(error)})") from None

    def newest_config(self) -> dict[str, Any] | None:
        """The configuration in the newest checkpoint that says one; None where there is none."""
        with self._reader() as reader:
            for step in reversed(self.steps()):
                try:
                    args = ocp.args.Composite(run=ocp.args.JsonRestore())
                    config: dict[str, Any] = reader.restore(step, args=args)["run"]["config"]
                    return config
                except Exception:  # restoring will say what is wrong with it
                    continue
        return None

    def restore(self, like: TrainState) -> tuple[int, TrainState, Saved] | None:
        """The newest checkpoint that is undamaged. Newer ones that are damaged are set aside, with
        a line about each.

        Args:
          like: `jax.ShapeDtypeStruct` with the shardings wanted, in place of the arrays.

        Returns:
          Its step, the state, and what was saved beside it; None where the run has no checkpoint.

        Raises:
          CheckpointError: there are checkpoints, but all are damaged; they stay where they are.
        """
        self.wait()
        damaged: list[int] = []
        with self._reader() as reader:
            for step in reversed(self.steps()):
                try:
                    found = _restored(reader, step, like)
                except CheckpointError as error:
                    self._say(f"checkpoint {self.folder / str(step)} is damaged ({error})")
                    damaged.append(step)
                    continue
                self._set_aside(damaged)
                return step, *found
        if damaged:
            raise CheckpointError(f"{self.folder}: every checkpoint is damaged")
        return None

    def _reader(self) -> ocp.CheckpointManager:
        """Reads without waiting for other processes: a file that is damaged may be read by one
        process alone, which would leave the others waiting."""
        own = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(own, {own}, f"reader-{own}")
        options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=alone)
        return ocp.CheckpointManager(self.folder, item_names=_ITEMS, options=options)

    def _set_aside(self, steps: list[int]) -> None:
        """Out of the way of the next checkpoints of these steps, but there to be looked at."""
        if steps and jax.process_index() == 0:
            for step in steps:
                aside = self.folder.parent / f"damaged-{step}"
                shutil.rmtree(aside, ignore_errors=True)
                (self.folder / str(step)).rename(aside)
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()


def _restored(
    reader: ocp.CheckpointManager, step: int, like: TrainState
) -> tuple[TrainState, Saved]:
    """One checkpoint, on all processes; CheckpointError, on all of them too, if one of them cannot
    read it, or if it has other contents than were written."""
    problem = ""
    try:
        state, run = _read(reader, step, like)
    except Exception as error:  # of a damaged file, Orbax and TensorStore raise anything
        problem = _line(error)
    if multihost_utils.process_allgather(np.bool_(bool(problem))).any():
        raise CheckpointError(problem or "another process cannot read it")
    paths, _ = jax.tree_util.tree_flatten_with_path(like)
    found = np.asarray(checksums(state)).tolist()
    for (path, _), was, now in zip(paths, run.pop("sums"), found, strict=True):
        if was != now:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise CheckpointError(f"array {name} has other contents than were written")
    return state, Saved(**run)


def _read(
    reader: ocp.CheckpointManager, step: int, like: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """This process's part of the arrays, and what stands beside them."""
    items = reader.restore(
        step,
        args=ocp.args.Composite(
            weights=ocp.args.StandardRestore(like.params),
            training=ocp.args.StandardRestore(_without_params(like)),
            run=ocp.args.JsonRestore(),
        ),
    )
    run = items["run"]
    if run.pop("sum") != _sum(run):
        raise CheckpointError("what stands beside the arrays is not what was written")
    return TrainState(params=items["weights"], **items["training"]), run


def _sum(values: dict[str, Any]) -> int:
    """Of what JSON makes of them."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _without_params(state: TrainState) -> dict[str, Any]:
    return {name: leaf for name, leaf in state._asdict().items() if name != "params"}


def _kept(config: CheckpointConfig) -> Any:
    policies = ocp.checkpoint_managers.preservation_policy
    kept: list[Any] = [policies.LatestN(config.keep)]
    if config.milestone is not None:
        kept.append(policies.EveryNSteps(config.milestone))
    return policies.AnyPreservationPolicy(kept)


@jax.jit
def checksums(tree: Any) -> jax.Array:
    """A uint32 for each leaf, of its bits and their places; the same on every mesh."""
    return jnp.stack([_checksum(leaf) for leaf in jax.tree.leaves(tree)])


def _checksum(leaf: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)


def _line(error: Exception) -> str:
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:300]
