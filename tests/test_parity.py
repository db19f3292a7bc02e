"""Agreement with the PyTorch model of transformers, on models in which every tensor matters."""

from functools import cache
from pathlib import Path

import cases
import numpy as np
import pytest
from helpers import assert_close, logits, run, run_head
from safetensors.numpy import load_file

import zaya_jax
from zaya_jax import init_state

GOLDEN = Path(__file__).parent / "golden"
BOUND = 1e-4


@cache
def loaded(folder: Path, dtype: str = "float32"):
    return zaya_jax.load(folder, dtype)


def real(rows, lengths) -> np.ndarray:
    """The real tokens' part of padded rows, one after the other."""
    return np.concatenate([np.asarray(row)[:n] for row, n in zip(rows, lengths, strict=True)])


def compute(folder: Path, dtype: str = "float32"):
    """Our logits and experts for a case's padded rows, and the reference's results."""
    model, reference = loaded(folder, dtype), load_file(folder / "reference.safetensors")
    ids, lengths = reference["ids"], reference["lengths"]
    out = run(model.params, model.config, ids, new_lengths=lengths)
    ours = run_head(model.params, model.config, out.hidden)
    return real(ours, lengths), real(out.experts, lengths), reference


def check_float32(folder: Path):
    ours, experts, reference = compute(folder)
    assert_close(ours, reference["logits"], BOUND)
    np.testing.assert_array_equal(experts, reference["experts"])
    classes = loaded(folder).config.num_experts + 1
    assert len(np.unique(experts)) == classes, "some expert gets no token: the case proves little"


@pytest.mark.parametrize("name", cases.GOLDEN)
def test_golden_logits_and_experts(name):
    check_float32(GOLDEN / name)


@pytest.mark.parametrize("name", cases.CASES)
def test_float32_logits_and_experts(oracle, name):
    check_float32(oracle / name)


@pytest.mark.parametrize("name", cases.CASES)
def test_cached_decoding_equals_the_full_forward(oracle, name):
    """The last 64 tokens of two rows of different lengths, one at a time, from a padded prefill."""
    folder = oracle / name
    model, reference = loaded(folder), load_file(folder / "reference.safetensors")
    lengths = reference["lengths"][:2]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    ids, prompt = reference["ids"][:2], lengths - 64
    state = init_state(model.params, model.config, 2, capacity=640)
    out = run(model.params, model.config, ids[:, : prompt.max()], new_lengths=prompt, state=state)
    for step in range(64):
        token = np.take_along_axis(ids, (prompt + step)[:, None], axis=1)
        out = run(model.params, model.config, token, state=out.state)
        expected = reference["logits"][starts + prompt + step]
        ours = run_head(model.params, model.config, out.hidden)[:, 0]
        spread = reference["logits"].std()
        assert np.abs(ours - expected).max() / spread <= BOUND


def kl(expected: np.ndarray, actual: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of next-token distributions, in nats."""

    def log_softmax(x):
        x = x.astype(np.float64) - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(expected), log_softmax(actual)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", cases.CASES)
def test_bfloat16_is_as_close_to_float32_as_pytorch_is(oracle, name):
    ours, experts, reference = compute(oracle / name, "bfloat16")
    assert kl(reference["logits"], ours) <= kl(reference["logits"], reference["bf16_logits"])
    same = np.mean(experts == reference["experts"])
    assert same >= np.mean(reference["bf16_experts"] == reference["experts"])


def test_left_padded_rows_equal_the_unpadded_reference():
    folder = GOLDEN / "attention_bias"  # where PyTorch itself is not invariant to left padding
    model, reference = loaded(folder), load_file(folder / "reference.safetensors")
    ids, lengths = reference["ids"], reference["lengths"]
    width = ids.shape[1]
    left = np.stack([np.roll(row, width - n) for row, n in zip(ids, lengths, strict=True)])
    mask = np.arange(width) >= width - lengths[:, None]
    tokens, found = zaya_jax.from_left_padded(left, mask)
    ours = logits(model.params, model.config, tokens, new_lengths=found)
    assert_close(real(ours, found), reference["logits"], BOUND)
