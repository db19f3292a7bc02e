"""Programs compiled for AMD GPUs, and what the compiler made of them."""

import contextlib
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pallas_kernels.launch import compiling_for
from pallas_kernels.rocm.code_object import Kernel, read_kernels
from pallas_kernels.rocm.lowering import MI300X
from pallas_kernels.rocm.toolchain import devices


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      kernels: all that XLA generated, ours among them, by name.
      text: the compiled HLO.
      arguments, results, temporary: bytes of memory on each device; `results` that share the memory
        of arguments are not counted.
    """

    kernels: dict[str, Kernel]
    text: str
    arguments: int
    results: int
    temporary: int

    @property
    def memory(self) -> int:
        """Bytes that a device needs."""
        return self.arguments + self.results + self.temporary


def compile_for(
    f: Callable[..., Any], *args: Any, architecture: str = MI300X, **options: Any
) -> Program:
    """Compiles a function of arrays for one GPU, or for those that its arguments lie on.

    XLA writes a code object only once for the same kernel: what was compiled earlier in the same
    process is missing in `kernels`.

    Args:
      f: the function, or one that is already under `jax.jit`.
      args: trees of `jax.ShapeDtypeStruct`; with the devices of `toolchain.devices` in their
        shardings, or without any.
      architecture: of the GPU.
      options: for `jax.jit`, of a function that is not.

    Raises:
      jax.errors.JaxRuntimeError: the compiler refuses it.
    """
    with tempfile.TemporaryDirectory() as folder, _keeping_files(folder):
        with compiling_for(architecture), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Triton backend is deprecated")
            jitted = f if isinstance(f, jax.stages.Wrapped) else jax.jit(f, **options)
            traced = jitted.trace(*_placed(args, architecture))
            lowered = traced.lower(lowering_platforms=("rocm",))
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
        lds = _lds(Path(folder))
        kernels = {
            kernel.name: kernel
            for file in sorted(Path(folder).glob("*.hsaco"))
            for kernel in read_kernels(file, architecture, lds)
        }
    memory = compiled.memory_analysis()
    assert memory is not None
    return Program(
        kernels,
        compiled.as_text() or "",
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
    )


@contextlib.contextmanager
def _keeping_files(folder: str) -> Iterator[None]:
    """Within, XLA leaves what it makes in a folder."""
    wanted = {"TMPDIR": folder, "TF_ROCM_KEEP_XLA_TEMPFILES": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _placed(args: Any, architecture: str) -> Any:
    """Shapes without a place, on the first GPU."""
    place = jax.sharding.SingleDeviceSharding(devices(1, architecture)[0])

    def put(x: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(x, "sharding", None) or place
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(put, args)


def _lds(folder: Path) -> dict[str, int]:
    """Bytes of LDS that kernels get when they are launched."""
    found = {}
    for file in folder.glob("*thunk_sequence.txt"):
        for name, size in re.findall(
            r"\] (\S+) grid: \[.*?shared_memory: (\d+) bytes", file.read_text()
        ):
            found[name] = int(size)
    return found
