"""The CCA mixing kernels against their reference, interpreted."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import check_bfloat16, check_by_differences, distance

from pallas_kernels.blocks import Blocks, trying
from pallas_kernels.cca_mix import backward, kernel, reference, value_shift
from pallas_kernels.cca_mix.reference import Carry, Weights

# Interpreted kernels take longer to compile than to run.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
OURS = jax.jit(kernel.cca_mix, compiler_options=FAST)
THEIRS = jax.jit(reference.cca_mix)


def operands(rows, tokens, kv_heads=2, group=2, d=16, taps=(2, 2), half=None, age=None, **given):
    rng = np.random.default_rng(0)
    k0, k1 = taps
    heads, half = kv_heads * group, d // 4 if half is None else half
    channels = (heads + kv_heads) * d

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    weights = Weights(
        normal(channels, 1, k0),
        normal(channels),
        normal(channels, d, k1) / d**0.5,
        normal(channels),
        normal(kv_heads) + 3,
        normal(kv_heads * d // 2),
    )
    carry = Carry(normal(rows, k0 + k1 - 2, channels), normal(rows, kv_heads * d // 2))
    projections = (
        normal(rows, tokens, n) for n in (heads * d, kv_heads * d, *[kv_heads * d // 2] * 2)
    )
    angles = normal(rows, tokens, half)
    lengths = jnp.asarray(given.get("lengths", [tokens] * rows), jnp.int32)
    tables = jnp.cos(angles), jnp.sin(angles)
    return (*projections, weights, carry, lengths, ages(age, tokens), *tables)


def ages(segments, tokens):
    """Of packed segments of these lengths."""
    if segments is None:
        return None
    age = [np.concatenate([np.arange(n) for n in row]) for row in segments]
    assert all(len(a) == tokens for a in age)
    return jnp.asarray(np.stack(age), jnp.int32)


@contextlib.contextmanager
def small_blocks():
    """So that few tokens are many programs."""
    sizes = 16, 16
    blocks = {kernel.FORWARD: sizes, kernel.DECODE: sizes, backward.BACKWARD: 2 * sizes}
    blocks[value_shift.VALUES] = (16,)
    with contextlib.ExitStack() as stack:
        for name, sizes in blocks.items():
            stack.enter_context(trying(name, Blocks(sizes)))
        yield


def results_and_gradients(f, args, options=None):
    """Those by all arrays of floating-point numbers, for random cotangents."""
    *arrays, lengths, age, cos, sin = args
    rng = np.random.default_rng(1)

    def run(*arrays):
        def of_arrays(*arrays):
            *arrays, cos, sin = arrays
            return f(*arrays, lengths, age, cos, sin)

        out, pull = jax.vjp(of_arrays, *arrays)
        return out, pull(
            jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), out)
        )

    return jax.jit(run, compiler_options=options)(*arrays, cos, sin)


def check(args, tolerance=1e-5):
    ours = results_and_gradients(kernel.cca_mix, args, FAST)
    assert distance(ours, results_and_gradients(reference.cca_mix, args)) < tolerance


CASES = {
    "tiles of packed segments": dict(
        # One token; one that begins in the halo of a tile; one at the edge of another.
        **dict(rows=1, tokens=43, d=8, group=1, half=3),
        **dict(age=[[1, 1, 13, 1, 16, 11]]),
    ),
    "four queries of a key, channels not a power of two": dict(
        rows=2, tokens=17, group=4, d=24, half=12, taps=(3, 1), lengths=[0, 2]
    ),
    "nothing rotated": dict(rows=1, tokens=3, group=1, d=4, half=0, taps=(2, 1)),
    "one tap each, an odd number of channels": dict(
        rows=2, tokens=9, d=7, half=2, taps=(1, 1), age=[[4, 5], [9]]
    ),
    "fewer tokens than the halo": dict(
        rows=2, tokens=2, taps=(2, 3), age=[[2], [1, 1]], lengths=[2, 1]
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_the_reference(name, monkeypatch):
    monkeypatch.setattr(kernel, "FEW", 0)
    monkeypatch.setattr(backward, "PROGRAMS", 8)  # so that a program has several blocks of tokens
    with small_blocks():
        check(operands(**CASES[name]))


@pytest.mark.parametrize("name", list(CASES)[:2])
def test_few_tokens_are_mixed_one_head_at_a_time(name):
    args = operands(**CASES[name])
    with small_blocks():
        ours = jax.jit(lambda *args: kernel.cca_mix(*args), compiler_options=FAST)(*args)
    assert distance(ours, THEIRS(*args)) < 1e-5


def test_chunks_that_begin_within_a_segment():
    """A row each for those whose first segment began at the chunk, or as many tokens before as the
    carry has columns, fewer or more."""
    *rest, age, cos, sin = operands(6, 5, group=1, d=4, half=1, taps=(3, 3), age=[[3, 2]] * 6)
    age = jnp.where(jnp.arange(5) < 3, age + jnp.arange(6)[:, None], age)
    check((*rest, age, cos, sin))


@pytest.mark.parametrize("mix", [OURS, THEIRS])
def test_two_chunks_with_a_carry_are_one_pass(mix):
    """The second one begins at the second token of a segment, which sees one column of the
    carry and not the one before."""
    *projections, weights, carry, _, age, cos, sin = operands(1, 10, age=[[3, 4, 3]])

    def chunk(carry, tokens):
        arrays = [x[:, tokens] for x in projections]
        tables = age[:, tokens], cos[:, tokens], sin[:, tokens]
        return (*arrays, weights, carry, jnp.array([arrays[0].shape[1]]), *tables)

    *whole, carry_after = THEIRS(*chunk(carry, slice(None)))
    *first, between = THEIRS(*chunk(carry, slice(0, 4)))
    *second, end = mix(*chunk(between, slice(4, None)))
    joined = [jnp.concatenate(pair, axis=1) for pair in zip(first, second, strict=True)]
    assert distance(joined, whole) < 1e-5
    assert distance(end, carry_after) == 0
    _, gradients = results_and_gradients(reference.cca_mix, chunk(between, slice(4, None)))
    unseen, seen = gradients[5].conv_tail[0]
    assert not unseen.any() and seen.any()


def test_tables_have_no_gradient():
    """Nothing trains them; `check` compares the kernel's gradients by all arrays."""
    _, (*_, cos, sin) = results_and_gradients(reference.cca_mix, operands(1, 2, group=1, d=4))
    assert not cos.any() and not sin.any()


