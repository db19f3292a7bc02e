"""How Markovian RSA is run: the report's settings, in its symbols (arXiv 2605.05365)."""

import dataclasses

from zaya_jax.errors import InputError
from zaya_jax.generation.sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of Markovian RSA; `PRESETS` has those of the report.

    T=0 is parallel sampling. With tau=beta, candidates are seen whole, as in recursive
    self-aggregation (RSA). With N=1 and C=1, one line of thought goes on from its own tail, as in
    the Markovian thinker (Delethink).

    Attributes:
      N: candidates in each round.
      C: candidates of the round before that a new one sees, chosen uniformly.
      T: rounds behind the first one.
      beta: tokens of a response, reasoning included.
      tau: tokens of reasoning that are seen of a candidate, its last ones.
      final_budget: tokens of a response of the last round.
      temperature, top_p: of sampling; the report uses 1 and 1.

    Raises:
      InputError: naming the setting at fault.
    """

    N: int = 16
    C: int = 4
    T: int = 2
    beta: int = 16_384
    tau: int = 4_096
    final_budget: int = 40_960
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name, least in {"N": 1, "C": 1, "T": 0, "beta": 1, "tau": 1, "final_budget": 1}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name} must be a whole number from {least} on, got {value!r}")
        if self.T and self.C > self.N:
            raise InputError(f"C={self.C} candidates cannot be chosen from N={self.N}")
        if self.T and self.tau > self.beta:
            raise InputError(
                f"a tail of tau={self.tau} tokens is longer than a response of beta={self.beta}"
            )
        Sampling(temperature=self.temperature, top_p=self.top_p)

    def budget(self, round: int) -> int:
        """Tokens of a response in that round, counted from 0."""
        return self.final_budget if round == self.T else self.beta


K = 1024
PRESETS = {
    "light": Settings(T=2, N=8, C=4, beta=8 * K, tau=4 * K),
    "recommended": Settings(T=2, N=16, C=4, beta=16 * K, tau=4 * K),
    "default": Settings(T=2, N=16, C=4, beta=40 * K, tau=4 * K),
    "high": Settings(T=8, N=16, C=4, beta=16 * K, tau=4 * K),
    "xhigh": Settings(T=8, N=32, C=4, beta=32 * K, tau=4 * K),
    # Not of the report: what fits the context of the embedded model, and what it was trained on.
    "nano": Settings(T=3, N=16, C=4, beta=256, tau=16, final_budget=256),
}


def preset(name: str) -> Settings:
    """The settings of that name. Raises InputError for an unknown one."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}: one of {', '.join(PRESETS)}")
    return PRESETS[name]


def fitting_preset(context: int) -> str:
    """The preset to take where none is named: what the authors recommend, or the embedded model's
    where the context is too short for that."""
    recommended = PRESETS["recommended"]
    fits = recommended.C * recommended.tau + recommended.final_budget < context
    return "recommended" if fits else "nano"
