"""The handle a notebook holds: parameters, config and tokenizer, and what one does with them."""

import dataclasses
import os
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from convert.checkpoint import Layout
from zaya_jax.config import ZayaConfig
from zaya_jax.errors import InputError
from zaya_jax.generation.engine import Engine
from zaya_jax.generation.rows import Generation, OnText
from zaya_jax.generation.sampling import Sampling
from zaya_jax.model import Params, forward, head
from zaya_jax.reasoning.markovian_rsa import OnRound, markovian_rsa
from zaya_jax.reasoning.settings import Settings, fitting_preset, preset
from zaya_jax.reasoning.solution import Solution, Verifier
from zaya_jax.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Zaya:
    """A loaded model. `params` and `config` are all that `zaya_jax.forward` needs; the methods are
    conveniences."""

    params: Params
    config: ZayaConfig
    tokenizer: Tokenizer | None = None
    mesh: Mesh | None = None

    @cached_property
    def engine(self) -> Engine:
        """What generates; its programs are compiled when they are first needed."""
        return Engine(self.params, self.config, self.tokenizer, self.mesh)

    def logits(self, tokens: Any, lengths: Any = None, segment_ids: Any = None) -> jax.Array:
        """Next-token logits at every position: int [B, S] -> float32 [B, S, V].

        Args:
          tokens: token ids, right-padded where rows differ in length.
          lengths: int [B], real tokens of each row; logits behind them are undefined.
          segment_ids: int [B, S] of packed rows, 0 for padding; exclusive with `lengths`.

        Raises:
          InputError: shapes that do not fit, or tokens outside the vocabulary.
        """
        tokens = _integers("tokens", tokens)
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise InputError(f"tokens must be [B, S] and not empty, got {list(tokens.shape)}")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise InputError(f"tokens must lie in 0 .. {self.config.vocab_size - 1}")
        if lengths is not None:
            lengths = _lengths(lengths, tokens.shape)
        longest = self.config.max_position_embeddings
        if segment_ids is None and tokens.shape[1] > longest:
            raise InputError(f"tokens has rows of {tokens.shape[1]}, the context is {longest}")
        if segment_ids is not None:
            if lengths is not None:
                raise InputError("lengths and segment_ids exclude each other")
            segment_ids = _segments(segment_ids, tokens.shape)
        return _logits(self.params, self.config, tokens, lengths, segment_ids)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 0.95,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] = (),
        stop_tokens: Sequence[int] = (),
        *,
        enable_thinking: bool = True,
        tools: Sequence[dict[str, Any]] = (),
        on_text: OnText | None = None,
        batch_size: int | None = None,
    ) -> list[Generation]:
        """Continues each prompt.

        Args:
          prompts: a list of prompts (or one): text, which is encoded as it stands, token ids, or a
            conversation (a list of {"role", "content"}), which is rendered with the chat template.
            A prompt that occurs several times gets different samples.
          max_new_tokens, temperature, top_p, top_k, min_p, stop, stop_tokens: see `Sampling`.
          seed: of all prompts, or one for each.
          enable_thinking: for conversations; False asks for an answer without reasoning.
          tools: for conversations; functions that the model may call, as JSON schemas.
          on_text: called with a prompt's number and each new piece of its text.
          batch_size: rows decoded at once; by default as many as there are prompts, at most 16.

        Raises:
          InputError: prompts or settings that no model could run.
          Interrupted: on Ctrl-C, with the results so far.
        """
        seeds = [seed] if isinstance(seed, int) else list(seed)
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            stop=stop,
            stop_tokens=stop_tokens,
        )
        if self.tokenizer is None and (sampling.stop or on_text is not None):
            raise InputError(
                "this checkpoint has no tokenizer, so no stop strings and no streamed text"
            )
        rows = [self._encode(prompt, enable_thinking, tools) for prompt in _as_list(prompts)]
        if isinstance(seed, int):
            seeds = seeds * len(rows)
        each = [dataclasses.replace(sampling, seed=one) for one in seeds]
        return self.engine.run(rows, each, on_text, batch_size=batch_size)

    def markovian_rsa(
        self,
        question: str,
        settings: Settings | str | None = None,
        *,
        seed: int = 0,
        verifier: Verifier | None = None,
        template: Path | str | None = None,
        folder: Path | str | None = None,
        batch_size: int | None = None,
        share: bool = True,
        on_text: OnText | None = None,
        on_round: OnRound | None = None,
        **changes: Any,
    ) -> Solution:
        """Answers a question in rounds of candidates (Markovian RSA, arXiv 2605.05365).

        Args:
          question: as a user would ask it.
          settings: `Settings`, or the name of one of `PRESETS`; by default "recommended", or "nano"
            where the context is too short for that.
          verifier: scores an answer, 1 for a correct one; the model does not see it.
          seed, template, folder, batch_size, share, on_text, on_round: see
            `reasoning.markovian_rsa`.
          **changes: settings that differ: N, C, T, beta, tau, final_budget, temperature, top_p.

        Raises:
          InputError: an empty question, or settings that do not fit the context.
          Interrupted: on Ctrl-C; complete rounds are in `folder`.
        """
        if settings is None:
            settings = fitting_preset(self.config.max_position_embeddings)
        if isinstance(settings, str):
            settings = preset(settings)
        if unknown := sorted(set(changes) - set(vars(settings))):
            raise InputError(f"unknown setting {unknown[0]!r}: one of {', '.join(vars(settings))}")
        (solution,) = markovian_rsa(
            self.engine,
            [question],
            dataclasses.replace(settings, **changes),
            seed=seed,
            verifiers=None if verifier is None else [verifier],
            template=template,
            folder=folder,
            batch_size=batch_size,
            share=share,
            on_text=on_text,
            on_round=on_round,
        )
        return solution

    def warmup(
        self, batch_size: int = 1, prompt_tokens: int = 64, max_new_tokens: int = 256
    ) -> float:
        """Compiles ahead what such requests need; see `Engine.warmup`."""
        return self.engine.warmup(batch_size, prompt_tokens, max_new_tokens)

    def save(self, path: str | os.PathLike[str], layout: Layout = "hf") -> None:
        """Writes a folder that `load` reads: in the Hugging Face layout, which transformers reads
        too, "hf-legacy" or "orbax"."""
        from zaya_jax.loading import save

        save(self.params, self.config, path, self.tokenizer, layout)

    def _encode(
        self, prompt: Prompt, enable_thinking: bool, tools: Sequence[dict[str, Any]]
    ) -> Sequence[int]:
        """Token ids of text or of a conversation; ids are returned as they are."""
        conversation = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
        if not isinstance(prompt, str) and not conversation:
            return prompt  # type: ignore[return-value]
        if self.tokenizer is None:
            raise InputError("this checkpoint has no tokenizer: give prompts as token ids")
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode_chat(prompt, enable_thinking=enable_thinking, tools=tools)  # type: ignore[arg-type]


