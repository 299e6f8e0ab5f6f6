"""Background work, which no caller waits for.

Not an executor of the standard library: its locks are not reentrant, an interrupt between two of its lines leaves one taken for
ever, and a job whose thread could not be started stays in its queue and runs later, when its caller has long cleaned up.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from hps_numba.errors import CapacityError, ClosedError
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.threads import start_thread

__all__ = ["BackgroundJobs"]

log = logging.getLogger(__name__)
_Jobs = SimpleQueue[Callable[[], None] | None]  # None: a thread may end


class BackgroundJobs:
    """Up to ``threads`` threads for jobs that no caller waits for; they end with the object.

    Attributes:
        dropped: jobs that ``submit`` refused while it was open; of two refused in the same moment, perhaps one.

    Thread safety: ``submit`` from any thread, also in a signal handler; it takes no lock.
    """

    #: jobs that may wait; further ones are dropped, so that a row is fetched from its tier once more
    LIMIT = 64

    def __init__(self, threads: int = 1) -> None:
        self._limit = threads
        self._closed = False
        self.dropped = 0
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Start without threads and jobs, as a forked child must."""
        self._jobs: _Jobs = SimpleQueue()
        self._unfinished: list[object] = []  # one entry a job that waits or is at work
        self._threads: list[threading.Thread] = []

    @property
    def waiting(self) -> int:
        """Jobs that wait or are at work."""
        return len(self._unfinished)

    @property
    def works_here(self) -> bool:
        """Whether this thread is one of these, for which ``close`` waits."""
        return threading.current_thread() in self._threads

    def submit(self, job: Callable[[], None]) -> bool:
        """Run ``job`` later and return True; False if it is dropped: too many wait, or no thread can be started."""
        if self._closed:
            return False
        if len(self._unfinished) >= self.LIMIT:
            self.dropped += 1
            return False
        if len(self._threads) < self._limit:
            try:
                run, name = (self._jobs, self._unfinished), f"hps_numba_background_{len(self._threads)}"
                self._threads.append(start_thread(_work_off, run, name=name, purpose="rows of slower tiers"))
            except CapacityError as problem:
                log.debug("%s", problem)
                if not self._threads:
                    self.dropped += 1
                    return False
        self._unfinished.append(job)
        self._jobs.put(job)
        return True

    def close(self) -> None:
        """Wait for the running jobs and drop those that wait, and all later ones; again goes on where it was interrupted."""
        self._closed = True
        try:
            while True:
                self._jobs.get_nowait()
        except Empty:
            self._end()
        for thread in list(self._threads):
            if thread is not threading.current_thread():
                thread.join()
        self._unfinished.clear()

    def _end(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)

    def __del__(self) -> None:
        if hasattr(self, "_threads"):  # an interrupt may have ended ``__init__``
            self._end()


def _work_off(jobs: _Jobs, unfinished: list[object]) -> None:
    """Knows the queue and not its owner, which may go without ``close``."""
    while (job := jobs.get()) is not None:
        try:
            job()
        except ClosedError:
            log.debug("closed during a job in the background")
        except BaseException as problem:
            log.warning("rows fetched from a slower tier were not kept: %s", problem)
        if job in unfinished:
            unfinished.remove(job)
        del job  # it may be the last that knows its server
    jobs.put(None)  # for the next one: an interrupt may have left a thread that nobody counts
