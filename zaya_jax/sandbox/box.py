"""A sandbox seen from outside: started, read from, and killed."""

import contextlib
import marshal
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from zaya_jax.errors import SandboxError
from zaya_jax.sandbox.filter import call_filter
from zaya_jax.sandbox.limits import Limits, Result, Status

CHILD = Path(__file__).with_name("child.py")
SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
START_SECONDS = 30.0  # to set up a sandbox on a busy machine
KILL_SECONDS = 5.0  # for the launcher to see everything inside gone
CHUNK = 1 << 16
# isolated from environment and user folders, no site-packages, no bytecode files
FLAGS = ("-I", "-S", "-B", "-X", "utf8")


class Box:
    """One sandbox and what came out of it so far.

    Args:
      files: the contents of /box, by name; "program.py" and the like.
      arguments: of the interpreter; the first is one of these files.
      steps: the protections to set up; each must succeed.
      stdin: what the program reads.
      channel: descriptors that the program gets as 3, 4, ...; they stay open here.
      probing: try each step, report, and leave out what fails.
    """

    def __init__(
        self,
        files: dict[str, bytes],
        arguments: Sequence[str],
        limits: Limits,
        steps: Sequence[str],
        stdin: bytes = b"",
        channel: Sequence[int] = (),
        probing: bool = False,
    ):
        self.limits = limits
        self.begin = time.perf_counter()
        self.seconds = 0.0
        self.deadline = self.begin + START_SECONDS
        self.started = False
        self.cut_short = False  # ended from here, and not for anything that it did
        self.reason: Status | None = None  # why it is being killed
        self.output = {"stdout": bytearray(), "stderr": bytearray(), "status": bytearray()}
        self.truncated = False
        # Without a file tree of its own the program gets a folder, and can leave it.
        self.folder = None
        if "files" not in steps and not probing:
            self.folder = tempfile.TemporaryDirectory(prefix="sandbox-")
        root = self.folder.name if self.folder else ""
        if root:
            os.mkdir(f"{root}/tmp")
        name, *rest = arguments
        status, written = os.pipe()
        job = {
            "parent": os.getpid(),
            "status": written,
            "channel": tuple(channel),
            "steps": tuple(steps),
            "probing": probing,
            "visible": visible(),
            "devices": DEVICES,
            "files": {f"{root}/box/{k}": v for k, v in {**files, "stdin": stdin}.items()},
            "stdin": f"{root}/box/stdin",
            "directory": f"{root}/tmp",
            "command": (interpreter(), *FLAGS, f"{root}/box/{name}", *rest),
            "calls": call_filter(),
            "cpu_seconds": limits.cpu_seconds,
            "memory_bytes": limits.memory_bytes,
            "file_bytes": limits.file_bytes,
            "disk_bytes": limits.disk_bytes,
            "processes": limits.processes,
        }
        try:
            # A file, because writing to a pipe could block.
            with tempfile.TemporaryFile() as description:
                marshal.dump(job, description)
                description.seek(0)
                self.process = subprocess.Popen(
                    [interpreter(), *FLAGS, str(CHILD)],
                    stdin=description,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env={},
                    cwd="/",
                    pass_fds=(written, *channel),
                    start_new_session=True,
                )
        except BaseException:
            os.close(status)
            raise
        finally:
            os.close(written)
        assert self.process.stdout and self.process.stderr
        self.pipes = {
            self.process.stdout.fileno(): "stdout",
            self.process.stderr.fileno(): "stderr",
            status: "status",
        }

    def read(self, pipe: int) -> bool:
        """Takes what has arrived; False at the pipe's end."""
        data, name = os.read(pipe, CHUNK), self.pipes[pipe]
        kept = self.output[name]
        room = self.limits.output_bytes - len(kept)
        kept += data[:room] if name != "status" else data
        if name == "status" and not self.started and b"start\n" in kept:
            self.started = True
            self.deadline = time.perf_counter() + self.limits.wall_seconds
        elif name != "status" and len(data) > room:
            self.truncated = True
            self.stop("output")
        return bool(data)

    def stop(self, reason: Status) -> None:
        """Asks the launcher to kill everything inside; asked again too late, kills the launcher."""
        if self.reason is None:
            self.reason = reason
            self.deadline = time.perf_counter() + KILL_SECONDS
            self.process.terminate()
        elif time.perf_counter() >= self.deadline:
            self.kill()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends it in any case, and frees what it held here."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        try:
            self.process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()
        for pipe in self.pipes:
            os.close(pipe)
        if self.folder:
            self.folder.cleanup()

    def lines(self) -> list[str]:
        """What the processes that set it up said."""
        return self.output["status"].decode(errors="replace").splitlines()

    def result(self) -> Result:
        """Raises SandboxError if the program was never started."""
        last = (self.lines() or [""])[-1]
        if last.startswith("error ") or not (self.started or self.cut_short):
            what = last.removeprefix("error ") if last else "it ended, or hung, before it reported"
            heard = self.output["stderr"].decode(errors="replace").strip().splitlines()
            raise SandboxError(f"The sandbox could not be set up: {(heard or [what])[-1]}.")
        code = int(last.removeprefix("exit ")) if last.startswith("exit ") else None
        limits: dict[str, Status] = {"cpu": "timeout", "memory": "memory", "processes": "processes"}
        status: Status = "ok" if code == 0 else limits.get(last, "failed")
        # It may have ended by itself in the moment in which it was found to take too long.
        if self.reason and (code is None or self.reason == "output"):
            code, status = None, self.reason
        return Result(
            status,
            code,
            self.output["stdout"].decode(errors="replace"),
            self.output["stderr"].decode(errors="replace"),
            self.truncated,
            self.seconds,
        )


def drive(boxes: Sequence[Box], until: Box) -> None:
    """Reads from all, and enforces their wall-clock limits, until one has ended; ends the others.
    Nothing runs in any of them afterwards."""
    try:
        with selectors.DefaultSelector() as selector:
            owners = {pipe: box for box in boxes for pipe in box.pipes}
            for pipe in owners:
                selector.register(pipe, selectors.EVENT_READ)
            while any(pipe in selector.get_map() for pipe in until.pipes):
                wait = min(box.deadline for box in boxes) - time.perf_counter()
                for key, _ in selector.select(max(wait, 0)):
                    if not owners[key.fd].read(key.fd):
                        selector.unregister(key.fd)
                for box in boxes:
                    if time.perf_counter() >= box.deadline:
                        box.stop("timeout")
            for box in boxes:
                box.cut_short = box is not until and box.reason is None
    finally:
        for box in boxes:
            box.seconds = time.perf_counter() - box.begin
            box.close()


def interpreter() -> str:
    """The one that runs this, outside any virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def visible() -> tuple[str, ...]:
    """What of the file tree an interpreter needs to start."""
    prefixes = {os.path.realpath(sys.base_prefix), os.path.realpath(sys.base_exec_prefix)}
    if "/" in prefixes:
        raise SandboxError("The interpreter's prefix is /: a sandbox would show the whole tree.")
    paths = sorted({*prefixes, *SYSTEM, interpreter()})
    return tuple(path for path in paths if not any(path.startswith(f"{other}/") for other in paths))
