"""One prompt on its way to a `Generation`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np

from zaya_jax.config import ZayaConfig
from zaya_jax.generation.batching import bucket
from zaya_jax.generation.sampling import Sampling
from zaya_jax.generation.step import NAN
from zaya_jax.state import DecodeState
from zaya_jax.text.chat import Answer, split_thinking
from zaya_jax.text.tokenizer import Tokenizer

Finish = Literal["stop", "length", "context", "nan", "interrupted"]
OnText = Callable[[int, str], None]


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Tokens of one row that the model has read; a prompt that begins with them goes on from
    there."""

    tokens: list[int]
    state: DecodeState  # of one row
    last_logits: jax.Array  # float32 [1, V]
    experts: list[np.ndarray]  # uint8 [L] of each token


def fitted(prefix: Prefix) -> Prefix:
    """The prefix without room for further tokens, which can be most of its memory."""
    state = prefix.state.resize(bucket(len(prefix.tokens), 64))
    return dataclasses.replace(prefix, state=state)


@dataclasses.dataclass
class Generation:
    """The continuation of one prompt.

    Attributes:
      text: without the token or string that stopped it; None where there is no tokenizer.
      tokens: everything sampled, the stop token included; those after a stop string are cut.
      logprobs: of each token under the temperature, among all tokens.
      sampled_logprobs: the same among the tokens that top-k, top-p and min-p kept.
      experts: uint8 [forwarded, layers], the expert of each forwarded token: the prompt's, and all
        sampled ones but the last. The skip class is number E.
      finish_reason: "stop" (a stop token or string), "length" (max_new_tokens), "context" (no room
        left), "nan" (the model's next logits hold NaN) or "interrupted".
      error: what went wrong where finish_reason is "nan", else None.
      end: where it ended, to go on from, if the engine was asked to keep it. None also where a stop
        string cut the tokens behind which the state stands.
      prompt_read: tokens of the prompt that were read for this one; the others had been read for
        requests that begin like it.
    """

    text: str | None
    tokens: list[int]
    logprobs: list[float]
    sampled_logprobs: list[float]
    experts: np.ndarray
    finish_reason: Finish
    error: str | None = None
    end: Prefix | None = dataclasses.field(default=None, repr=False)
    prompt_read: int = 0

    @property
    def answer(self) -> Answer:
        """The text, split into reasoning and answer."""
        return split_thinking(self.text or "")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during generation; `results` holds what every prompt had got until then."""

    def __init__(self, results: list[Generation]):
        super().__init__("generation was interrupted")
        self.results = results


class Row:
    """What one prompt has produced so far, and whether it is done.

    `number` is its place among the prompts; `request_id` counts earlier ones with the same prompt
    and seed, and is all that tells their random numbers apart.
    """

    def __init__(
        self,
        number: int,
        request_id: int,
        prompt: list[int],
        config: ZayaConfig,
        sampling: Sampling,
        tokenizer: Tokenizer | None,
    ):
        self.number, self.request_id = number, request_id
        self.prompt, self.sampling = prompt, sampling
        self.budget = min(sampling.max_new_tokens, config.max_position_embeddings - len(prompt))
        self.cut_short = self.budget < sampling.max_new_tokens
        self.stop_tokens = {*config.eos_token_ids, *sampling.stop_tokens}
        self.text = None if tokenizer is None else tokenizer.stream(sampling.stop)
        self.ends: tuple[int, ...] = (len(prompt),)  # of the prompt's parts
        self.read = 0  # tokens of the prompt that were read for it
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.sampled_logprobs: list[float] = []
        self.experts: list[np.ndarray] = []
        self.finish: Finish | None = None
        self.error: str | None = None
        self.end: Prefix | None = None

    def extend(self, part: tuple[np.ndarray, ...], remaining: int, on_text: OnText | None) -> None:
        """Takes the row's part of a block: tokens, both log-probabilities, and experts."""
        for token, *values in zip(*part, strict=True):
            if self.finish is not None or token < 0:
                if token == NAN:
                    self._break_off()
                break
            self._add(int(token), *values)
        if self.finish is None and remaining == 0:
            self.finish = "context" if self.cut_short else "length"
        self._give_text(on_text)

    @property
    def remaining(self) -> int:
        """Tokens it may still sample."""
        return self.budget - len(self.tokens)

    def start(self, experts: Sequence[np.ndarray]) -> None:
        """Takes the experts of its prompt's tokens; that is all where no tokens are asked for."""
        self.experts = list(experts)
        if self.remaining == 0:
            self.finish = "length"

    def keep(self, slot: int, state: DecodeState, last_logits: jax.Array) -> None:
        """Remembers the state of its slot, if that is the state behind its last forwarded token."""
        forwarded = [*self.prompt, *self.tokens[:-1]]
        if int(state.lengths[slot]) == len(forwarded):
            logits = last_logits[slot : slot + 1]
            experts = self.experts[: len(forwarded)]
            self.end = Prefix(forwarded, state.select([slot]), logits, experts)

    def result(self) -> Generation:
        """The row as it stands."""
        return Generation(
            None if self.text is None else self.text.text,
            self.tokens,
            self.logprobs,
            self.sampled_logprobs,
            np.array(self.experts, np.uint8)[: len(self.prompt) + max(len(self.tokens) - 1, 0)],
            self.finish or "interrupted",
            self.error,
            self.end,
            self.read,
        )

    def _add(self, token: int, logprob: float, sampled_logprob: float, experts: np.ndarray) -> None:
        self.tokens.append(token)
        self.logprobs.append(float(logprob))
        self.sampled_logprobs.append(float(sampled_logprob))
        self.experts.append(experts)
        if token in self.stop_tokens or (self.text is not None and self.text.add(token)):
            self.finish = "stop"

    def _break_off(self) -> None:
        position = len(self.prompt) + len(self.tokens)
        self.error = f"prompt {self.number}: the logits for position {position} hold NaN"
        self.finish = "nan"

    def _give_text(self, on_text: OnText | None) -> None:
        if self.text is not None:
            piece = self.text.take(final=self.finish is not None)
            if piece and on_text is not None:
                on_text(self.number, piece)
