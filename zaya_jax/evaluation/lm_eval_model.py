"""ZAYA as a model of lm-eval (EleutherAI's lm-evaluation-harness): `--model zaya`.

It does with text what lm-eval's `hf` model does, so that both agree on the same weights: what is
put in front of a text, where context and continuation part, and what is cut off one that is too
long. Only lm-eval imports this module.
"""

import dataclasses
import inspect
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import tokenizers
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from zaya_jax.errors import InputError, ZayaError
from zaya_jax.evaluation.scoring import iterate_scores
from zaya_jax.generation.engine import BATCH
from zaya_jax.generation.sampling import Sampling
from zaya_jax.loading import NANO, load
from zaya_jax.text.tokenizer import SETTINGS, TOKENIZER

log = logging.getLogger("lm_eval.zaya")  # below lm-eval's own, which has a handler

MAX_GEN_TOKS = 256  # of tasks that name no number, as for lm-eval's own models
ROUNDS = 8  # batches' worth of prompts between two updates of the progress bar
SAMPLING = ("top_p", "top_k", "min_p", "seed")  # that a task may set, beside the temperature
CONTINUED = "<|the final message goes on here|>"


class Plan(NamedTuple):
    """What to generate for one request."""

    prompt: list[int]
    sampling: Sampling
    until: list[str]  # strings before which the text is cut


