"""Best-fit-decreasing bin packing of whole examples into rows."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[list[int]]:
    """Rows of example numbers, each example whole and in one row.

    The longest examples come first, each into the fullest row that still has room for it (equal
    lengths in the order given): at most 11/9 of the fewest rows possible, and one more. O(n log n).

    Args:
      lengths: of the examples, in tokens.
      row_length: room in a row.

    Raises:
      ValueError: an example is empty, or longer than a row.
    """
    sizes = np.asarray(lengths, np.int64)
    if sizes.size and (sizes.min() < 1 or sizes.max() > row_length):
        raise ValueError(f"examples must have 1 .. {row_length} tokens")
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # rows by what room they have
    rooms: list[int] = []  # the keys of `with_room`, sorted
    order = np.argsort(-sizes, kind="stable")
    for example, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        place = bisect_left(rooms, size)
        if place == len(rooms):
            row, room = len(rows), row_length
            rows.append([])
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        rows[row].append(example)
        if left := room - size:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(row)
    return rows
