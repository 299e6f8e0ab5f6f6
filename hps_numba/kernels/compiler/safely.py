"""Compilations that survive an interrupt (Ctrl-C) and a fork.

*Problem.* numba changes global state in Python code while it compiles. An exception of a signal handler in the midst of it
leaves that state half changed, or numba's lock taken, and the process can never compile again. A child that is forked
meanwhile has the lock too, but not the thread that would release it.

*Choice.* Signal handlers run in the main thread only, so what the main thread asks for is compiled in another thread, for
which it waits; if it is interrupted, the compilation goes on, and the next call finds the result. A fork waits until no thread
compiles.
"""

from __future__ import annotations

import _thread
import atexit
import logging
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from numba.core.compiler_lock import global_compiler_lock

__all__ = ["compile_lock", "run_safely", "safe_dispatcher"]

log = logging.getLogger(__name__)

#: numba's lock: one thread at a time compiles, and may take it again; who takes it needs no lock of its own
compile_lock = global_compiler_lock

_STACK = 8 << 20  # bytes that LLVM may need


class _Job:
    """A call in a thread of its own."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._done = _thread.allocate_lock()
        self._done.acquire()
        self._result: Any = None
        self._problem: BaseException | None = None
        self._has_begun = False
        self.abandoned = False  # the caller was interrupted before it knew of a thread

    def run(self) -> None:
        """Call it; by the thread."""
        self._has_begun = True
        try:
            self._result = self._work()
        except BaseException as problem:
            self._problem = problem
        finally:
            self._work = None  # type: ignore[assignment]
            _running.discard(self)
            self._done.release()

    def wait(self) -> Any:
        """Its result, or what it raised; an interrupt ends the wait, not the call."""
        try:
            self._done.acquire()
        except BaseException:
            log.debug("interrupted: the compilation goes on in the background")
            raise
        self._done.release()
        try:
            if self._problem is not None:
                raise self._problem
            return self._result
        finally:
            self._problem = None  # its traceback refers to this frame

    def finish(self) -> None:
        """Wait until it has ended, if it ever began."""
        if self._has_begun or not self.abandoned:
            with self._done:
                pass


_running: set[_Job] = set()


def run_safely(work: Callable[[], Any]) -> Any:
    """What ``work``, a compilation, returns or raises; an interrupt of the caller does not reach it.

    Thread safety: any thread, also one that compiles.
    """
    if (
        compile_lock.is_locked()  # by this thread: the other one would wait for it
        or threading.get_ident() != threading.main_thread().ident
        or 0 < threading.stack_size() < _STACK
    ):
        return work()
    job = _Job(work)
    try:
        _running.add(job)
        _thread.start_new_thread(job.run, ())
    except RuntimeError:  # a limit of the system, or the interpreter is shutting down
        _running.discard(job)
        return work()
    except BaseException:
        job.abandoned = True
        raise
    return job.wait()


def safe_dispatcher(dispatcher: Any) -> Any:
    """numba's dispatcher, which from now on compiles by ``run_safely``."""
    compile_now = dispatcher.compile
    dispatcher.compile = lambda signature: run_safely(lambda: compile_now(signature))
    return dispatcher


def _interrupt_main() -> None:
    """By a signal, which ends waits."""
    main = threading.main_thread().ident
    if main is not None:
        signal.pthread_kill(main, signal.SIGINT)


class _Fork:
    """Holds numba's lock during a fork.

    Signal handlers may raise in these calls too, where Python would print that and go on: it is kept, the lock is taken and
    released all the same, and the main thread is interrupted after the fork.
    """

    def __init__(self) -> None:
        self._took = self._interrupted = False

    def before(self) -> None:
        """Wait until no thread compiles."""
        took = not compile_lock.is_locked()
        while not compile_lock.is_locked():  # asked again: an interrupt may come when the lock has been taken
            try:
                compile_lock.acquire()
            except BaseException:
                self._interrupted = True
        self._took = took  # several threads may fork: this is of the one that has the lock

    def in_parent(self) -> None:
        """Let others compile, and be interrupted now."""
        took, self._took = self._took, False
        while took and compile_lock.is_locked():
            try:
                compile_lock.release()
            except BaseException:
                self._interrupted = True
        if self._interrupted:
            self._interrupted = False
            _thread.start_new_thread(_interrupt_main, ())  # what is raised in here is printed and forgotten

    def in_child(self) -> None:
        """There are no other threads."""
        took, self._took = self._took, False
        _running.clear()
        self._interrupted = False
        if not compile_lock.is_locked():  # an interrupt kept ``before`` from it, and another thread may have had it
            compile_lock.__init__()
        elif took:
            compile_lock.release()


@atexit.register
def _finish() -> None:
    """The process must not end under a thread that compiles."""
    for job in list(_running):
        job.finish()


if hasattr(os, "register_at_fork"):
    _fork = _Fork()
    os.register_at_fork(before=_fork.before, after_in_parent=_fork.in_parent, after_in_child=_fork.in_child)
