"""A process of its own for checkers that could hang, eat memory or crash: run as a script, it
answers JSON lines with JSON lines. Nothing else of this package is imported here."""

import json
import os
import re
import resource
import signal
import sys
from functools import cache
from typing import Any

MEMORY = 4 << 30  # bytes
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\{[^}]*\}")


def parse(text: str) -> list[Any]:
    """What math-verify finds in an expression; in prose, its last one."""
    from math_verify import parse as parse_math

    boxed = rf"\boxed{{{text.strip().strip('$')}}}"
    order = (text, boxed) if _WORD.search(_TEXT.sub("", text)) else (boxed, text)
    found = (parse_math(form, parsing_timeout=None) for form in order)
    return next((one for one in found if one), [])


def math(expected: str, answer: str) -> float:
    from math_verify import verify

    return float(verify(parse(expected), parse(answer), timeout_seconds=None))


@cache
def dataset(name: str, config: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, **json.loads(config))


def gym(name: str, config: str, index: int, answer: str) -> float:
    data = dataset(name, config)
    return float(data.score_answer(answer, data[index]))


def main() -> None:
    requests, replies = sys.stdin, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what checkers print is no reply
    seconds = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in requests:
        name, *values = json.loads(line)
        __import__({"gym": "reasoning_gym"}.get(name, "math_verify"))  # which may take its time
        # Nobody handles the alarm, so that it ends the process even inside C code, and even if
        # whoever asked is gone.
        signal.alarm(seconds)
        try:
            reply = {"score": globals()[name](*values)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:200]}
        signal.alarm(0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