@partial(jax.jit, static_argnums=1)
def _logits(params, config, tokens, lengths, segment_ids):
    out = forward(params, config, tokens, new_lengths=lengths, segment_ids=segment_ids)
    return head(params, config, out.hidden)


def _as_list(prompts: Any) -> list[Any]:
    """One prompt or several, as several: a string, a row of ids and a conversation are one.

    Raises:
      InputError: something that is neither.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, np.ndarray | jax.Array):
        prompts = np.asarray(prompts).tolist()
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise InputError(f"prompts must be text, token ids or conversations, got {prompts!r:.60}")
    one = bool(prompts) and isinstance(prompts[0], int | np.integer | dict)
    return [list(prompts)] if one else list(prompts)


def _integers(name: str, values: Any) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.empty(0, object)
    if array.dtype.kind not in "iu":
        raise InputError(f"{name} must be an array of integers (pad rows of different lengths)")
    if array.size and (array.min() < -(2**31) or array.max() >= 2**31):
        raise InputError(f"{name} has values that do not fit 32 bits")
    return array.astype(np.int32)


def _lengths(lengths: Any, shape: tuple[int, ...]) -> np.ndarray:
    lengths = _integers("lengths", lengths)
    if lengths.shape != shape[:1] or lengths.min() < 0 or lengths.max() > shape[1]:
        raise InputError(f"lengths must be {shape[0]} numbers in 0 .. {shape[1]}")
    return lengths


def _segments(segment_ids: Any, shape: tuple[int, ...]) -> np.ndarray:
    ids = _integers("segment_ids", segment_ids)
    if ids.shape != shape or ids.min() < 0:
        raise InputError(f"segment_ids must be non-negative and {list(shape)}, like tokens")
    for number, row in enumerate(ids):
        runs = row[np.flatnonzero(np.diff(row, prepend=-1))]
        runs = runs[runs != 0]
        if len(runs) != len(set(runs.tolist())):
            raise InputError(f"segment_ids: row {number} uses an id for two separate segments")
    return ids
