"""Choice of an implementation by name: the one rule shared by every op's `api.py`."""

from collections.abc import Callable, Mapping


def select[F: Callable](op: str, implementation: str | None, available: Mapping[str, F]) -> F:
    """The implementation of `op` called `implementation`; None picks the default of this platform.

    Only the XLA reference exists so far, so it is the default everywhere.

    Raises:
      ValueError: no implementation of that name.
    """
    name = implementation or "xla"
    if name not in available:
        raise ValueError(f"{op} has no implementation {name!r}: one of {', '.join(available)}")
    return available[name]
