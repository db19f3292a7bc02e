"""Muon's orthogonalisation of matrices by Newton-Schulz iterations, in XLA.

Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024); conventions as in
his code and in `optax.contrib.muon`.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.precision import exact

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at zero that stay near one
EPS = 1e-7


def newton_schulz(
    x: jax.Array,
    steps: int = STEPS,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = EPS,
) -> jax.Array:
    """Moves the singular values of matrices towards one, and leaves their singular vectors.

    Args:
      x: [..., rows, columns], of a float dtype; each matrix is taken by itself.
      steps: iterations X <- a X + (b A + c A A) X with A = X X^T, the smaller of the two Gram
        matrices (where there are more rows than columns, X is the transposed matrix); at least 1.
      coefficients: a, b and c.
      eps: added to the Frobenius norms that the matrices are first divided by.

    Returns:
      As x. Float32 is computed in float32, all else in bfloat16 with sums in float32.
    """
    dtype = x.dtype
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.matrix_transpose(x) if tall else x
    x = x.astype(jnp.float32) * frobenius_scale(x, eps)[..., None, None]
    x = x.astype(compute_dtype(dtype))
    for _ in range(steps):
        x = _iterate(x, *coefficients)
    return (jnp.matrix_transpose(x) if tall else x).astype(dtype)


def frobenius_scale(x: jax.Array, eps: float) -> jax.Array:
    """What makes the Frobenius norm of matrices one: [..., rows, columns] -> float32 [...]."""
    return 1 / (jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(-2, -1))) + eps)


def compute_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Of operands and of what is stored between products."""
    return jnp.dtype(jnp.float32 if dtype == jnp.float32 else jnp.bfloat16)


def _iterate(x: jax.Array, a: float, b: float, c: float) -> jax.Array:
    gram = _product(x, jnp.matrix_transpose(x)).astype(x.dtype)
    polynomial = b * gram.astype(jnp.float32) + c * _product(gram, gram)
    update = _product(polynomial.astype(x.dtype), x)
    return (a * x.astype(jnp.float32) + update).astype(x.dtype)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=exact(x.dtype), preferred_element_type=jnp.float32)
