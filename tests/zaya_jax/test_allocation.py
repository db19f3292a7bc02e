"""Memory that one run of a program frees serves the next."""

import subprocess
import sys

import pytest

RUN = """
import resource, sys
import jax, jax.numpy as jnp
from zaya_jax.allocation import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

@jax.jit
def run(x):  # with 40 MB of temporaries
    return jnp.sum(jax.lax.optimization_barrier(x * 2))

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

x = jnp.ones((5 << 9, 1 << 12))
for _ in range(100):  # each of XLA's threads has a heap
    run(x).block_until_ready()
before = faults()
for _ in range(20):
    run(x).block_until_ready()
print((faults() - before) // 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, the allocator is another one")
def test_pages_are_cleared_once_not_in_every_run():
    def faults(how: str) -> int:
        arguments = [sys.executable, "-c", RUN, how]
        return int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)

    freed, kept = faults("free"), faults("keep")
    print(f"page faults a run: {freed}, and {kept} where memory is kept")
    assert freed > 10_000 and kept < freed / 2
