"""Batches: their order, resuming, packing, and what a process reads of them."""

import itertools
import json

import numpy as np
import pytest
from sources import MODEL, TOKENIZER, config_of, conversation, documents, write_lines

from train.data.batches import Batches, held_out
from train.data.config import Source
from train.data.mixture import mixture, permutation, permute
from zaya_jax import ConfigError, DataError

ROWS, LENGTH = 4, 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_lines(folder / "a.jsonl", documents(0, 40, 100))
    write_lines(folder / "b.jsonl", documents(1, 17, 100))
    chats = [conversation(f"Q{n}", "<think>" + "r" * n + f"</think>A{n}") for n in range(30)]
    write_lines(folder / "chat.jsonl", chats)
    return folder


def make(folder, *weights, rows=ROWS, length=LENGTH, window=24, **fields) -> Batches:
    """Of as many of the three sources as there are weights, by default of all."""
    kinds = (("a", "text"), ("b", "text"), ("chat", "chat"))
    sources = [
        Source(str(folder / f"{name}.jsonl"), format, weight)
        for (name, format), weight in zip(kinds, weights or (1.0, 2.0, 1.5), strict=False)
    ]
    config = config_of(folder, *sources, window=window, **fields)
    return Batches(config, TOKENIZER, MODEL, rows=rows, length=length)


def take(batches, count):
    return [plan.rows() for plan in itertools.islice(batches, count)]


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_same_configuration_gives_the_same_batches(folder):
    first = take(make(folder), 30)
    assert_same(first, take(make(folder), 30))
    other = take(make(folder, seed=1), 30)
    assert any((a.tokens != b.tokens).any() for a, b in zip(first, other, strict=True))


def test_resuming_anywhere_goes_on_as_if_uninterrupted(folder):
    whole = make(folder)
    states, batches = [], []
    for _ in range(28):
        states.append(json.loads(json.dumps(whole.get_state())))
        batches.append(next(whole).rows())
    assert max(len(json.dumps(state)) for state in states) < 1000
    for place, state in enumerate(states[:-3]):
        resumed = make(folder)
        resumed.set_state(state)
        assert_same(take(resumed, 3), batches[place : place + 3])
    whole.set_state(states[3])  # also in an iterator that was further on
    assert_same(take(whole, 5), batches[3:8])


def test_rows_a_batch_change_nothing_but_their_grouping(folder):
    fours, sixes = make(folder), make(folder, rows=6)
    rows = [row for plan in itertools.islice(fours, 9) for row in plan.examples]
    assert rows == [row for plan in itertools.islice(sixes, 6) for row in plan.examples]
    assert fours.get_state() == sixes.get_state()
    sixes.set_state(fours.get_state())
    assert next(fours).examples == next(sixes).examples[:4]


def test_the_rows_of_several_processes_are_those_of_one(folder):
    one, two = make(folder), [make(folder), make(folder)]
    for _ in range(10):
        whole = next(one).rows()
        halves = [next(two[0]).rows(slice(0, 2)), next(two[1]).rows([2, 3])]
        assert_same([whole], [type(whole)(*map(np.concatenate, zip(*halves, strict=True)))])


def test_a_process_reads_the_tokens_of_its_rows_only(folder, monkeypatch):
    batches = make(folder)
    read = []
    for cache in batches.caches:
        monkeypatch.setattr(
            cache, "tokens", lambda n, c=cache, f=cache.tokens: (read.append((c.key, n)), f(n))[1]
        )
    for plan in itertools.islice(batches, 20):
        assert not read
        plan.rows([1])
        assert read == [(batches.caches[s].key, n) for s, n in plan.examples[1]]
        read.clear()


def test_every_example_is_whole_and_comes_once_an_epoch(folder):
    batches = make(folder, 1.0, window=20)
    size = len(batches.caches[0])
    seen = []
    while len(seen) < 3 * size + 20:
        for row in next(batches).examples:
            assert sum(batches.caches[s].lengths(np.array([n]))[0] for s, n in row) <= LENGTH
            seen += row
    # Packing changes the order only inside a window.
    draws = [mixture([size], [1.0], 0)[place] for place in range(3 * size)]
    epochs = [draws[start : start + size] for start in (0, size, 2 * size)]
    assert all(sorted(epoch) == [(0, n) for n in range(size)] for epoch in epochs)
    for start in range(0, 3 * size - 20, 20):
        assert sorted(seen[start : start + 20]) == sorted(draws[start : start + 20])


def test_arrays_hold_what_the_plan_says(folder):
    batches = make(folder)
    for plan in itertools.islice(batches, 20):
        batch = plan.rows()
        assert [array.dtype for array in batch] == [np.int32] * 3 + [np.float32]
        assert all(array.shape == (ROWS, LENGTH) for array in batch)
        assert (batch.segment_ids > 0).sum() == plan.tokens
        for row, examples in enumerate(plan.examples):
            start = 0
            for segment, (source, number) in enumerate(examples, 1):
                tokens = batches.caches[source].tokens(number)
                weights = batches.caches[source].weights(number)
                part = slice(start, start + len(tokens))
                assert (batch.segment_ids[row, part] == segment).all()
                np.testing.assert_array_equal(batch.tokens[row, part], tokens)
                np.testing.assert_array_equal(batch.targets[row, part], [*tokens[1:], -1])
                np.testing.assert_array_equal(batch.weights[row, part], [*weights[1:], 0])
                start = part.stop
            for array, padding in zip(batch, (0, 0, -1, 0), strict=True):
                assert (array[row, start:] == padding).all()


