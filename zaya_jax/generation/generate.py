"""Batched generation: a loop around the core that prefills in chunks and decodes in blocks."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from zaya_jax.config import ZayaConfig
from zaya_jax.generation.batching import MAX_CHUNK, bucket, check_tokens, pad_rows
from zaya_jax.generation.sampling import Request, Sampling
from zaya_jax.generation.step import Block, decode_block, prefill_chunk
from zaya_jax.model import Params, init_state
from zaya_jax.state import DecodeState
from zaya_jax.text.chat import Answer, split_thinking
from zaya_jax.text.tokenizer import Tokenizer

BLOCK = 8  # tokens decoded between two looks at the rows

Finish = Literal["stop", "length", "context"]
OnText = Callable[[int, str], None]


@dataclasses.dataclass
class Generation:
    """The continuation of one prompt.

    Attributes:
      text: without the token or string that stopped it; None where there is no tokenizer.
      tokens: everything sampled, the stop token included; those after a stop string are cut.
      logprobs: of each token under the temperature, among all tokens.
      sampled_logprobs: the same among the tokens that top-k, top-p and min-p kept.
      experts: uint8 [prompt + tokens - 1, layers], the expert of each forwarded token; the skip
        class is number E.
      finish_reason: "stop" (an end token or stop string), "length" (max_new_tokens), "context" (no
        room left).
    """

    text: str | None
    tokens: list[int]
    logprobs: list[float]
    sampled_logprobs: list[float]
    experts: np.ndarray
    finish_reason: Finish

    @property
    def answer(self) -> Answer:
        """The text, split into reasoning and answer."""
        return split_thinking(self.text or "")


def generate(
    params: Params,
    config: ZayaConfig,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    tokenizer: Tokenizer | None = None,
    on_text: OnText | None = None,
) -> list[Generation]:
    """Continues every prompt; a prompt's result depends on the seed and its place in the list, not
    on its neighbours.

    Args:
      params, config: the model.
      prompts: token ids.
      sampling: shared by all prompts.
      tokenizer: for text, stop strings and streaming.
      on_text: called with a prompt's number and each new piece of its text, whole characters only.

    Raises:
      InputError: an empty prompt, an unknown token, a prompt that fills the context, stop strings
        without tokenizer.
    """
    prompts = check_tokens(prompts, config)
    rows = [
        _Row(number, prompt, config, sampling, tokenizer) for number, prompt in enumerate(prompts)
    ]
    batch = bucket(len(rows))
    capacity = bucket(max(len(row.prompt) + row.budget for row in rows), 64)
    request = _request(rows, batch, config, sampling)
    state = init_state(params, config, batch, capacity)
    logits, state = _prefill(params, config, rows, batch, state)
    while any(row.finish is None for row in rows):
        block = decode_block(params, config, state, logits, request, BLOCK)
        state, logits, request = block.state, block.last_logits, block.request
        remaining = np.array(request.remaining)
        for row, new in zip(rows, _rows_of(block), strict=False):
            row.extend(new, int(remaining[row.number]), on_text)
            if row.finish is not None:
                remaining[row.number] = 0
        request = request._replace(remaining=jnp.asarray(remaining))
    return [row.result() for row in rows]


def _prefill(
    params: Params, config: ZayaConfig, rows: "list[_Row]", batch: int, state: DecodeState
) -> tuple[jnp.ndarray, DecodeState]:
    """Reads all prompts in chunks; the logits are those of each row's last prompt token."""
    longest = max(len(row.prompt) for row in rows)
    chunk = min(bucket(longest, 16), MAX_CHUNK)
    logits = jnp.zeros((batch, config.vocab_size))
    for start in range(0, longest, chunk):
        parts = [row.prompt[start : start + chunk] for row in rows] + [[]] * (batch - len(rows))
        tokens, new_lengths = pad_rows(parts, chunk, config.pad_token_id)
        out = prefill_chunk(params, config, tokens, new_lengths, state)
        state = out.state
        logits = jnp.where(new_lengths[:, None] > 0, out.last_logits, logits)
        experts = np.asarray(out.experts)
        for row, part in zip(rows, parts, strict=False):
            row.experts.extend(experts[row.number, : len(part)])
    return logits, state


def _request(rows: "list[_Row]", batch: int, config: ZayaConfig, sampling: Sampling) -> Request:
    def full(value: float, dtype: Any) -> jnp.ndarray:
        return jnp.full(batch, value, dtype)

    budgets = [row.budget for row in rows] + [0] * (batch - len(rows))
    return Request(
        jnp.arange(batch, dtype=jnp.int32),
        full(sampling.seed, jnp.uint32),
        full(sampling.temperature, jnp.float32),
        full(sampling.top_p, jnp.float32),
        full(sampling.top_k, jnp.int32),
        full(sampling.min_p, jnp.float32),
        jnp.tile(jnp.array(config.eos_token_ids, jnp.int32), (batch, 1)),
        jnp.array(budgets, jnp.int32),
    )


def _rows_of(block: Block) -> list[tuple[np.ndarray, ...]]:
    kinds = (block.tokens, block.logprobs, block.sampled_logprobs, block.experts)
    return list(zip(*(np.asarray(kind) for kind in kinds), strict=True))


class _Row:
    """One prompt on its way: what it has produced, and whether it is done."""

    def __init__(
        self,
        number: int,
        prompt: list[int],
        config: ZayaConfig,
        sampling: Sampling,
        tokenizer: Tokenizer | None,
    ):
        self.number, self.prompt = number, prompt
        self.budget = min(sampling.max_new_tokens, config.max_position_embeddings - len(prompt))
        self.cut_short = self.budget < sampling.max_new_tokens
        self.eos = config.eos_token_ids
        self.text = None if tokenizer is None else tokenizer.stream(sampling.stop)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.sampled_logprobs: list[float] = []
        self.experts: list[np.ndarray] = []
        self.finish: Finish | None = None

    def extend(self, new: tuple[np.ndarray, ...], remaining: int, on_text: OnText | None) -> None:
        """Takes the row's part of a block."""
        for token, logprob, sampled_logprob, experts in zip(*new, strict=True):
            if self.finish is not None or token < 0:
                break
            self.tokens.append(int(token))
            self.logprobs.append(float(logprob))
            self.sampled_logprobs.append(float(sampled_logprob))
            self.experts.append(experts)
            if token in self.eos or (self.text is not None and self.text.add(int(token))):
                self.finish = "stop"
        if self.finish is None and remaining == 0:
            self.finish = "context" if self.cut_short else "length"
        if self.text is not None:
            piece = self.text.take(final=self.finish is not None)
            if piece and on_text is not None:
                on_text(self.number, piece)

    def result(self) -> Generation:
        return Generation(
            None if self.text is None else self.text.text,
            self.tokens,
            self.logprobs,
            self.sampled_logprobs,
            np.stack(self.experts)[: len(self.prompt) + len(self.tokens) - 1],
            self.finish or "length",
        )
