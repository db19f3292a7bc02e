"""The fused router against its reference, interpreted."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import check_against_reference, check_by_differences, distance, gradients

from pallas_kernels.blocks import Blocks, trying
from pallas_kernels.rocm.cases import TOKENS, ZAYA1_8B, with_gradient
from pallas_kernels.rocm.lowering import lower, traffic
from pallas_kernels.router import backward, kernel, layers, reference
from pallas_kernels.router.api import FREE, Weights
from pallas_kernels.router.cases import cases

OURS = jax.jit(partial(kernel.route, eps=1e-5))
THEIRS = jax.jit(partial(reference.route, eps=1e-5))
COARSE = Blocks((256, 64))  # few programs, which interpreting is quicker with
USUAL = (20, 32, 5)  # tokens, size and experts: what was compiled for one test is used by the next


def operands(tokens, size, experts, seed=0, depth=True):
    """Random states, weights and biases for which all classes are chosen."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    scale = 1.5 / math.sqrt(size)
    weights = Weights(
        draw(size) if depth else None,
        1 + 0.1 * draw(size),
        scale * draw(size, size),
        0.1 * draw(size),
        scale * draw(size, size),
        0.1 * draw(size),
        3 * scale * draw(experts + 1, size),
    )
    states, previous = draw(tokens, size), draw(tokens, size)
    return states, (previous if depth else None), weights, 0.1 * draw(experts + 1)


def spread(probabilities):
    """Biases that make the classes' largest probabilities equal."""
    return -jnp.max(probabilities, axis=0)


def probabilities(states, previous, weights, biases):
    """All classes' of every token, by the reference."""
    forced = jnp.arange(len(biases), dtype=jnp.uint8)[:, None]
    every = jnp.broadcast_to(forced, (len(biases), len(states)))
    stack = jnp.broadcast_to(states, (len(biases), *states.shape))
    earlier = None if previous is None else jnp.broadcast_to(previous, stack.shape)
    return THEIRS(stack, earlier, weights, biases, forced=every)[2].T


def test_the_normal_distribution_is_exact_also_where_it_is_small():
    """Within 1e-7, as an erf within 2e-7 would make it, and to five digits of its own size."""
    x = np.linspace(-8, 8, 200_001, dtype=np.float32)
    exact = np.vectorize(lambda x: math.erfc(-x / math.sqrt(2)) / 2)(x.astype(np.float64))
    for f in (layers.normal, jax.jit(layers.normal)):
        error = np.abs(np.asarray(f(jnp.asarray(x)), np.float64) - exact)
        assert error.max() <= 1e-7
        assert (error / exact)[x > -5].max() <= 1e-5 and (error / exact).max() <= 5e-5
    ends = layers.normal(jnp.array([-jnp.inf, -40, 0, 8, jnp.inf]))
    np.testing.assert_allclose(ends, [0, 0, 0.5, 1, 1], atol=2e-17)


def test_gelu_of_units_that_are_nearly_dead():
    """Their gradients are a millionth of the others', and right to four digits."""
    args = operands(16, 16, 4)
    weights = args[2]
    dead = weights._replace(fc1_bias=weights.fc1_bias - 5, fc2_bias=weights.fc2_bias - 4.5)
    check_against_reference(OURS, THEIRS, (*args[:2], dead, *args[3:]), tolerance=5e-5)


def test_the_slope_of_gelu_is_its_derivative():
    x = jnp.linspace(-8, 8, 10_001)
    exact = jax.vmap(jax.grad(partial(jax.nn.gelu, approximate=False)))(x)
    np.testing.assert_allclose(layers.gelu_slope(x), exact, atol=5e-7)


# Odd counts of tokens, one class more than a power of two, widths that are none, one chunk or more.
@pytest.mark.parametrize(
    ("tokens", "size", "experts", "depth"),
    [(1, 32, 3, True), (33, 80, 16, True), (19, 40, 24, False)],
)
def test_results_and_gradients_are_those_of_the_reference(tokens, size, experts, depth):
    args = operands(tokens, size, experts, depth=depth)
    check_against_reference(OURS, THEIRS, args)