def test_targets_with_weight_spell_the_assistants_turns(folder):
    source = Source(str(folder / "chat.jsonl"), "chat")
    held = held_out(config_of(folder, source), TOKENIZER, MODEL, rows=ROWS, length=LENGTH)
    spelled = []
    for plan in held:
        batch = plan.rows()
        for row in range(ROWS):
            for segment in range(1, batch.segment_ids[row].max() + 1):
                at = (batch.segment_ids[row] == segment) & (batch.weights[row] > 0)
                spelled.append(TOKENIZER.decode(batch.targets[row][at]))
    turns = ["<think>" + "r" * n + f"</think>A{n}<|im_end|>" for n in range(30)]
    assert sorted(spelled) == sorted(turns)


def test_a_mixture_has_its_weights_in_every_stretch():
    draws = mixture([1000, 100, 10], [6, 3, 1], seed=0)
    for start in (0, 12_345):
        counts = np.bincount([draws[start + n].source for n in range(1000)], minlength=3)
        np.testing.assert_allclose(counts, [600, 300, 100], atol=2)


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 2**16 - 1, 2**16, 2**16 + 1])
def test_an_order_has_every_number_once(size):
    assert np.sort(permutation(size, 5)).tolist() == list(range(size))


def test_any_part_of_an_order_is_the_same_as_in_the_whole():
    whole = permutation(1000, 8, 2)
    np.testing.assert_array_equal(
        permute(np.array([999, 3, 3, 0]), 1000, 8, 2), whole[[999, 3, 3, 0]]
    )


@pytest.mark.parametrize("size", [1, 2, 5, 1000, 2**14 + 1])
def test_a_source_is_shuffled_as_a_whole_and_anew_each_epoch(size):
    draws = mixture([size, size], [1, 1], seed=3)
    drawn = [draws[place] for place in range(4 * size)]
    by_source = [[d.example for d in drawn if d.source == source] for source in range(2)]
    epochs = [part[start : start + size] for part in by_source for start in (0, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 5:
        assert len(set(map(tuple, epochs))) == 4
        moved = np.abs(np.array(epochs[0]) - np.arange(size)).mean()
        assert 0.25 < moved / size < 0.42  # a third, for a random order


def test_orders_never_change():
    """A run that goes on with another version of a library must see the same data."""
    assert permutation(8, 1, 2).tolist() == [6, 3, 4, 1, 5, 2, 7, 0]
    draws = mixture([70_000, 9], [2, 1], seed=7)
    expected = [(0, 62117), (0, 20606), (1, 3), (0, 43580), (0, 69073), (1, 4), (0, 39438)]
    assert [tuple(draws[n]) for n in range(7)] == expected


def test_windows_of_a_realistic_size_waste_little(folder):
    batches = make(folder, window=4096)
    for _ in range(30):
        next(batches)
    assert batches.efficiency >= 0.97
    counted = make(folder, window=4096)
    real = sum((plan.rows().segment_ids > 0).sum() for plan in itertools.islice(counted, 30))
    assert counted.efficiency == real / (30 * ROWS * LENGTH)


def test_a_state_of_other_data_is_refused(folder, tmp_path):
    state = make(folder).get_state()
    for name, other in [
        ("seed", make(folder, seed=1)),
        ("window", make(folder, window=25)),
        ("weights", make(folder, 1.0, 1.0, 1.5)),
        ("sources", make(folder, 1.0, 2.0)),
        ("length", make(folder, length=LENGTH - 1)),
    ]:
        with pytest.raises(DataError, match=f"does not belong.*{name}"):
            other.set_state(state)
    with pytest.raises(DataError, match="does not belong"):
        make(folder).set_state({})
    with pytest.raises(DataError, match="no place"):
        make(folder).set_state({**state, "next_row": -1})


def test_held_out_examples_come_once_and_count_their_bytes(folder):
    config = config_of(folder, Source(str(folder / "b.jsonl"), weight=9.0), window=3)
    held = held_out(config, TOKENIZER, MODEL, rows=ROWS, length=LENGTH)
    lines = (folder / "b.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert held.bytes == sum(len(text.encode()) for text in texts)
    assert held.tokens == sum(len(TOKENIZER.encode(text)) + 2 for text in texts)
    drawn = [example for plan in held for row in plan.examples for example in row]
    assert sorted(drawn) == [(0, n) for n in range(17)]
    assert all(plan.rows().tokens.shape == (ROWS, LENGTH) for plan in held)
    again = held_out(config, TOKENIZER, MODEL, rows=ROWS, length=LENGTH)
    assert [plan.examples for plan in again] == [plan.examples for plan in held]
    few = held_out(config, TOKENIZER, MODEL, rows=ROWS, length=LENGTH, examples=5)
    assert sum(len(row) for plan in few for row in plan.examples) == 5


def test_statistics_name_what_became_of_each_source(folder):
    statistics = make(folder, length=64).statistics()
    chat = statistics[str(folder / "chat.jsonl")]
    assert chat["records"] == 30 and chat["bad"] == 0 and sum(chat["trimming"].values()) == 30


def test_without_sources_or_rows_there_are_no_batches(folder):
    with pytest.raises(ConfigError, match="sources is empty"):
        Batches(config_of(folder), TOKENIZER, MODEL, rows=1, length=8)
    with pytest.raises(ConfigError, match="at least 1 row"):
        make(folder, rows=0)