class ZayaLM(TemplateLM):
    """A checkpoint behind lm-eval's interface.

    Args (lm-eval's `model_args`):
      pretrained: checkpoint folder or Hugging Face hub id; by default the embedded nano model.
      dtype: of the parameters, float32, bfloat16 or float16; by default that of the checkpoint.
      batch_size: rows at once. "auto" scores as many as make up 4096 tokens, and generates for 16.
        lm-eval's command line asks for 1 unless told otherwise (`--batch_size auto`).
      max_batch_size: rows at once in place of those of "auto".
      max_length: tokens that the model sees at once; by default, and at most, its context.
      add_bos_token: whether a text begins with the beginning-of-sequence token, if it does not
        begin with it anyway; by default as the checkpoint's tokenizer says (nano's adds none).
      enable_thinking: of chat prompts; False asks for answers without reasoning.
      think_end_token: text that ends reasoning, like </think>. What was generated up to the last
        of it is left out, and only behind it do a task's stop strings count.
      device: without effect; lm-eval's command line always names one. JAX_PLATFORMS chooses.

    Raises:
      ZayaError: an argument that is unknown or out of range, a checkpoint that cannot be read, or
        one without tokenizer.
    """

    # `tokenizer` stays None: lm-eval expects one of transformers there.

    def __init__(
        self,
        pretrained: str | os.PathLike[str] = NANO,
        dtype: str | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | None = None,
        device: str | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            known = [name for name in inspect.signature(ZayaLM).parameters if name != "unknown"]
            raise InputError(f"unknown model argument {min(unknown)!r}: one of {', '.join(known)}")
        rows = max_batch_size if str(batch_size).partition(":")[0] == "auto" else batch_size
        if rows is not None and (not str(rows).isdecimal() or int(rows) < 1):
            raise InputError(f"batch_size must be a number of rows from 1 on, got {rows!r}")
        self._rows = None if rows is None else int(rows)
        self._model = load(pretrained, None if dtype == "auto" else dtype, layout="decoding")
        self._config = self._model.config
        if self._model.tokenizer is None:
            raise InputError(f"{pretrained}: has no {TOKENIZER}, which lm-eval needs")
        self._text = self._model.tokenizer
        context = self._config.max_position_embeddings
        self.max_length = context if max_length is None else max_length
        if not isinstance(self.max_length, int) or not 1 <= self.max_length <= context:
            raise InputError(f"max_length must be in 1 .. {context}, the context: {max_length!r}")
        self._adds_bos = self._file_adds_bos() if add_bos_token is None else add_bos_token
        if self._adds_bos and self._config.bos_token_id is None:
            raise InputError(f"add_bos_token: {pretrained} names no bos_token_id")
        self._enable_thinking, self._think_end = enable_thinking, think_end_token

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "ZayaLM":
        """A model from `model_args`, which win over what else lm-eval was told: its command line
        always names a batch size."""
        given = {k: v for k, v in (additional_config or {}).items() if v is not None}
        return cls(**{**given, **arg_dict})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "ZayaLM":
        """The same from arguments written like dtype=float32,max_length=512."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        return self._config.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a continuation that has no context."""
        bos = self._config.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Told apart by it: the requests that lm-eval caches, chat prompts included."""
        return f"zaya-{self._text.fingerprint[:16]}-thinking-{self._thinks}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; where nothing else is said, with a beginning-of-sequence token if texts get
        one and this has none."""
        tokens = self._text.encode(string)
        if add_special_tokens is None:
            prefix = self._text.decode([self.prefix_token_id])
            add_special_tokens = self._adds_bos and not string.startswith(prefix)
        return [self.prefix_token_id, *tokens] if add_special_tokens else tokens

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The checkpoint's only template, whatever its name."""
        return self._text.template.source if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation, up to where the answer begins, or up to the end of the last
        message, which the model is to go on with."""
        *before, last = chat_history
        if not add_generation_prompt:
            last = {**last, "content": last["content"] + CONTINUED}
        prompt = self._text.template.render(
            [*before, last],
            enable_thinking=self._thinks,
            add_generation_prompt=add_generation_prompt,
        )
        return prompt if add_generation_prompt else prompt[: prompt.rindex(CONTINUED)]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the continuation's log-probability, and whether it is
        what greedy decoding gives. A context too long is cut on the left."""
        if self._enable_thinking:
            raise InputError("enable_thinking=True has no meaning where given answers are scored")
        for number, request in enumerate(requests):
            if not request.args[1]:
                raise InputError(f"request {number} has an empty continuation")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each whole text, in windows of `max_length` where it is longer, in
        each of which the last token of the one before is the first."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            found = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            for window in map(make_disjoint_window, found):
                windows.append((None, *window))
                owners.append(number)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for number, (logprob, _) in zip(owners, scores, strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [self._fit(*request) for request in requests]
        found: dict[int, tuple[float, bool]] = {}
        cut = sum(
            len(pair[0]) < len(request[1]) for pair, request in zip(pairs, requests, strict=True)
        )
        self._warn_of_cut(cut, len(pairs))
        bar = tqdm(total=len(pairs), desc="Scoring", disable=disable_tqdm)
        for number, scores in iterate_scores(self._model, pairs, self._rows):
            found[number] = scores.total, scores.greedy
            if (text := requests[number][0]) is not None:  # None is a window of a longer text
                self.cache_hook.add_partial("loglikelihood", text, found[number])
            bar.update()
        bar.close()
        return [found[number] for number in range(len(pairs))]

    def _fit(
        self, text: Any, context: list[int], continuation: list[int]
    ) -> tuple[list[int], list[int]]:
        """Context and continuation, without what is too much on the left: the model reads all
        tokens but the last."""
        if not continuation:
            raise InputError(f"the continuation adds no token to its context: {text!r:.80}")
        if len(continuation) > self.max_length:
            raise InputError(
                f"a continuation of {len(continuation)} tokens is longer than max_length "
                f"{self.max_length}: {text!r:.80}"
            )
        excess = len(context) + len(continuation) - (self.max_length + 1)
        return context[max(excess, 0) :], continuation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each context greedily, or as the task says, up to one of its stop strings, the
        end of the turn, or `max_gen_toks` tokens. A context that leaves no room for those is cut on
        the left."""
        encoded = [self.tok_encode(request.args[0]) for request in requests]
        plans = [
            self._plan(tokens or [self.prefix_token_id], request.args[1])
            for tokens, request in zip(encoded, requests, strict=True)
        ]
        cut = sum(len(plan.prompt) < len(row) for plan, row in zip(plans, encoded, strict=True))
        self._warn_of_cut(cut, len(plans))
        _number_samples(plans)
        order = sorted(range(len(plans)), key=lambda number: -len(plans[number].prompt))
        texts = [""] * len(plans)
        rows = self._rows or BATCH
        bar = tqdm(total=len(plans), desc="Generating", disable=disable_tqdm)
        for part in itertools.batched(order, ROUNDS * rows):
            results = self._model.engine.run(
                [plans[number].prompt for number in part],
                [plans[number].sampling for number in part],
                batch_size=rows,
            )
            for number, result in zip(part, results, strict=True):
                if result.error is not None:
                    raise ZayaError(result.error)
                texts[number] = postprocess_generated_text(
                    result.text or "", plans[number].until, self._think_end
                )
                args = requests[number].args
                self.cache_hook.add_partial("generate_until", args, texts[number])
                bar.update()
        bar.close()
        return texts

    def _plan(self, tokens: list[int], settings: dict[str, Any]) -> Plan:
        """What a task's `generation_kwargs` ask for."""
        if not isinstance(settings, dict):
            raise InputError(f"generation_kwargs must be settings by name, got {settings!r:.80}")
        known: dict[str, Any] = dict(normalize_gen_kwargs(settings, MAX_GEN_TOKS))
        until = [text for text in known.pop("until") or [] if text]
        count = known.pop("max_gen_toks")
        temperature = known.pop("temperature", 0.0) if known.pop("do_sample") else 0.0
        if known.pop("num_beams", 1) != 1:
            raise InputError("num_beams must be 1: there is no beam search")
        if strange := known.keys() - set(SAMPLING):
            raise InputError(f"unknown generation setting {min(strange)!r}")
        if not 0 < count < self.max_length:
            raise InputError(f"max_gen_toks {count} must be in 1 .. {self.max_length - 1}")
        sampling = Sampling(
            max_new_tokens=count,
            temperature=float(temperature),
            stop=() if self._think_end else tuple(until),
            **{"top_p": 1.0, **known},
        )
        return Plan(tokens[-(self.max_length - count) :], sampling, until)

    @property
    def _thinks(self) -> bool:
        return self._enable_thinking is not False

    def _file_adds_bos(self) -> bool:
        """What transformers makes of the tokenizer's files."""
        settings = json.loads(self._text.files.get(SETTINGS, b"{}"))
        if (said := settings.get("add_bos_token")) is not None:
            return bool(said)
        core = tokenizers.Tokenizer.from_str(self._text.files[TOKENIZER].decode())
        return core.encode("").ids[:1] == [self._config.bos_token_id]

    def _warn_of_cut(self, cut: int, count: int) -> None:
        if cut:
            log.warning(
                "%d of %d contexts were cut on the left to fit %d tokens",
                cut,
                count,
                self.max_length,
            )


def _number_samples(plans: list[Plan]) -> None:
    """Gives equal prompts different seeds, in place, so that each draws its own sample in whichever
    batch it comes."""
    seen: Counter[tuple[int, ...]] = Counter()
    for number, plan in enumerate(plans):
        prompt = tuple(plan.prompt)
        seed = plan.sampling.seed + seen[prompt]
        plans[number] = plan._replace(sampling=dataclasses.replace(plan.sampling, seed=seed))
        seen[prompt] += 1
