"""Work on records in several processes, whose results come in the order of the records."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from train.data.records import Record
from zaya_jax.errors import DataError

CHUNK_RECORDS, CHUNK_BYTES = 256, 1 << 20  # that a process is given at a time
WORTH_PROCESSES = 8  # chunks; starting a process takes as long as many of them
AHEAD = 4  # chunks a process that are read before their turn
MOST_WORKERS = 16

_work: Callable[[list[Record]], Any]


def in_order[Result](
    work: Callable[[list[Record]], Result], records: Iterable[Record], workers: int | None
) -> Iterator[Result]:
    """What `work` (which is pickled) makes of the records, a chunk at a time, in their order.

    Args:
      workers: processes; 0 for this one; None for one a processor, at most 16. Few chunks are
        not worth a process.

    Raises:
      DataError: a process died.
    """
    if workers is None:
        workers = min(MOST_WORKERS, os.cpu_count() or 1)
    chunks = _chunks(records)
    first = list(itertools.islice(chunks, WORTH_PROCESSES))
    if workers == 0 or len(first) < WORTH_PROCESSES:
        yield from map(work, itertools.chain(first, chunks))
        return
    # Not forked: JAX has threads in this process.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (work,))
    try:
        pending: deque[Future[Result]] = deque()
        for chunk in itertools.chain(first, chunks):
            pending.append(pool.submit(_run, chunk))
            if len(pending) > AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a process that tokenises died, perhaps for want of memory: use fewer workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += record.size
        if len(chunk) >= CHUNK_RECORDS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _start(work: Callable[[list[Record]], Any]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot stop its processes, which would wait for work for ever."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _run(chunk: list[Record]) -> Any:
    return _work(chunk)
