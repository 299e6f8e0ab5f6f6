"""Changes of the set of models, one at a time, each on a thread of its own, which no interrupt can split.

Problem: Ctrl-C raises KeyboardInterrupt between any two lines of the main thread, also of ``finally`` blocks. A replacement
left in the middle would leave tables of two versions in service, a ``close`` tiers that are never closed. Choice: the work runs
on another thread, where no signal handler runs, and the caller only waits. An interrupt there asks the work to stop. It does,
and undoes what it did, as long as it only prepares; once it has begun to commit it goes on to its end. The caller then raises
the interrupt. A second one lets the caller go at once, while the thread goes on. Turned down: signal masks (Python's handlers
run in the main thread all the same, and a load of minutes could not be stopped), and a record of steps to be redone by the next
call, which may never come.
"""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Generic, NoReturn, TypeVar

from hps_numba.errors import ClosedError
from hps_numba.runtime.fork import register_fork_reset

__all__ = ["Check", "ModelJobs", "go_on"]

log = logging.getLogger(__name__)
T = TypeVar("T")
Check = Callable[[], None]
"""Called by the work where it can still stop; it raises if it is to stop."""


def go_on() -> None:
    """A Check that never stops the work."""


class _Stopped(BaseException):
    """Ends work whose caller was interrupted; nobody sees it."""


class _Job(Generic[T]):
    """One piece of work, its result and its end.

    Attributes:
        ended: set when the work has ended, whatever became of it.
    """

    def __init__(self, work: Callable[[Check], T], closing: Callable[[], bool]) -> None:
        self._work, self._closing = work, closing
        self._stopping = False
        self._result: list[T] = []
        self._problem: BaseException | None = None
        self.ended = threading.Event()

    def stop(self) -> None:
        """Ask the work to stop where it can."""
        self._stopping = True

    def check(self) -> None:
        """What the work calls where it can stop."""
        if self._stopping:
            raise _Stopped
        if self._closing():
            _refuse()

    def run(self, turn: AbstractContextManager[object]) -> None:
        """Do the work in its ``turn``, on any thread; raises nothing."""
        try:
            with turn:
                self._result.append(self._work(self.check))
        except BaseException as problem:
            self._problem = problem
        finally:
            self.ended.set()

    def result(self) -> T:
        """What the work returned, or raised."""
        if self._problem is not None:
            problem, self._problem = self._problem, None
            try:
                raise problem
            finally:
                del problem  # no cycle through the traceback
        return self._result[0]


class ModelJobs:
    """Runs one job at a time, the others wait. Once ``closing`` is set, only the one that closes runs.

    Attributes:
        closing: the server is being closed, or is: jobs are refused, and one at work stops where it can.

    Thread safety: every method. A job may run another one.
    """

    def __init__(self) -> None:
        self.closing = False
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """A new lock, as a forked child needs it: the thread that had it is the parent's."""
        self._lock = threading.RLock()
        self._worker: int | None = None

    def run(self, work: Callable[[Check], T]) -> T:
        """Do the work and return what it returns; it is called with a Check.

        Raises:
            ClosedError: the server is being closed.   As ``work``.   KeyboardInterrupt, or whatever interrupts the wait: the
                work was undone, or it was done, or this is about to happen.
        """

        if self.closing:
            _refuse()

        def unless_closing(check: Check) -> T:
            if self.closing:
                _refuse()
            return work(check)

        return self._run(unless_closing)

    def close(self, work: Callable[[Check], T]) -> T:
        """``run`` for the job that closes the server: it goes first, and is never stopped."""
        self.closing = True
        return self._run(lambda _: work(go_on))

    def _run(self, work: Callable[[Check], T]) -> T:
        if self._worker == threading.get_ident():  # a job runs another one
            return work(go_on)
        job: _Job[T] = _Job(work, lambda: self.closing)
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(job.run, self._turn()), name="hps_numba_models")
        try:
            thread.start()
        except RuntimeError as problem:  # no more threads, or the interpreter is shutting down
            log.debug("models are changed by the calling thread: %s", problem)
            job.run(self._turn())
        try:
            job.ended.wait()
        except BaseException:
            job.stop()
            job.ended.wait()
            raise
        return job.result()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with self._lock:
            before, self._worker = self._worker, threading.get_ident()
            try:
                yield
            finally:
                self._worker = before


def _refuse() -> NoReturn:
    raise ClosedError("the server is closed")
