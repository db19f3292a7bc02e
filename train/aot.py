"""Compiles whole programs of the 8B model for MI300X GPUs that are not there, and judges them:

    python -m train.aot        # writes docs/programs.md

A prompt, a decoding step, and the training step on clusters (`train.cluster`). Fails on a dense
product for a ragged one, a buffer of tokens by tokens, or more memory than a GPU has. Needs the
compiler (`make rocm-aot` installs it apart). Nothing is run.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro

from pallas_kernels.rocm import hlo, roofline
from pallas_kernels.rocm.compiler import Program, compile_for
from pallas_kernels.rocm.toolchain import GPUS, devices
from train import cluster
from train.config import TrainConfig
from train.flops import forward_flops
from zaya_jax.config import ZayaConfig
from zaya_jax.model import Params, forward, head, init, init_state

PAGE = Path(__file__).parent.parent / "docs" / "programs.md"
TOKENS, ROWS, CONTEXT = 8192, 8, 32768
GPU = GPUS["gfx942"]


class Whole(NamedTuple):
    """A program.

    Attributes:
      name: what it is.
      function: of arrays.
      args: their shapes.
      donated: numbers of arguments that the results take the place of.
      flops: that each device has to do at least.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    donated: tuple[int, ...] = ()
    flops: float = 0.0


def programs(config: ZayaConfig) -> list[Whole]:
    """Those of a model that generate: through separate layers, whose weights are read and whose
    caches are written where they are; a scan over stacked ones, as in training, copies both."""
    params = jax.eval_shape(lambda: init(config, jax.random.key(0), jnp.bfloat16))
    return [_prefill(params, config), _decoding(params, config)]


def _state(params: Params, config: ZayaConfig, rows: int) -> Any:
    return jax.eval_shape(partial(init_state, config=config, batch=rows, capacity=CONTEXT), params)


def _int32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _prefill(params: Params, config: ZayaConfig) -> Whole:
    def run(params: Params, tokens: jax.Array, lengths: jax.Array, state: Any) -> Any:
        out = forward(params, config, tokens, new_lengths=lengths, state=state)
        last = jnp.take_along_axis(out.hidden, lengths[:, None, None] - 1, axis=1)
        return head(params, config, last), out.state, out.experts

    args = params, _int32(1, TOKENS), _int32(1), _state(params, config, 1)
    flops = forward_flops(config, TOKENS, 1, TOKENS * (TOKENS + 1) / 2)
    return Whole(f"prompt of {TOKENS:,} tokens", run, args, (3,), flops)


def _decoding(params: Params, config: ZayaConfig) -> Whole:
    def run(params: Params, tokens: jax.Array, state: Any) -> Any:
        out = forward(params, config, tokens, state=state)
        return head(params, config, out.hidden), out.state, out.experts

    args = params, _int32(ROWS, 1), _state(params, config, ROWS)
    name = f"decoding step of {ROWS} rows, {CONTEXT:,} tokens of context"
    return Whole(name, run, args, (2,), forward_flops(config, ROWS, ROWS, ROWS * CONTEXT))


def examine(whole: Whole, by_xla: Whole) -> tuple[dict[str, str], list[str]]:
    """What is to be said of a program, beside the one that XLA makes without our kernels: a row of
    the table, and what is wrong with it."""
    begin = time.process_time()
    program = compile_for(whole.function, *whole.args, donate_argnums=whole.donated)
    seconds = time.process_time() - begin
    alone = compile_for(by_xla.function, *by_xla.args, donate_argnums=by_xla.donated)
    text = hlo.Program(program.text)
    moved_alone = hlo.Program(alone.text).moved()
    row = {
        "program": whole.name,
        **_measured(program, text, whole.flops, seconds),
        "temporary without": f"{alone.temporary / 1e9:.2f}",
        "of XLA's": f"{text.moved() / moved_alone:.2f}",
    }
    return row, _named(whole.name, problems_of(program, text, (TOKENS, TOKENS)))


class Examined(NamedTuple):
    """Of a training step: rows of the tables of docs/programs.md, and what is wrong with it."""

    program: dict[str, str]
    exchanged: list[dict[str, str]]
    paper: dict[str, str]
    problems: list[str]


