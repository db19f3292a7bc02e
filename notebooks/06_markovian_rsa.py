# ---
# jupyter:
#   jupytext:
#     formats: py:percent,ipynb
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Markovian RSA
#
# Rounds of candidates, each of which sees the ends of some of the round before (arXiv 2605.05365).
# First one question, then what it brings the embedded model on held-out problems.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import zaya_jax

model = zaya_jax.load(layout="decoding")
question = "State the final answer to the following arithmetic problem: 361 + 575 - 88 ="
solution = model.markovian_rsa(question, seed=1, verifier=lambda answer: answer == "848")
for number, round in enumerate(solution.rounds):
    print(f"round {number}: {round.mean_correctness:.0%} correct, majority {round.answer}")
    for candidate in round.candidates[:3]:
        print(f"  sees {candidate.subset}, answers {candidate.answer}")

# %% [markdown]
# However many rounds there are, a row of the decoding state holds one prompt and one response.
# Beginnings that several prompts have in common are read once.

# %%
print(f"{solution.generated_tokens} tokens generated")
print(f"{solution.read_tokens} of {solution.prompt_tokens} tokens of prompts read")

# %% [markdown]
# ## What it brings
#
# `python -m train.course.proof` measured this: the same held-out problems, answered independently
# and in rounds. RSA shows candidates whole, Markovian RSA their last tokens. Accuracy against the
# tokens generated for a problem; every point of a line is one round more.

# %%
figures = json.loads(Path("../docs/rsa.json").read_text())
families = figures["families"]
fig, axes = plt.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
for axis, row in zip(axes.flat, families, strict=False):
    each = row["tokens_each"]
    axis.plot([each], [row["single"]], "ks", label="single, avg@16")
    ks = {int(k): accuracy for k, accuracy in row["majorities_of"].items()}
    axis.plot([k * each for k in ks], list(ks.values()), "o-", color="0.6", label="maj@k")
    for name, run, color in (("RSA", row["rsa"], "C1"), ("Markovian RSA", row, "C0")):
        spent = np.cumsum(run["tokens_by_round"])
        axis.plot(spent, run["rounds"], "v:", color=color, label=f"{name}, mean")
        axis.plot(spent, run["majority_by_round"], "^-", color=color, label=f"{name}, majority")
    axis.set(title=row["family"], xlabel="tokens", xscale="log")
axes[0, 0].legend(fontsize=8)
fig.show()

# %% [markdown]
# An aggregator that copied a random candidate would be right as often as its candidates: the
# diagonal. Below it, the mean correctness of a second round that sees the candidates of the first
# as they are, their tokens shuffled, or those of another problem.

# %%
counts = np.sum([row["by_correct"] for row in families], axis=0)
fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
C = figures["settings"]["C"]
left.plot(range(C + 1), counts[:, 1] / counts[:, 0], "o-", label="aggregated")
left.plot([0, C], [0, 1], "k:", label="a random candidate")
left.set(xlabel=f"correct candidates of {C}", ylabel="correct responses", xticks=range(C + 1))
left.legend()
for place, name in enumerate(("same", "shuffled", "foreign")):
    values = [row["controls"][name] for row in families]
    right.bar(np.arange(len(families)) + 0.2 * place, values, 0.2, label=name)
right.plot(
    np.arange(len(families)) + 0.2, [row["single"] for row in families], "k_", label="single"
)
right.set_xticks(np.arange(len(families)) + 0.2, [row["family"] for row in families], rotation=20)
right.set(ylabel="correct in the second round")
right.legend()
fig.show()
