"""What Markovian RSA returns: rounds of candidates, and the answer that most of the last ones
give."""

import dataclasses
from collections.abc import Callable
from statistics import fmean
from typing import Any

from zaya_jax.reasoning.answers import majority

Verifier = Callable[[str], float]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One response.

    Attributes:
      text: as generated, reasoning included.
      answer: the final answer in it, None where there is none.
      tokens: sampled, the stop token included.
      logprob: mean log-probability of a token under the temperature, in nats.
      finish_reason: see `Generation`.
      subset: candidates of the round before that it has seen, by number, in the prompt's order.
      tail: tokens of its reasoning that the next round may see; empty in the last round.
      prompt_tokens: of its prompt.
      read_tokens: of its prompt, those that were read for it; the others were shared.
      score: the verifier's, None without one.
    """

    text: str
    answer: str | None
    tokens: list[int]
    logprob: float
    finish_reason: str
    subset: list[int]
    tail: list[int]
    prompt_tokens: int
    read_tokens: int
    score: float | None = None


@dataclasses.dataclass(frozen=True)
class Round:
    """The candidates of one round, in order."""

    candidates: list[Candidate]

    @property
    def answer(self) -> str | None:
        """The answer of most candidates; see `answers.majority`."""
        answers = [c.answer for c in self.candidates]
        place = majority(answers, [c.logprob for c in self.candidates])
        return None if place is None else answers[place]

    @property
    def mean_correctness(self) -> float | None:
        """Mean score of the candidates, which is what the report states; None without verifier."""
        scores = [c.score for c in self.candidates if c.score is not None]
        return fmean(scores) if scores else None


@dataclasses.dataclass(frozen=True)
class Solution:
    """Everything that was thought about a question."""

    question: str
    rounds: list[Round]

    @property
    def answer(self) -> str | None:
        """That of the last round."""
        return self.rounds[-1].answer

    @property
    def mean_correctness(self) -> float | None:
        """That of the last round."""
        return self.rounds[-1].mean_correctness

    @property
    def generated_tokens(self) -> int:
        return sum(len(c.tokens) for c in self._candidates)

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, those of shared beginnings counted each time."""
        return sum(c.prompt_tokens for c in self._candidates)

    @property
    def read_tokens(self) -> int:
        """Of the prompts, those that the model really read."""
        return sum(c.read_tokens for c in self._candidates)

    @property
    def _candidates(self) -> list[Candidate]:
        return [candidate for round in self.rounds for candidate in round.candidates]

    def as_json(self) -> dict[str, Any]:
        """All of it, for a file."""
        return {
            "question": self.question,
            "answer": self.answer,
            "mean_correctness": self.mean_correctness,
            "generated_tokens": self.generated_tokens,
            "prompt_tokens": self.prompt_tokens,
            "read_tokens": self.read_tokens,
            "rounds": [
                {"mean_correctness": round.mean_correctness, **dataclasses.asdict(round)}
                for round in self.rounds
            ],
        }
