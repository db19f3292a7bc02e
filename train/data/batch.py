"""What a training step is given."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """Packed rows; all arrays [B, S].

    Attributes:
      tokens: int32.
      segment_ids: int32; 1, 2, .. along a row, 0 for padding.
      targets: int32, the next token of the same segment; -1 where there is none.
      weights: float32, each target's weight in the loss; 0 for those that are only context.
    """

    tokens: Any
    segment_ids: Any
    targets: Any
    weights: Any
