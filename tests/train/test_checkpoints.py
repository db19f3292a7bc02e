"""Checkpoints of a run: whole, undamaged, or not there; whenever the process is killed."""

import itertools
import multiprocessing
import os
import resource
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_equal
from killed import kill_at

from convert.folder import CHECKPOINTS
from train.checkpoints import Checkpoints, Saved, checksums
from train.config import CheckpointConfig
from train.step import Health, TrainState
from zaya_jax.errors import CheckpointError


def state_of(step: int) -> TrainState:
    numbers = np.random.default_rng(step).standard_normal((7, 5)).astype(np.float32)
    params = {"params": {"layers": {"w": jnp.asarray(numbers)}}, "balancing": {"b": jnp.ones(3)}}
    moments = ({"mu": jnp.asarray(numbers * 2)}, jnp.int32(step))
    health = Health(jnp.float32(step), jnp.int32(step), jnp.int32(0), jnp.int32(0))
    return TrainState(jnp.int32(step), params, moments, (jnp.zeros(3),), health)


def saved(step: int) -> Saved:
    return Saved({"position": step}, {"rows": 8}, {"loss": 1.0 / step})


def like() -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state_of(1))


def forked():
    """Processes that have imported what they need, but in which JAX has not started."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.checkpoints", "killed", "test_checkpoints"])
    return context


def opened(run: Path, said: list[str] | None = None, **config) -> Checkpoints:
    return Checkpoints(run, CheckpointConfig(**config), (said if said is not None else []).append)


def write(run: Path, *steps: int, **config) -> None:
    checkpoints = opened(run, **config)
    for step in steps:
        checkpoints.save(step, state_of(step), saved(step))
    checkpoints.wait()
    checkpoints.close()


def assert_restores(run: Path, step: int, said: list[str] | None = None) -> None:
    checkpoints = opened(run, said)
    at, state, beside = checkpoints.restore(like())
    assert at == step
    assert_trees_all_equal(state, state_of(step))
    assert beside == saved(step)
    checkpoints.save(step + 1, state_of(step + 1), saved(step + 1))
    checkpoints.wait()
    assert checkpoints.steps()[-1] == step + 1
    checkpoints.close()


def test_a_checkpoint_gives_back_what_was_saved_bit_for_bit(tmp_path):
    write(tmp_path, 1, 2)
    assert_restores(tmp_path, 2)


def test_a_run_without_checkpoints_restores_nothing(tmp_path):
    assert opened(tmp_path).restore(like()) is None


def test_the_newest_and_the_milestones_are_kept(tmp_path):
    write(tmp_path, *range(1, 10), every=1, keep=2, milestone=4)
    assert opened(tmp_path).steps() == [4, 8, 9]


def test_saving_does_not_wait_for_arrays_that_the_next_step_takes(tmp_path):
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    checkpoints, state = opened(tmp_path), state_of(1)
    checkpoints.save(1, state, saved(1))
    for _ in range(20):
        state = advance(state)
    checkpoints.wait()
    checkpoints.close()
    assert_restores(tmp_path, 1)


def test_the_configuration_is_read_without_the_arrays(tmp_path):
    write(tmp_path, 3)
    assert opened(tmp_path).newest_config() == {"rows": 8}


def files_of(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file() and f.stat().st_size)


def spoil(file: Path, damage: str) -> None:
    content = file.read_bytes()
    middle = len(content) // 2
    if damage == "remove":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:middle])
    else:
        file.write_bytes(content[:middle] + bytes(b ^ 0xFF for b in content[middle:]))


def test_damage_anywhere_falls_back_to_the_checkpoint_before(tmp_path):
    """Every file of a checkpoint in turn: cut off, overwritten in the middle, or gone."""
    whole = tmp_path / "whole"
    write(whole, 1, 2)
    files = [file.relative_to(whole) for file in files_of(whole / CHECKPOINTS / "2")]
    outcomes = []
    for file, damage in itertools.product(files, ("cut", "overwrite", "remove")):
        run = tmp_path / "damaged"
        shutil.copytree(whole, run)
        spoil(run / file, damage)
        said: list[str] = []
        checkpoints = opened(run, said)
        at, state, beside = checkpoints.restore(like())
        assert_trees_all_equal(state, state_of(at))
        assert beside == saved(at)
        if at == 1:
            assert "is damaged" in said[0] and (run / "damaged-2").is_dir()
        else:
            assert not said  # Orbax writes some files that nobody needs
        checkpoints.close()
        shutil.rmtree(run)
        outcomes.append(at)
    assert outcomes.count(1) >= 15


def _on_a_full_disk(run: str) -> None:
    """In a process of its own, whose files cannot grow; its exit code is 0 if that was noticed."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    checkpoints = opened(Path(run))
    _, largest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, largest))
    try:
        for step in (2, 3, 4):
            checkpoints.save(step, state_of(step), saved(step))
    except CheckpointError as error:
        os._exit(0 if "checkpoints: cannot be written (" in str(error) else 2)
    os._exit(1)


