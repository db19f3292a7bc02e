"""One door to every checkpoint: `load` and `save`."""

import json
import math
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError

from convert.mapping import mapping
from convert.safetensors_io import INDEX, Tensor, read_folder, read_json, write_folder
from zaya_jax.config import ZayaConfig
from zaya_jax.errors import CheckpointError, ConfigError
from zaya_jax.layouts import for_cpu, is_for_cpu
from zaya_jax.model import Params
from zaya_jax.sharding import check_mesh, parameter_sharding
from zaya_jax.text.tokenizer import CARRIED, Tokenizer
from zaya_jax.zaya import Zaya

NANO = Path(__file__).parent / "nano"
MAX_SHARD_BYTES = 5_000_000_000
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


def load(
    path_or_hub_id: str | os.PathLike[str] = NANO,
    dtype: Any = None,
    mesh: Mesh | None = None,
    *,
    layout: Literal["canonical", "decoding"] = "canonical",
    on_progress: Callable[[int, int], None] | None = None,
) -> Zaya:
    """Loads a checkpoint in the current Hugging Face layout; without a path, the embedded nano
    model.

    Args:
      path_or_hub_id: a folder with config.json and model.safetensors (or shards with an index), or
        the id of a repository on the Hugging Face hub.
      dtype: of the parameters, float32, bfloat16 or float16; by default that of the file. Balancing
        biases are float32.
      mesh: spreads the experts over its `expert` axis and replicates the rest.
      layout: "decoding" is the form that generation on the CPU wants (`layouts.for_cpu`). A
        canonical model is copied into it when it first generates; a model that fills the memory
        must be loaded so. Ignored where JAX runs on something else, or on a mesh.
      on_progress: called with the parameters read so far and their number.

    Raises:
      CheckpointError: listing everything that is missing, unknown, misshapen, duplicate or damaged.
      ConfigError: naming the field of config.json at fault.
    """
    folder = _folder(path_or_hub_id, _HUB_FILES)
    dtype = None if dtype is None else _dtype(dtype)
    config = read_config(folder)
    if mesh is not None:
        check_mesh(config, mesh)
    tokenizer = Tokenizer.from_folder(folder, config)
    params = _read(folder, config, dtype, mesh, on_progress)
    if layout == "decoding" and mesh is None and jax.default_backend() == "cpu":
        params = for_cpu(params, config, consume=True)
    return Zaya(params, config, tokenizer, mesh)


def read_config(path_or_hub_id: str | os.PathLike[str]) -> ZayaConfig:
    """The configuration of a checkpoint, without its weights. Raises as `load` does."""
    file = _folder(path_or_hub_id, ["config.json"]) / "config.json"
    try:
        return ZayaConfig.from_hf(read_json(file))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def save(
    params: Params, config: ZayaConfig, path: str | os.PathLike[str], tokenizer: Tokenizer | None
) -> None:
    """Writes parameters in the layout that `load` reads, tensor by tensor bit for bit.

    A checkpoint that is there already stays until the new one is complete.

    Raises:
      CheckpointError: the path holds something else, or cannot be written.
    """
    path = Path(path).resolve()
    leaves = _leaves(params, config)
    tensors = {
        entry.name: np.asarray(leaf)
        for entry, leaf in zip(mapping(config).values(), leaves, strict=True)
    }
    try:
        _check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving.") as temporary:
            folder = Path(temporary) / "checkpoint"
            folder.mkdir()
            _write(tensors, config, tokenizer, folder)
            _swap_in(folder, path, Path(temporary) / "replaced")
    except CheckpointError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from None


def _check_replaceable(path: Path) -> None:
    """Raises CheckpointError unless the path is free, or a folder of nothing but a checkpoint's
    files."""
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: is a file, so no checkpoint is saved there")
    if Path.cwd().is_relative_to(path):
        raise CheckpointError(f"{path}: is the current directory; save into a folder of its own")
    own = {"config.json", INDEX, *CARRIED}
    for entry in sorted(path.iterdir()) if path.exists() else ():
        if entry.name not in own and entry.suffix != ".safetensors":
            raise CheckpointError(f"{path}: holds {entry.name!r} too, so it is not replaced")


