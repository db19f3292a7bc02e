"""The fused residual scaling and norm against its reference, interpreted."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from checks import check_against_reference, check_bfloat16, check_by_differences

from pallas_kernels.norm import kernel, reference

OURS = partial(kernel.scale_residual_and_norm, eps=1e-5)
THEIRS = partial(reference.scale_residual_and_norm, eps=1e-5)


def operands(tokens, size, seed=0):
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal(shape) for shape in ((tokens, size),) * 2 + ((size,),) * 5]
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


@pytest.mark.parametrize(("tokens", "size"), [(0, 32), (1, 32), (7, 40), (33, 96), (64, 128)])
def test_results_and_gradients_are_those_of_the_reference(tokens, size):
    check_against_reference(OURS, THEIRS, operands(tokens, size))


def test_more_tokens_than_programs_of_the_backward_pass(monkeypatch):
    monkeypatch.setattr(kernel, "PARTIALS", 2)
    check_against_reference(OURS, THEIRS, operands(21, 32))


def test_any_leading_axes():
    args = operands(6, 32)
    shaped = tuple(a.reshape(2, 3, 32) for a in args[:2]) + args[2:]
    check_against_reference(OURS, THEIRS, shaped)


def test_bfloat16_outputs_and_parameters():
    check_bfloat16(
        lambda o, r, *v: OURS(o, r.astype(jnp.float32), *v),
        lambda o, r, *v: THEIRS(o, r.astype(jnp.float32), *v),
        operands(17, 64),
    )


def test_gradients_by_finite_differences():
    check_by_differences(OURS, operands(3, 32))


def test_a_token_of_nan_stays_alone():
    output, *rest = operands(9, 32)
    stream, normed = OURS(output.at[4].set(jnp.nan), *rest)
    for array in (stream, normed):
        bad = np.isnan(np.asarray(array)).all(axis=1)
        assert bad.tolist() == [i == 4 for i in range(9)]
        assert not np.isnan(np.asarray(array)[~bad]).any()
