"""Work that an interrupt of its caller cannot split: it runs on a thread where none arrives, and the caller waits.

Problem: Ctrl-C raises KeyboardInterrupt between any two bytecodes of the main thread, also in ``finally`` blocks and in context
managers, which then keep their locks. A write that stops between two tiers leaves them different for good. Choice: work that
the main thread asks for runs on another thread; signal handlers never run there. An interrupt of the wait is kept until the
work has ended, and then raised. A second one is raised at once, and the work goes on to its end alone. Other threads get no
interrupts, and work for themselves. It costs 20 microseconds. Turned down: a signal handler that waits (it would replace the
user's, and covers one signal); redoing an interrupted write (the locks and tiers that were interrupted inside are in no known
state).
"""

from __future__ import annotations

import _thread
import contextvars
import logging
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, Generic, TypeVar

from hps_numba.runtime.blocks import has_ended
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.reentry import reentry_error
from hps_numba.runtime.threads import works_alone

__all__ = ["Ask", "hand_over", "refuse_inside_work", "shielded"]

log = logging.getLogger(__name__)
T = TypeVar("T")
Ask = Callable[[Callable[[], Any]], Any]
"""Runs a function on the thread that asked for the work, and gives what it returns or raises."""
_Reply = tuple[Any, BaseException | None]
_LOOK_SECONDS = 0.1


