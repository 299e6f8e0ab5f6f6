"""Background refreshes: the timer of a server, for ``refresh_delay`` and ``refresh_interval`` (spec 1.3, 6.8)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from hps_numba.errors import ClosedError
from hps_numba.forks import renew_after_fork

__all__ = ["RefreshTimer"]

log = logging.getLogger(__name__)


class RefreshTimer:
    """One thread that refreshes the models of a server when they are due; it starts with the first model that asks for it.

    A refresh that takes longer than its interval is followed at once by the next, never by two. A refresh that fails is a
    WARNING, and the next one comes in its time.   **Threads:** every method.
    """

    def __init__(self) -> None:
        self._due: dict[str, tuple[float, float, Callable[[], object]]] = {}
        self._closed = False
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Start with no thread and nothing due, as a forked child has to: the caches are its parent's."""
        self._due = {}
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition(threading.Lock())

    def add(self, name: str, refresh: Callable[[], object], *, delay: float, interval: float) -> None:
        """Call ``refresh`` first after ``delay`` seconds (after ``interval`` if that is 0), then every ``interval`` seconds.

        With an interval of 0 there is one call, and none if both are 0.
        """
        first = delay or interval
        if first <= 0:
            return
        with self._changed:
            if self._closed:
                return
            self._due[name] = (time.monotonic() + first, interval, refresh)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hps_numba_refresh", daemon=True)
                self._thread.start()
            self._changed.notify()

    def remove(self, name: str) -> None:
        """Refresh a model no more."""
        with self._changed:
            self._due.pop(name, None)

    def close(self) -> None:
        """Let the refresh at work end; there will be no other."""
        with self._changed:
            self._closed = True
            self._due = {}
            self._changed.notify()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while self._refresh(self._next()):
            pass  # nothing of a model is held while the thread waits

    @staticmethod
    def _refresh(due: tuple[str, Callable[[], object]] | None) -> bool:
        """Call what is due; False at the end."""
        if due is None:
            return False
        name, call = due
        try:
            call()
        except ClosedError:
            log.debug("%s: closed while it was refreshed", name)
        except Exception as problem:  # a tier's own code may raise anything, and the timer must go on
            log.warning("%s: the refresh failed: %s", name, problem)
        return True

    def _next(self) -> tuple[str, Callable[[], object]] | None:
        """Wait for what is due next; None at the end."""
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                name = min(self._due, key=lambda model: self._due[model][0], default=None)
                if name is None:
                    self._changed.wait()
                    continue
                if self._due[name][0] > now:
                    self._changed.wait(self._due[name][0] - now)
                    continue
                due, interval, refresh = self._due.pop(name)
                if interval > 0:
                    self._due[name] = (max(due + interval, now), interval, refresh)
                return name, refresh
            return None
