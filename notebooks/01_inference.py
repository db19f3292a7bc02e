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
# # Inference with a ZAYA model
#
# Load a model, compile its forward pass yourself, generate, and look inside: who routes where,
# what residual scaling does to the stream, and how small the decoding state is. Everything runs
# on the model embedded in the package; `zaya_jax.load("Zyphra/ZAYA1-8B")` loads a released one
# the same way.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import zaya_jax
from zaya_jax.layers import rotary_table
from zaya_jax.model import Layer, apply_ends, place_tokens

model = zaya_jax.load()
config, params = model.config, model.params
print(f"{config.num_hidden_layers} layers, {config.num_experts} experts, {jax.default_backend()}")

# %% [markdown]
# ## Compile the forward pass yourself
#
# `forward` and `head` are plain functions of parameters and tokens. The config is hashable, so it
# is a static argument. The head is apart: here it only sees the last token.


# %%
@partial(jax.jit, static_argnums=1)
def next_token(params, config, tokens):
    out = zaya_jax.forward(params, config, tokens)
    return zaya_jax.head(params, config, out.hidden[:, -1]), out.experts


question = "Spell this word backward (example: sun -> nus): garden"
prompt = model.tokenizer.encode_chat([{"role": "user", "content": question}])
logits, experts = next_token(params, config, np.array([prompt]))
best = np.argsort(-logits[0])[:5]
for token, probability in zip(best, jax.nn.softmax(logits[0])[best], strict=True):
    print(f"{float(probability):7.2%}  {model.tokenizer.decode([token])!r}")

# %% [markdown]
# ## Generate
#
# `generate` takes text, token ids or conversations, and returns text, tokens, log-probabilities
# and the expert of every token.

# %%
(result,) = model.generate([{"role": "user", "content": question}], temperature=0)
print(result.text)
print("\nanswer:", result.answer.text, "| finished by:", result.finish_reason)

# %% [markdown]
# The model is sure of that. A harder question shows where it hesitates.

# %%
numbers = "Find the Greatest Common Divisor (GCD) of these numbers: 203, 116. "
numbers += "Give only the GCD as your final answer."
(hard,) = model.generate([{"role": "user", "content": numbers}], temperature=0)
spelled = [model.tokenizer.decode([token]) for token in hard.tokens]
fig, ax = plt.subplots(figsize=(11, 3))
ax.bar(range(len(spelled)), np.exp(hard.logprobs))
ax.set_xticks(range(len(spelled)), [repr(text)[1:-1] for text in spelled], rotation=90)
ax.set(ylabel="probability", title="How sure the model was of each token")
plt.show()

# %% [markdown]
# ## Routing, layer by layer
#
# Each token goes through one expert per layer. Training balanced the experts over many documents;
# on one question the routers specialise.

# %%
words = ["garden", "puzzle", "winter", "orange", "rocket", "silver", "breeze", "stream"]
questions = [[{"role": "user", "content": question.replace("garden", word)}] for word in words]
results = model.generate(questions, temperature=0)
layers = np.concatenate([r.experts for r in results])
share = np.stack([np.bincount(e, minlength=config.num_experts + 1) for e in layers.T]) / len(layers)
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3), width_ratios=(1, 2))
image = left.imshow(share, cmap="viridis", aspect="auto")
left.set(xlabel="expert (last: skip)", ylabel="layer", title="share of tokens")
left.set_yticks(range(config.num_hidden_layers))
left.set_xticks(range(config.num_experts + 1))
fig.colorbar(image)
right.imshow(result.experts.T, cmap="tab10", aspect="auto", interpolation="nearest")
right.set(xlabel="token of one conversation", ylabel="layer", title="expert of each token")
right.set_yticks(range(config.num_hidden_layers))
plt.show()

# %% [markdown]
# ## The residual stream through depth, with and without residual scaling
#
# ZAYA joins each sub-layer to the stream as `(output + hb) * hs + (stream + rb) * rs`, with
# learned vectors. `Layer` is the module that `forward` runs; applied by hand, it shows the stream
# between layers. Without scaling means scales 1 and biases 0: an ordinary residual connection.

# %%
tokens = np.array([prompt + result.tokens])


def stream_norms(params):
    """Mean norm of the residual stream before the first layer and after each one."""
    where = place_tokens(tokens)
    rotary = rotary_table(np.arange(tokens.shape[1])[None], config.head_dim, config.rope)
    h, router_state = apply_ends(params, config, "embed", tokens), None
    norms = [h]
    for i in range(config.num_hidden_layers):
        variables = {name: params[name]["layers"][i] for name in ("params", "balancing")}
        layer = Layer(config, first=i == 0)
        h, router_state, _, _ = layer.apply(variables, h, router_state, where, rotary)
        norms.append(h)
    return [float(jnp.linalg.norm(h, axis=-1).mean()) for h in norms]


def without_scaling(path, leaf):
    name = jax.tree_util.keystr(path)
    if "residual_scale']['" not in name and "input_hidden_states" not in name:
        return leaf
    return jnp.ones_like(leaf) if name.endswith("scale']") else jnp.zeros_like(leaf)


plain = jax.tree_util.tree_map_with_path(without_scaling, params)
fig, ax = plt.subplots(figsize=(6, 3))
ax.plot(stream_norms(params), "o-", label="learned scaling")
ax.plot(stream_norms(plain), "s--", label="scales 1, biases 0")
ax.set(xlabel="layers passed", ylabel="mean norm of the stream", ylim=0)
ax.set_xticks(range(config.num_hidden_layers + 1))
ax.legend()
plt.show()

# %% [markdown]
# ## What decoding has to remember
#
# Compressed attention keeps two key/value heads, two columns of the convolutions and one delayed
# value. For ZAYA1-8B that is an eighth of what full attention over its hidden size (16 heads of
# 128) would keep.

# %%
big = zaya_jax.ZayaConfig.preset("zaya1_8b")
shapes = jax.eval_shape(lambda: zaya_jax.init(big, jax.random.key(0), jnp.bfloat16))


def state_bytes(length):
    state = jax.eval_shape(lambda p: zaya_jax.init_state(p, big, 1, length), shapes)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


lengths = 2 ** np.arange(10, 18)
full = 2 * 2 * big.num_hidden_layers * big.hidden_size * lengths
ours = np.array([state_bytes(int(n)) for n in lengths])
fig, ax = plt.subplots(figsize=(6, 3))
ax.loglog(lengths, full / 2**30, "s--", label="full attention", base=2)
ax.loglog(lengths, ours / 2**30, "o-", label="ZAYA1-8B (CCA)", base=2)
ax.set(xlabel="tokens", ylabel="GiB per row, bfloat16")
ax.legend()
plt.show()
print(f"at 131072 tokens: {ours[-1] / 2**30:.1f} GiB against {full[-1] / 2**30:.1f} GiB")
