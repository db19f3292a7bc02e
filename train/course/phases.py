"""What the phases of the course are: lengths, rates, steps and mixtures, as data."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Phase:
    """Settings of one phase; each starts from the weights of the one before.

    Attributes:
      context: tokens of a row.
      rows: in a batch; rows x context is 2,048 throughout, as at this size steps are worth more
        than tokens.
      steps: of the optimizer.
      rope_base: of the rotary embedding; it grows with the context.
      peak_rate, end_rate: of the optimizer, in a cosine.
      mixture: shares of the phases' files among the examples; earlier ones are replayed.
        Midtraining's are about four times as long as the others.
      documents: written into the phase's own file, about as many as its steps need.
    """

    context: int
    rows: int
    steps: int
    rope_base: float
    peak_rate: float
    end_rate: float
    mixture: Mapping[str, float]
    documents: int


PHASES = {
    "pretrain": Phase(256, 8, 1500, 1e4, 1e-2, 4e-3, {"pretrain": 1.0}, 30_000),
    "midtrain": Phase(1024, 2, 400, 1e5, 5e-3, 4e-3, {"midtrain": 0.6, "pretrain": 0.4}, 3_000),
    "sft": Phase(512, 4, 1700, 1e5, 5e-3, 0.0, {"sft": 1.0}, 30_000),
    # Its documents are made of what the model answers after the phase before.
    "aggregation": Phase(512, 4, 3300, 1e5, 3e-3, 0.0, {"aggregation": 0.65, "sft": 0.35}, 27_000),
}
HELD_OUT_DOCUMENTS = 400  # of each phase, for perplexity
