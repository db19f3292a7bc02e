"""How much memory generating takes: predicted from the model's shapes, and measured.

A run on the CPU holds most while it reads prompts, or already at the end of loading. `plan` adds up

- the weights as `layouts.for_cpu` holds them, with routers and convolutions in float32, and a tied
  head that it transposes beside the embedding (loading holds one layer twice, but not yet that
  head);
- the decoding state of every row, its room rounded up to a power of two, and that of some rows more
  (`SPARE_ROWS`), among several rows twice;
- the temporaries of a layer that reads a chunk: attention scores of a block of queries, in float32
  before and after the softmax, and `STREAMS` float32 arrays of the residual stream's size;
- `LOGITS` float32 arrays of the logits' size, for the sampler;
- the process itself, as measured on x86-64 Linux: `RUNTIME` for Python, JAX and loading, and
  `PROGRAMS` to compile or read the compiled programs.

For models of 100 million parameters and more that is within 10% of what a run takes. It says
nothing about accelerators, which hold other forms, and take the memory that they may.
"""

import dataclasses
import resource
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pallas_kernels.attention.reference import SCORE_BUDGET
from pallas_kernels.product import Streamed, streamed
from zaya_jax.config import ZayaConfig
from zaya_jax.generation.batching import MAX_CHUNK, bucket
from zaya_jax.layouts import CONVOLUTIONS
from zaya_jax.model import init, parameter_counts

HELD = "weights as held on the CPU"
PEAK = "peak of a run on the CPU"

MB = 1_000_000
RUNTIME = 250 * MB
PROGRAMS = 310 * MB
STREAMS = 5
LOGITS = 8
# The empty state that a prompt begins with, and two copies while that is given its size; among
# several rows also the prompt before, and what the allocator cannot use again at once. Measured;
# there is then also a copy of all rows, while one of them is replaced.
SPARE_ROWS, SPARE_ROWS_AMONG_SEVERAL = 3, 8


def plan(config: ZayaConfig, context: int, batch: int, dtype: Any) -> dict[str, int]:
    """Bytes by purpose.

    Args:
      config: the architecture.
      context: tokens of the longest row, prompt and answer.
      batch: rows decoded at once.
      dtype: of the parameters and the key/value cache.

    Raises:
      ConfigError: the model is no ZAYA.
    """
    config.check_is_zaya()
    itemsize = np.dtype(dtype).itemsize
    layers, room, rows = config.num_hidden_layers, bucket(context, 64), bucket(batch)
    keys = config.num_key_value_heads * config.head_dim
    per_token = layers * 2 * keys * itemsize
    per_row = layers * 4 * (config.conv_tail * config.conv_channels + keys // 2)
    state = room * per_token + per_row
    total, _ = parameter_counts(config)

    held, loading = _held(config, dtype)
    spare = SPARE_ROWS if rows == 1 else rows + SPARE_ROWS_AMONG_SEVERAL
    reading = held + (rows + spare) * state + _temporaries(config, room, rows)
    reading += PROGRAMS
    return {
        "weights": total * itemsize + _balancing(config),
        HELD: held,
        "key/value cache, per token": per_token,
        "convolution and value state, per row": per_row,
        "decoding state": rows * state,
        PEAK: RUNTIME + max(loading, reading),
    }


def _held(config: ZayaConfig, dtype: Any) -> tuple[int, int]:
    """Bytes of the weights as `for_cpu` holds them, and of the most that making them holds."""
    itemsize = np.dtype(dtype).itemsize
    one = dataclasses.replace(config, num_hidden_layers=1, layer_types=config.layer_types[:1])
    (layer,) = jax.eval_shape(partial(init, one), jax.random.key(0))["params"]["layers"]
    scale = config.router_hidden_size  # which the first layer gets
    qkv = layer["self_attn"]["qkv_proj"]
    exact = _size([layer["mlp"]["gate"], *(qkv[name] for name in CONVOLUTIONS)]) + scale
    total, _ = parameter_counts(config)
    total += scale

    def in_bytes(parameters: int, layers: int) -> int:
        return parameters * itemsize + layers * exact * (4 - itemsize)

    head = jax.ShapeDtypeStruct((config.vocab_size, config.hidden_size), dtype)
    form = jax.eval_shape(streamed, head)
    copied = isinstance(form, Streamed) and form.transposed
    head_bytes = head.size * itemsize if copied else 0
    held = in_bytes(total, config.num_hidden_layers) + _balancing(config)
    most = held + max(in_bytes(_size(layer), 1), head_bytes)
    return (held + head_bytes, most) if config.tie_word_embeddings else (held, most)


def _temporaries(config: ZayaConfig, room: int, rows: int) -> int:
    """Bytes of what comes and goes while a chunk is read, or tokens are sampled."""
    chunk = min(room, MAX_CHUNK)
    scores = 2 * min(chunk * config.num_attention_heads * room, SCORE_BUDGET)
    stream = chunk * config.hidden_size
    return 4 * (scores + STREAMS * stream + LOGITS * rows * config.vocab_size)


def _balancing(config: ZayaConfig) -> int:
    return 4 * config.num_hidden_layers * (config.num_experts + 1)


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def peak_memory() -> int:
    """Bytes that this process had resident at most."""
    if (peak := _kernel_figure("/proc/self/status", "VmHWM")) is not None:
        return peak  # getrusage counts the parent's memory, where that was more at the fork
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory() -> int | None:
    """Bytes that new processes can have; None where the system does not tell."""
    return _kernel_figure("/proc/meminfo", "MemAvailable")


def _kernel_figure(file: str, name: str) -> int | None:
    """Bytes in a line such as "VmHWM:  1234 kB"."""
    try:
        lines = (line.split() for line in Path(file).read_text().splitlines())
    except OSError:
        return None
    return next((1024 * int(line[1]) for line in lines if line[0] == f"{name}:"), None)
