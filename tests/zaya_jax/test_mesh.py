"""Generation on a mesh of eight simulated devices, in a process of its own."""

import subprocess
import sys

PROGRAM = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import PartitionSpec as P
import zaya_jax
from zaya_jax.generation import engine

QUESTIONS = ["What is 21 + 34?", "Spell this word backward: tin", "gcd of 6, 4"]
PROMPTS = [[{"role": "user", "content": question}] for question in QUESTIONS]
blocks, decode_block = [], engine.decode_block
engine.decode_block = lambda *a: blocks.append(decode_block(*a)) or blocks[-1]

def answers(mesh, **settings):
    model = zaya_jax.load(dtype="float32", mesh=mesh)
    results = model.generate(PROMPTS, 24, batch_size=8, **settings)
    return model, [(result.tokens, result.experts.tolist()) for result in results]

greedy, sampled = {"temperature": 0}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}
for settings, meshes in ((greedy, [(2, 4), (8, 1), (1, 8)]), (sampled, [(2, 4)])):
    _, wanted = answers(None, **settings)
    for data, expert in meshes:
        model, got = answers(zaya_jax.make_mesh(data, expert), **settings)
        assert got == wanted, (data, expert, settings)
        for leaf in jax.tree.leaves(blocks[-1].state):
            assert leaf.addressable_shards[0].data.shape[0] == 8 // data, leaf.sharding
        experts = model.params["params"]["layers"][0]["mlp"]["experts"]["down_proj"]
        assert experts.addressable_shards[0].data.shape[0] == 8 // expert
print("same")
"""


def test_every_mesh_gives_the_tokens_of_one_device_with_weights_and_state_spread_over_it():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert run.stdout.strip() == "same", run.stderr[-2000:]
