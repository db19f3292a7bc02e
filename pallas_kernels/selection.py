"""Choice of an implementation by name: the one rule shared by every op's `api.py`."""

from collections.abc import Callable, Mapping


def default_implementation() -> str:
    """What runs where the caller names nothing: so far the XLA reference, on every platform."""
    return "xla"


def select[F: Callable](op: str, implementation: str | None, available: Mapping[str, F]) -> F:
    """The implementation of `op` of that name; None picks the default.

    Raises:
      ValueError: no implementation of that name.
    """
    name = implementation or default_implementation()
    if name not in available:
        raise ValueError(f"{op} has no implementation {name!r}: one of {', '.join(available)}")
    return available[name]
