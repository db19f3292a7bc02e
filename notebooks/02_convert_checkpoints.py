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
# # Converting checkpoints
#
# ZAYA1 was released in two PyTorch layouts: the current Hugging Face one, and the legacy one of
# Zyphra's first releases, with twice the layers and every expert a tensor of its own. JAX users
# keep Orbax. `convert` goes from any of them to any other, bit for bit, with a few tensors in
# memory at a time; `zaya_jax.load` reads all three. Here on the model embedded in the package.

# %%
import json
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import orbax.checkpoint as ocp

import zaya_jax
from convert.checkpoint import layout_of, open_checkpoint
from convert.conversion import convert, plan
from convert.verify import compare, verify
from zaya_jax.loading import NANO

work = Path(tempfile.mkdtemp())

# %% [markdown]
# ## What will be called what
#
# One table maps our tree to the names of every layout. A plan opens the source, checks that
# everything is there in its shape, and lists what becomes of each tensor; nothing is written.

# %%
planned = plan(NANO, "hf-legacy")
for old, _, new, dtype, shape in planned.rows():
    if "model.layers.1." in old and "scale" not in old and "bias" not in old:
        print(f"{old}\n    -> {new}  {dtype} [{shape}]")

# %% [markdown]
# ## There and back again
#
# The new folder appears when it is complete. The tokenizer comes along.

# %%
convert(NANO, work / "legacy", "hf-legacy")
convert(work / "legacy", work / "orbax", "orbax")
convert(work / "orbax", work / "back", "hf")
for name in ("legacy", "orbax", "back"):
    files = sorted(p.name for p in (work / name).iterdir())
    print(f"{name:7} {layout_of(work / name):10} {', '.join(files)}")
print("differences after all three:", compare(NANO, work / "back"))

# %% [markdown]
# Residual scaling shows what the two PyTorch layouts disagree about: legacy layers scale as they
# begin, ours as they end. The same numbers have other names there.

# %%
values = json.loads((work / "legacy" / "config.json").read_text())
print(values["num_hidden_layers"], "legacy layers,", values["ffn_hidden_size"], "gate and up rows")
leaf = "params/layers/0/post_mlp_residual_scale/hidden_states_scale"
entry = zaya_jax.loading.mapping(planned.config)[leaf]
print(f"{entry.name}\n    is {entry.legacy[0]}")

# %% [markdown]
# ## Loading
#
# Any of them gives the same model.

# %%
tokens = np.array([[4, 8, 15, 16, 23, 42]])
expected = zaya_jax.load().logits(tokens)
for name in ("legacy", "orbax", "back"):
    logits = zaya_jax.load(work / name).logits(tokens)
    print(name, "largest difference:", float(np.abs(logits - expected).max()))

# %% [markdown]
# Orbax itself restores `weights/` too, without this package.

# %%
with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore(work / "orbax" / "weights")
print(len(jax.tree.leaves(tree)), "arrays;", tree["params"]["norm"]["weight"][:4])

# %% [markdown]
# ## Is it sound?
#
# `verify` reads every value: checksums that `convert` left, NaN, ranges. The checksum of all values
# is the same in every layout.

# %%
reports = {name: verify(work / name) for name in ("legacy", "orbax", "back")}
for name, report in reports.items():
    print(f"{name:7} {report.checksum[:16]}  {report.compared} leaves agree, {report.problems}")

ranges = reports["orbax"].ranges
names = sorted(ranges, key=lambda n: ranges[n].most - ranges[n].least)
plt.figure(figsize=(8, 7))
plt.hlines(names, [ranges[n].least for n in names], [ranges[n].most for n in names], lw=4)
plt.plot([ranges[n].mean for n in names], names, "k|", ms=9)
plt.xlabel("smallest to greatest value, and mean")
plt.tight_layout()
plt.show()

# %% [markdown]
# What is damaged is found and named, and never half read.

# %%
file = work / "back" / "model.safetensors"
data = bytearray(file.read_bytes())
data[-1] ^= 1
file.write_bytes(data)
print(verify(work / "back").problems)
file.write_bytes(data[:-100])
try:
    open_checkpoint(work / "back")
except zaya_jax.CheckpointError as error:
    print(str(error).replace(str(work), "..."))

# %% [markdown]
# On the command line:
#
#     zaya convert Zyphra/ZAYA1-8B weights-for-jax --to orbax
#     zaya convert weights-for-jax for-transformers --to hf --dtype bfloat16 --max-shard-size 5G
#     zaya verify for-transformers --against weights-for-jax
