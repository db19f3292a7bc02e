"""Products with weights in every form against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.product import NARROW, SHORT, Streamed, product, streamed

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
