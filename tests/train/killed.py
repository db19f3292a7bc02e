"""Kills a process at its Nth access to files of a place: what a machine that dies leaves behind.

    python killed.py PLACE N ARGUMENTS..    # of `zaya`

Accesses are what Python announces: folders made, files opened, renamed and removed.
"""

import os
import signal
import sys

WATCHED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def kill_at(place: str, limit: int) -> list[str]:
    """From now on; 0 kills never. The list of accesses grows as they happen."""
    seen: list[str] = []

    def on_event(event, arguments):
        if event in WATCHED and place in str(arguments[0]):
            seen.append(f"{event} {arguments[0]}")
            if len(seen) == limit:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)
    return seen


if __name__ == "__main__":
    from zaya_jax.cli.main import main

    place, limit, *arguments = sys.argv[1:]
    kill_at(place, int(limit))
    main(arguments)
