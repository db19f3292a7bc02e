"""Measures what bounds the speed of a model on this machine, as JAX sees it.

    python -m zaya_jax.benchmark.machine

Decoding reads all active weights for each token, so the memory's bandwidth bounds it; reading
prompts is bound by matrix products. Prints one JSON object a line.
"""

import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from zaya_jax.benchmark.measuring import report

BYTES = 1 << 29  # far more than the caches hold
SIZE = 2048  # of square matrices
RUNS = 8


def shortest(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Seconds of the fastest of several runs, compiled before."""
    run = jax.jit(function)
    jax.block_until_ready(run(x))
    times = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        jax.block_until_ready(run(x))
        times.append(time.perf_counter() - begin)
    return min(times)


def read_bandwidth() -> float:
    """Bytes a second of a sum over a large float32 array."""
    numbers = jnp.ones(BYTES // 4)
    return numbers.nbytes / shortest(jnp.sum, numbers)


def product_speed(dtype: str) -> float:
    """Floating-point operations a second of a product of square matrices, float32 out."""
    matrix = jnp.ones((SIZE, SIZE), dtype)
    square = partial(jnp.matmul, preferred_element_type=jnp.float32)
    return 2 * SIZE**3 / shortest(lambda x: square(x, x), matrix)


def main() -> None:
    report(case="read bandwidth", bytes_per_second=round(read_bandwidth()))
    for dtype in ("bfloat16", "float32"):
        report(case=f"{dtype} products", flops_per_second=round(product_speed(dtype)))


if __name__ == "__main__":
    main()
