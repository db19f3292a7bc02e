"""What is counted of programs and kernels, on programs whose figures are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from pallas_kernels.blocks import Blocks, blocks_for, trying
from pallas_kernels.launch import compiling_for, launch
from pallas_kernels.rocm import roofline
from pallas_kernels.rocm.cases import ZAYA1_8B, Case, cases
from pallas_kernels.rocm.hlo import Program
from pallas_kernels.rocm.lowering import lower, traffic


def program(f, *args):
    return Program(jax.jit(f).lower(*args).compile().as_text())


def test_bytes_of_a_program_are_those_of_its_kernels():
    x = jnp.zeros((256, 128))
    assert program(lambda x: x + 1, x).moved() == 2 * x.nbytes
    matrix = jnp.zeros((128, 64))
    moved = program(lambda x, m: x @ m, x, matrix).moved()
    assert moved == x.nbytes + matrix.nbytes + 256 * 64 * 4


def test_a_loop_counts_as_often_as_it_runs():
    x = jnp.zeros((1000, 64))

    def loop(x):
        return jax.lax.fori_loop(0, 10, lambda _, y: jnp.sin(y) * 2, x)

    once = program(lambda x: jnp.sin(x) * 2, x).moved()
    assert program(loop, x).moved() == pytest.approx(10 * once, rel=0.3)


def test_a_slice_counts_as_what_it_takes():
    x = jnp.zeros((1000, 64))
    moved = program(lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, 10) + 1, x, 3).moved()
    assert moved < 4 * 10 * 64 * 4


def test_squares_and_float32_products_are_found():
    q = jnp.zeros((96, 16), jnp.bfloat16)

    def scores(q):
        return jax.nn.softmax((q @ q.T).astype(jnp.float32)) @ q

    assert program(scores, q).squares(96, 96) and not program(lambda q: q * 2, q).squares(96, 96)
    found = program(lambda q: jnp.exp(q[:48] @ q.T), q)
    assert found.squares(48, 96) and not found.squares(48, 48) and not found.squares(96, 96)
    x = jnp.zeros((64, 64))
    assert program(lambda x: x @ x, x).float32_products()
    exact = program(lambda x: jnp.matmul(x, x, precision="highest"), x)
    assert not exact.float32_products()


def test_products_of_libraries_are_found_by_their_targets():
    text = """
ENTRY %main (x: f32[8,8]) -> (f32[8,8], s8[4]) {
  %x = f32[8,8]{1,0} parameter(0)
  %mine = f32[8,8]{1,0} custom-call(%x), custom_call_target="triton", backend_config="a gemm"
  ROOT %r = (f32[8,8]{1,0}, s8[4]{0}) custom-call(%x, %x), custom_call_target="__cublas$gemm"EXACT
}
"""
    exact = ', backend_config={"operand_precision":["HIGHEST","HIGHEST"]}'
    assert [i.name for i in Program(text.replace("EXACT", "")).float32_products()] == ["r"]
    assert not Program(text.replace("EXACT", exact)).float32_products()


LOOP = """
%body (s: (f32[8])) -> (f32[8]) {
  %s = (f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%s), index=0
  %g = f32[32]{0} all-gather(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  %p = f32[8]{0} collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3}}
  ROOT %t = (f32[8]{0}) tuple(%p)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %a = f32[8]{0} all-reduce-start(%x), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  %d = f32[8]{0} all-reduce-done(%a)
  %alone = f32[8]{0} all-reduce(%d), replica_groups=[4,1]<=[4], to_apply=%add
  %s = (f32[8]{0}) tuple(%alone)
  %w = (f32[8]{0}) while(%s), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %r = f32[8]{0} get-tuple-element(%w), index=0
}
"""


def test_collectives_count_as_often_as_they_run_with_what_each_device_sends():
    found = Program(LOOP).collectives()
    assert [(c.kind, c.times, c.sent) for c in found] == [
        ("all-reduce", 1, 32.0),  # half of 32 bytes out, and the other half's sum
        ("all-gather", 5, 5 * 32 * 3.0),
        ("collective-permute", 5, 5 * 32.0),
    ]
    assert [c.within(2) for c in found] == [False, False, False] and found[1].within(4)
    pairs = LOOP.replace("T(1,0)", "")
    assert Program(pairs).collectives()[0].groups.tolist() == [[0, 1], [2, 3]]
    assert Program(pairs).collectives()[0].within(2)


def test_devices_of_a_collective_are_known_by_axes_of_a_mesh_or_not_at_all():
    mesh = "replica_groups=mesh['data'=2,'expert'=4,'context'=1] {'AXES'}"

    def groups(axes):
        text = LOOP.replace("replica_groups=[2,2]<=[2,2]T(1,0)", mesh.replace("AXES", axes))
        return Program(text).collectives()[0].groups.tolist()

    assert groups("expert") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups("data','context") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    with pytest.raises(ValueError, match="not named in a known way"):
        groups("data':(1)2")


def test_asynchronous_and_conditional_collectives_count_once():
    text = """
