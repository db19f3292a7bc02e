"""How this process gives memory back."""

import ctypes
import sys

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
KEPT, GROWTH = 1 << 30, 1 << 26  # bytes


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory, up to a gigabyte, for what is allocated next.

    By default it gives blocks of more than 32 MB back to the system at once. XLA allocates the
    temporaries of each run of a program as one such block, which the system then has to clear page
    by page, run after run: a quarter of the time in which a CPU reads prompts of 4x512 tokens.
    Threads other than the first have heaps of 64 MB each, so that blocks of about that size are
    given back still. Without glibc this does nothing.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, KEPT)
        libc.mallopt(_M_TOP_PAD, GROWTH)  # or threads would give back the heaps of their own


def give_back_freed_memory() -> None:
    """Returns to the system what this process has freed: after compiling, half a gigabyte that XLA
    needed for it. Without effect where the C library is not glibc."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
