"""Products with weights in every form against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.product import NARROW, SHORT, Streamed, product, streamed, transposed_product

FORMS = {"narrow": (1024, NARROW), "wide": (512, 2 * NARROW), "tall": (2 * SHORT, 128)}


def operands(rows: int, outputs: int, inputs: int, dtype: str):
    rng = np.random.default_rng(rows)
    shapes = (rows, inputs), (outputs, inputs)
    return tuple(jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 32, 40, 128, 256])
@pytest.mark.parametrize("form", FORMS)
def test_streamed_weights_multiply_exactly(form, rows):
    """Products of 16-bit numbers are exact in float32, so only their sums round."""
    x, weight = operands(rows, *FORMS[form], "bfloat16")
    held = streamed(weight)
    assert isinstance(held, Streamed) and held.transposed == (form == "tall")
    assert held.shape == weight.shape and held.dtype == weight.dtype
    out = jax.jit(product)(x, held)
    wanted = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    assert out.dtype == jnp.float32 and out.shape == wanted.shape
    assert np.max(np.abs(out - wanted)) < 3e-4


def test_leading_axes_are_kept():
    x, weight = operands(6, *FORMS["narrow"], "bfloat16")
    for held in (weight, streamed(weight)):
        out = product(x.reshape(2, 3, -1), held)
        assert np.allclose(out.reshape(6, -1), product(x, weight), atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((64, 512), "bfloat16"), ((1024, 512), "float32"), ((4096, 72), "bfloat16")],
)
def test_small_odd_and_float32_weights_stay_as_they_are(shape, dtype):
    weight = jnp.zeros(shape, dtype)
    assert streamed(weight) is weight


def test_wide_weights_are_the_first_operand_of_32_rows():
    """XLA would swap the operands back, and repack the weight."""
    x, weight = operands(32, *FORMS["wide"], "bfloat16")
    text = jax.jit(product).lower(x, streamed(weight)).compile().as_text()
    outputs = len(weight)
    assert f"f32[{outputs},32]" in text and f"f32[32,{outputs}]{{1,0}} dot(" not in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["plain", "streamed"])
def test_gradients_are_products_of_the_weights_dtype(dtype, form):
    """Against float64, for a cotangent that is rounded to the dtype."""
    x, weight = operands(40, *FORMS["narrow"], dtype)
    of_out = np.random.default_rng(0).standard_normal((40, len(weight)))
    held = streamed(weight) if form == "streamed" else weight

    def gradient(x, weight, of_out):
        return jax.vjp(product, x, weight)[1](of_out)

    rounded = jnp.asarray(of_out, jnp.float32)
    of_x, of_weight = jax.jit(gradient)(x, held, rounded)
    of_weight = of_weight.array if isinstance(of_weight, Streamed) else of_weight
    assert of_x.dtype == x.dtype and of_weight.dtype == weight.dtype
    exact_of_out = np.asarray(rounded.astype(dtype), np.float64)
    tolerance = 1e-6 if dtype == "float32" else 1 / 256
    for ours, wanted in (
        (of_x, exact_of_out @ np.asarray(weight, np.float64)),
        (of_weight, exact_of_out.T @ np.asarray(x, np.float64)),
    ):
        error = np.abs(np.asarray(ours, np.float64) - wanted).max()
        assert error < tolerance * np.abs(wanted).max()
    equations = jax.make_jaxpr(gradient)(x, held, rounded).jaxpr.eqns
    products = [e for e in equations if e.primitive.name == "dot_general"]
    assert len(products) == 2
    assert all(str(v.aval.dtype) == dtype for e in products for v in e.invars)


@pytest.mark.parametrize("m, n", [(32, 512), (512, 32), (512, 512)])
def test_the_narrow_side_of_a_gradient_is_transposed(m, n):
    """So that 16-bit numbers are multiplied along the last axis of the first operand."""
    rng = np.random.default_rng(m)
    a, b = (jnp.asarray(rng.standard_normal((2, 256, width)), jnp.bfloat16) for width in (m, n))
    compiled = jax.jit(transposed_product).lower(a, b).compile()
    wanted = np.einsum("bti,btj->bij", *(np.asarray(x, np.float64) for x in (a, b)))
    error = np.abs(np.asarray(compiled(a, b), np.float64) - wanted).max()
    assert error < np.abs(wanted).max() / 256
    (dot,) = (line for line in compiled.as_text().splitlines() if " dot(" in line)
    assert f"bf16[2,{min(m, n)},512]" in dot and "lhs_contracting_dims={2}" in dot
