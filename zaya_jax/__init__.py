"""ZAYA1 in JAX: load a checkpoint, run it, generate with it."""

from convert.conversion import convert
from zaya_jax.config import PRESETS, Rope, ZayaConfig
from zaya_jax.errors import CheckpointError, ConfigError, DataError, InputError, ZayaError
from zaya_jax.generation.batching import from_left_padded
from zaya_jax.generation.engine import Engine
from zaya_jax.generation.rows import Generation, Interrupted
from zaya_jax.generation.sampling import Sampling
from zaya_jax.loading import load
from zaya_jax.model import Output, forward, head, init, init_state
from zaya_jax.sharding import make_mesh
from zaya_jax.state import DecodeState
from zaya_jax.zaya import Zaya

__all__ = [
    "PRESETS",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DecodeState",
    "Engine",
    "Generation",
    "InputError",
    "Interrupted",
    "Output",
    "Rope",
    "Sampling",
    "Zaya",
    "ZayaConfig",
    "ZayaError",
    "convert",
    "forward",
    "from_left_padded",
    "head",
    "init",
    "init_state",
    "load",
    "make_mesh",
]
