"""`zaya convert`: a checkpoint of any layout into another one."""

import dataclasses
import re
from pathlib import Path
from typing import Literal

import tyro

from convert.checkpoint import NAMES, Layout
from convert.conversion import Plan, Skip, convert, plan
from convert.folder import check_destination
from zaya_jax.cli.output import console, mesh_of, progress
from zaya_jax.errors import InputError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


@dataclasses.dataclass
class Convert:
    """Convert a checkpoint between the Hugging Face, legacy Zyphra and Orbax layouts.

    The source's layout is detected. Tensors keep their bits, unless a dtype is given. The
    destination appears when it is complete; an interrupted run leaves what was there.
    """

    source: tyro.conf.Positional[str]
    """Checkpoint folder, or hub id (downloads go on where they were interrupted)."""
    destination: tyro.conf.Positional[Path]
    """New folder."""
    to: Layout
    """Layout to write: hf (transformers, vLLM), hf-legacy (the first releases), orbax (JAX)."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of all tensors but the balancing biases, which become float32; by default as they are."""
    max_shard_size: str = "5G"
    """Of a safetensors file: a number of bytes, or with K, M or G."""
    mesh: str | None = None
    """Write Orbax in the pieces that devices of such a mesh hold, like data=2,expert=4; it loads on
    any other mesh too."""
    skip: Skip | None = None
    """What the router's skip class is to give, where tokens can reach it and the layouts differ."""
    dry_run: bool = False
    """Print the whole mapping, say whether the destination is free, and write nothing."""
    overwrite: bool = False
    """Replace a checkpoint at the destination."""

    def run(self) -> None:
        shard_bytes = _parse_size(self.max_shard_size)
        mesh = mesh_of(self.mesh)
        if self.dry_run:
            _show(plan(self.source, self.to, dtype=self.dtype, mesh=mesh, skip=self.skip))
            check_destination(self.destination, self.overwrite)
            return
        with progress("Converting") as on_progress:
            done = convert(
                self.source,
                self.destination,
                self.to,
                dtype=self.dtype,
                max_shard_bytes=shard_bytes,
                mesh=mesh,
                skip=self.skip,
                overwrite=self.overwrite,
                on_progress=on_progress,
            )
        text = f"{self.destination}: {NAMES[self.to]}, {_summary(done)}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _show(planned: Plan) -> None:
    """One line for each tensor, whatever the terminal's width: names are to be searched."""
    for old, was, new, becomes, shape in planned.rows():
        line = f"{old} {was} -> {new} {becomes} [{shape}]" if becomes else f"{old} {new}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(_summary(planned), markup=False, highlight=False, soft_wrap=True)


def _summary(planned: Plan) -> str:
    source, count = planned.source, len(planned.leaves)
    return (
        f"{count:,} leaves, {planned.nbytes / 1e9:.2f} GB, from {NAMES[source.layout]} "
        f"in {source.folder}"
    )


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMG]?)B?", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise InputError(f"max-shard-size {text!r}: write it like 5G, 500M or 1000000")
    return int(match[1]) * _UNITS[match[2]]
