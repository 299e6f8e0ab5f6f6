"""Threads that read from a database at the same time: rocksdict reads without the GIL, and a disk serves many reads at once.

Not the pool of ``runtime.threads``, a thread a core: reads wait for the disk. Not an executor of the standard library:
an interrupt may leave it locked. A call that is interrupted leaves its reads to the threads, which write to nobody's memory.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

from hps_numba.errors import CapacityError
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.threads import start_thread

__all__ = ["Readers"]

T = TypeVar("T")
_LEAST_KEYS = 64  # of a part: handing one over takes as long as reading a dozen warm rows


class Readers:
    """Up to ``threads`` threads, the caller's among them, started on first use. Thread safety: every method."""

    def __init__(self, threads: int) -> None:
        self.threads = max(1, threads)
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Start without threads."""
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._started: list[threading.Thread] = []

    def read(self, function: Callable[[list[bytes]], list[T]], keys: list[bytes]) -> list[T]:
        """``function`` of the keys, by parts that are in progress at the same time; raises what it raises."""
        parts = min(self.threads, len(keys) // _LEAST_KEYS)
        if parts < 2:
            return function(keys)
        step = -(-len(keys) // parts)
        waiting = deque(range(0, len(keys), step))
        count = len(waiting)
        done: SimpleQueue[tuple[int, list[T], BaseException | None]] = SimpleQueue()

        def work() -> None:
            while True:
                try:
                    start = waiting.popleft()
                except IndexError:
                    return
                try:
                    done.put((start, function(keys[start : start + step]), None))
                except BaseException as problem:
                    done.put((start, [], problem))

        for _ in range(count - 1):
            self._submit(work)
        work()
        return _in_order(done.get() for _ in range(count))

    def _submit(self, job: Callable[[], None]) -> None:
        if len(self._started) < self.threads - 1:
            try:
                self._started.append(start_thread(_work_off, (self._jobs,), name="rocksdb reader", purpose="reads of RocksDB"))
            except CapacityError:  # the caller reads what no thread does
                if not self._started:
                    return
        self._jobs.put(job)

    def close(self, seconds: float) -> None:
        """End the threads once they have done what they were given, and wait for that, ``seconds`` at most."""
        threads, self._started = self._started, []
        for _ in threads:
            self._jobs.put(None)
        end = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))


def _in_order(answers: Any) -> list[Any]:
    parts = sorted(answers, key=lambda answer: answer[0])
    for _, _, problem in parts:
        if problem is not None:
            raise problem
    return [item for _, part, _ in parts for item in part]


def _work_off(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # it refers to the database
