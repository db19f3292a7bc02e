"""XLA's compiler for AMD GPUs on a machine that has neither GPU nor ROCm.

The wheel jax-rocm7-pjrt holds the compiler, and links ROCm's libraries. Where those are missing,
stand-ins take their place, every function of which fails: compiling calls none of them, and nothing
can be run.
"""

import ctypes
import hashlib
import logging
import re
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jax
from jax._src import xla_bridge
from jax.experimental import topologies

_SYSTEM = re.compile(r"(libc|libm|librt|libdl|libpthread|libstdc\+\+|libgcc_s|ld-linux.*)\.so")
_SYSTEM_SYMBOL = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)|^_ZNK?St")

# As the compiler has them in specs/mi300.txtpb and specs/mi350.txtpb.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 64 shared_memory_per_block: {lds}
  shared_memory_per_block_optin: {lds} shared_memory_per_core: {lds} threads_per_core_limit: 2048
  core_count: {cores} fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65536
  block_dim_limit_z: 65536 memory_bandwidth: {bandwidth} l2_cache_size: 4194304
  clock_rate_ghz: {clock} device_memory_size: {memory} registers_per_core_limit: 131072
  registers_per_block_limit: 131072
  rocm_compute_capability {{ gcn_arch_name: "{architecture}:sramecc+:xnack-" }}
}}
platform_name: "ROCM" dnn_version_info {{ }} device_description_str: "{name}"
"""


class Gpu(NamedTuple):
    """A GPU to compile for: bytes of LDS of a compute unit, compute units, bytes a second, GHz,
    bytes of memory."""

    name: str
    lds: int
    cores: int
    bandwidth: int
    clock: float
    memory: int


GPUS = {
    "gfx942": Gpu("MI300X", 65536, 304, 5_300_000_000_000, 2.1, 206_158_430_208),
    "gfx950": Gpu("MI350X", 163840, 256, 7_782_000_000_000, 2.2, 270_566_162_432),
}
NODE = 8  # GPUs of a node


def devices(count: int = 1, architecture: str = "gfx942") -> list[jax.Device]:
    """So many GPUs to compile for, of one node; of nodes with eight each, where there are more.

    Raises:
      ModuleNotFoundError: the compiler is not installed.
      ValueError: nodes would not be full.
    """
    if count > NODE and count % NODE:
        raise ValueError(f"{count} GPUs do not fill nodes of {NODE}")
    if "rocm" not in xla_bridge._topology_factories:
        library = _library()
        _stand_in(library)
        # It logs a traceback where it finds no GPU.
        logging.getLogger("jax._src.xla_bridge").setLevel(logging.CRITICAL)
        jax.devices()  # JAX finds those that are there, before it hears of some that are not
        options = {"platform_name": "ROCM"}
        xla_bridge.register_plugin("rocm", priority=-1, library_path=str(library), options=options)
    nodes = max(count // NODE, 1)
    topology = topologies.get_topology_desc(
        platform="rocm",
        topology_name="mi300",
        target_config=_TARGET.format(architecture=architecture, **GPUS[architecture]._asdict()),
        topology=f"1x{nodes}x{count // nodes}",
    )
    return list(topology.devices)


def installed() -> bool:
    """Whether the compiler is there."""
    try:
        _library()
    except ModuleNotFoundError:
        return False
    return True


def _library() -> Path:
    plugins = find_spec("jax_plugins")
    for folder in plugins.submodule_search_locations or () if plugins else ():
        for file in Path(folder).glob("xla_rocm*/xla_rocm_plugin.so"):
            return file
    raise ModuleNotFoundError("jax-rocm7-pjrt is not installed (see `make rocm-aot`)")


def _stand_in(library: Path) -> None:
    """Loads stand-ins for libraries that are missing; the loader finds them by their names."""
    missing = [name for name in _needed(library) if not _loads(name)]
    if not missing:
        return
    symbols = sorted(_undefined(library))
    digest = hashlib.sha256("\n".join([*missing, *symbols]).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"rocm-stand-ins-{digest}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / "libraries"
            made.mkdir()
            functions = (f"long {name}(void) {{ return {_result(name)}; }}" for name in symbols)
            _compile(made / "liball.so", "\n".join(functions))
            for name in missing:
                _compile(made / name, "int stand_in;")
            made.rename(folder)
    for name in ["liball.so", *missing]:
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)


def _result(function: str) -> str:
    """What a function that fails returns: a name for an error, else an error."""
    if re.search(r"(Error(String|Name)|status_to_string|GetLastError)$", function):
        return "0" if "hipGetLast" in function else '(long) "no GPU"'
    if function.startswith(("__hip", "_Z")):
        return "0"
    return "100" if re.match(r"hip(?!blas|fft|sparse|solver)", function) else "1"


def _compile(file: Path, text: str) -> None:
    source = file.with_suffix(".c")
    source.write_text(text)
    flags = ["-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{file.name}"]
    subprocess.run(["gcc", *flags, "-o", file, source], check=True)


def _needed(library: Path) -> list[str]:
    listed = subprocess.run(
        ["readelf", "-d", library], check=True, capture_output=True, text=True
    ).stdout
    names = re.findall(r"NEEDED.*\[(.*)\]", listed)
    return [name for name in names if not _SYSTEM.match(name)]


def _undefined(library: Path) -> set[str]:
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True
    ).stdout
    names = [line.split()[-1] for line in listed.splitlines() if line.split()[-2] == "U"]
    return {name.partition("@")[0] for name in names if not _SYSTEM_SYMBOL.search(name)}


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True
