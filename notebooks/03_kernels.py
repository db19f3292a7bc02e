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
# # The kernels, on paper
#
# What XLA's compiler for ROCm made of our Pallas kernels for the MI300X, on a machine without one:
# `make rocm-aot` writes these tables, and nothing in them was timed. `docs/kernels.md` has them as
# text.

# %%
import json
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from pallas_kernels.attention import kernel, reference
from pallas_kernels.rocm.roofline import (
    MEASURED_BANDWIDTH,
    MOST_OF_MINIMUM,
    MOST_OF_REFERENCE,
    PEAK_FLOPS,
)

root = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "docs" / "kernels.json").exists())
rows = json.loads((root / "docs" / "kernels.json").read_text())
rows = [row for row in rows if row["sizes"] == "8B"]

# %% [markdown]
# ## Bytes moved
#
# Of the program that XLA makes of the reference (left; a fused op should move at most half), and of
# what must be moved at least (right). Bars beyond the line miss their target.

# %%
names = [row["case"] for row in rows]
place = np.arange(len(rows))
figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True)
for axis, of, most in (
    (axes[0], "reference_moved", MOST_OF_REFERENCE),
    (axes[1], "minimum", MOST_OF_MINIMUM),
):
    ratios = [row["moved"] / row[of] for row in rows]
    colors = ["tab:green" if ratio <= most else "tab:orange" for ratio in ratios]
    axis.barh(place, ratios, color=colors)
    axis.axvline(most, color="black", linewidth=1)
    axis.set_xlim(0, min(max(ratios), 4) * 1.1)
    axis.set_xlabel(f"of {'the XLA-only program' if of.startswith('ref') else 'the least'}")
axes[0].set_yticks(place, names)
axes[0].invert_yaxis()
figure.tight_layout()

# %% [markdown]
# ## The roofline
#
# What each case has to wait for: its bytes, at the 4.33 TB/s that others measured, or its products,
# at the matrix units' peak. The longer of both bounds it.

# %%
memory = [row["moved"] / MEASURED_BANDWIDTH * 1e6 for row in rows]
products = [row["flops"] / PEAK_FLOPS * 1e6 for row in rows]
plt.figure(figsize=(9, 6))
plt.barh(place - 0.2, memory, 0.4, label="bytes")
plt.barh(place + 0.2, products, 0.4, label="products")
plt.yticks(place, names)
plt.gca().invert_yaxis()
plt.xscale("log")
plt.xlabel("microseconds")
plt.legend()

# %% [markdown]
# ## Registers
#
# A SIMD has 512 registers a lane for all of its wavefronts: the more a kernel takes, the fewer
# wavefronts hide each other's waiting.

# %%
kernels = {k["name"]: k for row in reversed(rows) for k in row["kernels"]}
order = sorted(kernels, key=lambda name: kernels[name]["vgprs"])
plt.figure(figsize=(9, 6))
plt.barh(order, [kernels[name]["vgprs"] for name in order])
for limit, waves in ((128, 4), (168, 3), (256, 2)):
    plt.axvline(limit, color="black", linewidth=0.8)
    plt.text(limit, len(order) - 0.3, f"{waves} waves", ha="right", fontsize=8)
plt.xlabel("vector registers")
# %% [markdown]
# ## The same numbers
#
# Without a GPU, Pallas interprets kernels. They are slow then, and right.

# %%
rng = np.random.default_rng(0)
q, k, v = (
    jnp.asarray(rng.standard_normal(s), jnp.float32)
    for s in ((1, 40, 4, 16), (1, 2, 40, 16), (1, 2, 40, 16))
)
offsets = jnp.zeros(1, jnp.int32)
ours = kernel.attention(q, k, v, offsets)
float(jnp.abs(ours - reference.attention(q, k, v, offsets)).max())
