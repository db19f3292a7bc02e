"""Experts by all-to-all on eight simulated devices, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

MOE = """
import collections
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from pallas_kernels.moe import reference
from pallas_kernels.moe import rounds as loop
from zaya_jax import make_mesh
from zaya_jax.parallel import expert_parallel_moe

E, D, F, T = 16, 8, 12, 8 * 96  # of all devices together
rows, multiply = collections.Counter(), loop._hidden

def count(device, products):
    rows[int(device)] += int(products)

def counted(x, gate_up, places):
    jax.debug.callback(count, jax.lax.axis_index("expert"), places.token.size)
    return multiply(x, gate_up, places)

rng = np.random.default_rng(0)
shapes = (T, D), (T,), (E, 2 * F, D), (E, D, F)
x, weight, gate_up, down = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)
mesh = make_mesh(1, 8)
spread = jax.jit(jax.shard_map(
    expert_parallel_moe, mesh=mesh, in_specs=(P("expert"),) * 5, out_specs=P("expert"),
    check_vma=False,
))
whole = jax.jit(reference.moe)
CHOICES = {
    "balanced": rng.permutation(np.arange(T) % E),
    "random, skipped and padding": rng.integers(0, E + 3, T) - 1,
    "unknown": rng.integers(-9, 4 * E, T),
    "all to one": np.full(T, 5),
    "none": np.full(T, E),
}
for name, chosen in CHOICES.items():
    expert = jnp.asarray(chosen, jnp.int32)
    loop._hidden = multiply
    wanted = whole(x, expert, weight, gate_up, down)
    loop._hidden = counted
    rows.clear()
    got = spread(x, expert, weight, gate_up, down)
    jax.effects_barrier()
    worst = float(jnp.abs(got - wanted).max())
    assert worst <= 1e-5, (name, worst)
    # A device multiplies as many rows for each expert it has as the busiest of them needs: one
    # round of 5/4, 7/4 or 5/2 of the mean, or several of the largest.
    mean = T // 8
    per_expert = np.bincount(chosen[(chosen >= 0) & (chosen < E)], minlength=E).reshape(8, 2)

    def needed(busiest):
        sizes = [8 * -(-int(part * mean / 2) // 8) for part in (1.25, 1.75, 2.5)]
        several = -(-busiest // sizes[-1]) * sizes[-1]
        return min((size for size in sizes if busiest <= size), default=several)

    wanted_rows = [2 * needed(busiest) for busiest in per_expert.max(axis=1)]
    assert [rows[d] for d in range(8)] == wanted_rows, (name, rows)
    if name == "balanced":
        assert max(rows.values()) <= 1.5 * mean, rows

loop._hidden = multiply
halves = [a.astype(jnp.bfloat16) for a in (x, gate_up, down)]
steps = jax.make_jaxpr(jax.grad(lambda x, g, d: spread(x, expert, weight, g, d).sum(), (0, 1, 2)))
lines = [line.strip() for line in str(steps(*halves)).splitlines() if "all_to_all[" in line]
assert len(lines) >= 5 and not any(":f32[" in line for line in lines), lines
print("same")
"""


def test_experts_multiply_about_as_many_rows_as_they_get_tokens():
    """With room for all tokens of every device, of which most is empty: nothing is dropped where
    all go to one expert, and that device alone has more to do. Rows of bfloat16, and their
    gradients, are sent as bfloat16."""
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, "-c", MOE],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert ended.stdout.strip() == "same", ended.stderr[-2000:]
