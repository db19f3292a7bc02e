"""Packed batches whose segments begin and end everywhere around the boundaries of shards."""

import numpy as np

from train.data.batch import Batch


def packed_batch(rows: int, length: int, vocab: int = 64) -> Batch:
    """Rows of random segments, among them one of a single segment, one of padding alone, one of
    one-token segments, and some that begin at the middle and one or two tokens around it."""
    rng = np.random.default_rng(0)
    middle = length // 2
    chosen = [
        [length],
        [],
        [1] * (length - 3),
        [middle, 10],
        [middle + 1, length - middle - 1],
        [middle + 2, 3, 1, 1],
        [middle - 1, 2, 5],
        [5, 1, 6, 6, 7, length - 30],
    ]
    tokens = rng.integers(3, vocab, (rows, length)).astype(np.int32)
    segment_ids = np.zeros((rows, length), np.int32)
    for row in range(rows):
        lengths = chosen[row] if row < len(chosen) else rng.integers(1, length // 3, 12)
        ids = np.repeat(np.arange(len(lengths)) + 1, lengths)[: length - row // 3]
        segment_ids[row, : len(ids)] = ids
    tokens[segment_ids == 0] = 0
    following = segment_ids[:, 1:] == segment_ids[:, :-1]
    targets = np.full((rows, length), -1, np.int32)
    targets[:, :-1] = np.where(following & (segment_ids[:, 1:] > 0), tokens[:, 1:], -1)
    weights = rng.choice([0.0, 0.5, 1.0], (rows, length)).astype(np.float32)
    return Batch(tokens, segment_ids, targets, weights)