def examine_training(config: TrainConfig) -> Examined:
    """What is to be said of a training step on a cluster."""
    source = cluster.training(config)
    begin = time.process_time()
    program = compile_for(source.function, *source.args)
    seconds = time.process_time() - begin
    text = hlo.Program(program.text)
    collectives, context = text.collectives(), config.context
    row = {"program": source.name, **_measured(program, text, source.flops, seconds)}
    return Examined(
        row,
        cluster.exchanged(source.name, collectives),
        cluster.on_paper(source, text.moved(), collectives),
        _named(source.name, problems_of(program, text, (context // config.mesh.context, context))),
    )


def _measured(program: Program, text: hlo.Program, flops: float, seconds: float) -> dict[str, str]:
    bound, waits = roofline.bound(text.moved(), flops, roofline.MEASURED_BANDWIDTH)
    return {
        "arguments": f"{program.arguments / 1e9:.1f}",
        "temporary": f"{program.temporary / 1e9:.2f}",
        "moved": f"{text.moved() / 1e9:,.1f}",
        "TFLOP": f"{flops / 1e12:.2f}",
        "bound": f"{bound * 1e3:,.1f} ms, {waits}",
        "dense ragged": str(text.ragged_dots()),
        "float32 products": str(len(text.float32_products())),
        "compiled in, CPU s": f"{seconds:.0f}",
    }


def _named(name: str, problems: list[str]) -> list[str]:
    print(f"{name}: {'; '.join(problems) or 'sound'}", flush=True)
    return [f"{name}: {problem}" for problem in problems]


def problems_of(program: Program, text: hlo.Program, square: tuple[int, int]) -> list[str]:
    """What must not be in a program; `square` are the queries and keys of a row on one device."""
    problems = [f"a buffer {shapes}" for shapes in {str(i.shapes) for i in text.squares(*square)}]
    if ragged := text.ragged_dots():
        problems.append(f"{ragged} ragged products as dense ones")
    if program.memory > GPU.memory:
        problems.append(f"{program.memory / 1e9:.0f} GB, a GPU has {GPU.memory / 1e9:.0f}")
    return problems


_HEAD = """# Programs of the 8B model, compiled for the MI300X

Written by `make rocm-aot` (`python -m train.aot`). Compiled by XLA's compiler for ROCm on a machine
without a GPU; **nothing has run on one**. Of each device:

- *arguments* and *temporary* are GB of memory, and *temporary without* the latter without our
  kernels;
- *moved* are GB that all kernels read and write, and *of XLA's* that divided by the same without
  our kernels (experts then through the library's grouped products); an operand counts as a whole,
  also where a kernel takes a part of it, as attention does of the cache, and decoding of experts;
- *bound* is the time for these at 4.33 TB/s, which others measured, or for the products that the
  model needs at 1,307 TFLOP/s, whichever is longer;
- *dense ragged* are products of ragged groups that XLA computes as dense, masked ones; *float32
  products* those where nobody asked for float32's precision (as the router does), left to XF32.

## Generating

"""


def main() -> None:
    """Compiles all of them, and writes the page."""
    devices()  # first of all: JAX itself would log a traceback, as it finds no GPU
    config = ZayaConfig.preset("zaya1_8b")
    xla = dataclasses.replace(config, kernels="xla")
    generating = [
        examine(whole, by_xla)
        for whole, by_xla in zip(programs(config), programs(xla), strict=True)
    ]
    steps = [examine_training(config) for config in cluster.eight_b()]
    wrong = [*(found for _, found in generating), *(step.problems for step in steps)]
    problems = [problem for found in wrong for problem in found]
    PAGE.write_text(
        _HEAD
        + roofline.plain_table([row for row, _ in generating])
        + cluster.page(
            [step.program for step in steps],
            [row for step in steps for row in step.exchanged],
            [step.paper for step in steps],
        )
        + "".join(f"\n- {problem}" for problem in problems)
    )
    sys.exit(bool(problems))


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except ModuleNotFoundError as error:
        sys.exit(str(error))
