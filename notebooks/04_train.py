# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Training
#
# The same run that `zaya train pretrain` starts from the command line, as plain Python: a small
# model, problems and short texts made on the spot, Muon, router balancing, and a checkpoint to go
# on from.

# %%
import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import zaya_jax
from pallas_kernels.router import api as router
from train import balancing
from train.balancing import BalancingConfig
from train.config import EvaluationConfig, load_config
from train.course.data import write
from train.data.config import DataConfig, Source
from train.dry_run import describe
from train.metrics import FILE, read
from train.run import Silent, train
from train.setup import prepare

work = Path(tempfile.mkdtemp())
write(work, documents={"pretrain": 1500, "midtrain": 10, "sft": 10})
print((work / "pretrain.jsonl").read_text().splitlines()[4][:400])

# %% [markdown]
# ## What will be trained
#
# A configuration is one frozen value. Unknown keys and wrong types are errors that name the key.


# %%
def data(file):
    return DataConfig(sources=(Source(path=str(file)),), cache=str(work / "cache"), workers=0)


config = load_config(
    "pretrain",
    "tiny",
    [
        f'data.sources=[{{path="{work / "pretrain.jsonl"}"}}]',
        "context=256",
        "rows=4",
        "steps=60",
        "log_every=1",
        "checkpoint.every=30",
    ],
)
config = dataclasses.replace(
    config,
    data=data(work / "pretrain.jsonl"),
    evaluation=EvaluationConfig(
        data=data(work / "held_out" / "pretrain.jsonl"), every=20, examples=50
    ),
)
for name, value in describe(prepare(config)).items():
    print(f"{name:45} {value}")

# %% [markdown]
# ## Half of it, and then the rest
#
# The run is stopped behind step 30. The same call again goes on there; had it been killed, it would
# have gone on from the newest checkpoint, bit for bit.


# %%
class Lines(Silent):
    def say(self, line):
        print(line.replace(str(work), "..."))


run = work / "run"
train(dataclasses.replace(config, steps=30), run, Lines())
outcome = train(config, run, Lines())
print(
    f"loss {outcome.metrics['loss']:.3f}, held out {outcome.metrics['held_out_loss']:.3f}, ", end=""
)
print(f"{outcome.metrics['bits_per_byte']:.2f} bits a byte")

# %%
steps = [line for line in read(run / FILE) if "loss" in line]
held = [line for line in read(run / FILE) if "held_out_loss" in line]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
left.plot([s["step"] for s in steps], [s["loss"] for s in steps], label="training")
left.plot([s["step"] for s in held], [s["held_out_loss"] for s in held], "o", label="held out")
left.set(xlabel="step", ylabel="nats a token")
left.legend()
right.plot([s["step"] for s in steps], [s["entropy_by_layer"] for s in steps])
right.set(xlabel="step", ylabel="normalised entropy of the load", ylim=(0, 1))
right.set_title("one line a layer", fontsize=10)
plt.show()

# %% [markdown]
# ## The run is a model
#
# Its folder loads like any other checkpoint; `zaya convert run folder --to hf` exports it.

# %%
model = zaya_jax.load(run)
(result,) = model.generate(["Problem: 12 + 34 ="], 24, temperature=0)
print(repr(result.text), "- sixty steps teach little")

# %% [markdown]
# ## Router balancing
#
# Top-1 routing collapses if nothing holds it: an expert that is chosen more often learns more. The
# biases of ZAYA1 enter the choice alone, and move against each expert's share of the batch. Here
# three routers that send nearly all tokens to their first expert, with balancing and without.

# %%
EXPERTS, WIDTH, TOKENS = 8, 32, 2048


def skewed_router(key):
    """A random router with a component that all tokens share, which favours expert 0."""
    first, second, third = jax.random.split(key, 3)
    shared = jnp.ones(WIDTH)
    active = jax.nn.gelu(shared, approximate=False)
    hidden = [WIDTH**-0.5 * jax.random.normal(k, (WIDTH, WIDTH)) for k in (first, second)]
    out = WIDTH**-0.5 * jax.random.normal(third, (EXPERTS + 1, WIDTH))
    out = out.at[0].add(4 * active / (active @ active))
    return router.Weights(None, shared, hidden[0], jnp.zeros(WIDTH), hidden[1], shared, out)


def entropies(rate, steps=400):
    routers = [skewed_router(key) for key in jax.random.split(jax.random.key(0), 3)]
    optimizer = balancing.optimizer(BalancingConfig(rate=rate))

    @jax.jit
    def step(biases, state, key):
        counts = []
        for layer, weights in enumerate(routers):
            tokens = jax.random.normal(jax.random.fold_in(key, layer), (1, TOKENS, WIDTH))
            _, expert, _ = router.route(tokens, None, weights, biases[layer], 1e-5, None)
            counts.append(jnp.bincount(expert.reshape(-1), length=EXPERTS + 1))
        excess = balancing.pseudo_gradients(biases, jnp.stack(counts))
        updates, state = optimizer.update(excess, state, biases)
        return biases + updates, state, balancing.load(jnp.stack(counts)).entropy

    biases = jnp.zeros((3, EXPERTS + 1)).at[:, -1].set(-1.0)  # the skip class stays at -1
    state, seen = optimizer.init(biases), []
    for number in range(steps):
        biases, state, entropy = step(biases, state, jax.random.key(number))
        seen.append(entropy)
    return np.array(seen)


balanced, free = entropies(BalancingConfig().rate), entropies(0.0)
plt.figure(figsize=(6, 3.5), layout="constrained")
plt.plot(balanced, color="tab:blue", label=["balanced", None, None])
plt.plot(free, color="tab:red", label=["no balancing", None, None])
plt.axhline(0.98, color="0.6", linewidth=0.8)
plt.xlabel("step")
plt.ylabel("normalised entropy of the load")
plt.legend()
plt.show()
print(f"at the end: {balanced[-50:].min():.3f} or more with, {free.max():.3f} at most without")
