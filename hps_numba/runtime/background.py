"""Background work, which no caller waits for."""

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
    """Up to ``threads`` threads for jobs that no caller waits for.   Thread safety: ``submit`` from any thread."""

    #: jobs that may wait; further ones are dropped, so that a row is fetched from its tier once more
    LIMIT = 64

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._closed = False
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Start without threads and jobs, as a forked child must."""
        self._executor: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._waiting = 0

    def submit(self, job: Callable[[], None]) -> bool:
        """Run ``job`` later and return True; False if it is dropped: too many wait, or the interpreter is shutting down."""
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
        """Wait for the running job and drop those that wait, and all later ones."""
        with self._lock:
            self._closed = True
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
