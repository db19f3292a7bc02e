"""Arithmetic that a model needs, whatever computes it."""

from zaya_jax.config import ZayaConfig
from zaya_jax.model import parameter_counts


def forward_flops(config: ZayaConfig, tokens: int, logits: int, pairs: float) -> float:
    """Of a forward pass: the parameters that tokens use, logits of some of them, and attention of
    pairs of query and key. A gradient takes twice as many again."""
    _, used = parameter_counts(config)
    head = config.vocab_size * config.hidden_size
    attention = 2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return 2 * (used * tokens + head * logits + attention * pairs)


def training_flops(config: ZayaConfig, context: int) -> float:
    """For each token of full rows, forward and gradient: what a utilisation is measured against."""
    return 3 * forward_flops(config, context, context, context * (context + 1) / 2) / context
