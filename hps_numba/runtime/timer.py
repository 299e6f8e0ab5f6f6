"""Calls made when they are due, by one thread."""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue

from hps_numba.errors import ClosedError
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.threads import start_thread

__all__ = ["Timer"]

log = logging.getLogger(__name__)
_LONGEST_SLEEP = 60.0


class _Call:
    """A call and when it is due; infinity if it was the only one."""

    __slots__ = ("at", "call", "interval")

    def __init__(self, at: float, interval: float, call: Callable[[], object]) -> None:
        self.at, self.interval, self.call = at, interval, call


class Timer:
    """One thread that makes calls when they are due; it starts with the first one that is added.

    A call that takes longer than its interval is followed at once by the next, never by two. A call that fails is a WARNING,
    and the next one is made in its time. The thread ends with the timer: it keeps no reference to it, nor to what is called,
    while it sleeps.   Thread safety: every method; none takes a lock.
    """

    def __init__(self, what: str) -> None:
        """``what``: the work, for the name of the thread and for warnings."""
        self._what = what
        self._closed = False
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Start without a thread and nothing due, as a forked child must: what is called belongs to its parent."""
        self._due: dict[str, _Call] = {}
        self._thread: threading.Thread | None = None
        self._wakes: SimpleQueue[None] = SimpleQueue()  # entries only end a sleep: what is due is in ``_due``

    def add(self, name: str, call: Callable[[], object], *, delay: float, interval: float = 0.0) -> None:
        """Make a call first after ``delay`` seconds (after ``interval`` if that is 0), then every ``interval`` seconds.

        With an interval of 0 there is one call, and none if both are 0. It replaces what was added by the same name.

        Raises:
            CapacityError: the system gives no thread; nothing was added.
        """
        first = delay or interval
        if first <= 0 or self._closed:
            return
        if self._thread is None:
            run = (weakref.ref(self), self._wakes)
            self._thread = start_thread(_run, run, name=f"hps_numba_{self._what}", purpose=self._what)
        self._due[name] = _Call(time.monotonic() + first, interval, call)
        if self._closed:  # meanwhile
            self._due.clear()
        self._wakes.put(None)

    def remove(self, name: str) -> None:
        """Cancel a call."""
        self._due.pop(name, None)

    @property
    def works_here(self) -> bool:
        """Whether this thread makes the calls; ``close`` of another one waits for it."""
        return threading.current_thread() is self._thread

    def close(self) -> None:
        """Wait for the running call; there will be no other."""
        self._closed = True
        self._due.clear()
        self._wakes.put(None)
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def __del__(self) -> None:
        wakes = getattr(self, "_wakes", None)  # an interrupt may have ended ``__init__``
        if wakes is not None:
            wakes.put(None)

    def sleep_seconds(self) -> float:
        """Seconds until the next call is due, at most a minute."""
        first = min((call.at for call in list(self._due.values())), default=math.inf)
        return min(max(0.0, first - time.monotonic()), _LONGEST_SLEEP)

    def call_due(self) -> bool:
        """Make the call that is due, if one is; False if the thread of the timer is to end."""
        if self._thread not in (None, threading.current_thread()):  # two were started at a time
            return False
        now = time.monotonic()
        entries = [(name, self._due.get(name)) for name in list(self._due)]  # others may be added and removed meanwhile
        due = [(entry.at, name, entry) for name, entry in entries if entry is not None and entry.at <= now]
        if due and not self._closed:
            _, name, entry = min(due, key=lambda item: item[0])
            entry.at = max(entry.at + entry.interval, now) if entry.interval > 0 else math.inf
            self._call(name, entry.call)
        return not self._closed

    def _call(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except ClosedError:
            log.debug("%s: closed during its %s", name, self._what)
        except Exception as problem:  # a tier's own code may raise anything, and the timer must go on
            log.warning("%s: the %s failed: %s", name, self._what, problem)


def _run(reference: weakref.ref[Timer], wakes: SimpleQueue[None]) -> None:
    while True:
        timer = reference()
        if timer is None or not timer.call_due():
            return
        seconds = timer.sleep_seconds()
        del timer
        if seconds > 0:
            try:
                wakes.get(timeout=seconds)
            except Empty:
                continue
