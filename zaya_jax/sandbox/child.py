"""Sets up the sandbox, then becomes the program. Run as a script in a bare interpreter.

Three processes, of which only the last runs untrusted code:

  launcher   outside; makes the namespaces, waits, and kills the first process on SIGTERM
  first      process 1 inside: lays out the file tree, watches what the others use, reaps them; when
             it ends the kernel kills every process inside
  program    an unprivileged user with limits, which executes the interpreter on the program

Nothing of this package is imported here, and only what starts quickly.
"""

import contextlib
import ctypes
import fcntl
import marshal
import os
import resource
import signal
import sys

NOBODY = 65534
POLL = 0.02  # seconds between two looks at what the program uses

# <linux/prctl.h>, <sys/mount.h>, <linux/mount.h>
PDEATHSIG, DUMPABLE, SECCOMP, CAPBSET_DROP, NO_NEW_PRIVS = 1, 4, 22, 24, 38
NOSUID, NODEV, NOEXEC, BIND, RECURSIVE, PRIVATE, DETACH = 2, 4, 8, 4096, 16384, 1 << 18, 2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY = 442, -100, 0x8000, 1

libc = ctypes.CDLL(None, use_errno=True)


def check(outcome: int, what: str) -> None:
    if outcome < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def prctl(option: int, *values) -> None:
    padded = (*values, 0, 0, 0, 0)[:4]
    longs = [v if isinstance(v, ctypes.c_void_p) else ctypes.c_ulong(v) for v in padded]
    check(libc.prctl(option, *longs), f"prctl {option}")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    texts = [text and text.encode() for text in (source, target, kind)]
    outcome = libc.mount(*texts, ctypes.c_ulong(flags), data.encode() or None)
    check(outcome, f"mount {target}")


def set_attributes(target: str, attributes: int, recursive: bool = True) -> None:
    """Adds mount attributes, to the mounts below as well (Linux 5.12)."""
    values = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    arguments = (AT_FDCWD, target.encode(), flags, ctypes.byref(values), 32)
    check(libc.syscall(MOUNT_SETATTR, *arguments), f"mount_setattr {target}")


def unmount(target: str) -> None:
    check(libc.umount2(target.encode(), DETACH), f"umount {target}")


def say(job: dict, line: str) -> None:
    os.write(job["status"], f"{line}\n".encode())


def attempt(job: dict, step: str, action) -> bool:
    """Takes a step if it is among those asked for; a step that fails ends the run, or when probing
    is reported and left out."""
    if step not in job["steps"]:
        return False
    try:
        action()
    except (OSError, AttributeError) as error:
        reason = str(error).replace("\n", " ")
        say(job, f"missing {step} {reason}" if job["probing"] else f"error {step}: {reason}")
        if not job["probing"]:
            os._exit(1)
        return False
    if job["probing"]:
        say(job, f"have {step}")
    return True


# The launcher.


def launch(job: dict) -> None:
    for descriptor in (job["status"], *job["channel"]):
        os.set_inheritable(descriptor, False)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    attempt(job, "users", new_users)
    attempt(job, "processes", lambda: os.unshare(os.CLONE_NEWPID | os.CLONE_NEWIPC))
    attempt(job, "network", lambda: os.unshare(os.CLONE_NEWNET | os.CLONE_NEWUTS))
    die_with(job["parent"])
    alive, held = os.pipe()
    os.set_blocking(alive, False)
    first = os.fork()
    if not first:
        os.close(held)
        guarded(job, lambda: inside(job, alive))
    for pipe in (0, 1, 2, job["status"], *job["channel"]):
        os.close(pipe)
    while True:
        if signal.sigwait({signal.SIGTERM, signal.SIGCHLD}) == signal.SIGTERM:
            os.kill(first, signal.SIGKILL)
        # A first process that was killed is gone only after everything inside is.
        if os.waitpid(first, os.WNOHANG)[0]:
            os._exit(0)


