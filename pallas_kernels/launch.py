"""How our kernels are launched: through Pallas's Triton backend, the only one that AMD GPUs have;
interpreted where there is no GPU."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax._src.pallas.triton import gpu_info  # asked for the GPU, also where none is meant to run
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

_target = contextvars.ContextVar[str | None]("target", default=None)


@contextlib.contextmanager
def compiling_for(architecture: str) -> Iterator[None]:
    """Within, kernels are lowered for that AMD GPU ("gfx942"), whatever this machine has."""
    token, asked = _target.set(architecture), gpu_info.get_gpu_info
    info = gpu_info.GpuInfo(gpu_version=None, arch_name=architecture, compute_capability=0)
    gpu_info.get_gpu_info = lambda: info
    try:
        yield
    finally:
        gpu_info.get_gpu_info = asked
        _target.reset(token)


def architecture() -> str | None:
    """Of the GPU that kernels are compiled for, "gfx942" for the MI300X and "9.0" for a CUDA one;
    None where they are interpreted."""
    if _target.get() is not None:
        return _target.get()
    if jax.default_backend() != "gpu":
        return None
    return gpu_info.get_gpu_info().arch_name.partition(":")[0]


def launch(
    body: Callable[..., None],
    out_shape: Any,
    *,
    name: str,
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Any,
    warps: int = 4,
    stages: int = 1,
    aliases: dict[int, int] | None = None,
) -> Callable[..., Any]:
    """A Pallas kernel as a function of arrays.

    Args:
      body: takes the references of inputs, then of outputs.
      out_shape: of the outputs, `jax.ShapeDtypeStruct`.
      name: by which it is found in compiled programs.
      grid: number of programs along each axis; no order between them may matter.
      in_specs, out_specs: the block of each array that a program sees, of powers of two.
      warps: wavefronts of 64 lanes on AMD, of a program.
      stages: of software pipelining in loops.
      aliases: inputs whose memory becomes that of an output, by their numbers.
    """
    return pl.pallas_call(
        body,
        out_shape=out_shape,
        name=name,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        input_output_aliases=aliases or {},
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=architecture() is None,
    )


def power_of_two(size: int, most: int) -> int:
    """The smallest power of two that `size` fits in, or `most` if that is less: Triton has no other
    blocks."""
    return min(1 << math.ceil(math.log2(max(size, 1))), most)
