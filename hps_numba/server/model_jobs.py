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

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from queue import Empty, SimpleQueue
from typing import Generic, NoReturn, TypeVar

from hps_numba.errors import ClosedError
from hps_numba.runtime.reentry import ExclusiveLock, reentry_error
from hps_numba.runtime.shielded import hand_over

__all__ = ["Check", "ModelJobs", "go_on"]

log = logging.getLogger(__name__)
_LOOK_SECONDS = 1.0
T = TypeVar("T")
Check = Callable[[], None]
"""Called by the work where it can still stop; it raises if it is to stop."""


def go_on() -> None:
    """A Check that never stops the work."""


class _Stopped(BaseException):
    """Ends work whose caller was interrupted; nobody sees it."""


class _Job(Generic[T]):
    """One piece of work, its result and its end. Its queue only ends a sleep: no interrupt leaves a lock of it locked.

    Attributes:
        ended: the work has ended, whatever became of it.
    """

    def __init__(
        self, work: Callable[[Check], T], closing: Callable[[], bool], turn: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self._work, self._closing, self._turn = work, closing, turn
        self._runs: list[None] = [None]  # whoever takes it does the work
        self._stopping = False
        self._result: list[T] = []
        self._problem: BaseException | None = None
        self._wakes: SimpleQueue[None] = SimpleQueue()
        self.ended = False

    def stop(self) -> None:
        """Ask the work to stop where it can."""
        self._stopping = True

    def check(self) -> None:
        """What the work calls where it can stop."""
        if self._stopping:
            raise _Stopped
        if self._closing():
            _refuse()

    def run(self) -> None:
        """Do the work in its turn, on any thread, unless it was done or is at work; raises nothing."""
        try:
            self._runs.pop()
        except IndexError:
            return
        try:
            with self._turn():
                self._result.append(self._work(self.check))
        except BaseException as problem:
            self._problem = problem
        self.ended = True
        self._wakes.put(None)

    def wait(self) -> None:
        """Wait until the work has ended."""
        while not self.ended:
            with suppress(Empty):  # now and then the interpreter has to look for interrupts that are no signals
                self._wakes.get(timeout=_LOOK_SECONDS)

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

    A job that is asked for inside another one, by a tier's code or a finalizer, is refused: the other is half done.

    Thread safety: every method.
    """

    def __init__(self) -> None:
        self.closing = False
        self._turn = ExclusiveLock("the models of the server")

    def run(self, work: Callable[[Check], T]) -> T:
        """Do the work and return what it returns; it is called with a Check.

        Raises:
            ClosedError: the server is being closed.   ReentryError: this thread is in a job.   As ``work``.
            KeyboardInterrupt, or whatever interrupts the wait: the work was undone, or it was done, or this is about to happen.
        """
        self._check_turn()
        if self.closing:
            _refuse()

        def unless_closing(check: Check) -> T:
            if self.closing:
                _refuse()
            return work(check)

        return self._run(unless_closing)

    def close(self, work: Callable[[Check], T]) -> T:
        """``run`` for the job that closes the server: it goes first, and is never stopped."""
        self._check_turn()
        self.closing = True
        return self._run(lambda _: work(go_on))

    def _run(self, work: Callable[[Check], T]) -> T:
        job: _Job[T] = _Job(work, lambda: self.closing, self._turn.held)
        interrupt: BaseException | None = None
        handed_over = False
        while not job.ended:
            try:
                if not handed_over:  # again if an interrupt left open whether it was: the work is done once
                    handed_over = hand_over(job.run, "the models of the server")
                    if not handed_over:
                        job.run()
                job.wait()
            except BaseException as problem:
                job.stop()
                if interrupt is not None:
                    log.warning("the models of the server: a second interrupt: the change ends in the background")
                    raise
                interrupt = problem
        if interrupt is not None:
            raise interrupt
        return job.result()

    def _check_turn(self) -> None:
        if self._turn.owned_here:
            raise reentry_error("the models of the server", "a change of them")


def _refuse() -> NoReturn:
    raise ClosedError("the server is closed")
