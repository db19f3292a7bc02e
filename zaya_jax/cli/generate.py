"""`zaya generate`: answers questions, streaming."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Literal

import tyro
from rich.text import Text

from zaya_jax.cli.output import (
    check_destination,
    console,
    load_model,
    messages,
    streaming,
    working,
    write_json,
)
from zaya_jax.errors import InputError
from zaya_jax.generation.rows import Generation, OnText
from zaya_jax.generation.sampling import Sampling
from zaya_jax.zaya import Zaya


@dataclasses.dataclass
class Generate:
    """Answer questions with a model (by default the embedded one)."""

    prompts: tyro.conf.Positional[tuple[str, ...]]
    """Questions; several are answered together. "-" reads one from standard input."""
    model: str | None = None
    """Checkpoint folder or Hugging Face hub id."""
    raw: bool = False
    """Continue the text as it stands instead of answering it as a chat message."""
    no_thinking: bool = False
    """Ask for an answer without reasoning."""
    max_new_tokens: int = 512
    """Longest answer, reasoning included."""
    temperature: float = 1.0
    """0 takes the most probable token."""
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A string that ends the answer; may be given several times."""
    stop_tokens: tyro.conf.UseAppendAction[tuple[int, ...]] = ()
    """A token id that ends the answer, as those of the model's config do."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the parameters; by default that of the checkpoint."""
    mesh: str | None = None
    """Devices to spread over, like data=2,expert=4: rows over data, experts over expert."""
    json: Path | None = None
    """Also write answers, tokens and log-probabilities to this file."""

    def run(self) -> None:
        check_destination(self.json)
        sampling = self._sampling()
        prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in self.prompts]
        if not prompts:
            raise InputError('give a prompt, as in: zaya generate "What is 12 + 34?"')
        model = load_model(self.model, self.dtype, self.mesh)
        start = time.perf_counter()
        results = self._answer(model, prompts, sampling)
        seconds = time.perf_counter() - start
        tokens = sum(len(result.tokens) for result in results)
        messages.print(
            f"{tokens} tokens in {seconds:.1f} s, compilation included "
            f"({tokens / seconds:.1f} tokens/s)",
            style="dim",
            highlight=False,
        )
        rows = [_as_json(prompt, result) for prompt, result in zip(prompts, results, strict=True)]
        write_json(self.json, rows)

    def _sampling(self) -> Sampling:
        names = [field.name for field in dataclasses.fields(Sampling)]
        return Sampling(**{name: getattr(self, name) for name in names})

    def _answer(self, model: Zaya, prompts: list[str], sampling: Sampling) -> list[Generation]:
        """Generates, printing a single answer as it comes and several when all are there."""

        def generate(on_text: OnText | None) -> list[Generation]:
            return model.generate(
                prompts if self.raw else [[{"role": "user", "content": p}] for p in prompts],
                **vars(sampling),
                enable_thinking=not self.no_thinking,
                on_text=on_text,
            )

        if len(prompts) == 1:
            with streaming("Generating") as on_text:
                return generate(on_text)
        with working("Generating"):
            results = generate(None)
        for prompt, result in zip(prompts, results, strict=True):
            console.rule(Text(prompt.strip().partition("\n")[0]), align="left")
            console.file.write(f"{result.text}\n")
        return results


def _as_json(prompt: str, result: Generation) -> dict[str, object]:
    return {
        "prompt": prompt,
        "text": result.text,
        "thinking": result.answer.thinking,
        "answer": result.answer.text,
        "tokens": result.tokens,
        "logprobs": result.logprobs,
        "sampled_logprobs": result.sampled_logprobs,
        "experts": result.experts.tolist(),
        "finish_reason": result.finish_reason,
    }