def test_a_full_disk_is_noticed_by_the_next_checkpoint(tmp_path):
    write(tmp_path, 1)
    process = forked().Process(target=_on_a_full_disk, args=(str(tmp_path),))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert_restores(tmp_path, 1)


def test_where_all_are_damaged_nothing_begins_anew(tmp_path):
    write(tmp_path, 1)
    for file in files_of(tmp_path / CHECKPOINTS / "1"):
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        opened(tmp_path).restore(like())
    assert (tmp_path / CHECKPOINTS / "1").is_dir()


def test_checksums_see_one_bit_and_the_order():
    tree = {"a": jnp.arange(6, dtype=jnp.float32).reshape(2, 3), "b": jnp.int32(5)}
    sums = checksums(tree)
    assert sums.dtype == jnp.uint32 and sums.shape == (2,)
    flipped = np.asarray(tree["a"]).copy()
    flipped.view(np.uint32)[1, 2] ^= 1
    assert checksums({**tree, "a": jnp.asarray(flipped)})[0] != sums[0]
    assert checksums({**tree, "a": tree["a"][::-1]})[0] != sums[0]
    assert checksums({**tree, "b": jnp.int32(6)})[1] != sums[1]


def _killed_while_writing(run: str, limit: int) -> None:
    """In a process of its own: step 1 is safe, then it is killed while it writes step 2."""
    write(Path(run), 1, keep=1)
    seen = kill_at(str(Path(run) / CHECKPOINTS), limit)
    write(Path(run), 2, keep=1)
    Path(run, "accesses").write_text(str(len(seen)))
    os._exit(0)


@pytest.mark.slow
def test_a_kill_at_any_stage_of_writing_loses_nothing(tmp_path):
    """keep=1: the older checkpoint is removed while the newer one is made."""
    processes = forked()

    def run_until(limit: int) -> tuple[Path, int | None]:
        run = tmp_path / str(limit)
        run.mkdir()
        process = processes.Process(target=_killed_while_writing, args=(str(run), limit))
        process.start()
        process.join()
        return run, process.exitcode

    whole, code = run_until(0)
    assert code == 0
    count = int((whole / "accesses").read_text())
    assert count > 40
    for limit in range(1, count + 1):
        run, code = run_until(limit)
        assert code == -signal.SIGKILL, limit
        checkpoints = opened(run)
        at, state, beside = checkpoints.restore(like())
        assert at in (1, 2)
        assert_trees_all_equal(state, state_of(at))
        assert beside == saved(at)
        checkpoints.close()
        assert_restores(run, at)


def test_a_changed_digit_beside_the_arrays_is_damage(tmp_path):
    """Valid JSON, and the data would go on elsewhere."""
    write(tmp_path, 1, 2)
    changed = 0
    for file in files_of(tmp_path / CHECKPOINTS / "2" / "run"):
        content = file.read_bytes()
        other = content.replace(b'"rows": 8', b'"rows": 9')
        changed += other != content
        file.write_bytes(other)
    assert changed == 1
    said: list[str] = []
    at, *_ = opened(tmp_path, said).restore(like())
    assert at == 1 and "beside the arrays" in said[0]
