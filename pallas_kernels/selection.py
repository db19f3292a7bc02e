"""Choice of an implementation by name: the one rule shared by every op's `api.py`."""

import os
from collections.abc import Callable, Mapping

from pallas_kernels.launch import architecture

VARIABLE, CHOICES = "ZAYA_JAX_KERNELS", ("xla", "pallas")


def requested() -> str | None:
    """What the environment asks for, if anything.

    Raises:
      ValueError: no such implementation.
    """
    name = os.environ.get(VARIABLE) or None
    if name not in (None, *CHOICES):
        raise ValueError(f"{VARIABLE} is {name!r}: one of {', '.join(CHOICES)}")
    return name


def default_implementation() -> str:
    """What runs where the caller names nothing: what the environment asks for, else our kernels on
    AMD GPUs and XLA elsewhere."""
    on_amd = (architecture() or "").startswith("gfx")
    return requested() or ("pallas" if on_amd else "xla")


def select[F: Callable](
    op: str,
    implementation: str | None,
    available: Mapping[str, F],
    instead_of_pallas: str = "pallas",
) -> F:
    """The implementation of `op` of that name.

    Args:
      op: for the error.
      implementation: None picks the default.
      available: by name.
      instead_of_pallas: what this shape is better served by, where nobody asked for our kernels and
        they are the default.

    Raises:
      ValueError: no implementation of that name.
    """
    name = implementation or default_implementation()
    if name == "pallas" and implementation is None and requested() is None:
        name = instead_of_pallas
    if name not in available:
        raise ValueError(f"{op} has no implementation {name!r}: one of {', '.join(available)}")
    return available[name]