@pytest.mark.parametrize(("rows", "tokens"), [(0, 3), (2, 0)])
def test_without_tokens_the_carry_stays(rows, tokens):
    for age in (None, jnp.zeros((rows, tokens), jnp.int32)):
        *rest, _, cos, sin = operands(rows, tokens)
        args = (*rest, age, cos, sin)
        (*heads, carry), _ = results_and_gradients(kernel.cca_mix, args)
        assert [x.shape for x in heads] == [(rows, tokens, n, 16) for n in (4, 2, 2)]
        assert distance(carry, args[5]) == 0


def test_one_token_at_a_time_is_all_at_once():
    *projections, weights, carry, _, _, cos, sin = operands(3, 4)
    rest = jnp.full(3, 4), None, cos, sin
    *whole, end = THEIRS(*projections, weights, carry, *rest)
    for token in range(4):
        now = [x[:, token : token + 1] for x in projections]
        tables = [x[:, token : token + 1] for x in (cos, sin)]
        *ours, carry = OURS(*now, weights, carry, jnp.ones(3, int), None, *tables)
        assert distance(ours, [x[:, token : token + 1] for x in whole]) < 1e-5
    assert distance(carry, end) == 0


def test_padding_of_nan_stays_there(monkeypatch):
    monkeypatch.setattr(kernel, "FEW", 0)
    lengths = [0, 3, 20]
    *projections, weights, carry, _, _, cos, sin = operands(3, 20)
    rest = weights, carry, jnp.array(lengths), None, cos, sin
    padding = np.arange(20) >= np.array(lengths)[:, None]
    poisoned = [jnp.where(padding[..., None], jnp.nan, x) for x in projections]
    with small_blocks():
        ours = jax.jit(lambda *args: kernel.cca_mix(*args), compiler_options=FAST)(*poisoned, *rest)
    theirs = THEIRS(*projections, *rest)
    real = [[x[row, :n] for row, n in enumerate(lengths)] for x in ours[:3]]
    assert (
        distance(real, [[x[row, :n] for row, n in enumerate(lengths)] for x in theirs[:3]]) < 1e-5
    )
    assert distance(ours[3], theirs[3]) == 0


PACKED = dict(rows=1, age=[[7, 8, 4]])


@pytest.mark.parametrize(
    ("case", "tokens", "bad"),
    [
        (PACKED, np.s_[:, :7], jnp.inf),
        (PACKED, np.s_[:, 7:15], jnp.nan),
        (dict(rows=2, lengths=[9, 0]), np.arange(19) >= np.array([[9], [0]]), jnp.nan),
    ],
    ids=["first segment", "middle segment", "padding"],
)
def test_gradients_are_finite_where_those_of_the_reference_are(case, tokens, bad, monkeypatch):
    monkeypatch.setattr(kernel, "FEW", 0)
    args = operands(tokens=19, group=1, d=4, half=1, **case)
    args = (*(x.at[tokens].set(bad) for x in args[:4]), *args[4:])
    with small_blocks():
        ours = results_and_gradients(kernel.cca_mix, args, FAST)
    theirs = results_and_gradients(reference.cca_mix, args)
    finite = jax.tree.map(jnp.isfinite, theirs)
    assert all(jnp.any(x) for x in finite[1][:4])
    ours, theirs = (
        jax.tree.map(lambda x, good: jnp.where(good, x, 0), xs, finite) for xs in (ours, theirs)
    )
    assert distance(ours, theirs) < 1e-5


def test_bfloat16_weights():
    *arrays, lengths, age, cos, sin = operands(2, 9, group=1, taps=(1, 2), age=[[9], [4, 5]])

    def with_float32_projections(f, *args):
        *projections, weights, carry = args
        *projections, carry = jax.tree.map(lambda x: x.astype(jnp.float32), (*projections, carry))
        return f(*projections, weights, carry, lengths, age, cos, sin)

    ours, theirs = (
        jax.jit(partial(with_float32_projections, f), compiler_options=options)
        for f, options in ((kernel.cca_mix, FAST), (reference.cca_mix, None))
    )
    check_bfloat16(ours, theirs, tuple(arrays))


def test_gradients_by_finite_differences():
    *arrays, lengths, age, cos, sin = operands(1, 3, group=1, d=4, taps=(2, 1))
    ours = jax.jit(
        lambda *arrays: kernel.cca_mix(*arrays, lengths, age, cos, sin), compiler_options=FAST
    )
    check_by_differences(ours, tuple(arrays))


def test_heads_of_zeros_have_finite_gradients():
    """Those of padding, with convolutions without biases."""
    *_, weights, carry, lengths, age, cos, sin = args = operands(1, 3, group=1, taps=(1, 1))
    zeros = jax.tree.map(jnp.zeros_like, args[:4])
    weights = weights._replace(
        depthwise_bias=0 * weights.depthwise_bias, grouped_bias=0 * weights.grouped_bias
    )
    carry = jax.tree.map(jnp.zeros_like, carry)
    check((*zeros, weights, carry, lengths, age, cos, sin))
