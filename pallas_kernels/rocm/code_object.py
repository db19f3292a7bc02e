"""What is in the code objects (ELF files) that a compiler makes for AMD GPUs."""

import ctypes
import functools
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgpack

from pallas_kernels.rocm.toolchain import GPUS

WAVEFRONT = 64  # lanes
REGISTERS = 512  # of a SIMD, for each lane of its wavefronts; a compute unit has 4 SIMDs
MOST_WAVES = 8
_NOTE, _METADATA = 7, 32


class Kernel(NamedTuple):
    """A compiled kernel.

    Attributes:
      name: its symbol.
      vgprs: vector registers, accumulation registers (agprs) among them.
      agprs, sgprs: accumulation and scalar registers.
      spills: registers that did not fit and live in memory.
      scratch: bytes of that memory, for each lane.
      lds: bytes of local data share, for each program.
      warps: wavefronts of a program.
      matrix: instructions for matrix products, by kind; empty without a disassembler.
      instructions: their number; 0 without a disassembler.
      room: bytes of LDS that a compute unit has.
    """

    name: str
    vgprs: int
    agprs: int
    sgprs: int
    spills: int
    scratch: int
    lds: int
    warps: int
    matrix: dict[str, int]
    instructions: int
    room: int

    @property
    def waves(self) -> float:
        """Wavefronts that fit on a SIMD at once, by registers (in steps of 8) and LDS."""
        waves = min(MOST_WAVES, REGISTERS // max(8, -(-self.vgprs // 8) * 8))
        return min(waves, self.room // self.lds * self.warps / 4) if self.lds else waves


def read_kernels(file: Path, architecture: str, lds: dict[str, int]) -> list[Kernel]:
    """The kernels of a code object.

    Args:
      file: to read.
      architecture: that it is for.
      lds: of kernels, in bytes, where that is chosen at launch and not in the file.
    """
    data = file.read_bytes()
    names = Counter(_instructions(data, architecture))
    matrix = {name: count for name, count in names.items() if "mfma" in name}
    return [
        Kernel(
            name=meta[".name"],
            vgprs=meta[".vgpr_count"],
            agprs=meta[".agpr_count"],
            sgprs=meta[".sgpr_count"],
            spills=meta[".vgpr_spill_count"] + meta[".sgpr_spill_count"],
            scratch=meta[".private_segment_fixed_size"],
            lds=max(meta[".group_segment_fixed_size"], lds.get(meta[".name"], 0)),
            warps=meta[".max_flat_workgroup_size"] // WAVEFRONT,
            matrix=matrix,
            instructions=names.total(),
            room=GPUS[architecture].lds,
        )
        for meta in _metadata(data)
    ]


def _sections(data: bytes) -> Iterator[tuple[str, int, int, bytes]]:
    """Name, type, address and contents of each."""
    (offset,) = struct.unpack_from("<Q", data, 40)
    size, count, names = struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQ", data, offset + i * size) for i in range(count)]
    for name, kind, _, address, start, length in headers:
        begin = headers[names][4] + name
        label = data[begin : data.index(b"\0", begin)].decode()
        yield label, kind, address, data[start : start + length]


def _metadata(data: bytes) -> Iterator[dict[str, Any]]:
    for _, kind, _, notes in _sections(data):
        place = 0
        while kind == _NOTE and place < len(notes):
            name, length, note = struct.unpack_from("<III", notes, place)
            begin = place + 12 + -(-name // 4) * 4
            if note == _METADATA:
                yield from msgpack.unpackb(notes[begin : begin + length])["amdhsa.kernels"]
            place = begin + -(-length // 4) * 4


@functools.cache
def _disassembler(architecture: str) -> tuple[ctypes.CDLL, int] | None:
    """LLVM's, of the package rocm-llvm-python; None if that is not installed."""
    try:
        import rocm
    except ImportError:
        return None
    llvm = ctypes.CDLL(str(Path(next(iter(rocm.__path__))) / "llvm" / "librocmllvm.so"))
    for part in ("TargetInfo", "TargetMC", "Target", "Disassembler"):
        getattr(llvm, f"LLVMInitializeAMDGPU{part}")()
    text, pointer, size = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t
    llvm.LLVMCreateDisasmCPU.restype = pointer
    llvm.LLVMCreateDisasmCPU.argtypes = [text, text, pointer, ctypes.c_int, pointer, pointer]
    llvm.LLVMDisasmInstruction.restype = size
    number = ctypes.c_uint64
    llvm.LLVMDisasmInstruction.argtypes = [pointer, pointer, number, number, text, size]
    made = llvm.LLVMCreateDisasmCPU(
        b"amdgcn-amd-amdhsa", architecture.encode(), None, 0, None, None
    )
    return llvm, made


def _instructions(data: bytes, architecture: str) -> Iterator[str]:
    """The name of each instruction."""
    found = _disassembler(architecture)
    if found is None:
        return
    llvm, context = found
    code = next(contents for name, _, _, contents in _sections(data) if name == ".text")
    buffer, line = ctypes.create_string_buffer(code, len(code)), ctypes.create_string_buffer(256)
    start, place = ctypes.addressof(buffer), 0
    while place < len(code):
        left = len(code) - place
        size = llvm.LLVMDisasmInstruction(context, start + place, left, place, line, 256)
        words = line.value.decode().split() if size else []
        if words:
            yield words[0]
        place += size or 4
