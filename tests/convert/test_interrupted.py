"""A conversion that is refused or interrupted loses nothing and leaves nothing that looks whole."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import checkpoint, tensors
from helpers import TINY

import zaya_jax
from convert import conversion, safetensors_write, writing
from convert.checkpoint import layout_of, open_checkpoint
from convert.conversion import convert
from convert.verify import compare
from zaya_jax import CheckpointError

LAYOUTS = ("hf", "hf-legacy", "orbax")


def test_an_existing_checkpoint_is_replaced_only_when_asked(tmp_path):
    source = checkpoint(tmp_path / "source", TINY)
    convert(source, tmp_path / "out", "hf")
    with pytest.raises(CheckpointError, match=r"out: exists; say --overwrite to replace"):
        convert(source, tmp_path / "out", "orbax")
    convert(source, tmp_path / "out", "orbax", overwrite=True)
    assert layout_of(tmp_path / "out") == "orbax"
    convert(tmp_path / "out", tmp_path / "out", "hf-legacy", overwrite=True)  # in its own place
    assert layout_of(tmp_path / "out") == "hf-legacy" and not compare(source, tmp_path / "out")
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match=r"holds 'thesis\.txt' too"):
        convert(source, tmp_path / "out", "hf", overwrite=True)
    (tmp_path / "out" / "thesis.txt").rename(tmp_path / "thesis.txt")
    (tmp_path / "out" / "weights").mkdir()
    (tmp_path / "thesis.txt").rename(tmp_path / "out" / "weights" / "thesis.txt")
    assert layout_of(tmp_path / "out") == "hf-legacy"
    with pytest.raises(CheckpointError, match="holds 'weights' too"):
        convert(source, tmp_path / "out", "hf", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_disk_leaves_the_old_checkpoint(monkeypatch, tmp_path, layout):
    source = checkpoint(tmp_path / "source", TINY)
    convert(source, tmp_path / "out", "hf")
    before = tensors(tmp_path / "out")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot be written.*No space left on device"):
        convert(source, tmp_path / "out", layout, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    assert tensors(tmp_path / "out") == before
    monkeypatch.undo()
    monkeypatch.setattr(
        conversion.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 9)
    )
    with pytest.raises(CheckpointError, match=r"needs 0\.0 GB, only 0\.0 GB are free"):
        convert(source, tmp_path / "new", layout)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("layout", ("hf-legacy", "orbax"))
def test_a_file_that_cannot_be_read_is_named_with_its_tensor(monkeypatch, tmp_path, layout):
    """It goes away, or is cut, when its header has been read and before its tensors are."""
    source = checkpoint(tmp_path / "source", TINY)
    file = source / "model.safetensors"
    data = file.read_bytes()

    for harm, reason in (
        (file.unlink, r"tensor 'model\..*' cannot be read \(No such"),
        (lambda: file.write_bytes(data[: len(data) // 2]), r"ends within tensor 'model\."),
    ):
        with pytest.raises(CheckpointError, match=rf"source/model\.safetensors: {reason}"):
            monkeypatch.setattr(conversion, "read_carried", lambda _, harm=harm: (harm(), {})[1])
            convert(source, tmp_path / "out", layout)
        file.write_bytes(data)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_disk_that_refuses_in_the_middle_is_one_line(tmp_path, layout):
    """Files may have 30,000 bytes: the same as a disk that fills up, to those who write them."""
    source = checkpoint(tmp_path / "source", TINY)
    convert(source, tmp_path / "out", "hf")
    code = """
import resource, sys
from zaya_jax.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
main(["convert", *sys.argv[1:], "--overwrite"])
"""
    arguments = [str(source), str(tmp_path / "out"), "--to", layout]
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    progress, line = ended.stderr.splitlines()
    assert progress == "Converting ..." and "cannot be written" in line
    assert "File too large" in line and str(tmp_path) in line
    assert ('Error writing "' if layout == "orbax" else "tensor 'model.") in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    assert not compare(source, tmp_path / "out")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_conversion_leaves_nothing_that_looks_complete(tmp_path, layout):
    """SIGKILL in the middle of writing; the next run cleans up and completes."""
    source = checkpoint(tmp_path / "source", TINY)
    script = """
import sys, time
from convert.conversion import convert
def slow(done, total):
    print(done, flush=True)
    time.sleep(0.05)
convert(*sys.argv[1:], on_progress=slow)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(source), str(tmp_path / "out"), layout],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir() if p != source] == [".out.unfinished"]
    convert(source, tmp_path / "out", layout)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    assert not compare(source, tmp_path / "out")


def test_a_checkpoint_that_was_being_replaced_is_put_back(tmp_path):
    """Killed between the two renames."""
    source = checkpoint(tmp_path / "source", TINY)
    convert(source, tmp_path / "out", "hf")
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / "out").rename(tmp_path / ".out.unfinished" / "old")
    with pytest.raises(CheckpointError, match="exists; say --overwrite"):
        convert(source, tmp_path / "out", "orbax")
    assert not compare(source, tmp_path / "out")