def new_users() -> None:
    """A user namespace. Root brings along an unprivileged user, because the process limit does not
    bind root; for anybody else the one user there is maps to themselves outside."""
    user, group = os.geteuid(), os.getegid()
    if user:
        os.unshare(os.CLONE_NEWUSER)
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{NOBODY} {user} 1")
        write("/proc/self/gid_map", f"{NOBODY} {group} 1")
        return
    # Two users can only be mapped from the outside.
    ready, go = os.pipe()
    helper = os.fork()
    if not helper:
        try:
            os.read(ready, 1)
            for kind in ("uid", "gid"):
                write(f"/proc/{os.getppid()}/{kind}_map", f"0 0 1\n{NOBODY} {NOBODY} 1")
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or 1)
    try:
        os.unshare(os.CLONE_NEWUSER)
    finally:
        os.write(go, b"\0")
        os.close(ready)
        os.close(go)
        _, outcome = os.waitpid(helper, 0)
    if outcome:
        code = os.waitstatus_to_exitcode(outcome)
        raise OSError(code, f"mapping of users: {os.strerror(code)}")


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def die_with(parent: int) -> None:
    """The kernel kills this process when its parent ends; must follow any change of user."""
    if sys.platform == "linux":
        prctl(PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def guarded(job: dict, action) -> None:
    """Ends the process with its action, and reports what went wrong with it."""
    try:
        action()
    except BaseException as error:
        say(job, f"error {type(error).__name__}: {error}".replace("\n", " "))
    finally:
        os._exit(1)


# The first process inside.


def inside(job: dict, alive: int) -> None:
    if sys.platform == "linux":
        prctl(PDEATHSIG, signal.SIGKILL)
        prctl(DUMPABLE, 0)
        try:
            os.read(alive, 1)
            os._exit(1)  # end of file: the launcher died before the kernel knew what to do then
        except BlockingIOError:
            pass
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a first process is spared from
    isolated = attempt(job, "files", lambda: lay_out(job))
    watched: dict[str, int] = {}
    attempt(job, "watch", lambda: watched.update(processes=open_processes()))
    if isolated:
        attempt(job, "files", lambda: close_files(job))
    elif job["probing"]:
        attempt(job, "calls", lambda: filter_calls(job["calls"]))
        os._exit(0)
    else:
        place_files(job)
    program = os.fork()
    if not program:
        guarded(job, lambda: become_program(job, isolated))
    for pipe in (0, 1, 2, *job["channel"]):
        os.close(pipe)
    outcome = watch(job, program, watched.get("processes"))
    if "processes" not in job["steps"]:
        with contextlib.suppress(ProcessLookupError):  # nothing is left of its session
            os.killpg(program, signal.SIGKILL)
    say(job, outcome)
    os._exit(0)


def lay_out(job: dict) -> None:
    """A file tree of what the interpreter needs, the program, and a working directory in memory."""
    os.unshare(os.CLONE_NEWNS)
    mount(None, "/", None, RECURSIVE | PRIVATE)
    room = sum(map(len, job["files"].values())) + (1 << 20)
    mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, f"mode=755,size={room}")
    os.mkdir("/tmp/outside")
    check(libc.pivot_root(b"/tmp", b"/tmp/outside"), "pivot_root")
    os.chdir("/")
    os.mkdir("/proc")
    os.mkdir("/tmp")
    options = f"uid={NOBODY},gid={NOBODY},mode=700,nr_inodes=10000,size={job['disk_bytes']}"
    mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, options)
    for path in job["visible"]:
        show(path, READ_ONLY | NOSUID | NODEV)
    for path in job["devices"]:
        show(path, READ_ONLY | NOSUID | NOEXEC)
    place_files(job)


def place_files(job: dict) -> None:
    for path, content in job["files"].items():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)


def show(path: str, attributes: int) -> None:
    outside = f"/outside{path}"
    if not os.path.lexists(outside):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(outside):
        os.symlink(os.readlink(outside), path)
        return
    if os.path.isdir(outside):
        os.makedirs(path, exist_ok=True)
    else:
        write(path, "")
    mount(outside, path, None, BIND | RECURSIVE)
    set_attributes(path, attributes)


