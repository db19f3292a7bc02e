"""Best-fit-decreasing packing."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.packing import pack

lengths = st.lists(st.integers(1, 50), max_size=60)


def best_fit_decreasing(lengths, row_length):
    """The definition, row by row."""
    rows, rooms = [], []
    for example in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        fitting = [row for row, room in enumerate(rooms) if room >= lengths[example]]
        if not fitting:
            rows.append([])
            rooms.append(row_length)
            fitting = [len(rows) - 1]
        row = min(fitting, key=lambda row: rooms[row])
        rows[row].append(example)
        rooms[row] -= lengths[example]
    return rows


def fewest_rows(lengths, row_length, rooms=()) -> int:
    """By trying every assignment."""
    if not lengths:
        return len(rooms)
    size, *rest = lengths
    choices = [fewest_rows(rest, row_length, (*rooms, row_length - size))]
    for row, room in enumerate(rooms):
        if room >= size:
            taken = (*rooms[:row], room - size, *rooms[row + 1 :])
            choices.append(fewest_rows(rest, row_length, taken))
    return min(choices)


@given(lengths=lengths)
def test_every_example_is_whole_in_one_row(lengths):
    rows = pack(lengths, 50)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(0 < sum(lengths[n] for n in row) <= 50 for row in rows)


@given(lengths=lengths)
def test_rows_are_filled_as_the_definition_fills_them(lengths):
    fast, slow = pack(lengths, 50), best_fit_decreasing(lengths, 50)
    fill = [sorted(sum(lengths[n] for n in row) for row in rows) for rows in (fast, slow)]
    assert fill[0] == fill[1]


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_no_more_rows_than_the_known_bound(lengths):
    fewest = fewest_rows(lengths, 12)
    assert len(pack(lengths, 12)) <= 11 / 9 * fewest + 6 / 9


@pytest.mark.parametrize(("size", "row_length"), [(4096, 4096), (4096, 32768), (4096, 131072)])
def test_realistic_lengths_fill_rows(size, row_length):
    """Log-normal with a tail that reaches the context, where it is cut."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(row_length / 12), 1.2, size), 16, row_length)
    rows = pack(lengths.astype(int), row_length)
    assert lengths.astype(int).sum() / (len(rows) * row_length) >= 0.97


def test_a_hundred_thousand_examples_take_a_moment():
    lengths = np.random.default_rng(0).integers(1, 4097, 100_000)
    start = time.process_time()
    pack(lengths, 4096)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("length", [0, 51])
def test_an_example_that_is_empty_or_too_long_is_an_error(length):
    with pytest.raises(ValueError, match=r"1 \.\. 50"):
        pack([3, length], 50)
