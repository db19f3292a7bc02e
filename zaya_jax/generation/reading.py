"""Prompts that begin alike, token for token, are read from where they part."""

from collections.abc import Callable, Sequence

from zaya_jax.generation.rows import Prefix, Row, fitted

Read = Callable[[list[int], Prefix | None], Prefix]


def in_reading_order(rows: Sequence[Row]) -> list[Row]:
    """The rows in their order, but for those that begin like an earlier one: they follow it."""
    first: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}

    def place(row: Row) -> list[int]:
        return [first.setdefault(key, row.number) for key in _beginnings(row)]

    return sorted(rows, key=place)


class Reader:
    """Reads prompts one after the other, each part once.

    A state cannot be cut back, so one is kept at the end of every part that the next prompt has
    too: a path of them, as in a tree that is walked in depth. The state of a part depends on all
    before it; the same words behind something else are read again.

    Args:
      read: reads tokens, from the end of what was read before.
      prefix: read before; prompts that begin with it are read from its end on.
      share: False keeps nothing.
    """

    def __init__(self, read: Read, prefix: Prefix | None, share: bool = True):
        self._read, self._prefix, self._share = read, prefix, share
        self._path: list[Prefix] = []  # at the ends of the first parts of the last prompt

    def read(self, row: Row, following: Row | None) -> Prefix:
        """What the model makes of the row's prompt; `following` is the next one to be read."""
        shared = 0 if following is None or not self._share else _parts_alike(row, following)
        start = self._path[-1] if self._path else self._prefix
        for number in range(len(self._path), len(row.ends)):
            part = row.prompt[: row.ends[number]]
            before = 0 if start is None else len(start.tokens)
            goes_on = start is not None and part[:before] == start.tokens
            row.read += len(part) - (before if goes_on else 0)
            start = self._read(part, start)
            if number < shared:
                last = number + 1 == len(row.ends)
                self._path.append(start if last else fitted(start))
        del self._path[shared:]
        assert start is not None
        return start


def _beginnings(row: Row) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The prompt up to the end of each part, and where its parts end."""
    return [
        (tuple(row.prompt[:end]), row.ends[: number + 1]) for number, end in enumerate(row.ends)
    ]


def _parts_alike(a: Row, b: Row) -> int:
    """How many parts, from the first on, two prompts have in common."""
    pairs = zip(_beginnings(a), _beginnings(b), strict=False)
    return next((n for n, (x, y) in enumerate(pairs) if x != y), min(len(a.ends), len(b.ends)))
