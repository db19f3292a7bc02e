"""What every kernel is held to: its XLA reference, forward and backward, and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads


def distance(ours, theirs) -> float:
    """The largest difference of two trees' leaves, of the leaf's largest value."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    worst = 0.0
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, a.dtype, b.shape, b.dtype)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(b).all()
        scale = np.abs(b).max() if b.size else 0.0
        worst = max(worst, float(np.abs(a - b).max() / (scale or 1.0)) if a.size else 0.0)
        assert np.isfinite(a).all()
    return worst


def gradients(f, args, seed=0):
    """Of all floating-point arguments, for random cotangents."""
    leaves, tree = jax.tree.flatten(args)
    floats = [i for i, x in enumerate(leaves) if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)]

    def of_floats(*values):
        merged = list(leaves)
        for i, value in zip(floats, values, strict=True):
            merged[i] = value
        return [
            y
            for y in jax.tree.leaves(f(*jax.tree.unflatten(tree, merged)))
            if jnp.issubdtype(y.dtype, jnp.floating)
        ]

    out, pull = jax.vjp(of_floats, *(leaves[i] for i in floats))
    rng = np.random.default_rng(seed)
    return pull([jnp.asarray(rng.standard_normal(y.shape), y.dtype) for y in out])


def check_against_reference(ours, theirs, args, tolerance=1e-5, gradient=True):
    """Results and gradients in float32."""
    assert distance(ours(*args), theirs(*args)) < tolerance
    if gradient:
        assert distance(gradients(ours, args), gradients(theirs, args)) < tolerance


def check_bfloat16(ours, theirs, args, gradient=True):
    """In bfloat16, ours is at least as close to the float32 reference as the reference is."""

    def rounded(dtype):
        low = jax.tree.map(
            lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, args
        )
        return jax.tree.map(
            lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, low
        )

    def error(f, what):
        exact = what(theirs, rounded(jnp.float32))
        low = what(f, rounded(jnp.bfloat16))
        pairs = zip(jax.tree.leaves(low), jax.tree.leaves(exact), strict=True)
        return [
            float(np.sqrt(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)))
            for a, b in pairs
        ]

    passes = [lambda f, a: f(*a), gradients] if gradient else [lambda f, a: f(*a)]
    for what in passes:
        for mine, usual in zip(error(ours, what), error(theirs, what), strict=True):
            assert mine <= 1.05 * usual + 1e-7, (mine, usual)


def check_by_differences(f, args):
    """Gradients of a small float32 case by finite differences."""
    check_grads(f, args, order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)
