"""One thread pool a process: large batches are cut into ranges that the caller and idle threads work off together.

*Why not numba's own threads.* Its ``workqueue`` layer aborts when two Python threads enter it and its OpenMP layer dies
under ``fork``. Here serial kernels that hold no GIL run on plain threads, and the caller never waits for a busy pool: it
works through the ranges itself, and takes back what nobody started.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

__all__ = ["available_cores", "ranges_of", "run_ranges"]

#: below this many bytes a batch is not worth a second thread (handing over costs about 30 microseconds)
SPLIT_BYTES = 1 << 20


def available_cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class _Pool:
    """The executor of this process, made on first use and made anew in a forked child."""

    def __init__(self) -> None:
        self.executor: ThreadPoolExecutor | None = None
        self.threads = available_cores()

    def submit(self, function: Callable[[], Any]) -> Future[Any]:
        if self.executor is None:
            self.executor = ThreadPoolExecutor(max(1, self.threads - 1), "hps_numba")
        return self.executor.submit(function)


_pool = _Pool()


def _after_fork() -> None:
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def ranges_of(n: int, item_bytes: int, threads: int | None = None) -> list[tuple[int, int]]:
    """Cut ``n`` items into ranges for the pool: one range if small, else four a thread of at least SPLIT_BYTES / 2."""
    threads = _pool.threads if threads is None else threads
    total = n * item_bytes
    if threads == 1 or total < SPLIT_BYTES:
        return [(0, n)]
    parts = max(1, min(4 * threads, total // (SPLIT_BYTES // 2)))
    step = -(-n // parts)
    return [(start, min(start + step, n)) for start in range(0, n, step)]


def run_ranges(function: Callable[[int, int], int], ranges: Sequence[tuple[int, int]], threads: int | None = None) -> list[int]:
    """``function(start, stop)`` for every range, on the caller's thread and idle ones; the results in order.

    Raises what ``function`` raises, after all ranges have ended.
    """
    if len(ranges) == 1:
        return [function(*ranges[0])]
    results = [0] * len(ranges)
    waiting = deque(range(len(ranges)))

    def work() -> None:
        while True:
            try:
                number = waiting.popleft()
            except IndexError:
                return
            results[number] = function(*ranges[number])

    threads = _pool.threads if threads is None else threads
    others = [_pool.submit(work) for _ in range(min(threads, len(ranges)) - 1)]
    try:
        work()
    finally:
        failures = [other.exception() for other in others if not other.cancel()]
    for failure in failures:
        if failure is not None:
            raise failure
    return results