def open_processes() -> int:
    """The processes in here, for this process's eyes only; and nobody may make a namespace."""
    mount("proc", "/proc", "proc", NOSUID | NODEV | NOEXEC)
    write("/proc/sys/user/max_user_namespaces", "0")
    processes = os.open("/proc", os.O_RDONLY)
    unmount("/proc")
    return processes


def close_files(job: dict) -> None:
    unmount("/outside")
    os.rmdir("/outside")
    os.rmdir("/proc")
    set_attributes("/", READ_ONLY, recursive=False)


def watch(job: dict, program: int, processes: int | None) -> str:
    """Reaps whatever ends in here until the program does; says how that went."""
    while True:
        if processes is not None:
            signal.sigtimedwait({signal.SIGCHLD}, POLL)
        while True:
            ended, outcome = os.waitpid(-1, 0 if processes is None else os.WNOHANG)
            if ended == program:
                return finished(job, outcome)
            if not ended:
                break
        if processes is not None and (excess := over_limit(job, processes)):
            return excess


def finished(job: dict, outcome: int) -> str:
    code = os.waitstatus_to_exitcode(outcome)
    if code in (-signal.SIGXCPU, -signal.SIGKILL) and reaped_seconds() >= job["cpu_seconds"]:
        return "cpu"
    return f"exit {code}"


def reaped_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def over_limit(job: dict, processes: int) -> str:
    """Which limit all processes in here exceed together, or nothing."""
    ticks, pages, threads = 0, 0, 0
    for name in os.listdir(processes):
        if not name.isdigit() or name == "1":
            continue
        try:
            file = os.open(f"{name}/stat", os.O_RDONLY, dir_fd=processes)
        except OSError:
            continue  # it ended meanwhile
        try:
            # The name of the program, in brackets, may hold anything.
            fields = os.read(file, 4096).rpartition(b")")[2].split()
        except OSError:
            continue
        finally:
            os.close(file)
        ticks += sum(map(int, fields[11:15]))
        threads += int(fields[17])
        pages += int(fields[21])
    if pages * resource.getpagesize() > job["memory_bytes"]:
        return "memory"
    if ticks / os.sysconf("SC_CLK_TCK") + reaped_seconds() > job["cpu_seconds"]:
        return "cpu"
    if threads > job["processes"]:
        return "processes"
    return ""


# The program.


def become_program(job: dict, isolated: bool) -> None:
    os.setsid()
    # Copies out of the way first. Only 0, 1, 2 and the channel outlive the exec.
    wanted = [os.open(job["stdin"], os.O_RDONLY), 1, 2, *job["channel"], job["status"]]
    *copies, status = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 64) for each in wanted]
    job = {**job, "status": status}
    for place, copy in enumerate(copies):
        os.dup2(copy, place)
    os.chdir(job["directory"])
    os.umask(0o077)
    limit(job)
    if isolated:
        drop_privileges()
    attempt(job, "calls", lambda: filter_calls(job["calls"]))
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    say(job, "start")
    os.execve(job["command"][0], job["command"], {})


def limit(job: dict) -> None:
    seconds = int(job["cpu_seconds"]) + 2  # the watch, where there is one, comes first
    spare = 0 if os.geteuid() == 0 else 2  # the launcher and the first process count as well
    limits = {
        "CPU": seconds,
        "AS": job["memory_bytes"],
        "DATA": job["memory_bytes"],
        "FSIZE": job["file_bytes"],
        "NPROC": job["processes"] + spare,
        "NOFILE": 64,
        "CORE": 1,  # 0 would still start a program that the system has for dumps
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def drop_privileges() -> None:
    for capability in range(64):
        try:
            prctl(CAPBSET_DROP, capability)
        except OSError:
            break  # the last one this kernel knows came before
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    prctl(NO_NEW_PRIVS, 1)


def filter_calls(program: bytes) -> None:
    """Installs a seccomp filter: struct sock_fprog, of instructions of 8 bytes."""

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    described = Filter(len(program) // 8, program)
    prctl(NO_NEW_PRIVS, 1)
    prctl(SECCOMP, 2, ctypes.cast(ctypes.pointer(described), ctypes.c_void_p))


if __name__ == "__main__":
    described = marshal.load(sys.stdin.buffer)
    guarded(described, lambda: launch(described))
