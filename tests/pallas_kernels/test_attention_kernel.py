"""The attention kernels against their reference, interpreted.

Windows, offsets and ids are arguments of compiled functions, so that few are compiled.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import check_by_differences, distance

from pallas_kernels.attention import backward, decode, kernel, reference
from pallas_kernels.attention.tiles import shape_of
from pallas_kernels.blocks import Blocks
from pallas_kernels.rocm.cases import with_gradient
from pallas_kernels.rocm.lowering import traffic

H, N = 4, 2
OURS, THEIRS = kernel.attention, reference.attention
BLOCKS = {kernel: (32, 16), backward: (16, 32, 32, 16), decode: (16, 64)}
DEFAULTS = {kernel: kernel.DEFAULTS, backward: backward.DEFAULTS, decode: decode.DEFAULT}
WINDOWS = [1, 7, 16, 33, 70, 71, 1000, 2**31 - 1]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that a few tokens are many blocks."""
    for module in (kernel, backward):
        monkeypatch.setattr(module, "DEFAULTS", (Blocks(BLOCKS[module]),) * 3)
    monkeypatch.setattr(decode, "DEFAULT", Blocks(BLOCKS[decode]))
    monkeypatch.setattr(decode, "JOINED", 4)


ours_with_gradient, theirs_with_gradient, ours_alone, theirs_alone = (
    jax.jit(f) for f in (with_gradient(OURS), with_gradient(THEIRS), partial(OURS), partial(THEIRS))
)


def operands(batch, length, keys, head_dim=16, heads=H, kv_heads=N, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    cache = batch, kv_heads, keys, head_dim
    arrays = [rng.standard_normal(s) for s in ((batch, length, heads, head_dim), cache, cache)]
    return tuple(jnp.asarray(a, dtype) for a in arrays)


def check(args, offsets=(0,), ids=None, window=None, gradient=True, clean=None):
    """Results and gradients of both in float32; those of the reference for `clean` arguments."""
    where = jnp.asarray(offsets, jnp.int32), ids, None if window is None else jnp.int32(window)
    ours, theirs = ours_alone, theirs_alone
    if gradient:
        ours, theirs = ours_with_gradient, theirs_with_gradient
    assert distance(ours(*args, *where), theirs(*(clean or args), *where)) < 1e-5


def runs(*rows):
    """Ids [B, S], from the lengths and the ids of runs."""
    return jnp.asarray([np.repeat(ids, lengths) for lengths, ids in rows], jnp.int32)


@pytest.mark.parametrize("length", [2, 64])
def test_results_and_gradients_are_those_of_the_reference(length):
    check(operands(1, length, length))


@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(8, 2, 2), (40, 3, 1)])
def test_head_dims_that_are_no_blocks_and_groups_of_any_size(head_dim, heads, kv_heads):
    check(operands(1, 35, 35, head_dim, heads, kv_heads))


def test_traced_windows_smaller_and_larger_than_blocks():
    for window in WINDOWS:
        check(operands(1, 71, 71), window=window)


def test_a_static_window_is_that_window():
    args = *operands(1, 71, 71), jnp.zeros(1, jnp.int32), None
    assert distance(OURS(*args, 9), theirs_alone(*args, jnp.int32(9))) < 1e-5


IDS = {
    "runs and padding": runs(([20, 1, 40, 5, 8], [1, 2, 3, 4, 0])),
    "runs that fill blocks": runs(([32, 16, 16, 10], [9, 7, 3, 8])),
    "one run": runs(([74], [3])),
    "padding alone": runs(([74], [0])),
    "one-token segments": jnp.arange(74, dtype=jnp.int32)[None],
    "ids used again": runs(([30, 10, 20, 14], [5, 1, 5, 1])),
}


@pytest.mark.parametrize("window", [None, 12])
def test_segments_see_only_themselves(window):
    for ids in IDS.values():
        check(operands(1, 74, 74), ids=ids, window=window)


@pytest.mark.parametrize("window", [None, 12])
def test_queries_are_a_part_of_packed_rows(window):
    """As on devices that share rows: ids are those of all keys."""
    q, k, v = operands(2, 31, 74)
    for ids in IDS.values():
        check((q, k, v), [0, 43], jnp.concatenate([ids, IDS["runs and padding"]]), window)


def test_rows_have_segments_of_their_own():
    ids = jnp.concatenate([IDS["runs and padding"], IDS["runs that fill blocks"]])
    check(operands(2, 74, 74), [0, 0], ids)


