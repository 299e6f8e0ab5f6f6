"""Calls that come from inside another call of the same thread: from a signal handler, ``__del__``, a weakref or gc callback.

A reentrant lock lets such a call in, though the other is halfway through a change; a plain lock waits for itself forever.
Neither can be put right by waiting, so both are refused. Turned down: to queue the call until the other has ended, as its
caller expects that it is done when it returns.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from hps_numba.errors import ReentryError
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.threads import is_pool_thread, works_alone

__all__ = ["ExclusiveLock", "reentry_error", "refuse_inside"]

_PACKAGE = str(Path(__file__).parents[1])


class ExclusiveLock:
    """A lock that threads wait for, and that refuses a thread which is inside already.

    Attributes:
        mutex: the lock itself, reentrant: for what may happen inside ``held`` too, as it changes nothing.

    Thread safety: every method.
    """

    def __init__(self, place: str) -> None:
        """``place``: what is locked, for messages."""
        self._place = place
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """A new lock, as a forked child needs it: nobody releases one that another thread held."""
        self.mutex = threading.RLock()
        self._inside = False  # changed by the thread that holds the mutex

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock for a change.

        Raises:
            ReentryError: this thread is inside such a block already, or inside a compilation that another one, which is inside,
                may wait for.
        """
        with self._taken():  # before the test: a handler that runs in between does its whole work first
            if self._inside:
                raise reentry_error(self._place, "a change")
            try:
                self._inside = True
                yield
            finally:
                self._inside = False

    def _taken(self) -> AbstractContextManager[object]:
        """The mutex, to be entered; taken without waiting if this thread must not wait, and then to be left once."""
        if not works_alone():
            return self.mutex
        if not self.mutex.acquire(blocking=False):
            raise reentry_error(self._place, "a compilation, while another thread is there,")
        stack = ExitStack()
        stack.callback(self.mutex.release)
        return stack

    @property
    def owned_here(self) -> bool:
        """Whether this thread has the mutex."""
        owned: bool = self.mutex._is_owned()  # type: ignore[attr-defined]  # as ``threading.Condition`` asks a lock
        return owned

    @contextmanager
    def held_if_free(self) -> Iterator[bool]:
        """``held`` without waiting: gives False, and holds nothing, if another thread has the mutex or this one is inside."""
        if not self.mutex.acquire(blocking=False):
            yield False
            return
        try:
            if self._inside:
                yield False
                return
            try:
                self._inside = True
                yield True
            finally:
                self._inside = False
        finally:
            self.mutex.release()


def refuse_inside(place: str, parts: Iterable[object]) -> None:
    """Refuse a call from inside a method of one of the objects, by a look at the stack of this thread.

    Lookups leave no mark of their own for this: it would cost each of them more than it is worth.

    Raises:
        ReentryError: this thread is inside such a method.
    """
    if is_pool_thread():  # a garbage collection may run anywhere
        raise reentry_error(place, "a lookup or a step of another thread, which waits for this one, or")
    numbers = {id(part) for part in parts if part is not None}
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        ours = code.co_varnames[:1] == ("self",) and code.co_filename.startswith(_PACKAGE)
        if ours and id(frame.f_locals.get("self")) in numbers:
            raise reentry_error(place, code.co_qualname)
        frame = frame.f_back  # type: ignore[assignment]


def reentry_error(place: str, what: str) -> ReentryError:
    """What to raise for a call from inside ``what``."""
    return ReentryError(
        f"{place}: expected a call from outside, got one from inside {what} of the same thread (from a signal handler, "
        "__del__ or a callback): call again when that has ended"
    )
