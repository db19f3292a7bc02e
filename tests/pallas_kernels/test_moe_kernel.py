"""The mixture of experts in Pallas, interpreted, and by ragged products against its reference."""

from contextlib import ExitStack
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import (
    check_bfloat16,
    check_by_differences,
    distance,
    gradients,
)

from pallas_kernels.blocks import Blocks, trying
from pallas_kernels.moe import api, kernel, ragged, reference
from pallas_kernels.moe.cases import CANDIDATES, cases
from pallas_kernels.moe.dispatch import SORT, sort_by_expert
from pallas_kernels.moe.tiles import tiles
from pallas_kernels.rocm.cases import ZAYA1_8B
from pallas_kernels.rocm.lowering import traffic

OURS, THEIRS = jax.jit(kernel.moe), jax.jit(reference.moe)
SHAPE = 37, 40, 24, 3  # no size is a power of two


def operands(tokens, size, hidden, experts, routing="random"):
    rng = np.random.default_rng(tokens)
    expert = {
        "random": rng.integers(-1, experts + 1, tokens),
        "all to one": np.full(tokens, experts - 1),
        "two of three": rng.choice([0, 2], tokens),
        "none": rng.choice([-1, experts, 255], tokens),
    }[routing]
    shapes = (tokens, size), (tokens,), (experts, 2 * hidden, size), (experts, size, hidden)
    x, weight, gate_up, down = (
        jnp.asarray(0.4 * rng.standard_normal(s), jnp.float32) for s in shapes
    )
    return x, jnp.asarray(expert, jnp.int32), weight, gate_up, down


@partial(jax.jit, static_argnums=1)
def results_and_gradients(args, f=kernel.moe):
    return f(*args), gradients(f, args)


def check(args, f=kernel.moe):
    ours, theirs = results_and_gradients(args, f), results_and_gradients(args, reference.moe)
    assert distance(ours, theirs) < 1e-5


@pytest.mark.parametrize("routing", ["random", "all to one", "two of three", "none"])
def test_results_and_gradients_are_those_of_the_reference(routing):
    """Also where experts, or all of them, have no tokens."""
    check(operands(*SHAPE, routing))


@pytest.mark.parametrize("shape", [(1, 16, 16, 2), (17, 48, 16, 1)])
def test_one_token_one_expert_and_tile_edges(shape):
    check(operands(*shape, "all to one"))


@pytest.mark.parametrize("rows", [16, 32])
def test_many_blocks_along_every_axis(rows):
    """More tiles than one an expert, and blocks and steps that reach beyond the arrays."""
    with ExitStack() as stack:
        for name in CANDIDATES:
            sizes = (rows,) if name == SORT else (rows, 16, 16)
            stack.enter_context(trying(name, Blocks(sizes)))
        check(operands(70, 40, 24, 2), lambda *args: kernel.moe(*args))


@pytest.mark.parametrize("factor", [1.0, 1e5, 1e-7])
def test_bfloat16(factor):
    """Products take bfloat16 operands, so the output's gradient is rounded too: the reference is
    given it rounded."""

    @jax.custom_vjp
    def rounded_gradient(x):
        return x

    rounded_gradient.defvjp(
        lambda x: (x, None), lambda _, g: (g.astype(jnp.bfloat16).astype(g.dtype),)
    )

    def theirs(x, expert, weight, *experts):
        out = reference.moe(x, expert, weight.astype(jnp.float32), *experts)
        return rounded_gradient(out) if x.dtype == jnp.bfloat16 else out

    def ours(x, expert, weight, *experts):
        return kernel.moe(x, expert, weight.astype(jnp.float32), *experts)

    x, expert, weight, gate_up, down = operands(64, 64, 48, 3)
    args = x, expert, weight, factor * gate_up, down
    check_bfloat16(jax.jit(ours), jax.jit(theirs), args)


def test_the_backward_pass_reads_what_the_forward_pass_kept_and_inference_keeps_nothing():
    forward, training, _ = cases(ZAYA1_8B)
    moves = traffic(training.kernels, *training.args)
    assert sum(kernel.moved for kernel in moves) < 1.45 * training.minimum
    names = [kernel.name for kernel in traffic(forward.kernels, *forward.args)]
    assert names == ["moe_sort", "moe_hidden", "moe_output"]


def test_no_tokens():
    x, expert, weight, *experts = operands(4, 16, 16, 3)
    out, gradient = results_and_gradients((x[:0], expert[:0], weight[:0], *experts))
    assert out.shape == (0, 16)
    assert all(not np.asarray(g).any() for g in gradient)
    assert [g.shape for g in gradient[2:]] == [a.shape for a in experts]


