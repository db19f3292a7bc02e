"""Random models in which every tensor matters, and compiled entry points shared by the tests."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from zaya_jax import Rope, ZayaConfig, forward, head, init

# Python of the PyTorch reference environment (`make oracle`).
ORACLE = Path(__file__).parent.parent / ".venv-oracle" / "bin" / "python"

TINY = ZayaConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=4,
    moe_intermediate_size=24,
    router_hidden_size=8,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_ids=(2,),
)
# Every switch the other way, and long convolutions.
ODD = ZayaConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=8,
    cca_time0=3,
    cca_time1=4,
    num_experts=3,
    moe_intermediate_size=24,
    router_hidden_size=8,
    layer_types=("hybrid_sliding", "hybrid", "hybrid_sliding"),
    sliding_window=5,
    sliding_rope=Rope(100.0),
    rope=Rope(1e4),
    tie_word_embeddings=False,
    lm_head_bias=True,
    attention_bias=True,
    skip_expert="identity",
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_ids=(2,),
)
# Measured beside transformers, where speed is not what is tested.
BENCH = ZayaConfig(
    vocab_size=512,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=16,
    num_experts=8,
    moe_intermediate_size=48,
    router_hidden_size=48,
)
CONFIGS = {"tiny": TINY, "odd": ODD}


def random_params(config: ZayaConfig, seed: int = 0, skip_bias: float = 0.05):
    """Parameters whose every tensor changes the logits, the skip class within reach."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if name.endswith("balancing_biases"):
            noise *= 0.05
            noise[-1] = skip_bias
            return jnp.asarray(noise)
        if name.endswith(("scale", "temp")) or "norm" in name:
            return jnp.asarray(1 + 0.3 * noise)
        if leaf.ndim == 1:
            return jnp.asarray(0.1 * noise)
        if "embed" in name:
            return jnp.asarray(noise)
        if "out_proj" in name:
            return jnp.asarray(4 * noise / leaf.shape[-1] ** 0.5)
        return jnp.asarray((0.4 if "conv" in name else 1.5 / leaf.shape[-1] ** 0.5) * noise)

    return jax.tree_util.tree_map_with_path(draw, init(config, jax.random.key(0)))


run = jax.jit(forward, static_argnums=1)
run_head = jax.jit(head, static_argnums=1)


@partial(jax.jit, static_argnums=1)
def logits(params, config, tokens, **arguments):
    return head(params, config, forward(params, config, tokens, **arguments).hidden)


def random_tokens(seed: int, *shape: int, vocab: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, vocab, shape).astype(np.int32)


def assert_close(actual, expected, bound: float = 2e-5):
    """The largest difference is within `bound` of the expected values' spread."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / expected.std()
    assert error <= bound, f"differs by {error:.2e} of the spread, bound {bound:.0e}"
