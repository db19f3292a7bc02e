"""One door to every checkpoint: `load` and `save`."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from convert import checkpoint
from convert.checkpoint import Layout
from convert.folder import find, replacing
from convert.mapping import mapping
from convert.orbax_io import read_shards, unflatten
from convert.writing import Held, write_checkpoint
from zaya_jax.config import ZayaConfig
from zaya_jax.errors import CheckpointError, ConfigError
from zaya_jax.layouts import for_cpu, is_for_cpu
from zaya_jax.model import Params
from zaya_jax.sharding import check_mesh, parameter_sharding
from zaya_jax.text.tokenizer import TOKENIZER, Tokenizer
from zaya_jax.zaya import Zaya

NANO = Path(__file__).parent / "nano"


def load(
    path_or_hub_id: str | os.PathLike[str] = NANO,
    dtype: Any = None,
    mesh: Mesh | None = None,
    *,
    layout: Literal["canonical", "decoding"] = "canonical",
    on_progress: Callable[[int, int], None] | None = None,
) -> Zaya:
    """Loads a checkpoint of any layout: current Hugging Face, legacy Zyphra (whose skip class is
    the identity) or Orbax; without a path, the embedded nano model.

    Args:
      path_or_hub_id: a folder, or the id of a repository on the Hugging Face hub.
      dtype: of the parameters, float32, bfloat16 or float16; by default that of the file. Balancing
        biases are float32.
      mesh: spreads the experts over its `expert` axis and replicates the rest. Each process reads
        what its devices hold.
      layout: "decoding" is the form that generation on the CPU wants (`layouts.for_cpu`). A
        canonical model is copied into it when it first generates; a model that fills the memory
        must be loaded so. Ignored where JAX runs on something else, or on a mesh.
      on_progress: called with the parameters read so far and their number.

    Raises:
      CheckpointError: listing everything that is missing, unknown, misshapen, duplicate or damaged.
      ConfigError: naming the field of config.json at fault.
    """
    folder = find(path_or_hub_id)
    dtype = None if dtype is None else parse_dtype(dtype)
    config = checkpoint.read_config(folder)
    if mesh is not None:
        check_mesh(config, mesh)
    tokenizer = Tokenizer.from_folder(folder, config)
    params = _read(checkpoint.open_checkpoint(folder), dtype, mesh, on_progress)
    if layout == "decoding" and mesh is None and jax.default_backend() == "cpu":
        params = for_cpu(params, config, consume=True)
    return Zaya(params, config, tokenizer, mesh)


def read_config(path_or_hub_id: str | os.PathLike[str]) -> ZayaConfig:
    """The configuration of a checkpoint, without its weights. Raises as `load` does."""
    return checkpoint.read_config(find(path_or_hub_id, ["config.json"]))


def save(
    params: Params,
    config: ZayaConfig,
    path: str | os.PathLike[str],
    tokenizer: Tokenizer | None,
    layout: Layout = "hf",
) -> None:
    """Writes parameters so that `load` reads them back, tensor by tensor bit for bit.

    A checkpoint that is there already stays until the new one is complete.

    Raises:
      CheckpointError: the path holds something else, or cannot be written.
      ConfigError: the layout cannot express the config.
    """
    leaves = _leaves(params, config)
    carried = {} if tokenizer is None else tokenizer.files
    with replacing(Path(path)) as folder:
        write_checkpoint(folder, layout, config, leaves, carried, shardings=_shardings(leaves))


def _shardings(leaves: dict[str, Held]) -> dict[str, jax.sharding.Sharding] | None:
    """Of leaves that lie on several devices."""
    arrays = {path: leaf.array for path, leaf in leaves.items()}
    if all(isinstance(a, jax.Array) and len(a.sharding.device_set) > 1 for a in arrays.values()):
        return {path: array.sharding for path, array in arrays.items()}
    return None


def _leaves(params: Params, config: ZayaConfig) -> dict[str, Held]:
    """The tree's leaves in the order of the mapping table."""
    if is_for_cpu(params):
        raise CheckpointError("parameters loaded for decoding cannot be saved: load them canonical")
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    if odd := sorted(found.keys() ^ mapping(config).keys()):
        raise CheckpointError(f"the parameters do not fit the config at {odd[0]}")
    return {path: Held(found[path]) for path in mapping(config)}


def load_tokenizer(path_or_hub_id: str | os.PathLike[str] | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint, by default of the embedded model, without its weights.

    Raises:
      CheckpointError: there is none, or it cannot be read.
    """
    files = ["*.json", "*.jinja"]
    folder = NANO if path_or_hub_id is None else find(path_or_hub_id, files)
    tokenizer = Tokenizer.from_folder(folder, checkpoint.read_config(folder))
    if tokenizer is None:
        raise CheckpointError(f"{path_or_hub_id}: has no {TOKENIZER}")
    return tokenizer


def parse_dtype(dtype: Any) -> np.dtype:
    """A dtype that parameters may have. Raises ConfigError on any other."""
    try:
        kind = np.dtype(jnp.dtype(dtype))
    except TypeError:
        kind = None
    if kind not in (np.float32, np.float16, ml_dtypes.bfloat16):
        raise ConfigError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    return kind


def _read(
    opened: checkpoint.Checkpoint,
    dtype: np.dtype | None,
    mesh: Mesh | None,
    on_progress: Callable[[int, int], None] | None,
) -> Params:
    arrays: dict[str, jax.Array] = {}
    done, total = 0, sum(math.prod(leaf.shape) for leaf in opened.leaves.values())
    for path, entry in mapping(opened.config).items():
        leaf = opened.leaves[path]
        kind = np.dtype(np.float32) if entry.always_float32 else dtype
        if mesh is None:
            arrays[path] = jax.device_put(leaf.read(kind), may_alias=True)
        else:
            arrays[path] = read_shards(leaf, kind, parameter_sharding(path, mesh))
        done += math.prod(entry.shape)
        if on_progress is not None:
            on_progress(done, total)
    return unflatten(arrays)