def test_gradients_by_finite_differences():
    x, expert, *rest = operands(5, 16, 16, 2)
    check_by_differences(lambda x, *rest: OURS(x, expert, *rest), (x, *rest))


@pytest.mark.parametrize("f", [kernel.moe, ragged.moe], ids=["pallas", "ragged"])
def test_nan_in_tokens_without_expert_does_not_leak(f):
    """Neither from x nor from the routing weight."""
    x, expert, weight, gate_up, down = operands(*SHAPE)
    lost = (expert < 0) | (expert >= 3)
    assert 5 < lost.sum() < 30
    dirty = jnp.where(lost[:, None], jnp.nan, x), expert, jnp.where(lost, jnp.nan, weight)
    clean = jnp.where(lost[:, None], 0, x), expert, jnp.where(lost, 0, weight)
    of_dirty, of_clean = (results_and_gradients((*a, gate_up, down), f) for a in (dirty, clean))
    for a, b in zip(jax.tree.leaves(of_dirty), jax.tree.leaves(of_clean), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.asarray(of_dirty[0])[lost].any()


def test_nan_in_a_token_stays_in_its_row_and_its_expert():
    x, expert, weight, gate_up, down = operands(*SHAPE)
    expert = expert.at[4].set(1)
    out, (of_x, of_weight, of_gate_up, of_down) = results_and_gradients(
        (x.at[4].set(jnp.nan), expert, weight, gate_up, down)
    )
    for array, bad in ((out, 4), (of_x, 4), (of_weight, 4), (of_gate_up, 1), (of_down, 1)):
        assert np.isnan(np.asarray(array)[bad]).any()
        assert not np.isnan(np.delete(np.asarray(array), bad, axis=0)).any()


def test_a_token_does_not_depend_on_its_neighbours():
    """Bit for bit, in value and gradient, and when computed again."""
    x, expert, weight, gate_up, down = operands(*SHAPE)
    expert = expert.at[6].set(1)
    again = results_and_gradients((x, expert, weight, gate_up, down))
    other = x[::-1].at[6].set(x[6]), expert[::-1].at[6].set(1), weight.at[7:].set(3.0)
    first = results_and_gradients((x, expert, weight, gate_up, down))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    out, (of_x, of_weight, *_) = results_and_gradients((*other, gate_up, down))
    for a, b in ((first[0], out), (first[1][0], of_x), (first[1][1], of_weight)):
        np.testing.assert_array_equal(a[6], b[6])


@pytest.mark.parametrize("tokens", [1, 16, 50])
def test_the_sort_is_stable(tokens):
    expert = np.random.default_rng(tokens).integers(-1, 4, tokens).astype(np.int32)
    with trying(SORT, Blocks((16,))):
        order, starts = sort_by_expert(jnp.asarray(expert), 3)
    of_class = np.where((expert >= 0) & (expert < 3), expert, 3)
    np.testing.assert_array_equal(order, np.argsort(of_class, kind="stable"))
    counts = np.bincount(of_class, minlength=starts.size)
    np.testing.assert_array_equal(starts, np.cumsum(counts) - counts)


def test_there_are_enough_tiles_for_any_routing():
    rng = np.random.default_rng(0)
    for tokens, experts, size in rng.integers(1, 40, (300, 3)):
        counts = np.bincount(
            rng.choice(rng.integers(0, experts + 1, experts + 1), tokens), minlength=experts + 1
        )
        assert np.sum(-(-counts // size)) <= tiles(tokens, experts, size)


@pytest.mark.parametrize("routing", ["random", "none"])
def test_ragged_products_are_those_of_the_reference(routing):
    check(operands(*SHAPE, routing), ragged.moe)


def test_rows_return_from_ragged_products_without_a_scatter():
    x, expert, *rest = operands(*SHAPE)
    gradient = jax.grad(lambda x, *rest: ragged.moe(x, expert, *rest).sum(), (0, 1, 2, 3))
    lines = str(jax.make_jaxpr(gradient)(x, *rest)).splitlines()
    assert not [line for line in lines if "scatter" in line and ":f32[" in line.partition("=")[0]]


def test_implementations_by_name_and_experts_in_separate_arrays():
    x, expert, weight, gate_up, down = operands(*SHAPE)
    expected = THEIRS(x, expert, weight, gate_up, down)
    for name in ("pallas", "ragged"):
        for experts in ((gate_up, down), (tuple(gate_up), tuple(down))):
            out = jax.jit(api.moe, static_argnames="implementation")(
                x, expert, weight, *experts, implementation=name
            )
            assert distance(out, expected) < 1e-5
