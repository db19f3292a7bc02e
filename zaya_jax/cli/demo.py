"""`zaya demo`: a model answers problems it has never seen, and is graded."""

import dataclasses
from pathlib import Path

from rich.table import Table

from zaya_jax.cli.output import (
    check_destination,
    console,
    load_model,
    streaming,
    working,
    write_json,
)
from zaya_jax.errors import InputError
from zaya_jax.evaluation.accuracy import FamilyResult, evaluate
from zaya_jax.evaluation.families import Problem, held_out_problems
from zaya_jax.zaya import Zaya


@dataclasses.dataclass
class Demo:
    """Stream answers to a few held-out problems, then grade many of them."""

    model: str | None = None
    """Checkpoint folder or Hugging Face hub id; by default the embedded model."""
    shown: int = 4
    """Problems to stream."""
    problems: int = 200
    """Problems to grade."""
    json: Path | None = None
    """Also write the table to this file."""

    def run(self) -> None:
        check_destination(self.json)
        if self.shown < 0:
            raise InputError(f"shown must not be negative, got {self.shown}")
        with working("Drawing held-out problems"):
            problems = held_out_problems(self.problems)
        model = load_model(self.model)
        for problem in problems[: self.shown]:
            _stream(model, problem)
        with working(f"Grading {len(problems)} held-out problems"):
            results = evaluate(model, problems)
        _print_results(results)
        write_json(self.json, [dataclasses.asdict(result) for result in results])


def _stream(model: Zaya, problem: Problem) -> None:
    console.rule(problem.family, align="left")
    console.print(problem.question, style="bold", markup=False, highlight=False)
    message = {"role": "user", "content": problem.question}
    with streaming("Thinking") as on_text:
        (result,) = model.generate([message], temperature=0, on_text=on_text)
    right = problem.score(result.answer.text) == 1
    verdict = "correct" if right else f"wrong: the answer is {problem.answer}"
    console.print(f"[{verdict}]\n", style="green" if right else "red", markup=False)


def _print_results(results: list[FamilyResult]) -> None:
    table = Table(title="Held-out problems, answered greedily", title_justify="left")
    for column in ("family", "problems", "accuracy", "best constant answer", "tokens"):
        table.add_column(column, justify="left" if column == "family" else "right")
    for r in results:
        cells = (r.problems, f"{r.accuracy:.1%}", f"{r.constant:.1%}", f"{r.tokens:,}")
        table.add_row(r.family, *map(str, cells))
    count = sum(r.problems for r in results)
    tokens, seconds = sum(r.tokens for r in results), sum(r.seconds for r in results)
    accuracy = sum(r.problems * r.accuracy for r in results) / count
    constant = sum(r.problems * r.constant for r in results) / count
    table.add_section()
    table.add_row("all", str(count), f"{accuracy:.1%}", f"{constant:.1%}", f"{tokens:,}")
    console.print(table)
    console.print(f"{tokens / seconds:,.0f} tokens/s over {seconds:.0f} s, compilation included")
