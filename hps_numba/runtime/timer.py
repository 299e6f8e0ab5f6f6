"""Calls made when they are due, by one thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from hps_numba.errors import ClosedError
from hps_numba.runtime.fork import register_fork_reset

__all__ = ["Timer"]

log = logging.getLogger(__name__)


class Timer:
    """One thread that makes calls when they are due; it starts with the first one that is added.

    A call that takes longer than its interval is followed at once by the next, never by two. A call that fails is a WARNING,
    and the next one is made in its time.   Thread safety: every method.
    """

    def __init__(self, what: str) -> None:
        """``what``: the work, for the name of the thread and for warnings."""
        self._what = what
        self._due: dict[str, tuple[float, float, Callable[[], object]]] = {}
        self._closed = False
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Start without a thread and nothing due, as a forked child must: what is called belongs to its parent."""
        self._due = {}
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition(threading.Lock())

    def add(self, name: str, call: Callable[[], object], *, delay: float, interval: float = 0.0) -> None:
        """Make a call first after ``delay`` seconds (after ``interval`` if that is 0), then every ``interval`` seconds.

        With an interval of 0 there is one call, and none if both are 0. It replaces what was added by the same name.
        """
        first = delay or interval
        if first <= 0:
            return
        with self._changed:
            if self._closed:
                return
            self._due[name] = (time.monotonic() + first, interval, call)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=f"hps_numba_{self._what}", daemon=True)
                thread.start()
                self._thread = thread
            self._changed.notify()

    def remove(self, name: str) -> None:
        """Cancel a call."""
        with self._changed:
            self._due.pop(name, None)

    def close(self) -> None:
        """Wait for the running call; there will be no other."""
        with self._changed:
            self._closed = True
            self._due = {}
            self._changed.notify()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while self._call(self._next()):
            pass  # no reference to what is called is held while the thread waits

    def _call(self, due: tuple[str, Callable[[], object]] | None) -> bool:
        """Call what is due; False at the end."""
        if due is None:
            return False
        name, call = due
        try:
            call()
        except ClosedError:
            log.debug("%s: closed during its %s", name, self._what)
        except Exception as problem:  # a tier's own code may raise anything, and the timer must go on
            log.warning("%s: the %s failed: %s", name, self._what, problem)
        return True

    def _next(self) -> tuple[str, Callable[[], object]] | None:
        """Wait for what is due next; None at the end."""
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                name = min(self._due, key=lambda name: self._due[name][0], default=None)
                if name is None:
                    self._changed.wait()
                    continue
                if self._due[name][0] > now:
                    self._changed.wait(self._due[name][0] - now)
                    continue
                due, interval, call = self._due.pop(name)
                if interval > 0:
                    self._due[name] = (max(due + interval, now), interval, call)
                return name, call
            return None
