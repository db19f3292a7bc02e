"""Compiled programs kept on disk, so that a second run starts at once."""

import hashlib
import os
import platform
from pathlib import Path

import jax
import jaxlib

# Programs that took less time to compile are not kept: JAX's threshold, which leaves out most of
# ours, and the one in its place.
JAX_DEFAULT_SECONDS, WORTH_KEEPING_SECONDS = 1.0, 0.1


def use_persistent_cache() -> None:
    """Makes JAX keep compiled programs in the user's cache folder, unless it was told where.

    `JAX_COMPILATION_CACHE_DIR` names another folder, `JAX_ENABLE_COMPILATION_CACHE=false` keeps
    nothing. Programs for the CPU fit one kind of processor, so each kind has a folder of its own.
    """
    if jax.config.jax_compilation_cache_dir is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "zaya-jax" / f"{jaxlib.__version__}-{_processor()}"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if jax.config.jax_persistent_cache_min_compile_time_secs == JAX_DEFAULT_SECONDS:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING_SECONDS)


def _processor() -> str:
    """A name for this kind of processor: its features, as far as they can be told."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        text = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        text = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
