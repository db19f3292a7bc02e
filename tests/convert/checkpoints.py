"""Checkpoints for tests of conversion."""

from pathlib import Path

from helpers import random_params
from safetensors.numpy import load_file

import zaya_jax
from zaya_jax import Zaya


def checkpoint(folder: Path, config: zaya_jax.ZayaConfig, skip_bias: float = -1.5) -> Path:
    """A random one whose skip class no token can reach, unless said otherwise."""
    Zaya(random_params(config, skip_bias=skip_bias), config).save(folder)
    return folder


def tensors(folder: Path) -> dict[str, tuple]:
    """Everything about the tensors in a folder's safetensors files."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return {name: (t.dtype, t.shape, t.tobytes()) for name, t in found.items()}
