"""Lowering for AMD GPUs with plain JAX, and what the kernels in it move.

This is as far as one comes without the ROCm compiler: it finds what Triton cannot express.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from pallas_kernels.launch import compiling_for

MI300X = "gfx942"


def lower(f: Callable[..., Any], *args: Any, architecture: str = MI300X) -> jax.stages.Lowered:
    """A function of arrays, or of their shapes, for an AMD GPU that need not be there."""
    with compiling_for(architecture), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Triton backend is deprecated")
        return jax.jit(f).trace(*args).lower(lowering_platforms=("rocm",))


class Traffic(NamedTuple):
    """What a kernel asks of memory, by its block specs.

    Attributes:
      name: of the kernel.
      programs: in its grid.
      read, written: bytes of the distinct blocks of its inputs and outputs, each counted once.
      asked: bytes of all blocks of all programs, which caches serve as far as they can; a block
        that is a whole array counts once.
      multiplies: whether it multiplies matrices.
    """

    name: str
    programs: int
    read: int
    written: int
    asked: int
    multiplies: bool

    @property
    def moved(self) -> int:
        return self.read + self.written


def traffic(f: Callable[..., Any], *args: Any) -> list[Traffic]:
    """That of each kernel in a function, in the order of the program."""
    with compiling_for(MI300X):
        jaxpr = jax.make_jaxpr(f)(*args)
    return [_of_kernel(call.params) for call in _kernels(jaxpr.jaxpr)]


def _kernels(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else (value,):
                if isinstance(inner, core.ClosedJaxpr):
                    yield from _kernels(inner.jaxpr)
                elif isinstance(inner, core.Jaxpr):
                    yield from _kernels(inner)


def _of_kernel(params: dict[str, Any]) -> Traffic:
    mapping = params["grid_mapping"]
    programs = np.indices(mapping.grid).reshape(len(mapping.grid), -1)
    distinct, asked = [], 0
    for block in mapping.block_mappings:
        size = math.prod(block.ref_aval.shape) * block.array_aval.dtype.itemsize
        whole = math.prod(block.array_aval.shape) * block.array_aval.dtype.itemsize
        index = _indices(block.index_map_jaxpr, programs)
        count = len(np.unique(index, axis=0)) if index.size else 1
        # Blocks at the end of an array reach beyond it.
        distinct.append(min(count * size, whole))
        asked += whole if size >= whole else size * programs.shape[1]
    inputs = mapping.num_inputs
    name = params["name"] if "name" in params else params["name_and_src_info"].name
    read, written = sum(distinct[:inputs]), sum(distinct[inputs:])
    multiplies = "dot_general" in str(params["jaxpr"])
    return Traffic(name, programs.shape[1], read, written, asked, multiplies)


def _indices(jaxpr: core.ClosedJaxpr, programs: np.ndarray) -> np.ndarray:
    """The block that each program sees [programs, axes]."""
    function = jax.vmap(core.jaxpr_as_fun(jaxpr))
    with jax.ensure_compile_time_eval():
        columns = function(*programs.astype(np.int32)) if programs.size else function()
    return np.stack([np.broadcast_to(c, programs.shape[1:]) for c in columns], axis=1)
