"""`zaya info`: what a model is, how many parameters it has, and what memory it needs."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import tyro

from zaya_jax.cli.output import show, write_json
from zaya_jax.config import PRESETS, SLIDING, ZayaConfig
from zaya_jax.errors import InputError
from zaya_jax.loading import NANO, read_config
from zaya_jax.memory import plan
from zaya_jax.model import parameter_counts


@dataclasses.dataclass
class Info:
    """Show a model's configuration, parameter counts and memory."""

    model: tyro.conf.Positional[str | None] = None
    """Checkpoint folder, hub id, or preset name (zaya1_8b, ...); by default the embedded model."""
    context: int | None = None
    """Tokens of a prompt and its answer to plan memory for; by default the longest context."""
    batch: int = 1
    """Rows decoded at once to plan memory for."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the parameters and the key/value cache."""
    json: Path | None = None
    """Also write the tables to this file."""

    def run(self) -> None:
        name = self.model or "nano"
        if self.model is None:
            config = read_config(NANO)
        elif name in PRESETS:
            config = ZayaConfig.preset(name)
        else:
            config = read_config(name)
        context = config.max_position_embeddings if self.context is None else self.context
        if not 1 <= context <= config.max_position_embeddings:
            raise InputError(
                f"context must lie in 1 .. {config.max_position_embeddings}, got {context}"
            )
        if self.batch < 1:
            raise InputError(f"batch must be at least 1, got {self.batch}")
        total, active = parameter_counts(config)
        sizes = plan(config, context, self.batch, jnp.dtype(self.dtype))
        show(f"Configuration of {name}", _describe(config))
        counts = {"total": total, "active per token, without embedding": active}
        show("Parameters", {kind: f"{count:,}" for kind, count in counts.items()})
        title = f"Memory for {self.batch} x {context} tokens in {self.dtype}"
        show(title, {kind: _bytes(size) for kind, size in sizes.items()})
        write_json(
            self.json,
            {"config": config.to_hf(), "parameters": counts, "memory_bytes": sizes},
        )


def _describe(config: ZayaConfig) -> dict[str, Any]:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    sliding = config.layer_types.count(SLIDING)
    values["layer_types"] = f"{len(config.layer_types) - sliding} full, {sliding} sliding"
    for name in ("rope", "sliding_rope"):
        rope = values[name]
        values[name] = f"theta {rope.theta:g}, {rope.partial_rotary_factor:.0%} of each head"
    return values


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"
