"""`zaya doctor`: what this installation would run, and on what."""

import dataclasses
import os
import pkgutil
import platform
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

import pallas_kernels
from pallas_kernels import selection
from zaya_jax.cli.output import check_destination, console, find_devices, show, write_json

PACKAGES = ("zaya-jax", "jax", "jaxlib", "jax-rocm7-plugin", "jax-rocm7-pjrt", "flax", "optax")
VARIABLES = (
    *("JAX_PLATFORMS", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "HSA_NO_SCRATCH_RECLAIM"),
    selection.VARIABLE,
)


@dataclasses.dataclass
class Doctor:
    """Show versions, devices, selected kernels and flags of this installation."""

    json: Path | None = None
    """Also write the tables to this file."""

    def run(self) -> None:
        check_destination(self.json)
        tables: dict[str, dict[str, Any]] = {
            "versions": {"python": platform.python_version(), **_versions()},
            "flags": {name: os.environ.get(name, "not set") for name in VARIABLES},
        }
        for title, values in tables.items():
            show(title.capitalize(), values)
        devices = find_devices()  # after the flags, as bad ones can end the process here
        tables["devices"] = {f"{d.platform} {d.id}": d.device_kind for d in devices}
        show("Devices", tables["devices"])
        tables["kernels"] = dict.fromkeys(_ops(), selection.default_implementation())
        show("Kernels", tables["kernels"])
        warning = fallback_warning(tables["versions"], jax.default_backend())
        if warning is not None:
            console.print(warning, style="bold white on red", highlight=False)
        write_json(self.json, {**tables, "warning": warning})


def fallback_warning(versions: dict[str, str], backend: str) -> str | None:
    """What to shout where a ROCm installation runs on the CPU: JAX itself only logs it."""
    rocm = any(versions[name] != "not installed" for name in versions if "rocm" in name)
    if not rocm or backend in ("rocm", "gpu"):
        return None
    return (
        "WARNING: the ROCm plugin is installed, but JAX found no AMD GPU and runs on the CPU. "
        "Check `rocminfo`, access to /dev/kfd and /dev/dri, and that ROCm 7 is installed."
    )


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _ops() -> list[str]:
    """The folders of `pallas_kernels` that choose between implementations."""
    modules = pkgutil.iter_modules(pallas_kernels.__path__)
    folders = [module.name for module in modules if module.ispkg]
    return [name for name in folders if find_spec(f"pallas_kernels.{name}.api") is not None]
