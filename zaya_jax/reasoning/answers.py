"""Final answers: where they stand in a response, and which of them are the same."""

import re
from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean

BOXED = r"\boxed{"
_ANNOUNCED = re.compile(r"(?:final\s+answer(?:\s+is)?|answer)\s*[:=]\s*(.+)|####\s*(.+)", re.I)
_DRESS = re.compile(r"\\(?:text|mathrm|mathbf|boxed|left|right)\b|\\[,;! ]|\*\*|[$\s]")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))")
_ZEROS = re.compile(r"^\+?0*(?=\d+(?:\.\d+)?$)")
_DECIMALS = re.compile(r"(?<=\d)\.0*$|(?<=\d)(\.\d*[1-9])0+$")


def final_answer(text: str) -> str | None:
    r"""The answer that a response gives, its reasoning taken off already.

    That is the content of the last `\boxed{...}`; without one, what follows the last "Answer:",
    "Final answer:" or "####" on its line; else the whole text. None where that is empty.
    """
    boxed = _last_boxed(text)
    if boxed is None:
        announced = _ANNOUNCED.findall(text.replace("*", ""))
        boxed = "".join(announced[-1]) if announced else text
    return boxed.strip() or None


@lru_cache(maxsize=65_536)
def normalised(answer: str) -> str:
    r"""An answer as it is counted in a vote.

    Capitals, spaces, dollar signs, a final period, `\text` and its kin, the commas of thousands,
    leading zeros and a plus make no difference. Whether two different expressions are equal is for
    a checker to say.
    """
    before, text = None, answer
    while text != before:
        before, text = text, _undressed(text)
    return text


def majority(answers: Sequence[str | None], logprobs: Sequence[float]) -> int | None:
    """The place of the most frequent answer, as its most probable response puts it.

    Answers that are the same when `normalised` are counted together; None is no vote. Ties go to
    the answer whose responses have the largest mean log-probability. None if nobody votes.
    """
    votes: dict[str, list[int]] = {}
    for place, answer in enumerate(answers):
        if answer is not None:
            votes.setdefault(normalised(answer), []).append(place)
    if not votes:
        return None
    best = max(votes.values(), key=lambda places: (len(places), fmean(logprobs[i] for i in places)))
    return max(best, key=lambda place: logprobs[place])


def _undressed(text: str) -> str:
    text = _THOUSANDS.sub("", _DRESS.sub("", text.casefold())).rstrip(".")
    if inside := re.fullmatch(r"\{([^{}]*)\}", text):
        text = inside[1]
    text = _ZEROS.sub("", text)
    return _DECIMALS.sub(r"\1", text) if re.fullmatch(r"-?\d+\.\d+", text) else text


def _last_boxed(text: str) -> str | None:
    """The content of the last complete box."""
    start = text.rfind(BOXED)
    while start >= 0:
        depth, begin = 1, start + len(BOXED)
        for end in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[begin:end]
        start = text.rfind(BOXED, 0, start)
    return None