@pytest.mark.parametrize("blocks", [Blocks((16, 16)), Blocks((64, 128))])
def test_any_blocks_give_the_same(blocks):
    args = operands(35, 48, 4)
    with trying(kernel.NAME, blocks):
        ours = partial(kernel.route, eps=1e-5)  # traced anew
        check_against_reference(ours, THEIRS, args, gradient=False)


@pytest.mark.parametrize(
    ("inputs", "weights", "shape"),
    [((16, 16), (16, 32), (75, 80, 4)), ((32, 64), (32, 64), (128, 64, 15))],
)
def test_gradients_by_any_blocks_are_the_same(inputs, weights, shape, monkeypatch):
    """And by programs of several blocks, the last of which has tokens that there are not."""
    monkeypatch.setattr(backward, "PROGRAMS", 3)
    args = operands(*shape)
    ours = partial(kernel.route, eps=1e-5)  # traced anew
    with trying(backward.INPUTS, Blocks(inputs)), trying(backward.WEIGHTS, Blocks(weights)):
        mine = jax.jit(partial(gradients, ours))(args)
    assert distance(mine, gradients(THEIRS, args)) < 1e-5


def test_gradients_are_computed_by_kernels_that_move_less_than_half_of_what_xla_does():
    (case,) = (c for c in cases(ZAYA1_8B) if c.name == "router training")
    moves = traffic(case.kernels, *case.args)
    assert [m.name for m in moves] == [kernel.NAME, backward.INPUTS, backward.WEIGHTS]
    assert sum(m.moved for m in moves) < 1.6 * case.minimum
    assert min(m.programs for m in moves) >= 256  # a GPU has 304 compute units


@pytest.mark.parametrize("depth", [True, False])
def test_no_tokens_have_no_results_and_gradients_of_zero(depth):
    args = operands(0, 32, 3, depth=depth)
    new, expert, weight = OURS(*args)
    assert new.shape == (0, 32) and expert.shape == weight.shape == (0,)
    assert expert.dtype == jnp.int32
    mine = gradients(OURS, args)
    assert jax.tree.map(jnp.shape, mine) == tuple(x.shape for x in jax.tree.leaves(args))
    assert all((np.asarray(g) == 0).all() for g in mine)


@pytest.mark.parametrize(("size", "kernels"), [(layers.WIDEST, 3), (2048, 0)])
def test_tokens_that_are_wider_than_shared_memory_are_left_to_xla(size, kernels):
    args = jax.eval_shape(lambda: operands(TOKENS, size, 16))
    both = with_gradient(partial(kernel.route, eps=1e-5))
    assert len(traffic(both, *args)) == kernels
    assert ("__gpu$xla.gpu.triton" in lower(both, *args).as_text()) == bool(kernels)


def test_any_leading_axes_and_depth_without_a_scale_or_a_scale_without_depth():
    states, previous, weights, biases = operands(6, 32, 3)
    shaped = (states.reshape(2, 3, 32), previous.reshape(2, 3, 32), weights, biases)
    check_against_reference(OURS, THEIRS, shaped)
    unscaled = weights._replace(depth_scale=None)
    for case in ((states, None, weights, biases), (states, previous, unscaled, biases)):
        check_against_reference(OURS, THEIRS, case, gradient=False)


def test_choices_of_2000_tokens_are_the_references_but_for_near_ties():
    states, previous, weights, _ = operands(2000, 64, 16)
    shares = probabilities(states, previous, weights, jnp.zeros(17))
    biases = spread(shares)
    with trying(kernel.NAME, COARSE):
        ours = jax.jit(partial(kernel.route, eps=1e-5))(states, previous, weights, biases)
    theirs = THEIRS(states, previous, weights, biases)
    first, second = jnp.sort(shares + biases, axis=1)[:, :-3:-1].T
    clear = first - second > 1e-6
    assert clear.mean() > 0.99 and len(set(theirs[1].tolist())) == 17
    np.testing.assert_array_equal(ours[1][clear], theirs[1][clear])
    np.testing.assert_allclose(ours[2][clear], theirs[2][clear], atol=1e-6)