class _Workers:
    """Threads that wait for work, as many as ever worked at a time. Thread safety: every method."""

    def __init__(self) -> None:
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Start without threads."""
        self._idle: list[SimpleQueue[Callable[[], None]]] = []

    def start(self, job: Callable[[], None]) -> None:
        """Call ``job``, which must not raise, on a thread.

        Raises:
            RuntimeError: no thread can be started.
        """
        try:
            inbox = self._idle.pop()
        except IndexError:
            inbox = SimpleQueue()
            _thread.start_new_thread(self._work, (inbox, self._idle))
        inbox.put(job)

    @staticmethod
    def _work(inbox: SimpleQueue[Callable[[], None]], idle: list[SimpleQueue[Callable[[], None]]]) -> None:
        while True:
            inbox.get()()
            idle.append(inbox)


_workers = _Workers()


class _CallerLeft(BaseException):
    """Ends work that asks a thread which was interrupted and waits no more; nobody sees it."""


class _Job(Generic[T]):
    """One piece of work. All that the two threads need is in attributes; queues only end their sleep.

    Attributes:
        ended: the work has ended, whatever became of it.
        caller: the frame that waits for it; None when it waits no more.
    """

    def __init__(self, work: Callable[[Ask], T], caller: FrameType) -> None:
        self.caller: FrameType | None = caller
        self._work = work
        self._turns: list[None] = [None]  # whoever takes it does the work
        self._wakes: SimpleQueue[None] = SimpleQueue()
        self._answers: SimpleQueue[None] = SimpleQueue()
        self._question: Callable[[], Any] | None = None
        self._reply: _Reply | None = None
        self._result: Any = None
        self._problem: BaseException | None = None
        self.ended = False

    def take(self) -> bool:
        """Whether the caller is to do the work: true once."""
        try:
            self._turns.pop()
        except IndexError:
            return False
        return True

    def run(self) -> None:
        """Do the work, unless somebody else does; raises nothing."""
        if not self.take():
            return
        try:
            self._result = self._work(self._ask)
        except BaseException as problem:
            self._problem = problem
        self.ended = True
        self._wakes.put(None)

    def _ask(self, question: Callable[[], Any]) -> Any:
        self._question = question
        self._wakes.put(None)
        while (reply := self._reply) is None:
            try:
                self._answers.get(timeout=_LOOK_SECONDS)
            except Empty:  # the asking thread may have been interrupted before it said that it has answered, or for good
                if self._reply is None and not self._has_caller():
                    raise _CallerLeft from None
        self._question = None
        self._reply = None
        answer, problem = reply
        if problem is not None:
            raise problem
        return answer

    def _has_caller(self) -> bool:
        """Whether the call of ``shielded`` that waits for this job is still running."""
        caller = self.caller
        return caller is not None and not has_ended(caller)

    def wait(self) -> None:
        """Wait until the work has ended, and answer what it asks."""
        while not self.ended:
            question = self._question
            if question is None or self._reply is not None:
                with suppress(Empty):  # now and then the interpreter has to look for interrupts that are no signals
                    self._wakes.get(timeout=_LOOK_SECONDS)
            else:
                self._answer((question(), None))

    def _answer(self, reply: _Reply) -> None:
        self._reply = reply
        self._answers.put(None)

    def fail(self, problem: BaseException) -> bool:
        """Answer a question with an error; False if none is open."""
        is_open = self._question is not None and self._reply is None
        if is_open:
            self._answer((None, problem))
        return is_open

    def result(self) -> T:
        """What the work returned, or raised."""
        if self._problem is not None:
            problem, self._problem = self._problem, None
            try:
                raise problem
            finally:
                del problem  # no cycle through the traceback
        result: T = self._result
        return result


def shielded(work: Callable[[Ask], T], *, owner: object, place: str) -> T:
    """What ``work(ask)`` returns; it is done whole, whatever interrupts this thread.

    Args:
        work: called on another thread if this is the main one. What has to run on this thread, such as a function of the
            caller's, it runs by ``ask``.
        owner: what the work changes.   place: its name, for messages.

    Raises:
        ReentryError: this thread waits for other work of the same owner: the call comes from a signal handler or a callback.
        As ``work``.   KeyboardInterrupt, or what else interrupts this thread: the work was done, or fails by itself.
    """
    if threading.current_thread() is not threading.main_thread():
        return work(_ask_here)
    refuse_inside_work(place, (owner,))
    job = _Job(work, sys._getframe())
    try:
        return _run(job, work, place)
    finally:
        job.caller = None  # no cycle of the frame and its variable


def _run(job: _Job[T], work: Callable[[Ask], T], place: str) -> T:
    """Have the job done by another thread, or, if there is none, do ``work`` here."""
    interrupt: BaseException | None = None
    handed_over = False
    while not job.ended:
        try:
            if not handed_over:  # again if an interrupt left open whether it was: the work is done once
                handed_over = hand_over(job.run, place)
                if not handed_over and job.take():
                    break
            job.wait()
        except BaseException as problem:
            if not job.fail(problem):
                if interrupt is not None:
                    log.warning("%s: a second interrupt: the change goes on in the background", place)
                    raise
                interrupt = problem
    if not job.ended:
        return work(_ask_here)
    if interrupt is not None:
        raise interrupt
    return job.result()


def hand_over(run: Callable[[], None], place: str) -> bool:
    """Call ``run``, which must not raise, on a thread where no interrupt arrives; False if there is none to wait for.

    An interrupt of this thread may leave open whether that will happen: call it again, with a ``run`` that works once.
    """
    if works_alone():
        return False
    try:
        _workers.start(partial(contextvars.copy_context().run, run))
    except RuntimeError as problem:  # a limit, or the interpreter is shutting down
        log.debug("%s: is changed by the calling thread: %s", place, problem)
        return False
    return True


def _ask_here(question: Callable[[], Any]) -> Any:
    return question()


def refuse_inside_work(place: str, owners: Iterable[object]) -> None:
    """Refuse a call from inside ``shielded`` of this thread for one of the owners, for whose end it would wait.

    Raises:
        ReentryError: it is such a call.
    """
    numbers = {id(owner) for owner in owners}
    frame = sys._getframe(2)  # not that of ``shielded`` itself
    while frame is not None:
        if frame.f_code is shielded.__code__ and id(frame.f_locals.get("owner")) in numbers:
            raise reentry_error(place, "a change")
        frame = frame.f_back  # type: ignore[assignment]
