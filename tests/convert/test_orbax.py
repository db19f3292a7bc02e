"""Orbax checkpoints: what Orbax itself makes of them, any mesh, and damage."""

import shutil
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import ODD, TINY, random_params

import zaya_jax
from convert.checkpoint import open_checkpoint
from convert.verify import compare
from zaya_jax import CheckpointError, Zaya


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("orbax") / "model"
    Zaya(random_params(ODD), ODD).save(folder, layout="orbax")
    return folder


def test_orbax_restores_the_tree_by_itself(saved):
    params = random_params(ODD)
    with ocp.StandardCheckpointer() as checkpointer:
        alone = checkpointer.restore(saved / "weights")
        into = checkpointer.restore(saved / "weights", jax.eval_shape(lambda: params))
    assert jax.tree.structure(into) == jax.tree.structure(params)
    for restored in (alone, into):
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(params), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("options", [{}, {"use_zarr3": True}, {"use_ocdbt": False}], ids=str)
def test_what_orbax_saves_by_itself_is_read(saved, tmp_path, options):
    folder = shutil.copytree(saved, tmp_path / "model")
    shutil.rmtree(folder / "weights")
    handler = ocp.PyTreeCheckpointHandler(**options)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder / "weights", args=ocp.args.PyTreeSave(random_params(ODD)))
    assert not compare(saved, folder)


@pytest.mark.parametrize("dtype", ["int32", "float64"])
def test_arrays_of_other_dtypes_are_refused(saved, tmp_path, dtype):
    folder = shutil.copytree(saved, tmp_path / "model")
    shutil.rmtree(folder / "weights")
    tree = jax.tree.map(lambda x: np.asarray(x).astype(dtype), random_params(ODD))
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder / "weights", tree)
    with pytest.raises(CheckpointError, match=f"'params/norm/weight' is {dtype}, not one of F32"):
        open_checkpoint(folder)


def test_an_adapter_beside_it_does_not_change_what_it_is(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "adapter.safetensors").write_bytes(b"whatever")
    assert not compare(saved, folder)


def test_rows_are_read_alone(saved):
    leaf = open_checkpoint(saved).leaves["params/layers/1/mlp/experts/gate_up_proj"]
    whole = leaf.read()
    np.testing.assert_array_equal(leaf.read(rows=slice(1, 3)), whole[1:3])
    np.testing.assert_array_equal(leaf.read("float16", slice(2, 9)), whole[2:].astype("float16"))