def test_biases_decide_the_choice_but_not_the_weight():
    states, previous, weights, biases = operands(*USUAL)
    shares = probabilities(states, previous, weights, biases)
    for preferred in (0, 5):
        biased = biases.at[preferred].set(2.0)
        _, expert, weight = OURS(states, previous, weights, biased)
        np.testing.assert_array_equal(expert, preferred)
        np.testing.assert_allclose(weight, shares[:, preferred], atol=1e-6)
    gradient = jax.grad(lambda b: jnp.sum(OURS(states, previous, weights, b)[2]))(biases)
    np.testing.assert_array_equal(gradient, 0)


def test_the_first_of_equal_classes_is_chosen():
    states, previous, weights, _ = operands(*USUAL)
    flat = weights._replace(out=jnp.zeros_like(weights.out))
    for biases, first in (([0.0] * 6, 0), ([0, 0, 1, 0, 1, 1], 2), ([-1.0] * 5 + [0], 5)):
        _, expert, weight = OURS(states, previous, flat, jnp.array(biases, jnp.float32))
        np.testing.assert_array_equal(expert, first)
        np.testing.assert_allclose(weight, 1 / 6, rtol=1e-6)


def test_very_low_biases_do_not_let_a_class_that_is_not_there_win():
    states, previous, weights, biases = operands(*USUAL)
    args = states, previous, weights, biases - 1e6
    np.testing.assert_array_equal(OURS(*args)[1], THEIRS(*args)[1])


def test_forced_experts_and_their_gradients():
    args = operands(*USUAL)
    forced = jnp.array([0, 5, FREE, 3] * 5, jnp.uint8)
    ours, theirs = partial(OURS, forced=forced), partial(THEIRS, forced=forced)
    check_against_reference(ours, theirs, args)
    np.testing.assert_array_equal(ours(*args)[1][::4], 0)
    unknown = OURS(*args, forced=jnp.full((20,), 6, jnp.uint8))
    assert (unknown[1] == 6).all() and jnp.isnan(unknown[2]).all()
    beyond = jnp.array([6, FREE] * 10, jnp.uint8)
    mine, usual = (gradients(partial(f, forced=beyond), args) for f in (OURS, THEIRS))
    assert distance(mine, usual) < 1e-5


def test_the_gradient_is_that_of_the_forward_passs_choice_at_a_tie():
    states, previous, weights, biases = operands(*USUAL)
    tied = weights._replace(out=weights.out.at[2].set(weights.out[1]))
    biases = biases.at[1:3].set(5.0)
    assert (OURS(states, previous, tied, biases)[1] == 1).all()
    ours, theirs = (gradients(f, (states, previous, tied, biases)) for f in (OURS, THEIRS))
    assert distance(ours, theirs) < 1e-5


def test_parameters_in_bfloat16_are_computed_with_in_float32():
    states, previous, weights, biases = operands(21, 48, 16)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)
    args = (states, previous, low, biases)
    check_against_reference(OURS, THEIRS, args, gradient=False)
    ours, theirs = gradients(OURS, args), gradients(THEIRS, args)
    for mine, usual in zip(ours, theirs, strict=True):
        assert mine.dtype == usual.dtype
        assert distance(mine.astype(jnp.float32), usual.astype(jnp.float32)) < 2**-7


def test_gradients_by_finite_differences():
    states, previous, weights, biases = operands(2, 16, 2)
    forced = jnp.array([1, 2], jnp.uint8)

    def f(states, previous, weights):
        new, _, weight = OURS(states, previous, weights, biases, forced=forced)
        return new, weight

    check_by_differences(f, (states, previous, weights))


def test_a_token_of_nan_stays_alone():
    states, *rest = operands(*USUAL)
    broken = states.at[7].set(jnp.nan)
    clean = OURS(states, *rest)
    new, expert, weight = OURS(broken, *rest)
    assert jnp.isnan(new[7]).all() and jnp.isnan(weight[7]) and expert[7] == 0
    others = np.arange(20) != 7
    for array, usual in zip((new, expert, weight), clean, strict=True):
        np.testing.assert_array_equal(array[others], usual[others])
    of_states, usual = (gradients(OURS, (x, *rest))[0] for x in (broken, states))
    assert jnp.isnan(of_states[7]).all()
    np.testing.assert_array_equal(of_states[others], usual[others])
