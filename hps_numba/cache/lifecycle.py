"""Whether a cache is new, in use or closed, and the lock of the calls that change it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hps_numba.cache.backends import Backend
from hps_numba.cache.store_link import StoreLink
from hps_numba.cache.version_switch import VersionSwitch
from hps_numba.errors import ClosedError
from hps_numba.runtime.fork import register_fork_reset

__all__ = ["Lifecycle"]

_LOOK_SECONDS = 1e-3


class Lifecycle:
    """The life of one cache.

    Attributes:
        in_use: a lookup or an insertion has begun, and the cache is not closed.   closed: it is closed.
        lock: of the calls that change the cache; reentrant.

    Thread safety: all methods.
    """

    def __init__(self, backend: Backend, link: StoreLink | None, switch: VersionSwitch, name: str) -> None:
        self._backend, self._link, self._switch, self._name = backend, link, switch, name
        self.in_use = self.closed = False
        self.lock = threading.RLock()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Use a new lock: in the parent another thread may have held it."""
        self.lock = threading.RLock()

    def begin(self) -> None:
        """What every lookup begins with.

        Raises:
            ClosedError: the cache is closed.   HpsError: the device could not be told of a change of the host store.
        """
        if not self.in_use:
            self._enter()
        if self._link is not None and self._link.problem is not None:
            raise self._link.problem

    def _enter(self) -> None:
        """The first lookup waits for a warming in progress, unless that is part of a switch: stand-ins answer meanwhile."""
        while not self.lock.acquire(timeout=_LOOK_SECONDS):
            if self._switch.active is not None:
                self.check_open()
                return
        try:
            self.check_open()
            self.in_use = True
        finally:
            self.lock.release()

    @contextmanager
    def controlled(self) -> Iterator[None]:
        """A block for calls that use the cache's own stream: one at a time, the device current, the cache open."""
        with self.lock, self._backend.current():
            self.check_open()
            yield

    def check_open(self) -> None:
        """Raise ``ClosedError`` if the cache is closed."""
        if self.closed:
            raise ClosedError(f"{self._name}: the cache is closed")

    def close(self) -> bool:
        """Let no further call in; False if the cache was closed before."""
        with self.lock:
            first = not self.closed
            self.closed, self.in_use = True, False
            return first
