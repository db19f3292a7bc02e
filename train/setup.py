"""What a configuration makes of the machine it runs on."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from convert.folder import CHECKPOINTS, CONFIG, find, has_checkpoint
from train import balancing, optimizer, step
from train.config import ModelConfig, TrainConfig, for_run, new_model, to_json
from train.step import TrainState
from zaya_jax.config import ZayaConfig
from zaya_jax.errors import CheckpointError, ConfigError
from zaya_jax.layouts import stack
from zaya_jax.loading import NANO, load, read_config
from zaya_jax.model import Params
from zaya_jax.sharding import check_batch, check_mesh, make_mesh
from zaya_jax.text.tokenizer import Tokenizer

LOCK = "lock"
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # of file systems without any
# What may differ when a run goes on.
FREE = {
    "mesh",
    "accumulate",
    "checkpoint",
    "evaluation",
    "faults",
    "trackers",
    "log_every",
    "peak_tflops",
    "steps",
}


class Setup(NamedTuple):
    """A run, ready to begin."""

    config: TrainConfig
    model: ZayaConfig
    tokenizer: Tokenizer
    mesh: Mesh
    rule: optax.GradientTransformation
    balancer: optax.GradientTransformation
    like: TrainState  # shapes and shardings


class Plan(NamedTuple):
    """The optimizers of weights and of balancing biases, and the state's shapes and shardings."""

    rule: optax.GradientTransformation
    balancer: optax.GradientTransformation
    like: TrainState


def prepare(config: TrainConfig, run: Path | None = None) -> Setup:
    """Reads configurations and the tokenizer, but no weights.

    Args:
      config: of the run.
      run: its folder; once it has a checkpoint, what it started from may be gone, and so may the
        tokenizer.

    Raises:
      ZayaError: the configuration does not fit the weights, the tokenizer or the devices.
    """
    begun = run if run is not None and has_checkpoint(run) else None
    start = begun or config.start_from
    folder = None if start is None else find(start)
    model = for_run(config, new_model(config) if folder is None else read_config(folder))
    place = Path(config.tokenizer) if config.tokenizer and begun is None else folder or NANO
    tokenizer = Tokenizer.from_folder(place, model)
    if tokenizer is None:
        raise ConfigError(f"tokenizer: {place} has none")
    sizes = config.mesh
    mesh = make_mesh(sizes.data, sizes.expert, sizes.context)
    if (used := len({d.process_index for d in mesh.devices.flat})) < jax.process_count():
        raise ConfigError(
            f"a mesh of {mesh.size} devices lies on {used} of {jax.process_count()} processes: "
            f"there are {jax.device_count()} devices for mesh.data, mesh.expert and mesh.context"
        )
    return Setup(config, model, tokenizer, mesh, *plan(config, model, mesh))


def plan(config: TrainConfig, model: ZayaConfig, mesh: Mesh) -> Plan:
    """What a run keeps, on a mesh that `config.mesh` describes, whose devices need not be there.

    Raises:
      ConfigError: the model or its batches cannot be split evenly over the mesh.
    """
    check_mesh(model, mesh)
    check_batch((config.rows, config.context), config.accumulate, model, mesh)
    full = config.mesh.full_sharding
    params = jax.eval_shape(lambda: step.new_params(model, 0, False))
    rule = optimizer.build(
        config.optimizer, config.steps, mesh=mesh, full_sharding=full, kernels=model.kernels
    )
    balancer = balancing.optimizer(config.balancing)
    like = jax.eval_shape(lambda p: step.start(p, rule, balancer), params)
    shardings = step.state_shardings(like, rule, mesh, full)
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, shardings
    )
    return Plan(rule, balancer, placed)


def _course_of(values: dict[str, Any]) -> dict[str, Any]:
    """What the course of a run depends on."""
    data = {k: v for k, v in values["data"].items() if k not in ("workers", "cache")}
    return {**{k: v for k, v in values.items() if k not in FREE}, "data": data}


