"""One writer at a time, also after an interrupt in the middle of a write.

An interrupt (Ctrl-C, a time-out of a test runner, a fork in another thread) may hit between any two lines of a write. The write
then counts as unfinished, and the next one first rebuilds the free list from the index, which readers use and kernels never
leave half-written. A signal handler, ``__del__`` or a callback may come to the store between any two lines as well: it is not
let in to write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from hps_numba.errors import ClosedError
from hps_numba.runtime.reentry import ExclusiveLock
from hps_numba.storage.host.content import TableContent
from hps_numba.storage.host.header import StoreHeader
from hps_numba.storage.host.versions import Versions

__all__ = ["WriteLock"]


class WriteLock:
    """Serializes the writers of a store.

    Attributes:
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
        self._lock = ExclusiveLock(name)  # new in a forked child: the next write repairs what another thread had not finished

    @property
    def mutex(self) -> AbstractContextManager[object]:
        """The lock that writers hold; reentrant, for what writes nothing."""
        return self._lock.mutex

    def closed_error(self) -> ClosedError:
        """What to raise where the store is closed."""
        return ClosedError(f"{self._name}: the store is closed")

    @contextmanager
    def writing(self) -> Iterator[TableContent]:
        """Hold the mutex for one write; gives the content to change.

        Raises:
            ClosedError: the store is closed.   ReentryError: this thread is writing already.
            What a watcher raises: then nothing was changed.
        """
        with self._lock.held():
            if self.closed:
                raise self.closed_error()
            self._writes += 1
            self._tell_watchers()
            if self._unfinished:
                self._versions.repair()
            self._unfinished = True
            self._versions.collect()
            yield self._versions.current
            self._unfinished = False

    def settle(self) -> None:
        """The writer is between two steps and about to raise: nothing is left to repair.

        Not concluded from the class of an error: a signal handler may raise any, anywhere.
        """
        self._unfinished = False

    @contextmanager
    def closing(self) -> Iterator[bool]:
        """Hold the mutex and take no more writes; gives False if that is so already.

        Raises:
            ReentryError: this thread is writing.
        """
        with self._lock.held():
            first = not self.closed
            if first:
                self._tell_watchers()
                self.closed = True
            yield first

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
        mutex = self._lock.mutex
        if not mutex.acquire(timeout=seconds):
            yield -1, 0
            return
        try:
            yield self._writes, 0 if self._unfinished else self._header.block
        finally:
            mutex.release()
