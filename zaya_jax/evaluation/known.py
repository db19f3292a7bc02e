"""What is known of the released weights, so that a checkpoint of them can be told to be right."""

import dataclasses

import numpy as np

from zaya_jax.loading import load

RELEASED = "Zyphra/ZAYA1-8B"


@dataclasses.dataclass(frozen=True)
class Known:
    """Tokens and what the model makes of them.

    Attributes:
      tokens: of a prompt.
      argmax: the most probable token after each of them.
      logits: float [3, 3], the last three of the vocabulary at the last three positions.
      greedy: the tokens that follow.
    """

    tokens: tuple[int, ...]
    argmax: tuple[int, ...]
    logits: tuple[tuple[float, ...], ...]
    greedy: tuple[int, ...]


# Of Zyphra/ZAYA1-8B in bfloat16, as transformers tests it.
ZAYA1_8B = Known(
    tokens=(2, 9259, 236888, 2088, 740, 564, 6361, 611, 3124, 236881, 106),
    argmax=(105, 9731, 107, 740, 564, 1601, 611, 236881, 236881, 107, 107),
    logits=((0.3613, 0.3633, 0.3633), (-1.3672,) * 3, (-2.8750,) * 3),
    greedy=(
        *(107, 262146, 108, 9259, 236888, 2088, 740, 564),
        *(6361, 611, 3124, 236881, 108, 236769, 10282, 236787),
    ),
)
TOLERANCE = 0.05  # of a logit in bfloat16


def is_released(path_or_hub_id: str) -> bool:
    """Whether the name is that of the weights of which outputs are known."""
    return path_or_hub_id == RELEASED


def check_known_outputs(path_or_hub_id: str, known: Known = ZAYA1_8B) -> list[str]:
    """Runs a checkpoint on the known tokens; a line for each thing that is not as it should be.

    Raises:
      CheckpointError, ConfigError: it cannot be loaded.
      InputError: its vocabulary is smaller.
    """
    model = load(path_or_hub_id, layout="decoding")
    logits = np.asarray(model.logits([known.tokens]))[0]
    problems = []
    best = tuple(map(int, logits.argmax(axis=-1)))
    if best != known.argmax:
        problems.append(f"most probable tokens are {best}, known are {known.argmax}")
    corner = logits[-3:, -3:]
    if (gap := float(np.abs(corner - np.array(known.logits)).max())) > TOLERANCE:
        problems.append(f"logits differ from the known ones by up to {gap:.3g}")
    (result,) = model.generate([list(known.tokens)], len(known.greedy), temperature=0)
    if (tokens := tuple(map(int, result.tokens))) != known.greedy:
        problems.append(f"greedy continuation is {tokens}, known is {known.greedy}")
    return problems
