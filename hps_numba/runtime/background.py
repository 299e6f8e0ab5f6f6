"""Work that no caller waits for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from hps_numba.errors import ClosedError
from hps_numba.runtime.fork import register_fork_reset

__all__ = ["BackgroundJobs"]

log = logging.getLogger(__name__)


class BackgroundJobs:
    """Threads for jobs that no caller waits for, ``threads`` at most.   **Threads:** ``submit`` from any thread."""

    #: jobs that may wait; more are dropped, which only means that a row is fetched from its tier once more
    LIMIT = 64

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._closed = False
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Start with no thread and no job, as a forked child has to."""
        self._executor: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._waiting = 0

    def submit(self, job: Callable[[], None]) -> bool:
        """Run ``job`` later, and return True; it is dropped if many wait already, or none may start (the interpreter ends)."""
        with self._lock:
            if self._closed or self._waiting >= self.LIMIT:
                return False
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self._threads, "hps_numba_background")
            try:
                future = self._executor.submit(job)
            except RuntimeError as problem:
                log.debug("rows fetched from a slower tier were not kept: %s", problem)
                return False
            self._waiting += 1
        future.add_done_callback(self._done)
        return True

    def _done(self, future: Future[None]) -> None:
        with self._lock:
            self._waiting -= 1
        problem = None if future.cancelled() else future.exception()
        if problem is not None and not isinstance(problem, ClosedError):
            log.warning("rows fetched from a slower tier were not kept: %s", problem)

    def close(self) -> None:
        """Let the job at work end and drop those that wait; later ones are dropped at once."""
        with self._lock:
            self._closed = True
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