%reduce (x: f32[8]) -> f32[2] {
  %x = f32[8]{0} parameter(0)
  ROOT %r = f32[2]{0} reduce-scatter(%x), replica_groups={{0,1,2,3}}, to_apply=%add
}

%nothing (x: f32[8]) -> f32[2] {
  %x = f32[8]{0} parameter(0)
  ROOT %r = f32[2]{0} slice(%x), slice={[0:2]}
}

ENTRY %main (x: f32[8], y: pred[]) -> f32[2] {
  %x = f32[8]{0} parameter(0)
  %y = pred[] parameter(1)
  %s = ((f32[8]{0}), f32[2]{0}) async-start(%x), calls=%reduce
  %d = f32[2]{0} async-done(%s)
  ROOT %c = f32[2]{0} conditional(%y, %x, %x), true_computation=%reduce, false_computation=%nothing
}
"""
    found = Program(text).collectives()
    assert [(c.kind, c.times, c.sent) for c in found] == [("reduce-scatter", 1, 24.0)] * 2


def copy(rows, x):
    spec = pl.BlockSpec((rows, 64), lambda i: (i, 0))
    table = pl.BlockSpec((8, 64), lambda i: (0, 0))

    def body(x_ref, table_ref, out_ref):
        out_ref[...] = x_ref[...] + table_ref[0, :][None]

    return launch(
        body,
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        name="copy",
        grid=(pl.cdiv(x.shape[0], rows),),
        in_specs=[spec, table],
        out_specs=spec,
    )(x, jnp.zeros((8, 64)))


def test_traffic_counts_each_block_once_and_what_is_asked_each_time():
    x = jax.ShapeDtypeStruct((128, 64), jnp.float32)
    (moves,) = traffic(lambda x: copy(16, x), x)
    rows, table = 128 * 64 * 4, 8 * 64 * 4
    assert (moves.name, moves.programs, moves.multiplies) == ("copy", 8, False)
    assert (moves.read, moves.written) == (rows + table, rows)
    assert moves.asked == 2 * rows + table


def test_a_lowered_kernel_is_a_triton_call():
    x = jax.ShapeDtypeStruct((128, 64), jnp.float32)
    assert "__gpu$xla.gpu.triton" in lower(lambda x: copy(16, x), x).as_text()


def test_blocks_are_those_tried_or_chosen_or_the_default(monkeypatch):
    from pallas_kernels import blocks

    default, best, tried = Blocks((8,)), Blocks((64,), 8, 2), Blocks((16,))
    monkeypatch.setattr(blocks, "_table", lambda: {"gfx942 op 128x2 bfloat16": best})

    def found(shape=(128, 2), dtype=jnp.bfloat16, otherwise=default):
        return blocks_for("op", shape, dtype, otherwise)

    assert found() == default  # interpreted
    with compiling_for("gfx942"):
        assert found() == best
        assert found((128, 3)) == found(dtype=jnp.float32) == default
        with trying("op", tried), trying("op", default):
            assert found(otherwise=best) == default
        assert found() == best
    with compiling_for("gfx950"):
        assert found() == default


def test_least_bytes_are_arguments_and_results_and_twice_those_of_a_gradient():
    x = jax.ShapeDtypeStruct((10, 4), jnp.float32)
    forward = Case("f", None, lambda x: x * 2, (x,), 0.0)
    training = Case.training("f", None, lambda x: x * 2, (x,), 0.0)
    assert forward.minimum == 2 * 160
    assert training.minimum == (2 + 1 + 2) * 160  # with the gradient, and the forward pass's


def test_examples_have_integers_in_their_range():
    for case in cases(ZAYA1_8B, "moe"):
        small = case._replace(args=jax.tree.map(lambda a: a.update(shape=a.shape[:1]), case.args))
        expert = small.example()[1]
        assert expert.min() >= 0 and expert.max() <= 16 and len(set(expert.tolist())) > 3


def test_the_page_shows_bounds_and_marks_what_misses():
    kernel = dict(name="k", vgprs=200, agprs=0, spills=0, lds=1024, warps=4, waves=2.0)
    kernel |= dict(matrix={"v_mfma_f32_32x32x8_bf16": 3}, programs=1, moved=1, asked=1)
    row = dict(case="c", sizes="8B", kernels=[kernel], flops=1.307e9, minimum=2e9, moved=4.33e9)
    row |= dict(reference_moved=10e9, temporary=0, reference_temporary=1e6, problems=["k spills"])
    text = roofline.page([row])
    assert "| c, 8B | 4,330.0 | 0.43 | **2.17** | 1.3 | 1,000 us (817), memory |" in text
    assert "3 f32_32x32x8_bf16" in text and "- c 8B: k spills" in text
