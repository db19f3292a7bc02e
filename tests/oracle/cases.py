"""Configurations on which we must agree with the PyTorch reference; imported by the tests and by
the reference environment."""

BASE = dict(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=4,
    moe_intermediate_size=48,
    router_hidden_size=16,
)
SLIDING = dict(
    num_hidden_layers=4,
    layer_types=["hybrid_sliding", "hybrid"] * 2,
    sliding_window=37,
)


def rope(theta: float, factor: float) -> dict:
    entry = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": factor}
    return {"rope_parameters": {"hybrid": entry, "hybrid_sliding": entry}}


CASES: dict[str, dict] = {
    "base": {},
    "one_layer": dict(num_hidden_layers=1),
    "odd_layers_many_experts": dict(num_hidden_layers=3, num_experts=16),
    "deep": dict(num_hidden_layers=8),
    "sliding": SLIDING,
    "window_of_one": dict(layer_types=["hybrid", "hybrid_sliding"], sliding_window=1),
    "untied": dict(tie_word_embeddings=False),
    "untied_bias": dict(tie_word_embeddings=False, lm_head_bias=True),
    "tied_bias": dict(lm_head_bias=True),
    "attention_bias": dict(attention_bias=True),
    "one_kv_head": dict(num_attention_heads=8, num_key_value_heads=1, head_dim=8),
    "no_grouping": dict(num_attention_heads=3, num_key_value_heads=3, head_dim=8),
    "conv_1_1": dict(cca_time0=1, cca_time1=1),
    "conv_1_3": dict(cca_time0=1, cca_time1=3),
    "conv_4_1": dict(cca_time0=4, cca_time1=1),
    "conv_3_4": dict(cca_time0=3, cca_time1=4, attention_bias=True),
    "full_rotary": rope(1e4, 1.0),
    "quarter_rotary": rope(1e3, 0.25),
    "skip_zero": dict(num_hidden_layers=3),
    "skip_identity": dict(num_hidden_layers=3, skip_expert="identity"),
}
# Small enough to commit: every mechanism occurs in one of them.
GOLDEN = ("sliding", "untied_bias", "attention_bias", "conv_3_4", "conv_1_1", "skip_identity")


def settings(name: str) -> dict:
    """Hugging Face config fields of a case."""
    values = {**BASE, **CASES[name]}
    values.setdefault("layer_types", ["hybrid"] * values["num_hidden_layers"])
    return values


def prompt_lengths(golden: bool) -> list[int]:
    return [72, 41, 1] if golden else [600, 411, 257, 2]