def _swap_in(folder: Path, path: Path, replaced: Path) -> None:
    """Moves the new folder to `path`, and the old one back if that is interrupted."""
    if path.exists():
        path.rename(replaced)
    try:
        folder.rename(path)
    except BaseException:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        raise


def _leaves(params: Params, config: ZayaConfig) -> list[Any]:
    """The tree's leaves in the order of the mapping table."""
    if is_for_cpu(params):
        raise CheckpointError("parameters loaded for decoding cannot be saved: load them canonical")
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    if odd := sorted(found.keys() ^ mapping(config).keys()):
        raise CheckpointError(f"the parameters do not fit the config at {odd[0]}")
    return [found[path] for path in mapping(config)]


def _write(
    tensors: dict[str, np.ndarray], config: ZayaConfig, tokenizer: Tokenizer | None, folder: Path
) -> None:
    values = config.to_hf() | {"dtype": str(tensors["model.norm.weight"].dtype)}
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    if tokenizer is not None:
        tokenizer.save(folder)
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    write_folder(folder, sizes, lambda names: {n: tensors[n] for n in names}, MAX_SHARD_BYTES)


def _folder(path_or_hub_id: str | os.PathLike[str], hub_files: list[str]) -> Path:
    name = str(path_or_hub_id)
    try:
        path = Path(name)
        if path.is_dir():
            return path
        if path.exists():
            raise CheckpointError(f"{path}: is a file, expected a checkpoint folder")
    except OSError:
        raise CheckpointError(f"{name[:80]}...: no path can be that long") from None
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise CheckpointError(f"{name}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=hub_files))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{name}: no such folder, and not loaded from the hub: {reason}"
        ) from None


def _dtype(dtype: Any) -> np.dtype:
    try:
        kind = np.dtype(jnp.dtype(dtype))
    except TypeError:
        kind = None
    if kind not in (np.float32, np.float16, ml_dtypes.bfloat16):
        raise ConfigError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    return kind


def _read(
    folder: Path,
    config: ZayaConfig,
    dtype: np.dtype | None,
    mesh: Mesh | None,
    on_progress: Callable[[int, int], None] | None,
) -> Params:
    found, problems = read_folder(folder)
    table = mapping(config)
    embedding, head = found.get("model.embed_tokens.weight"), found.get("lm_head.weight")
    if config.tie_word_embeddings and embedding is not None and head is not None:
        if _same(embedding, head):
            del found["lm_head.weight"]
        else:
            problems.append(
                "lm_head.weight differs from the embedding, but tie_word_embeddings is true"
            )
    expected = {entry.name: entry.shape for entry in table.values()}
    problems += [
        f"missing tensor {name!r} {shape}" for name, shape in expected.items() if name not in found
    ]
    for name, tensor in found.items():
        if name not in expected:
            problems.append(f"unknown tensor {name!r} {tensor.shape}")
        elif tensor.shape != expected[name]:
            problems.append(f"tensor {name!r} has shape {tensor.shape}, expected {expected[name]}")
    if problems:
        raise CheckpointError(f"{folder}: {len(problems)} problems: " + "; ".join(problems))

    tree: Any = {}
    done, total = 0, sum(math.prod(shape) for shape in expected.values())
    for path, entry in table.items():
        array = found[entry.name].read(np.float32 if entry.always_float32 else dtype)
        placement = None if mesh is None else parameter_sharding(path, mesh)
        _insert(tree, path.split("/"), jax.device_put(array, placement, may_alias=True))
        done += math.prod(entry.shape)
        if on_progress is not None:
            on_progress(done, total)
    for collection in tree.values():
        collection["layers"] = tuple(collection["layers"].values())
    return tree


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.read().tobytes() == b.read().tobytes()


def _insert(tree: dict[str, Any], path: list[str], leaf: jax.Array) -> None:
    *parents, last = path
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = leaf
