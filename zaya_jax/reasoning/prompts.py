"""The prompts of Markovian RSA, as token ids in parts that several candidates may share."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from jinja2.environment import TemplateModule
from jinja2.sandbox import ImmutableSandboxedEnvironment

from zaya_jax.errors import InputError
from zaya_jax.reasoning.tails import tail
from zaya_jax.text.tokenizer import Tokenizer


class Prompt(NamedTuple):
    """Token ids, and where parts end that other prompts may begin with too."""

    tokens: list[int]
    cuts: list[int]


class Prompts:
    """What candidates are asked: the question alone, or with the tails of others.

    Prompts are put together from token ids: the chat template is rendered with marks in place of
    the candidates, the text between the marks is tokenised, and the tails stand as they were
    sampled.

    Args:
      tokenizer: with the chat template.
      template: a file like `aggregation.jinja`, which is used by default: a jinja2 template of
        `question` and `candidates` that sets `delimiters`.

    Raises:
      InputError: the file cannot be read, is no template, or sets no delimiters.
    """

    def __init__(self, tokenizer: Tokenizer, template: Path | str | None = None):
        self._tokenizer = tokenizer
        self._name = "aggregation.jinja" if template is None else str(template)
        try:
            file = resources.files(__package__) / self._name if template is None else Path(template)
            self.source = file.read_text(encoding="utf-8")
            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
            self._template = environment.from_string(self.source)
            self.delimiters = vars(self._render("", []))["delimiters"]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise InputError(f"{self._name}: cannot be read ({reason})") from None
        except KeyError:
            raise InputError(
                f"{self._name}: sets no `delimiters`, the strings that candidates must not hold"
            ) from None
        except Exception as error:  # a template is a program, and fails in as many ways
            raise InputError(f"{self._name}: is no template ({error})") from None
        if not isinstance(self.delimiters, list) or not all(map(_can_be_split, self.delimiters)):
            raise InputError(
                f"{self._name}: `delimiters` must be strings of two characters and more, no spaces"
            )

    def question(self, question: str) -> Prompt:
        """The prompt of the first round. Raises InputError for a question without text."""
        if not isinstance(question, str) or not question.strip():
            raise InputError("the question is empty")
        message = {"role": "user", "content": question}
        return Prompt(self._tokenizer.encode_chat([message]), [])

    def aggregation(self, question: str, tails: Sequence[Sequence[int]]) -> Prompt:
        """The prompt of a later round, cut before each tail."""
        marks = _marks(question, len(tails))
        content = str(self._render(question, marks))
        rest = self._tokenizer.template.render([{"role": "user", "content": content}])
        if [rest.count(mark) for mark in marks] != [1] * len(marks):
            raise InputError(f"{self._name}: must show every candidate once")
        tokens: list[int] = []
        cuts: set[int] = set()
        for mark, candidate in zip(marks, tails, strict=True):
            between, found, rest = rest.partition(mark)
            if not found:
                raise InputError(f"{self._name}: must show the candidates in their order")
            tokens += self._tokenizer.encode(between)
            cuts.add(len(tokens))
            tokens += candidate
        return Prompt([*tokens, *self._tokenizer.encode(rest)], sorted(cuts))

    def tail(self, tokens: Sequence[int], tau: int) -> list[int]:
        """The part of a response that is shown as a candidate: see `tails.tail`."""
        return tail(tokens, tau, self._tokenizer, self.delimiters)

    def longest(self, question: str, count: int, tau: int) -> int:
        """Tokens that a prompt with that many tails of at most tau tokens can have."""
        return len(self.aggregation(question, [[]] * count).tokens) + count * tau

    def _render(self, question: str, candidates: Sequence[str]) -> TemplateModule:
        return self._template.make_module({"question": question, "candidates": candidates})


def _marks(question: str, count: int) -> list[str]:
    """Texts that stand for candidates, and do not occur in the question."""
    edge = "\ue000"  # of the private use area
    while edge in question:
        edge += "\ue001"
    return [f"{edge}{number}{edge}" for number in range(count)]


def _can_be_split(delimiter: object) -> bool:
    return (
        isinstance(delimiter, str) and len(delimiter) > 1 and not any(map(str.isspace, delimiter))
    )