def test_a_token_alone_in_its_segment_sees_its_own_value():
    q, k, v = operands(1, 74, 74)
    own = jnp.repeat(v, H // N, axis=1).swapaxes(1, 2)
    ours = ours_alone(q, k, v, jnp.zeros(1, jnp.int32), IDS["one-token segments"])
    assert distance(ours, own) < 1e-6


def with_nan_where_none_sees(args, offsets, window):
    q, k, v = args
    key = np.arange(k.shape[2])
    offsets = np.asarray(offsets)[:, None]
    unseen = (key >= offsets + q.shape[1]) | (key < offsets - (window or 1000) + 1)
    assert unseen.any(axis=1).all()
    return q, *(jnp.where(unseen[:, None, :, None], jnp.nan, x) for x in (k, v))


@pytest.mark.parametrize("window", [None, 9])
def test_chunks_over_a_cache_see_nothing_beyond_themselves(window):
    """Keys and values that no query sees may be NaN: results and gradients stay finite."""
    args = operands(2, 37, 90)
    for offsets in ([0, 13], [20, 52]):
        check(with_nan_where_none_sees(args, offsets, window), offsets, None, window, clean=args)


def test_a_chunk_up_to_the_end_of_the_cache():
    check(operands(2, 37, 90), [53, 40])


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("window", [None, 1, 16, 21])
def test_decoding_rows_of_any_length(length, window):
    """An empty cache, one key, and lengths across the edges of blocks and of programs."""
    offsets = [0, 1, 15, 16, 17, 47, 92]
    args = operands(7, length, 96)
    assert decode.fits(shape_of(*args[:2]))
    dirty = with_nan_where_none_sees(args, offsets, window)
    check(dirty, offsets, None, window, gradient=False, clean=args)


def test_a_full_cache():
    check(operands(2, 1, 96), [95, 94], gradient=False)


def test_decoding_divides_keys_among_programs():
    where = jnp.zeros(2, jnp.int32)
    kernels = traffic(OURS, *operands(2, 1, 96), where)
    assert [(x.name, x.programs) for x in kernels] == [(decode.DECODE, 6 * 2 * 2), (decode.JOIN, 8)]


def test_gradients_where_the_result_is_decoded():
    check(operands(3, 1, 40), [0, 16, 38])


def test_decoding_with_a_head_dim_that_is_no_block():
    check(operands(2, 2, 33, 40), [3, 30], gradient=False)


def root_mean_square(a, b):
    return float(np.sqrt(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)))


@pytest.mark.parametrize(("length", "offset"), [(67, 0), (1, 60)])
def test_bfloat16_is_as_close_to_float32_as_the_reference(length, offset):
    """XLA multiplies gradients of scores in float32. Ours are rounded to float16 for the matrix
    units, and are relative to the rounded result."""
    low = operands(2, length, 67, dtype=jnp.bfloat16)
    where = jnp.full(2, offset, jnp.int32)
    exact = theirs_with_gradient(*(x.astype(jnp.float32) for x in low), where)
    ours, theirs = ours_with_gradient(*low, where), theirs_with_gradient(*low, where)
    decoded = ours_alone(*low, where)
    limit = root_mean_square(theirs[0], exact[0])
    assert root_mean_square(decoded, exact[0]) <= limit
    assert root_mean_square(ours[0], exact[0]) <= limit
    for mine, usual, true, factor in zip(
        ours[1], theirs[1], exact[1], (1.0, 1.0, 1.01), strict=True
    ):
        assert root_mean_square(mine, true) <= factor * root_mean_square(usual, true)


@pytest.mark.parametrize("factor", [2.0**-80, 2.0**40])
def test_bfloat16_gradients_of_any_size_are_as_exact(factor):
    """Float16 alone would lose those that a mean over many tokens makes small."""
    args = operands(2, 33, 33, dtype=jnp.bfloat16)
    out, pull = jax.vjp(lambda *x: OURS(*x, jnp.zeros(2, jnp.int32)), *args)
    small = pull(out * jnp.bfloat16(factor))
    for a, b in zip(pull(out), small, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32) * factor, np.asarray(b, np.float32))
    assert not any(jnp.any(x) for x in pull(jnp.zeros_like(out)))


def test_gradients_by_finite_differences():
    offsets = jnp.array([0, 2])
    check_by_differences(jax.jit(lambda *x: OURS(*x, offsets)), operands(2, 3, 5, 8, 2, 1))


def test_default_blocks(monkeypatch):
    for module in (kernel, backward):
        monkeypatch.setattr(module, "DEFAULTS", DEFAULTS[module])
    monkeypatch.setattr(decode, "DEFAULT", DEFAULTS[decode])
    fresh = jax.jit(with_gradient(lambda *args: OURS(*args)))
    args = *operands(1, 150, 150, 16, 2, 1), jnp.zeros(1, jnp.int32)
    assert distance(fresh(*args), theirs_with_gradient(*args)) < 1e-5


def test_larger_heads_have_smaller_blocks(monkeypatch):
    """Of 512 bytes and of more: with the blocks of smaller ones, registers would spill."""
    for module in (kernel, backward):
        monkeypatch.setattr(module, "DEFAULTS", DEFAULTS[module])
    programs = []
    for head_dim in (64, 128, 256):
        args = *operands(1, 512, 512, head_dim, 2, 1), jnp.zeros(1, jnp.int32)
        programs.append([x.programs for x in traffic(with_gradient(OURS), *args)])
    # Of the forward pass, queries; of the backward pass, keys and queries.
    assert programs == [[2 * 4, 8 + 2 * 4], [2 * 4, 16 + 2 * 8], [2 * 8, 16 + 2 * 16]]


@pytest.mark.parametrize("mix", [OURS, THEIRS])
@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0)])
def test_without_queries_there_is_nothing_to_see(mix, batch, length):
    args = operands(batch, length, 5)
    out, gradients = with_gradient(mix)(*args, jnp.zeros(batch, jnp.int32))
    assert out.shape == args[0].shape
    assert not any(x.any() for x in gradients)