def test_an_in_place_conversion_that_was_killed_is_recovered(tmp_path):
    """Between the two renames, where the source itself is what was moved away."""
    place = checkpoint(tmp_path / "place", TINY)
    shutil.copytree(place, tmp_path / "same")
    (tmp_path / ".place.unfinished").mkdir()
    place.rename(tmp_path / ".place.unfinished" / "old")
    with pytest.raises(CheckpointError, match=r"it is in .*\.place\.unfinished/old"):
        zaya_jax.load(place)
    convert(place, place, "orbax", overwrite=True)
    assert layout_of(place) == "orbax" and not compare(tmp_path / "same", place)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["place", "same"]


def test_a_checkpoint_that_was_being_replaced_outlives_a_folder_made_in_its_place(tmp_path):
    source = checkpoint(tmp_path / "source", TINY)
    shutil.copytree(source, tmp_path / "out")
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / "out").rename(tmp_path / ".out.unfinished" / "old")
    (tmp_path / "out").mkdir()  # as a job script does
    with pytest.raises(CheckpointError, match="exists; say --overwrite"):
        convert(source, tmp_path / "out", "orbax")
    assert not compare(source, tmp_path / "out")


def test_what_is_left_of_an_unfinished_run_is_no_source_for_the_same_place(tmp_path):
    made = checkpoint(tmp_path / ".out.unfinished" / "new", TINY)
    with pytest.raises(CheckpointError, match="would be removed as an unfinished"):
        convert(made, tmp_path / "out", "hf")
    assert open_checkpoint(made)


def test_two_runs_cannot_write_to_the_same_place(tmp_path):
    first, second = (checkpoint(tmp_path / n, TINY) for n in ("first", "second"))

    def meanwhile(*_):
        with pytest.raises(CheckpointError, match="another process is writing there"):
            convert(second, tmp_path / "out", "orbax")

    convert(first, tmp_path / "out", "hf", on_progress=meanwhile)
    assert layout_of(tmp_path / "out") == "hf" and not compare(first, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "out", "second"]


@pytest.mark.parametrize(
    "files",
    [
        ["mine.safetensors"],
        ["model.safetensors"],  # without a config, anybody's
        ["config.json", "mine.safetensors"],
        ["config.json", "model.safetensors/thesis.txt"],
        ["config.json/thesis.txt"],
        ["config.json", "weights/_CHECKPOINT_METADATA", "weights/thesis.txt"],
    ],
    ids=" ".join,
)
def test_nothing_that_may_not_be_a_checkpoint_is_replaced(tmp_path, files):
    source = checkpoint(tmp_path / "source", TINY)
    for file in files:
        (tmp_path / "out" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / file).write_text("precious")
    with pytest.raises(CheckpointError, match="not replaced"):
        convert(source, tmp_path / "out", "hf", overwrite=True)
    assert all((tmp_path / "out" / file).read_text() == "precious" for file in files)


def test_a_folder_that_only_has_the_name_of_an_unfinished_one_stays(tmp_path):
    source = checkpoint(tmp_path / "source", TINY)
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="is no unfinished checkpoint of ours"):
        convert(source, tmp_path / "out", "hf")
    assert (tmp_path / ".out.unfinished" / "thesis.txt").read_text() == "precious"


def test_places_that_cannot_be_are_one_line(tmp_path, monkeypatch):
    source = checkpoint(tmp_path / "source", TINY)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in (tmp_path / "loop", "a\0b"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            convert(source, place, "hf")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "disk")
    with pytest.raises(CheckpointError, match="disk: is where a disk is mounted"):
        convert(source, tmp_path / "disk", "hf")


def test_the_config_is_written_last(tmp_path, monkeypatch):
    """A folder without it is no checkpoint to anybody."""
    source, written = checkpoint(tmp_path / "source", TINY), []
    original = safetensors_write.write_durably

    def recorded(file, data):
        written.append((file.name, {p.name for p in file.parent.iterdir()}))
        original(file, data)

    monkeypatch.setattr(writing, "write_durably", recorded)
    for layout, weights in (("hf", "model.safetensors"), ("orbax", "weights")):
        convert(source, tmp_path / layout, layout)
        assert written[-1] == ("config.json", {weights, "checksums.json"})


def test_ctrl_c_leaves_the_old_checkpoint(tmp_path):
    source = checkpoint(tmp_path / "source", TINY)
    convert(source, tmp_path / "out", "hf")

    def interrupted(*_):
        raise KeyboardInterrupt

    for layout in LAYOUTS:
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", layout, overwrite=True, on_progress=interrupted)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
        assert not compare(source, tmp_path / "out")
