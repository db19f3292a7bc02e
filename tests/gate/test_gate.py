"""The gate fails on what it must fail on, and tells what the compiler made of kernels."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from pallas_kernels.blocks import Blocks
from pallas_kernels.launch import launch
from pallas_kernels.moe import cases as moe_cases
from pallas_kernels.moe import ragged
from pallas_kernels.rocm import hlo, report, sweep
from pallas_kernels.rocm.cases import ZAYA1_8B, Case
from pallas_kernels.rocm.compiler import compile_for
from train import aot, cluster
from train.config import MeshConfig, ModelConfig, TrainConfig
from train.data.config import DataConfig


def bfloat16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def problems(f, *args) -> list[str]:
    """Of a whole program."""
    program = compile_for(f, *args)
    return aot.problems_of(program, hlo.Program(program.text), (512, 512))


def squared(size: int, warps: int, stages: int = 1):
    """A kernel that multiplies matrices in one program of that size, step by step."""

    def body(x_ref, y_ref, out_ref):
        def add(step, total):
            x = x_ref[:, pl.ds(step * 64, 64)]
            y = y_ref[pl.ds(step * 64, 64), :]
            return total + jnp.dot(x, y, preferred_element_type=jnp.float32)

        zeros = jnp.zeros((size, size), jnp.float32)
        out_ref[...] = jax.lax.fori_loop(0, x_ref.shape[1] // 64, add, zeros)

    def run(x, y):
        specs = [pl.BlockSpec(a.shape, lambda i: (0, 0)) for a in (x, y)]
        return launch(
            body,
            jax.ShapeDtypeStruct((size, size), jnp.float32),
            name="squared",
            grid=(1,),
            in_specs=specs,
            out_specs=pl.BlockSpec((size, size), lambda i: (0, 0)),
            warps=warps,
            stages=stages,
        )(x, y)

    return run


def judged(size: int, **options: int) -> dict:
    f = squared(size, **options)
    args = bfloat16(size, 512), bfloat16(512, size)
    case = Case("squared", f, partial(jnp.matmul, preferred_element_type=jnp.float32), args, 1.0)
    return report.examine(case, ZAYA1_8B)


def test_a_kernel_that_fits_is_sound_and_described():
    row = judged(64, warps=4)
    (kernel,) = row["kernels"]
    assert row["problems"] == [] and kernel["name"] == "squared"
    assert kernel["spills"] == 0 and 0 < kernel["vgprs"] <= 512 and kernel["warps"] == 4
    assert 0 < kernel["lds"] <= 65536 and 1 <= kernel["waves"] <= 8
    (instruction, count), *_ = kernel["matrix"].items()
    assert "mfma" in instruction and "bf16" in instruction and count > 0
    assert row["moved"] == row["minimum"]


def test_spilled_registers_fail():
    row = judged(256, warps=2)
    (kernel,) = row["kernels"]
    assert kernel["spills"] > 0
    assert [p for p in row["problems"] if p.startswith("squared spills")]


def test_too_much_lds_is_refused_by_the_compiler():
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?i)shared memory"):
        judged(256, warps=8, stages=4)


def test_a_case_that_does_not_compile_fails_the_gate(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "DOCS", tmp_path)
    broken = Case("no such", None, None, (), 0.0)
    monkeypatch.setattr(report, "cases", lambda sizes, op=None: [broken])
    with pytest.raises(SystemExit) as ended:
        report.main(sizes="8B")
    assert ended.value.code == 1
    assert not list(tmp_path.iterdir())


def test_ragged_products_are_the_librarys_in_bfloat16_and_dense_in_float32():
    def products(dtype) -> list[str]:
        shapes = [(256, 64), (256,), (256,), (4, 128, 64), (4, 64, 64)]
        dtypes = [dtype, jnp.int32, jnp.float32, dtype, dtype]
        args = [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, dtypes, strict=True)]
        return problems(ragged.moe, *args)

    assert products(jnp.bfloat16) == []
    assert products(jnp.float32) == ["2 ragged products as dense ones"]


def test_a_buffer_of_tokens_by_tokens_fails():
    args = bfloat16(512, 128), bfloat16(512, 128)
    naive = problems(lambda q, k: jax.nn.softmax(q @ k.T) @ k, *args)
    assert naive and all(problem.startswith("a buffer") for problem in naive)
    assert problems(lambda q, k: q.T @ k, *args) == []


def test_more_memory_than_a_gpu_has_fails():
    assert problems(lambda x: x * 2, bfloat16(60_000, 1_000_000)) == ["240 GB, a GPU has 206"]


def test_the_sweep_chooses_the_largest_sound_blocks_and_kernels_use_them(monkeypatch, capsys):
    monkeypatch.setitem(sweep.MODELS, "8B", ZAYA1_8B._replace(hidden=256, expert_hidden=128))
    candidates = [Blocks((32, 32, 32)), Blocks((128, 64, 64), 4, 2), Blocks((256, 256, 64), 2)]
    monkeypatch.setattr(moe_cases, "CANDIDATES", {"moe_hidden": candidates})
    sweep.main("moe forward", "8B", "gfx950")
    (found,) = json.loads(capsys.readouterr().out).items()
    assert found == ("gfx950 moe_hidden 128x256x128 bfloat16", [[128, 64, 64], 4, 2])


def test_a_training_step_is_in_place_and_sends_experts_no_float32():
    config = TrainConfig(
        phase="pretrain",
        data=DataConfig(),
        model=ModelConfig(preset="nano", num_hidden_layers=3, kernels="xla"),
        context=32,
        rows=8,
        mesh=MeshConfig(2, 2, 2),
    )
    source = cluster.training(config)
    program = compile_for(source.function, *source.args)
    text = hlo.Program(program.text)
    assert program.results < 1e5 < program.arguments  # the state is donated
    collectives = text.collectives()
    assert all(c.within(8) for c in collectives)
    kinds = {c.kind for c in collectives}
    assert {"all-to-all", "reduce-scatter", "all-gather", "collective-permute"} <= kinds
    rows = cluster.exchanged(source.name, collectives)
    assert {row["collective"] for row in rows} == kinds
    sent = [i for c in text.computations.values() for i in c.values() if "all-to-all" in i.op]
    assert sent and not [i for i in sent if any(kind == "f32" for kind, _ in i.shapes)]
