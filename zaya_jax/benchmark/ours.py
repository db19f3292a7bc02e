"""Measures this package on a checkpoint, case by case as `transformers_reference` measures PyTorch.

    python -m zaya_jax.benchmark.ours CHECKPOINT [--dtype bfloat16] [--batch 1 8] [--prompt 64]
        [--new 128] [--prefill 1x512 4x512] [--repeats 3]

Runs the engine's programs on the parameters as the engine holds them. Prefill computes the last
token's logits; decoding is greedy, stops at no token, and is timed after the prompt. Prints one
JSON object a line: the seconds to load, speeds, the routers' balance, and the peak of memory.
"""

import math
import time
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import zaya_jax
from zaya_jax.benchmark.measuring import measure, report
from zaya_jax.generation.batching import bucket
from zaya_jax.generation.engine import BLOCK, Engine
from zaya_jax.generation.sampling import Request
from zaya_jax.generation.step import Prefill, decode_block, prefill_chunk
from zaya_jax.memory import peak_memory
from zaya_jax.model import init_state


def read(engine: Engine, tokens: np.ndarray, new: int = 0) -> tuple[float, Prefill]:
    """Seconds to read prompts [B, S] as one chunk into a state with room for `new` tokens more, and
    what comes of it."""
    rows, length = tokens.shape
    state = init_state(engine.params, engine.config, rows, bucket(length + new, 64))
    jax.block_until_ready(state)
    begin = time.perf_counter()
    out = prefill_chunk(
        engine.params, engine.config, tokens, np.full(rows, length, np.int32), state
    )
    jax.block_until_ready(out)
    return time.perf_counter() - begin, out


def read_seconds(engine: Engine, tokens: np.ndarray) -> float:
    """Seconds to read prompts [B, S]."""
    return read(engine, tokens)[0]


def decode(engine: Engine, tokens: np.ndarray, new: int) -> float:
    """Seconds to decode `new` tokens after the prompts [B, S]."""
    _, out = read(engine, tokens, new)
    state, logits = out.state, out.last_logits
    request = greedy(len(tokens), new + 1)  # one more, as a row's last token is not forwarded
    begin = time.perf_counter()
    for _ in range(0, new, BLOCK):
        block = decode_block(engine.params, engine.config, state, logits, request, BLOCK)
        state, logits, request = block.state, block.last_logits, block.request
        np.asarray(block.tokens)
    jax.block_until_ready(logits)
    return time.perf_counter() - begin


def greedy(rows: int, remaining: int) -> Request:
    """The most probable tokens, whatever they are."""

    def column(value: float, dtype: type[np.generic]) -> jax.Array:
        return jnp.full(rows, value, dtype)

    return Request(
        request_id=column(0, np.int32),
        seed=column(0, np.uint32),
        temperature=column(0, np.float32),
        top_p=column(1, np.float32),
        top_k=column(0, np.int32),
        min_p=column(0, np.float32),
        stop_tokens=jnp.full((rows, 4), -1, jnp.int32),
        remaining=column(remaining, np.int32),
    )


def balance(experts: np.ndarray, num_experts: int) -> dict[str, float]:
    """Entropy of the experts' loads, 1 where it is uniform: mean and minimum over the layers.

    Args:
      experts: uint8 [..., L], of each token.
      num_experts: besides the skip class, which counts as one more number.
    """
    layers = experts.reshape(-1, experts.shape[-1]).T
    counts = np.stack([np.bincount(layer, minlength=num_experts + 1) for layer in layers])
    load = counts / counts.sum(axis=1, keepdims=True)
    logarithms = np.log(load, where=load > 0, out=np.zeros_like(load))
    entropy = -(load * logarithms).sum(axis=1) / math.log(num_experts)
    return {"mean": round(float(entropy.mean()), 4), "min": round(float(entropy.min()), 4)}


def main(
    checkpoint: tyro.conf.Positional[Path],
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    batch: tuple[int, ...] = (1, 8),
    prompt: int = 64,
    new: int = 128,
    prefill: tuple[str, ...] = ("1x512", "4x512"),
    repeats: int = 3,
) -> None:
    """Measures a checkpoint.

    Args:
      checkpoint: folder.
      dtype: of the parameters.
      batch: rows decoded at once, for each case.
      prompt: tokens before those decoded.
      new: tokens decoded in each row.
      prefill: rows x tokens of each case.
      repeats: timed runs of each case.
    """
    begin = time.perf_counter()
    model = zaya_jax.load(checkpoint, dtype, layout="decoding")
    report(case="load", seconds=round(time.perf_counter() - begin, 2), peak_rss=peak_memory())
    engine, rng = model.engine, np.random.default_rng(0)
    for shape in prefill:
        rows, length = map(int, shape.split("x"))
        tokens = rng.integers(3, model.config.vocab_size, (rows, length), np.int32)
        measure(f"prefill {shape}", tokens.size, partial(read_seconds, engine, tokens), repeats)
    _, out = read(engine, tokens)
    report(case="balance", **balance(np.asarray(out.experts), model.config.num_experts))
    for rows in batch:
        tokens = rng.integers(3, model.config.vocab_size, (rows, prompt), np.int32)
        measure(f"decode {rows}", rows * new, partial(decode, engine, tokens, new), repeats)
    report(case="memory", peak_rss=peak_memory())


if __name__ == "__main__":
    tyro.cli(main)