MESHES = """
import sys, jax, numpy as np, zaya_jax
jax.config.update("jax_num_cpu_devices", 8)
from convert.checkpoint import Stacked
from convert.orbax_io import StoredArray
from convert.safetensors_read import Tensor

folder, reference = sys.argv[1:]
alone = zaya_jax.load(reference)
read = {}
for kind in (StoredArray, Tensor, Stacked):
    original = kind.read
    def counted(self, dtype=None, rows=slice(None), original=original):
        if len(self.shape) == 3 and self.shape[0] == 4:  # the experts'
            read[id(self)] = read.get(id(self), 0) + len(range(4)[rows])
        return original(self, dtype, rows)
    kind.read = counted
for data, expert in ((1, 1), (8, 1), (4, 2), (2, 4)):
    read.clear()
    mesh = zaya_jax.make_mesh(data, expert)
    model = zaya_jax.load(folder, mesh=mesh)
    assert set(read.values()) == {4}, read  # each row once, however many devices hold it
    leaves = jax.tree.leaves_with_path(model.params)
    for (path, a), b in zip(leaves, jax.tree.leaves(alone.params), strict=True):
        experts = "experts" in jax.tree_util.keystr(path)
        assert a.sharding.mesh == mesh and a.dtype == b.dtype
        assert a.addressable_shards[0].data.shape[0] == b.shape[0] // (expert if experts else 1)
        np.testing.assert_array_equal(a, b)
    model.save(f"{folder}-{data}x{expert}", layout="orbax")
print("same")
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["orbax", "hf", "hf-legacy"])
def test_what_one_mesh_wrote_any_other_loads(tmp_path, layout):
    """Written for 2x4 devices, loaded on 1, 8x1, 4x2 and 2x4, and saved from each."""
    source = tmp_path / "source"
    Zaya(random_params(TINY, skip_bias=-1.5), TINY).save(source)
    mesh = ["--mesh", "data=2,expert=4"] if layout == "orbax" else []
    zaya = [sys.executable, "-m", "zaya_jax.cli.main"]
    model = str(tmp_path / "model")
    subprocess.run([*zaya, "convert", str(source), model, "--to", layout, *mesh], check=True)
    run = [sys.executable, "-c", MESHES, model, str(source)]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert "same" in out
    for sizes in ("1x1", "8x1", "4x2", "2x4"):
        assert not compare(source, tmp_path / f"model-{sizes}")


PIECES = """
import sys, jax, zaya_jax, orbax.checkpoint as ocp
from convert.conversion import convert
jax.config.update("jax_num_cpu_devices", 8)
source, out = sys.argv[1:]
for data, expert in ((1, 1), (4, 2), (2, 4)):
    convert(source, out, "orbax", mesh=zaya_jax.make_mesh(data, expert), overwrite=True)
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(f"{out}/weights").item_metadata.tree
    leaf = tree["params"]["layers"][0]["mlp"]["experts"]["down_proj"]
    assert leaf.storage.chunk_shape[0] == 4 // expert, leaf
    plain = ocp.StandardCheckpointer().restore(f"{out}/weights")
    array = plain["params"]["layers"][1]["mlp"]["experts"]["down_proj"]
    assert array.sharding.mesh.shape == {"data": data, "expert": expert, "context": 1}
try:
    convert(source, out + "-no", "orbax", mesh=zaya_jax.make_mesh(1, 8))
except zaya_jax.ConfigError as error:
    print(error)
"""


def test_a_mesh_decides_what_is_stored_as_one_piece(tmp_path):
    source = tmp_path / "source"
    Zaya(random_params(TINY, skip_bias=-1.5), TINY).save(source)
    run = [sys.executable, "-c", PIECES, str(source), str(tmp_path / "out")]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert "num_experts 4 is not divisible by the expert axis of 8" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    assert not compare(source, tmp_path / "out")


def damage(change):
    def on_every_file(folder):
        for file in (folder / "weights").rglob("*"):
            if file.is_file() and file.parent.name == "d" and file.stat().st_size > 500:
                change(file)

    return on_every_file


def escape(folder):
    """An array whose name leads out of the folder."""
    file = folder / "weights" / "_METADATA"
    file.write_text(file.read_text().replace('"key": "params"', '"key": "../params"', 1))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage(lambda f: f.write_bytes(f.read_bytes()[:100])), "weights: array '"),
        (damage(lambda f: f.unlink()), "weights: array '"),
        (lambda f: (f / "weights" / "_METADATA").unlink(), "_METADATA: no such file"),
        (
            lambda f: (f / "weights" / "manifest.ocdbt").unlink(),
            "array 'balancing/.* cannot be opened",
        ),
        (lambda f: (f / "weights" / "_METADATA").write_text("{"), "_METADATA: not valid JSON"),
        (lambda f: (f / "weights" / "_METADATA").write_text("{}"), "does not list the arrays"),
        (escape, "does not list the arrays"),
        (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
        (lambda f: shutil.rmtree(f / "weights"), "has neither model.safetensors nor"),
    ],
)
def test_damage_is_one_clear_error(saved, tmp_path, harm, message):
    folder = shutil.copytree(saved, tmp_path / "model")
    harm(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        zaya_jax.load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_another_tree_is_named(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    shutil.rmtree(folder / "weights")
    params = random_params(ODD)
    params["params"]["norm"] = {"scale": params["params"]["norm"]["weight"][:-1]}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "weights", params)
    with pytest.raises(CheckpointError) as error:
        zaya_jax.load(folder)
    assert "missing array 'params/norm/weight' (32,)" in str(error.value)
    assert "unknown array 'params/norm/scale' (31,)" in str(error.value)