def first_state(setup: Setup) -> TrainState:
    """New weights, or those to start from, spread over the mesh."""
    shardings = jax.tree.map(lambda x: x.sharding, setup.like)

    def begin(params: Params) -> TrainState:
        return step.start(params, setup.rule, setup.balancer)

    if setup.config.start_from is None:
        by_width = setup.config.model.init == "fan_in"

        def new() -> TrainState:
            return begin(step.new_params(setup.model, setup.config.seed, by_width))

        return jax.jit(new, out_shardings=shardings)()
    mesh = setup.mesh if setup.mesh.size > 1 else None
    loaded = load(setup.config.start_from, jnp.float32, mesh).params

    def stacked(params: Params) -> TrainState:
        return begin(stack(params, setup.model))

    return jax.jit(stacked, out_shardings=shardings)(loaded)


def check_tokenizer(config: TrainConfig) -> None:
    """Raises ConfigError where a model of another size than the embedded one would begin with the
    embedded one's tokenizer."""
    named = config.tokenizer or config.start_from
    if named is None and config.model.preset != ModelConfig.preset:
        raise ConfigError(
            f"tokenizer: must name the folder of one for new weights of {config.model.preset}"
        )


def check_alike(config: TrainConfig, data: dict[str, Any]) -> None:
    """Raises ConfigError where the processes of a run were given different configurations or
    data."""
    if jax.process_count() == 1:
        return
    facts = json.dumps([_course_of(to_json(config)), data], sort_keys=True).encode()
    own = np.frombuffer(hashlib.sha256(facts).digest(), np.uint32)
    if (multihost_utils.process_allgather(own) != own).any():
        raise ConfigError("the processes of this run have different configurations or data")


def check_same(config: TrainConfig, before: dict[str, Any] | None, run: Path) -> None:
    """Raises ConfigError where a run was begun with another configuration, but for what may
    differ."""
    if before is None:
        return
    before, now = _course_of(before), _course_of(to_json(config))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ConfigError(
                f"{run} was begun with {name} = {before.get(name)!r}, not {now.get(name)!r}: give "
                "another --out, or the same configuration"
            )


@contextlib.contextmanager
def run_folder(run: Path) -> Iterator[None]:
    """The folder of a run, made if there is none, for this run alone.

    Raises:
      CheckpointError: it cannot be made, holds something else, or another process trains there;
        or a file could not be read or written inside the block, as on a full disk.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in run.iterdir()}
        if names - {LOCK} and CHECKPOINTS not in names:
            raise CheckpointError(f"{run}: holds {min(names)!r}, no run: give it its own")
        lock = open(run / LOCK, "w")  # noqa: SIM115
    except OSError as error:
        raise CheckpointError(f"{run}: cannot be written ({error.strerror})") from None
    with lock:
        if jax.process_index() == 0:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(f"{run}: another process trains there") from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise CheckpointError(f"{run}: {error.strerror}") from None
        try:
            yield
        except BrokenPipeError:  # whoever reads what is printed
            raise
        except OSError as error:
            reason = error.strerror or error
            raise CheckpointError(f"{error.filename or run}: {reason}") from None


def write_model(setup: Setup, run: Path) -> None:
    """The model's config and tokenizer, which all checkpoints of the run share. One that is no ZAYA
    has no config, and so nothing takes it for a checkpoint."""
    if jax.process_index() == 0:
        run.mkdir(parents=True, exist_ok=True)
        files = dict(setup.tokenizer.files)
        if setup.model.is_zaya:
            files[CONFIG] = json.dumps(setup.model.to_hf(), indent=2).encode()
        for name, content in files.items():
            if (run / name).is_file() and (run / name).read_bytes() == content:
                continue
            unfinished = run / f".{name}.unfinished"
            unfinished.write_bytes(content)
            os.replace(unfinished, run / name)
