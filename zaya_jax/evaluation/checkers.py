"""Whether a response answers a question: a score, and the answer that it was given for."""

import importlib.util
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from zaya_jax.errors import ZayaError
from zaya_jax.reasoning.answers import final_answer, normalised

SECONDS = 10  # that a checker may take
_NUMBER = re.compile(r"(?<![\d.])-?\d[\d,]*(?:\.\d+)?")
_LETTER = r"\(?([A-Za-z])\)?"
_ONLY_LETTER = re.compile(rf"[\s*$]*(?:option|choice)?\s*{_LETTER}(?:[\s*$]*|[).:,]\W.*)", re.S)
_NAMED_LETTER = re.compile(
    rf"\b(?:answer|option|choice)(?:\s+is)?\s*:?[\s*$]*{_LETTER}(?![A-Za-z])", re.I
)


class Checked(NamedTuple):
    """What a checker makes of a response.

    Attributes:
      score: 1.0 is correct; reasoning-gym gives parts of it too.
      answer: found in the response, None where there is none.
      note: why it could not be judged, else "".
    """

    score: float
    answer: str | None
    note: str = ""


Checker = Callable[[str, str], Checked]  # of a response without its reasoning, and what is expected


def check_exact(response: str, expected: str) -> Checked:
    """The same text, but for what `normalised` takes off."""
    answer = final_answer(response)
    return Checked(float(answer is not None and normalised(answer) == normalised(expected)), answer)


def check_choice(response: str, expected: str) -> Checked:
    """The same letter, as in "B", "(B)", "B. Paris" or "the answer is B"."""
    answer = choice_letter(response)
    return Checked(float(answer is not None and answer == choice_letter(expected)), answer)


def check_number(response: str, expected: str) -> Checked:
    """The last number of the final answer has the same value: 1,000.50 is 1000.5."""
    answer = last_number(response)
    right = answer is not None and _value(answer) == _value(last_number(expected) or "nan")
    return Checked(float(right), answer)


def check_math(response: str, expected: str) -> Checked:
    """An equal mathematical expression, says math-verify: 1/2 is 0.5."""
    answer = final_answer(response)
    if answer is None:
        return Checked(0.0, None)
    score, note = ask("math", expected, answer)
    return Checked(score, answer, note)


CHECKERS: dict[str, Checker] = {
    "math": check_math,
    "exact": check_exact,
    "choice": check_choice,
    "number": check_number,
}


def problem_with_answer(checker: str, expected: str) -> str:
    """Why no response could ever be found right, or ""."""
    if checker == "number" and last_number(expected) is None:
        return f"the answer {expected!r:.60} holds no number"
    if checker == "choice" and choice_letter(expected) is None:
        return f"the answer {expected!r:.60} is no letter of a choice"
    if not expected.strip():
        return "the answer is empty"
    return ""


def choice_letter(text: str) -> str | None:
    """The letter of a choice that a text settles for."""
    answer = final_answer(text)
    if answer is None:
        return None
    if only := _ONLY_LETTER.fullmatch(re.sub(r"\\text|[{}]", "", answer)):
        return only[1].upper()
    named = _NAMED_LETTER.findall(answer)
    return named[-1].upper() if named else None


def last_number(text: str) -> str | None:
    """The last number of a text's final answer, as it is written."""
    numbers = _NUMBER.findall((final_answer(text) or "").replace("\N{MINUS SIGN}", "-"))
    return numbers[-1].rstrip(",") if numbers else None


def _value(number: str) -> Fraction | None:
    return None if number == "nan" else Fraction(number.replace(",", ""))


def require(package: str) -> None:
    """Raises ZayaError, saying how to install it, where a package of the evaluation is missing."""
    if importlib.util.find_spec(package) is None:
        raise ZayaError(f"{package} is missing: pip install 'zaya-jax[evaluation]'")


_lock = threading.Lock()
_worker: subprocess.Popen[str] | None = None


def ask(name: str, *values: Any) -> tuple[float, str]:
    """A score from the checking process, and a note where it could give none: a checker that takes
    more than `SECONDS` ends with its process, and the next one gets a new one."""
    global _worker
    require("reasoning_gym" if name == "gym" else "math_verify")
    with _lock:
        if _worker is None:
            _worker = _start()
        assert _worker.stdin is not None and _worker.stdout is not None
        whole = False
        try:
            _worker.stdin.write(json.dumps([name, *values]) + "\n")
            _worker.stdin.flush()
            reply = _worker.stdout.readline()
            whole = reply.endswith("\n")
        except BrokenPipeError:
            pass
        finally:  # an interrupt too leaves no reply behind that the next one would take for its own
            if not whole:
                _worker.kill()
                code, _worker = _worker.wait(), None
    if not whole:
        hung = code == -signal.SIGALRM
        return 0.0, f"the checker took more than {SECONDS} s" if hung else "the checker died"
    result = json.loads(reply)
    return result.get("score", 0.0), result.get("error", "")


def _start() -> subprocess.Popen[str]:
    worker = Path(__file__).with_name("worker.py")
    return subprocess.Popen(
        [sys.executable, "-P", str(worker), str(SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C is not for it
    )
