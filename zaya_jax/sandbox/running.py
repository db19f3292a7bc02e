"""Runs an untrusted program."""

from zaya_jax.errors import SandboxError
from zaya_jax.sandbox.box import Box, drive
from zaya_jax.sandbox.limits import Limits, Result
from zaya_jax.sandbox.probing import require


def run(
    program: str, *, limits: Limits | None = None, stdin: str = "", allow_weak: bool = False
) -> Result:
    """Runs Python source code in a sandbox, with this interpreter and its standard library.

    It starts in an empty folder with an empty environment, as a user without rights, without
    network, processes or files other than its own; when it ends, or exceeds a limit, everything it
    started is killed. May be called from several threads.

    Args:
      program: any text; one that is not Python fails like any other that is wrong.
      limits: Limits() if None.
      stdin: what it can read.
      allow_weak: also run where the platform lacks essential protections.

    Raises:
      SandboxError: essential protections are missing here (see `protections`), or setting up the
        sandbox failed. Nothing the program does raises.
    """
    files = {"program.py": source(program, "program")}
    box = Box(
        files, ["program.py"], limits or Limits(), require(allow_weak), source(stdin, "stdin")
    )
    drive([box], box)
    return box.result()


def source(text: str, name: str) -> bytes:
    if not isinstance(text, str):
        raise SandboxError(f"{name} is a {type(text).__name__}: it must be a string.")
    return text.encode(errors="surrogatepass")
