"""Writes a random checkpoint of any size: every tensor matters, and every expert gets its share of
the tokens.

    python -m convert.synthetic PRESET OUT [--dtype bfloat16|float32] [--seed N] [--layers N]

For measuring speed and memory without the released weights. Plain random weights would not do: what
all tokens have in common makes most routers send nearly everything to one expert.
"""

import dataclasses
import json
import math
import shutil
import sys
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
import tyro

from convert.mapping import Entry, mapping
from convert.safetensors_write import Planned, write_folder
from zaya_jax.config import ZayaConfig
from zaya_jax.errors import CheckpointError, ZayaError

Dtype = Literal["bfloat16", "float32"]

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
SHARD_BYTES = 1_500_000_000
_CHUNK = 1 << 22  # elements drawn in float32 at a time


def write_synthetic(
    config: ZayaConfig, folder: Path, dtype: Dtype = "bfloat16", seed: int = 0
) -> None:
    """Writes a random model in the current Hugging Face layout, a few tensors in memory at a time.

    Args:
      config: the architecture.
      folder: new or empty.
      dtype: of all tensors but the balancing biases, which are float32.
      seed: the same tensors for the same seed.

    Raises:
      CheckpointError: the folder holds something, or its disk has too little room.
    """
    kind = DTYPES[dtype]
    tensors = [
        Planned(entry.name, stored, entry.shape, partial(_draw, entry, config, stored, seed))
        for entry in mapping(config).values()
        for stored in [DTYPES["float32"] if entry.always_float32 else kind]
    ]
    try:
        _check_room(folder, sum(tensor.nbytes for tensor in tensors))
        folder.mkdir(parents=True, exist_ok=True)
        values = config.to_hf() | {"dtype": dtype}
        (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        write_folder(folder, tensors, SHARD_BYTES)
        if config.vocab_size >= ZayaConfig.preset("nano").vocab_size:
            _write_tokenizer(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error})") from None


def _write_tokenizer(folder: Path) -> None:
    """The embedded model's tokenizer, whose few tokens any larger vocabulary has room for."""
    file = resources.files("zaya_jax") / "nano" / "tokenizer.json"
    (folder / "tokenizer.json").write_bytes(file.read_bytes())


def _check_room(folder: Path, needed: int) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists already; give a new or an empty folder")
    folder = folder.absolute()
    free = shutil.disk_usage(next(p for p in [folder, *folder.parents] if p.is_dir())).free
    if needed > free:
        needs, has = f"{needed / 1e9:.1f} GB", f"{free / 1e9:.1f} GB"
        raise CheckpointError(f"{folder}: the model needs {needs}, only {has} are free on its disk")


def _draw(entry: Entry, config: ZayaConfig, dtype: np.dtype, seed: int) -> np.ndarray:
    """One tensor; its name and the seed determine it."""
    rng = np.random.default_rng([seed, *entry.name.encode()])
    mean, spread = _distribution(entry, config)
    out = np.empty(entry.shape, np.float32 if entry.always_float32 else dtype)
    flat = out.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        part[:] = mean + spread * rng.standard_normal(part.size, np.float32)
    if entry.name.endswith("balancing_biases"):
        out[-1] = -1.0  # the skip class: never chosen
    elif _reads_router_activations(entry.name):
        out[:] = _even_rows(out.astype(np.float32)) * (spread * math.sqrt(entry.shape[1]))
    return out


def _reads_router_activations(name: str) -> bool:
    return name.endswith(("router_mlp.fc2.weight", "router_mlp.out_proj.weight"))


def _even_rows(weight: np.ndarray) -> np.ndarray:
    """Rows without a mean, which cancels what GELU's outputs have in common, and of length 1, so
    that no class is ahead of the others for all tokens."""
    weight = weight - weight.mean(axis=1, keepdims=True)
    return weight / np.linalg.norm(weight, axis=1, keepdims=True)


def _distribution(entry: Entry, config: ZayaConfig) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values."""
    # The stream keeps its size, and no more of the embedding than noise would have in common with
    # it: otherwise a tied head would repeat its input for ever.
    keep = config.hidden_size ** (-1 / (4 * config.num_hidden_layers))
    join = math.sqrt(1 - keep**2)
    width = math.sqrt(config.hidden_size)
    patterns = {
        "embed_tokens.weight": (0.0, 2 / width),
        "lm_head.weight": (0.0, 2 / width),
        "input_hidden_states_scale": (width / 2, width / 20),
        "input_hidden_states_bias": (0.0, 0.1 / width),
        "post_attention_residual_scale.hidden_states_scale": (0.5 * join, 0.05 * join),
        "post_mlp_residual_scale.hidden_states_scale": (8 * join, 0.8 * join),
        "residual_scale.residual_scale": (keep, 0.05 * keep),
        "router_states_scale": (0.5, 0.1),
        "out_proj.weight": (0.0, 6 / math.sqrt(entry.shape[-1])),
        "balancing_biases": (0.0, 0.01),
        "temp": (2.0, 0.15),
        "norm.weight": (1.0, 0.1),
        "bias": (0.0, 0.02),
    }
    for ending, distribution in patterns.items():
        if entry.name.endswith(ending):
            return distribution
    inputs = math.prod(entry.shape[1:]) if "conv" in entry.name else entry.shape[-1]
    return 0.0, 1 / math.sqrt(inputs)


def main(
    preset: tyro.conf.Positional[str],
    out: tyro.conf.Positional[Path],
    dtype: Dtype = "bfloat16",
    seed: int = 0,
    layers: int | None = None,
) -> None:
    """Writes a random checkpoint.

    Args:
      preset: name of a configuration, such as small or zaya1_8b.
      out: folder, new or empty.
      dtype: of the weights.
      seed: of the weights.
      layers: the first so many only.
    """
    try:
        config = ZayaConfig.preset(preset)
        if layers is not None:
            config = dataclasses.replace(
                config, num_hidden_layers=layers, layer_types=config.layer_types[:layers]
            )
        write_synthetic(config, out, dtype, seed)
    except ZayaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {out}")


if __name__ == "__main__":
    tyro.cli(main)
