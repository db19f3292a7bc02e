"""What a program may use, and what came of it."""

import dataclasses
from typing import Literal

from zaya_jax.errors import SandboxError

MIB = 1 << 20
Status = Literal["ok", "failed", "timeout", "memory", "processes", "output"]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use. All must be positive.

    Attributes:
      wall_seconds: from the start of the program to its end.
      cpu_seconds: of all its processes together.
      memory_bytes: of address space, for each process, and of resident memory for all together; at
        least 64 MiB, of which the interpreter takes about half.
      file_bytes: the largest file it may write.
      disk_bytes: all files together; they are in memory and go with the sandbox.
      processes: processes and threads at a time, its own first one included.
      output_bytes: of standard output, and as many of standard error.
    """

    wall_seconds: float = 10.0
    cpu_seconds: float = 10.0
    memory_bytes: int = 512 * MIB
    file_bytes: int = 16 * MIB
    disk_bytes: int = 64 * MIB
    processes: int = 16
    output_bytes: int = MIB

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            whole = field.type is int
            right = isinstance(value, int if whole else int | float) and 0 < value < 2**62
            if not right or isinstance(value, bool):
                kind = "whole number" if whole else "number"
                raise SandboxError(
                    f"Limits.{field.name} is {value!r}: it must be a positive {kind}."
                )
        if self.memory_bytes < 64 * MIB:
            raise SandboxError(
                f"Limits.memory_bytes is {self.memory_bytes}: the interpreter alone needs 64 MiB."
            )


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a program.

    Attributes:
      status: "ok" if it ended by itself with exit code 0, "failed" if with another or by a signal;
        otherwise the limit it was killed for ("timeout" is wall clock or CPU). One process that
        asks for more memory than allowed gets a MemoryError, which it may handle.
      exit_code: as the shell knows it, a signal negative; None if it was killed for a limit.
      stdout, stderr: what it wrote, up to the limit; what is not UTF-8 is replaced by U+FFFD.
      truncated: whether it wrote more than that.
      seconds: of wall clock, the sandbox's own start and end included.
    """

    status: Status
    exit_code: int | None
    stdout: str
    stderr: str
    truncated: bool
    seconds: float

    @property
    def ok(self) -> bool:
        return self.status == "ok"
