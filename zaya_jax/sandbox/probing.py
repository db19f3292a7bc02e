"""Which protections this platform gives, found by setting up one sandbox."""

import dataclasses
import functools
import os
import sys

from zaya_jax.errors import SandboxError
from zaya_jax.sandbox.box import Box, drive
from zaya_jax.sandbox.limits import Limits

SENTENCES = {
    "limits": "CPU, memory, files and processes are limited, in a session of its own",
    "processes": "it sees no other process, and none of its own outlives it",
    "network": "there is no network, not even the machine's own",
    "files": "it sees the interpreter and an empty folder in memory, and nothing else of the files",
    "users": "its user is nobody, without rights, also where the caller is root",
    "watch": "memory, CPU and processes are also limited for all of it together",
    "calls": "system calls that reach out of it are refused",
}
ESSENTIAL = ("limits", "processes", "network", "files")


@dataclasses.dataclass(frozen=True)
class Protections:
    """What a sandbox on this platform protects from; `describe` has a sentence for each.

    Attributes:
      reasons: why those that are missing are, by name.
    """

    limits: bool = False
    processes: bool = False
    network: bool = False
    files: bool = False
    users: bool = False
    watch: bool = False
    calls: bool = False
    reasons: dict[str, str] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def given(self) -> tuple[str, ...]:
        return tuple(name for name in SENTENCES if getattr(self, name))

    @property
    def missing(self) -> tuple[str, ...]:
        """The essential ones that are not given."""
        return tuple(name for name in ESSENTIAL if not getattr(self, name))

    def describe(self) -> str:
        """A line for each protection: whether it is given, what it means, why it is missing."""
        return "\n".join(
            f"{'yes' if getattr(self, name) else 'NO '} {name}: {sentence}"
            + (f" ({self.reasons[name]})" if name in self.reasons else "")
            + (" [essential]" if name in self.missing else "")
            for name, sentence in SENTENCES.items()
        )


@functools.cache
def protections() -> Protections:
    """What this platform gives; tried out at the first call, in some tens of milliseconds."""
    if os.name != "posix":
        reason = f"{sys.platform} has none of what it takes"
        return Protections(reasons=dict.fromkeys(SENTENCES, reason))
    if sys.platform != "linux":
        reason = f"needs Linux, this is {sys.platform}"
        return Protections(limits=True, reasons=dict.fromkeys(list(SENTENCES)[1:], reason))
    box = Box({"program.py": b""}, ["program.py"], Limits(), tuple(SENTENCES), probing=True)
    drive([box], box)
    have, reasons = set(), {}
    for line in box.lines():
        word, name, *rest = [*line.split(" ", 2), ""]
        if word == "have":
            have.add(name)
        elif word == "missing":
            reasons[name] = " ".join(rest)
    have |= {"limits"}
    given = {name: name in have and name not in reasons for name in SENTENCES}
    for name in SENTENCES:
        if not given[name]:
            reasons.setdefault(name, "could not be tried without the others")
    if given["files"] and box.lines()[-1:] != ["exit 0"]:
        given["files"] = False
        reasons["files"] = f"the interpreter does not start in there: {box.lines()[-1]}"
    return Protections(**given, reasons=reasons)


def require(allow_weak: bool) -> tuple[str, ...]:
    """The steps to set up. Raises SandboxError where an essential one cannot be, unless allowed."""
    found = protections()
    if os.name != "posix":
        raise SandboxError(f"There is no sandbox on {sys.platform}: use Linux.")
    if found.missing and not allow_weak:
        lacking = "; ".join(f"{name} ({found.reasons.get(name, 'no')})" for name in found.missing)
        raise SandboxError(
            f"This platform lacks essential protections: {lacking}. "
            "Use Linux with user namespaces, or pass allow_weak=True for code you trust."
        )
    return found.given
