"""Decides whether an untrusted program passes tests that it can neither see nor touch."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from zaya_jax.errors import SandboxError
from zaya_jax.sandbox.box import Box, drive
from zaya_jax.sandbox.limits import Limits, Status
from zaya_jax.sandbox.probing import require
from zaya_jax.sandbox.running import source

HARNESS = Path(__file__).with_name("harness.py")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What tests made of a program.

    Attributes:
      passed: the tests ran to their end.
      status: "ok" if so; "failed", or the limit that the program (or its tests) exceeded.
      detail: why not, in one line; it may quote the program and is no more to be trusted.
      stdout, stderr: of the program, up to the limit.
      seconds: of wall clock.
    """

    passed: bool
    status: Status
    detail: str
    stdout: str
    stderr: str
    seconds: float


def check(
    program: str,
    tests: str,
    *,
    functions: Sequence[str],
    setup: str = "",
    limits: Limits | None = None,
    allow_weak: bool = False,
) -> Verdict:
    """Whether `tests`, Python source code that calls the program's functions, raises nothing.

    Program and tests run in two sandboxes, with nothing between them but calls: in the tests each
    of the functions is a stand-in that sends its arguments over and gets a result, or an exception
    of a built-in class, back. So the program can exit, print, replace builtins, or search its
    interpreter as it likes: the tests and the verdict are elsewhere, and no object of its making
    gets there. Arguments and results are plain data: None, numbers, strings, bytes, ranges, and
    lists, tuples, sets and dicts of them. They are copies, so that a test of what a function does
    to its argument in place fails.

    Args:
      program: the untrusted source code; `__name__` is "program".
      tests: trusted source code.
      functions: names in the program that the tests call.
      setup: trusted source code that runs before the tests, in their namespace; the stand-ins
        replace what it defines by those names. For HumanEval this is the prompt, which has helper
        functions that tests call.
      limits: of each of the two; Limits() if None.
      allow_weak: as for `run`; the two are not protected from one another then.

    Raises:
      SandboxError: as for `run`. Nothing the program does raises.
    """
    limits = limits or Limits()
    steps = require(allow_weak)
    for name in functions:
        if not str(name).isidentifier():
            raise SandboxError(f"functions has {name!r}: it must hold names of functions.")
    harness = HARNESS.read_bytes()
    untrusted = {"harness.py": harness, "program.py": source(program, "program")}
    trusted = {
        "harness.py": harness,
        "setup.py": source(setup, "setup"),
        "tests.py": source(tests, "tests"),
    }
    channels = [*os.pipe(), *os.pipe()]
    requests, asking, answers, answering = channels
    boxes: list[Box] = []
    try:
        serve = ["harness.py", "serve"]
        boxes.append(Box(untrusted, serve, limits, steps, channel=(requests, answering)))
        judge = ["harness.py", "judge", *functions]
        boxes.append(Box(trusted, judge, limits, steps, channel=(asking, answers)))
    except BaseException:
        for box in boxes:
            box.close()
        raise
    finally:
        for descriptor in channels:
            os.close(descriptor)
    drive(boxes, until=boxes[1])
    ran, judged = (box.result() for box in boxes)
    status = judged.status if ran.status in ("ok", "failed") else ran.status
    passed = status == "ok"
    detail = {
        "ok": "",
        "failed": (judged.stderr.strip().splitlines() or ["the tests ended without a word"])[-1],
        "timeout": f"took {limits.wall_seconds:g} s, or {limits.cpu_seconds:g} s of CPU, and more",
        "memory": f"used more than {limits.memory_bytes} bytes of memory",
        "processes": f"had more than {limits.processes} processes",
        "output": f"wrote more than {limits.output_bytes} bytes",
    }[status]
    return Verdict(passed, status, detail, ran.stdout, ran.stderr, judged.seconds)
