"""What a model has learned: accuracy on held-out problems, as a table, as JSON, in the README.

    python -m train.course.report docs/nano.json README.md

writes the README's table anew from the JSON.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import tyro

from zaya_jax.errors import InputError
from zaya_jax.evaluation.accuracy import CHAT, TEXT, evaluate
from zaya_jax.evaluation.families import FAMILIES, distinct_answers, held_out
from zaya_jax.zaya import Zaya

BEGIN, END = "<!-- nano: begin -->", "<!-- nano: end -->"


@dataclasses.dataclass(frozen=True)
class FamilyReport:
    """Greedy answers to the held-out problems of one family.

    Attributes:
      accuracy: share of answers with reasoning-gym's full score.
      constant: accuracy of always giving these problems' most common answer.
      answers: how many different answers the family has.
      tokens: generated, reasoning included, for all problems.
    """

    family: str
    problems: int
    accuracy: float
    constant: float
    answers: int
    tokens: int


def report(model: Zaya, phase: str, count: int = 200) -> list[FamilyReport]:
    """Answers the first `count` held-out problems of every family, and prints a line for each.

    A model that comes out of "pretrain" is asked in texts, every other one in chats.
    """
    form = TEXT if phase == "pretrain" else CHAT
    print(f"{phase:24} {'accuracy':>8} {'constant':>8} {'answers':>8} {'tokens':>8}")
    rows = []
    for family in FAMILIES:
        (result,) = evaluate(model, held_out(family, count), form)
        row = FamilyReport(
            family,
            result.problems,
            result.accuracy,
            result.constant,
            distinct_answers(family),
            result.tokens,
        )
        print(
            f"{family:24} {row.accuracy:8.3f} {row.constant:8.3f} {row.answers:8,} {row.tokens:8,}",
            flush=True,
        )
        rows.append(row)
    return rows


def save(file: Path, reports: Mapping[str, Sequence[FamilyReport]]) -> None:
    """Writes the reports of phases as JSON: {phase: [row of a family, ...]}."""
    data = {phase: [dataclasses.asdict(row) for row in rows] for phase, rows in reports.items()}
    file.write_text(json.dumps(data, indent=2) + "\n")


def load(file: Path) -> dict[str, list[FamilyReport]]:
    """The reports that `save` wrote."""
    data = json.loads(file.read_text())
    return {phase: [FamilyReport(**row) for row in rows] for phase, rows in data.items()}


def table(reports: Mapping[str, Sequence[FamilyReport]]) -> str:
    """A Markdown table: a row for each family, a column for each phase's accuracy."""
    heads = ["`nano`, greedy, held-out", *reports, "best constant answer", "distinct answers"]
    lines = [heads, ["---"] * len(heads)]
    for rows in zip(*reports.values(), strict=True):
        last = rows[-1]
        accuracies = [f"{row.accuracy:.1%}" for row in rows]
        lines.append([last.family, *accuracies, f"{last.constant:.1%}", f"{last.answers:,}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_table(readme: str, reports: Mapping[str, Sequence[FamilyReport]]) -> str:
    """The README's text with the table of these reports between its two markers. Raises InputError
    without them."""
    return filled(readme, BEGIN, END, table(reports))


def filled(page: str, begin: str, end: str, text: str) -> str:
    """A page with a text between two markers.

    Raises:
      InputError: the markers are missing.
    """
    before, found, rest = page.partition(begin)
    _, also_found, after = rest.partition(end)
    if not (found and also_found):
        raise InputError(f"the page needs the lines {begin} and {end}, the table goes between")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def main(figures: Path, readme: Path, /) -> None:
    """Writes the README's table anew.

    Args:
      figures: what `save` wrote.
      readme: has the two markers.
    """
    readme.write_text(with_table(readme.read_text(), load(figures)))


if __name__ == "__main__":
    tyro.cli(main)
