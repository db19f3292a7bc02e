"""Muon's orthogonalisation against its reference, interpreted."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import check_against_reference, check_bfloat16

from pallas_kernels.blocks import Blocks, trying
from pallas_kernels.newton_schulz import kernel, reference
from pallas_kernels.newton_schulz.api import newton_schulz

ONE_STEP = partial(reference.newton_schulz, steps=1)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@contextlib.contextmanager
def small_tiles():
    """Many of them in a small matrix."""
    with (
        trying(kernel.GRAM, Blocks((16, 32))),
        trying(kernel.POLYNOMIAL, Blocks((16, 16))),
        trying(kernel.UPDATE, Blocks((16, 32, 16))),
    ):
        yield


def ours(x, steps=1):
    return jax.jit(partial(kernel.newton_schulz, steps=steps))(x)


# Wide, tall and square; sizes that are and are not multiples of the tiles; batches.
@pytest.mark.parametrize(
    "shape", [(48, 64), (40, 72), (72, 40), (2, 33, 17), (2, 3, 16, 20), (1, 5), (32, 32)]
)
def test_one_iteration_is_the_references(shape):
    with small_tiles():
        check_against_reference(ours, ONE_STEP, (draw(*shape),), gradient=False)


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4)])
def test_nothing(shape):
    assert ours(jnp.zeros(shape)).shape == shape


def test_default_tiles_larger_than_the_matrix():
    check_against_reference(ours, ONE_STEP, (draw(2, 30, 50),), gradient=False)


def test_the_reference_is_that_of_optax():
    x = draw(24, 40)
    coefficients = jnp.array(reference.COEFFICIENTS)
    theirs = optax.contrib._muon.orthogonalize_via_newton_schulz(x, coefficients, eps=1e-7)
    for y, expected in ((x, theirs), (x.T, theirs.T)):
        np.testing.assert_allclose(reference.newton_schulz(y), expected, atol=2e-5)


@pytest.mark.parametrize("shape", [(2, 40, 72), (72, 40)])
def test_five_iterations_bring_singular_values_near_one(shape):
    with small_tiles():
        result = ours(draw(*shape), steps=5)
    np.testing.assert_allclose(result, reference.newton_schulz(draw(*shape)), atol=2e-5)
    values = np.linalg.svd(np.asarray(result), compute_uv=False)
    assert values.min() > 0.65 and values.max() < 1.2


@pytest.mark.parametrize("shape", [(2, 24, 40), (40, 24)])
def test_bfloat16_is_as_close_as_xlas(shape):
    with small_tiles():
        check_bfloat16(ours, ONE_STEP, (draw(*shape),), gradient=False)
        assert ours(draw(*shape).astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_symmetric_products_are_exactly_symmetric(over, dtype):
    x = draw(2, 39, 50).astype(dtype)
    with small_tiles():
        gram = kernel._symmetric(kernel.GRAM, x, jnp.array([1.0, 0.3]), over)
        polynomial = kernel._symmetric(kernel.POLYNOMIAL, gram, jnp.ones(2), 1, addend=-2.0)
    for array in (gram, polynomial):
        np.testing.assert_array_equal(array, jnp.matrix_transpose(array))
    exact = np.asarray(x, np.float64)
    exact = np.einsum("eki,ekj->eij" if over == 0 else "eik,ejk->eij", exact, exact)
    exact *= np.array([1, 0.3])[:, None, None]
    tolerance = {jnp.float32: 1e-6, jnp.bfloat16: 2**-7}[dtype] * np.abs(exact).max()
    np.testing.assert_allclose(np.asarray(gram, np.float64), exact, atol=tolerance)


def test_matrices_of_a_batch_are_taken_by_themselves():
    x = draw(3, 20, 40)
    with small_tiles():
        whole = ours(x * jnp.array([1.0, 100.0, 1e-3])[:, None, None])
        for i in range(3):
            np.testing.assert_allclose(whole[i], ours(x[i]), atol=3e-5)


def test_a_matrix_of_zeros_stays_zero_and_one_of_nan_stays_alone():
    x = draw(3, 20, 40).at[0].set(0).at[2].set(jnp.nan)
    with small_tiles():
        result = ours(x)
    np.testing.assert_array_equal(result[0], 0)
    assert jnp.isfinite(result[1]).all() and jnp.isnan(result[2]).all()


def test_what_is_above_the_diagonal_comes_from_below_whatever_the_order_of_sums(monkeypatch):
    exact = kernel._product

    def uneven(*args):
        return exact(*args) * (1 + 1e-3 * jnp.arange(16)[:, None])

    monkeypatch.setattr(kernel, "_product", uneven)
    with small_tiles():
        gram = kernel._symmetric(kernel.GRAM, draw(1, 39, 50), jnp.ones(1), 1)
    np.testing.assert_array_equal(gram, jnp.matrix_transpose(gram))


@pytest.mark.parametrize("error", [-1e-6, 0, 1e-6])  # of a GPU's square root
def test_every_tile_below_the_diagonal_has_a_number(monkeypatch, error):
    root = jnp.sqrt
    monkeypatch.setattr(jnp, "sqrt", lambda x: root(x) * (1 + error))
    number = np.arange(5000 * 5001 // 2, dtype=np.int32)
    row, column = jax.jit(lambda n: kernel.triangle(n))(number)
    expected = np.repeat(np.arange(5000), np.arange(1, 5001))
    np.testing.assert_array_equal(row, expected)
    np.testing.assert_array_equal(column, number - expected * (expected + 1) // 2)


def test_implementations_are_chosen_by_name():
    x = draw(16, 20)
    np.testing.assert_allclose(
        newton_schulz(x, 1, implementation="pallas"),
        newton_schulz(x, 1, implementation="xla"),
        atol=1e-6,
    )
    with pytest.raises(ValueError, match="at least 1 step"):
        newton_schulz(x, 0)
