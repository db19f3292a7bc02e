"""Compiles whole programs of the 8B model for MI300X GPUs that are not there, and judges them:

    python -m train.aot        # writes docs/programs.md

A prompt, a decoding step, and the forward pass and gradient of a training step on eight GPUs. Fails
on a dense product for a ragged one, a buffer of tokens by tokens, or more memory than a GPU has.
Needs the compiler (`make rocm-aot` installs it apart). Nothing is run.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.cross_entropy.api import cross_entropy
from pallas_kernels.rocm import hlo, roofline
from pallas_kernels.rocm.compiler import Program, compile_for
from pallas_kernels.rocm.toolchain import GPUS, devices
from zaya_jax.config import ZayaConfig
from zaya_jax.layouts import stack
from zaya_jax.model import Params, forward, head, init, init_state, parameter_counts
from zaya_jax.parallel import by_rows
from zaya_jax.sharding import make_mesh, parameter_sharding

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
    """Those of a model: generating goes through separate layers, whose weights are read and whose
    caches are written where they are; a scan over stacked ones, as in training, copies both."""
    params = jax.eval_shape(lambda: init(config, jax.random.key(0), jnp.bfloat16))
    stacked = jax.eval_shape(partial(stack, config=config), params)
    return [_prefill(params, config), _decoding(params, config), _training(stacked, config)]


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
    flops = _flops(config, TOKENS, 1, TOKENS * (TOKENS + 1) / 2)
    return Whole(f"prompt of {TOKENS:,} tokens", run, args, (3,), flops)


def _decoding(params: Params, config: ZayaConfig) -> Whole:
    def run(params: Params, tokens: jax.Array, state: Any) -> Any:
        out = forward(params, config, tokens, state=state)
        return head(params, config, out.hidden), out.state, out.experts

    args = params, _int32(ROWS, 1), _state(params, config, ROWS)
    name = f"decoding step of {ROWS} rows, {CONTEXT:,} tokens of context"
    return Whole(name, run, args, (2,), _flops(config, ROWS, ROWS, ROWS * CONTEXT))


def _training(params: Params, config: ZayaConfig) -> Whole:
    """Packed rows, one for each of two shards of data, experts spread over four GPUs each."""
    mesh = make_mesh(2, 4, devices=devices(8))
    rows = NamedSharding(mesh, P("data"))

    def placed(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = parameter_sharding(name, mesh).spec
        stacked = P(None, *spec) if "/layers/" in name and spec else spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, stacked))

    def run(params: Params, tokens: jax.Array, targets: jax.Array, ids: jax.Array) -> Any:
        def loss(weights: Any) -> jax.Array:
            out = forward({**params, "params": weights}, config, tokens, segment_ids=ids)
            embedding = weights["embed_tokens"]["weight"]
            flat = out.hidden.reshape(-1, config.hidden_size), targets.reshape(-1)

            def score(rows: Any, weight: jax.Array) -> Any:
                return cross_entropy(rows[0], weight, rows[1], implementation=config.kernels)

            found = by_rows(score, flat, embedding, config.kernels)
            return -jnp.mean(found.log_probability)

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.value_and_grad(loss)(params["params"])

    tokens = jax.ShapeDtypeStruct((2, TOKENS), jnp.int32, sharding=rows)
    args = jax.tree_util.tree_map_with_path(placed, params), tokens, tokens, tokens
    flops = 3 * _flops(config, 2 * TOKENS, 2 * TOKENS, TOKENS * (TOKENS + 1)) / mesh.size
    return Whole("forward pass and gradient, 2 x 4 GPUs", run, args, flops=flops)


def _flops(config: ZayaConfig, tokens: int, logits: int, pairs: float) -> float:
    """Of a forward pass: the parameters that tokens use, logits of some of them, and attention of
    pairs of query and key."""
    _, used = parameter_counts(config)
    head = config.vocab_size * config.hidden_size
    attention = 2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return 2 * (used * tokens + head * logits + attention * pairs)


def examine(whole: Whole, by_xla: Whole) -> tuple[dict[str, str], list[str]]:
    """What is to be said of a program, beside the one that XLA makes without our kernels: a row of
    the table, and what is wrong with it."""
    begin = time.perf_counter()
    program = compile_for(whole.function, *whole.args, donate_argnums=whole.donated)
    seconds = time.perf_counter() - begin
    alone = compile_for(by_xla.function, *by_xla.args, donate_argnums=by_xla.donated)
    text = hlo.Program(program.text)
    moved, moved_alone = text.moved(), hlo.Program(alone.text).moved()
    bound, waits = roofline.bound(moved, whole.flops, roofline.MEASURED_BANDWIDTH)
    collectives = ", ".join(f"{n} {name}" for name, n in text.collectives().items()) or "none"
    row = {
        "program": whole.name,
        "arguments": f"{program.arguments / 1e9:.1f}",
        "temporary": f"{program.temporary / 1e9:.2f}, {alone.temporary / 1e9:.2f}",
        "moved": f"{moved / 1e9:,.1f}",
        "of XLA's": f"{moved / moved_alone:.2f}",
        "TFLOP": f"{whole.flops / 1e12:.2f}",
        "bound": f"{bound * 1e3:,.1f} ms, {waits}",
        "collectives": collectives,
        "dense ragged": str(text.ragged_dots()),
        "float32 products": str(len(text.float32_products())),
        "compiled in": f"{seconds:.0f} s",
    }
    return row, [f"{whole.name}: {problem}" for problem in problems_of(program, text)]


def problems_of(program: Program, text: hlo.Program) -> list[str]:
    """What must not be in a program."""
    problems = [f"a buffer {shapes}" for shapes in {str(i.shapes) for i in text.squares(TOKENS)}]
    if ragged := text.ragged_dots():
        problems.append(f"{ragged} ragged products as dense ones")
    if program.memory > GPU.memory:
        problems.append(f"{program.memory / 1e9:.0f} GB, a GPU has {GPU.memory / 1e9:.0f}")
    return problems


_HEAD = """# Programs of the 8B model, compiled for the MI300X

Written by `make rocm-aot` (`python -m train.aot`). Compiled by XLA's compiler for ROCm on a machine
without a GPU; **nothing has run on one**. Of each device:

- *arguments* and *temporary* are GB of memory, the latter also without our kernels;
- *moved* are GB that all kernels read and write, and *of XLA's* that divided by the same without
  our kernels (experts then through the library's grouped products); an operand counts as a whole,
  also where a kernel takes a part of it, as attention does of the cache, and decoding of experts;
- *bound* is the time for these at 4.33 TB/s, which others measured, or for the products that the
  model needs at 1,307 TFLOP/s, whichever is longer;
- *dense ragged* are products of ragged groups that XLA computes as dense, masked ones; *float32
  products* those where nobody asked for float32's precision (as the router does), left to XF32.

"""


def main() -> None:
    """Compiles all of them, and writes the page."""
    config = ZayaConfig.preset("zaya1_8b")
    xla = dataclasses.replace(config, kernels="xla")
    rows, problems = [], []
    for whole, by_xla in zip(programs(config), programs(xla), strict=True):
        row, wrong = examine(whole, by_xla)
        print(f"{whole.name}: {'; '.join(wrong) or 'sound'}", flush=True)
        rows.append(row)
        problems += wrong
    table = roofline.table({name: itemgetter(name) for name in rows[0]}, rows)
    PAGE.write_text(_HEAD + table + "".join(f"\n- {problem}" for problem in problems))
    sys.exit(bool(problems))


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except ModuleNotFoundError as error:
        sys.exit(str(error))
