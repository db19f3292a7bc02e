"""`zaya eval`: how well a model answers the problems of a task."""

import dataclasses
import hashlib
import json as json_format
import re
import time
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.table import Table

from zaya_jax.cli.output import (
    check_destination,
    console,
    load_model,
    messages,
    progress,
    working,
    write_json,
)
from zaya_jax.errors import InputError
from zaya_jax.evaluation.run import PRESETS, Settings, evaluate
from zaya_jax.evaluation.tasks import load_task
from zaya_jax.generation.engine import BATCH
from zaya_jax.generation.sampling import Sampling
from zaya_jax.reasoning import settings as rsa_settings
from zaya_jax.sandbox import protections
from zaya_jax.sandbox.probing import SENTENCES


@dataclasses.dataclass
class Eval:
    """Evaluate a model on a task; the same command again goes on where it was interrupted.

    Tasks: a .jsonl file (fields question and answer, perhaps checker, choices and id; the fields of
    AIME, GSM8K and GPQA are understood), reasoning-gym:DATASET, nano or nano:FAMILY (held-out
    problems of the embedded model), humaneval. Samples, results and settings are kept in a folder.
    """

    task: tyro.conf.Positional[str]
    model: str | None = None
    """Checkpoint folder or Hugging Face hub id; by default the embedded model."""
    problems: int | None = None
    """The first so many; by default all of them, 100 where there is no end."""
    samples: int | None = None
    """Of each problem, 1 by default. The authors take 64 for mathematics, 16 for code and GPQA."""
    preset: Literal["math", "code", "greedy"] | None = None
    """Sampling: temperature 1.0 and top-p 0.95 (math, the default), 0.6, 0.95 and top-k 20 (code,
    the default of humaneval), or the most probable token."""
    temperature: float | None = None
    """In place of the preset's, like the next two."""
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None
    """Longest response, reasoning included; by default what the context has room for, at most
    32,768."""
    rsa: str | None = None
    """Answer with Markovian RSA: default, recommended, light, high, xhigh or nano, perhaps with
    settings of its own, like light,N=16,beta=4096."""
    config: str = "{}"
    """Settings of a reasoning-gym dataset as JSON, like '{"max_terms": 3}'."""
    instruction: str | None = None
    """Behind each question, in place of the usual request to box the answer; "" for none."""
    allow_weak_sandbox: bool = False
    """Run humaneval also where this platform lacks protections that matter."""
    seed: int = 0
    batch_size: int | None = None
    """Responses generated at once: by default 16, and with RSA the candidates of one problem."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the parameters; by default that of the checkpoint."""
    mesh: str | None = None
    """Devices to spread over, like data=2,expert=4: rows over data, experts over expert."""
    out: Path | None = None
    """Folder of the evaluation; by default runs/eval-TASK- and a number made of the settings."""
    json: Path | None = None
    """Also write the results to this file."""

    def run(self) -> None:
        check_destination(self.json)
        settings = self._settings()
        with working("Reading the problems"):
            task = load_task(
                self.task,
                self.problems,
                config=self.config,
                instruction=self.instruction,
                allow_weak=self.allow_weak_sandbox,
            )
        if self.task == "humaneval":
            _show_protections()
        out = self.out or self._folder()
        model = load_model(self.model, self.dtype, self.mesh)
        start = time.perf_counter()
        try:
            with progress(f"Answering {len(task.questions)} problems") as on_progress:
                results = evaluate(
                    model,
                    task,
                    settings,
                    out,
                    described={"model": self.model or "nano", "dtype": self.dtype},
                    on_progress=on_progress,
                    on_note=_say,
                )
        except KeyboardInterrupt:
            _say(f"interrupted; what is done is in {out}, and the same command goes on from there")
            raise
        _print(task.name, results)
        _say(f"{time.perf_counter() - start:.0f} s; samples and results are in {out}")
        write_json(self.json, results)

    def _settings(self) -> Settings:
        if self.rsa is not None:
            for name in ("samples", "preset", "temperature", "top_p", "top_k", "max_new_tokens"):
                if getattr(self, name) is not None:
                    option = name.replace("_", "-")
                    raise InputError(f"--{option} is not for --rsa: it has settings of its own")
            chosen = _parse_rsa(self.rsa)
            return Settings(
                samples=chosen.N,
                sampling=Sampling(seed=self.seed),
                batch_size=chosen.N if self.batch_size is None else self.batch_size,
                rsa=chosen,
            )
        preset = self.preset or ("code" if self.task == "humaneval" else "math")
        own = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
        how = PRESETS[preset] | {name: value for name, value in own.items() if value is not None}
        return Settings(
            samples=1 if self.samples is None else self.samples,
            sampling=Sampling(**how, seed=self.seed),
            budget=self.max_new_tokens,
            batch_size=BATCH if self.batch_size is None else self.batch_size,
        )

    def _folder(self) -> Path:
        """The same for the same command, but for where it writes and what it runs on."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("out", "json", "mesh")]
        said = json_format.dumps([getattr(self, name) for name in names])
        digest = hashlib.sha256(said.encode()).hexdigest()[:8]
        stem = re.sub(r"[^\w.-]+", "-", Path(self.task).name.removesuffix(".jsonl"))
        return Path("runs") / f"eval-{stem}-{digest}"


def _parse_rsa(text: str) -> rsa_settings.Settings:
    """A preset and changes to it, like light,N=16."""
    name, *changes = text.split(",")
    chosen = rsa_settings.preset(name)
    kinds = {field.name: field.type for field in dataclasses.fields(rsa_settings.Settings)}
    values: dict[str, Any] = {}
    for change in changes:
        key, _, value = change.partition("=")
        if key not in kinds:
            raise InputError(f"rsa: unknown setting {key!r}: one of {', '.join(kinds)}")
        try:
            values[key] = float(value) if kinds[key] is float else int(value)
        except ValueError:
            raise InputError(f"rsa: {key} must be a number, got {value!r}") from None
    return dataclasses.replace(chosen, **values)


def _show_protections() -> None:
    """What generated code is kept from."""
    found = protections()
    lacking = set(SENTENCES) - set(found.given)
    _say(f"generated code runs in a sandbox with {', '.join(found.given)}")
    if lacking:
        _say(f"which lacks {', '.join(sorted(lacking))}")


def _say(message: str) -> None:
    messages.print(message, style="dim", markup=False, highlight=False, soft_wrap=True)


def _print(name: str, results: dict[str, Any]) -> None:
    whole, groups = results["all"], results["groups"]
    n, tokens = whole["samples"], whole["tokens"]
    samples = f"{n} sample{'s' if n > 1 else ''} each"
    table = Table(title=f"{name}: {whole['problems']} problems, {samples}", title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    table.add_column("95% interval", justify="right")
    kinds = ("avg@", "pass@", "maj@") if n > 1 else ("avg@",)
    for metric in [metric for kind in kinds for metric in whole if metric.startswith(kind)]:
        if metric != "pass@1":  # which is the average
            table.add_row(metric, *_percent(whole[metric]))
    table.add_section()
    table.add_row("tokens", f"{tokens['total']:,}")
    table.add_row("tokens of a response, mean", f"{tokens['mean']:,.1f}")
    table.add_row("median", f"{tokens['median']:,.0f}")
    table.add_row("nine in ten below", f"{tokens['p90']:,.0f}")
    table.add_row("cut off", f"{tokens['truncated']:.1%}")
    console.print(table)
    if len(groups) > 1:
        table = Table("", "problems", f"avg@{n}", "95% interval", "tokens")
        for group, metrics in groups.items():
            share = _percent(metrics[f"avg@{n}"])
            table.add_row(
                group, str(metrics["problems"]), *share, f"{metrics['tokens']['total']:,}"
            )
        console.print(table)
    if whole["noted"]:
        _say(f"the `note` of {whole['not_judged']} records says why they count as wrong")
    if nan := whole["finish_reasons"].get("nan"):
        _say(f"{nan} samples ended because the model computed NaN")


def _percent(metric: dict[str, Any]) -> tuple[str, str]:
    """Like "62.5%" and "51% to 72%"."""
    bounds = metric["interval"]
    between = "" if bounds is None else f"{bounds[0]:.0%} to {bounds[1]:.0%}"
    return f"{metric['value']:.1%}", between
