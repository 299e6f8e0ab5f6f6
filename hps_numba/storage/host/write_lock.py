"""One writer at a time, also after an interrupt in the middle of a write.

An interrupt (Ctrl-C, a time-out of a test runner, a fork in another thread) may hit between any two lines of a write. The write
then counts as unfinished, and the next one first rebuilds the free list from the index, which readers use and kernels never
leave half-written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hps_numba.errors import ClosedError, HpsError
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.storage.host.content import TableContent
from hps_numba.storage.host.header import StoreHeader
from hps_numba.storage.host.versions import Versions

__all__ = ["WriteLock"]


class WriteLock:
    """Serializes the writers of a store.

    Attributes:
        mutex: held during a write; reentrant, so that one write may contain another.
        closed: the store takes no more writes.

    Thread safety: every method.
    """

    def __init__(self, name: str, header: StoreHeader, versions: Versions) -> None:
        self._name = name
        self._header = header
        self._versions = versions
        self._watchers: tuple[Callable[[], object], ...] = ()
        self._writes = 0  # begun so far
        self._unfinished = False  # a writer was interrupted, or is at work
        self.closed = False
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Replace the mutex, as a forked child has to; the next write repairs what another thread had not finished."""
        self.mutex = threading.RLock()

    def closed_error(self) -> ClosedError:
        """What to raise where the store is closed."""
        return ClosedError(f"{self._name}: the store is closed")

    @contextmanager
    def writing(self) -> Iterator[TableContent]:
        """Hold the mutex for one write; gives the content to change.

        Raises:
            ClosedError: the store is closed. What a watcher raises: then nothing was changed.
        """
        with self.mutex:
            if self.closed:
                raise self.closed_error()
            self._writes += 1
            self._tell_watchers()
            if self._unfinished:
                self._versions.repair()
            self._unfinished = True
            self._versions.collect()
            try:
                yield self._versions.current
            except HpsError:  # raised by ourselves, between two steps
                self._unfinished = False
                raise
            self._unfinished = False

    def close(self) -> bool:
        """Take no more writes; False if that is so already. The caller holds ``mutex``."""
        if self.closed:
            return False
        self._tell_watchers()
        self.closed = True
        return True

    def _tell_watchers(self) -> None:
        for watcher in self._watchers:
            watcher()

    def watch(self, watcher: Callable[[], object]) -> None:
        """Call ``watcher`` under the mutex at the beginning of each write; if it raises, nothing is changed."""
        with self.mutex:
            self._watchers = (*self._watchers, watcher)

    def unwatch(self, watcher: Callable[[], object]) -> None:
        """Undo ``watch``."""
        with self.mutex:
            self._watchers = tuple(other for other in self._watchers if other != watcher)

    @contextmanager
    def at_rest(self, seconds: float) -> Iterator[tuple[int, int]]:
        """Keep writers away; gives the number of writes so far and the address of the index block in use.

        The block is 0 if a writer held the mutex for ``seconds``, the store is closed, or an interrupted write is yet to be
        repaired.
        """
        if not self.mutex.acquire(timeout=seconds):
            yield -1, 0
            return
        try:
            yield self._writes, 0 if self._unfinished else self._header.block
        finally:
            self.mutex.release()
