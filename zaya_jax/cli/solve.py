"""`zaya solve`: Markovian RSA on one question."""

import contextlib
import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import tyro
from rich.live import Live
from rich.table import Table
from rich.text import Text

from zaya_jax.cli.output import check_destination, console, load_model, messages, write_json
from zaya_jax.errors import InputError
from zaya_jax.reasoning.answers import normalised
from zaya_jax.reasoning.settings import Settings, fitting_preset, preset
from zaya_jax.reasoning.solution import Round, Solution

SHOWN = 60  # characters of a candidate's text in the live view


@dataclasses.dataclass
class Solve:
    """Answer one question with Markovian RSA (by default with the embedded model).

    Rounds of N candidates; each sees the ends of C of the round before. The answer is that of most
    candidates of the last round. Settings that are not given are those of the preset.
    """

    question: tyro.conf.Positional[str]
    """The question; "-" reads it from standard input."""
    model: str | None = None
    """Checkpoint folder or Hugging Face hub id."""
    preset: Literal["light", "recommended", "default", "high", "xhigh", "nano"] | None = None
    """By default "recommended", or "nano" where the model's context is too short for it."""
    N: int | None = None
    """Candidates in each round."""
    C: int | None = None
    """Candidates of the round before that a new one sees."""
    T: int | None = None
    """Rounds behind the first one; 0 samples N answers independently."""
    beta: int | None = None
    """Tokens of a response, reasoning included."""
    tau: int | None = None
    """Tokens that are seen of a candidate."""
    final_budget: int | None = None
    """Tokens of a response of the last round."""
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    expected: str | None = None
    """The right answer, which the model does not see: shows how many candidates have it."""
    template: Path | None = None
    """A prompt to use in place of zaya_jax/reasoning/aggregation.jinja."""
    out: Path | None = None
    """Keep each round in this folder; the same command again goes on behind the last one."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the parameters; by default that of the checkpoint."""
    mesh: str | None = None
    """Devices to spread over, like data=2,expert=4."""
    json: Path | None = None
    """Also write rounds, candidates, tokens and answers to this file."""

    def run(self) -> None:
        check_destination(self.json)
        question = sys.stdin.read() if self.question == "-" else self.question
        if not question.strip():
            raise InputError("the question is empty")
        if self.preset is not None:
            self._settings(self.preset)  # complains before anything is loaded
        model = load_model(self.model, self.dtype, self.mesh)
        name = self.preset or fitting_preset(model.config.max_position_embeddings)
        settings = self._settings(name)
        with showing(settings) as view:
            try:
                solution = model.markovian_rsa(
                    question,
                    settings,
                    seed=self.seed,
                    verifier=None if self.expected is None else self._verify,
                    template=self.template,
                    folder=self.out,
                    on_text=view.on_text,
                    on_round=view.on_round,
                )
            except KeyboardInterrupt:
                if self.out is not None:
                    view.say(f"stopped; the same command goes on behind round {view.round - 1}")
                raise
        _print_solution(solution)
        write_json(self.json, {"settings": dataclasses.asdict(settings), **solution.as_json()})

    def _settings(self, name: str) -> Settings:
        names = [field.name for field in dataclasses.fields(Settings)]
        given = {key: value for key in names if (value := getattr(self, key)) is not None}
        return dataclasses.replace(preset(name), **given)

    def _verify(self, answer: str) -> float:
        return float(normalised(answer) == normalised(self.expected or ""))


class View:
    """The candidates of the current round, and a line for each round before it."""

    def __init__(self, settings: Settings, live: Live | None):
        self.round, self._settings, self._live = 0, settings, live
        self._texts: dict[int, str] = {}

    def on_text(self, number: int, piece: str) -> None:
        self._texts[number] = self._texts.get(number, "") + piece
        if self._live is not None:
            self._live.update(self._table())

    def on_round(self, number: int, rounds: list[Round]) -> None:
        (round,) = rounds
        answers = Counter(c.answer for c in round.candidates if c.answer is not None)
        tokens = sum(len(c.tokens) for c in round.candidates)
        right = "" if round.mean_correctness is None else f", {round.mean_correctness:.0%} correct"
        votes = ", ".join(f"{answer!r:.30} x{votes}" for answer, votes in answers.most_common(3))
        self.say(f"round {number} of {self._settings.T}: {tokens} tokens{right}; {votes or 'none'}")
        self.round, self._texts = number + 1, {}

    def say(self, line: str) -> None:
        messages.print(line, markup=False, highlight=False)

    def _table(self) -> Table:
        title = f"round {self.round} of {self._settings.T}"
        table = Table(title=title, title_justify="left")
        table.add_column("candidate", justify="right")
        table.add_column("characters", justify="right")
        table.add_column("is thinking", width=SHOWN, no_wrap=True)
        for number in range(self._settings.N):
            text = self._texts.get(number, "")
            end = " ".join(text[-SHOWN:].split())
            table.add_row(str(number), f"{len(text):,}", Text(end))
        return table


@contextlib.contextmanager
def showing(settings: Settings) -> Iterator[View]:
    """A view of what is going on: a table on a terminal, only the lines elsewhere."""
    if not messages.is_terminal:
        yield View(settings, None)
        return
    with Live(console=messages, transient=True, refresh_per_second=8) as live:
        yield View(settings, live)


def _print_solution(solution: Solution) -> None:
    saved = solution.prompt_tokens - solution.read_tokens
    messages.print(
        f"{solution.generated_tokens} tokens generated, {solution.prompt_tokens} of prompts, "
        f"{saved} of these read once for several candidates",
        style="dim",
        highlight=False,
    )
    if solution.answer is None:
        raise InputError("no candidate of the last round came to an answer: raise --final-budget")
    console.file.write(f"{solution.answer}\n")
