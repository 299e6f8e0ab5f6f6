"""One table of a segment as its processes see it: the header, the versions that it leads to, the writer's turn.

A table has an entry in the segment (``layout.T_*``) that stays for the life of the segment: header word, marks, the number of
writes. ``T_UNFINISHED`` is set as long as a writer is at work. The next one of whatever process that finds it set repairs the
table, as after an interrupt: it rebuilds the list of slots from the index, which no kernel leaves half-written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from hps_numba.errors import ClosedError
from hps_numba.kernels.host.epoch import publish
from hps_numba.kernels.layouts.host_store import META_GENERATION
from hps_numba.runtime.reentry import reentry_error
from hps_numba.storage.host.content import TableContent, address_of
from hps_numba.storage.host.header import StoreHeader
from hps_numba.storage.host.store_bytes import StoreBytes
from hps_numba.storage.host.versions import Versions
from hps_numba.storage.host.write_lock import WriteLock
from hps_numba.storage.shared.content import SharedContent
from hps_numba.storage.shared.epochs import SharedEpochs
from hps_numba.storage.shared.layout import T_ERASED, T_HEADER, T_SOURCE, T_STATE, T_UNFINISHED, T_WRITES, TABLE_BYTES
from hps_numba.storage.shared.regions import Regions
from hps_numba.storage.shared.segment import Segment
from hps_numba.storage.shared.segment_file import word_view

__all__ = ["SharedHeader", "SharedVersions", "SharedWriteLock", "TableEntry"]


class TableEntry:
    """The entry of a table in its segment.

    Attributes:
        address: of the entry.   words: int64 ``[64]``, the ``T_*`` words.

    Thread safety: what it changes, in the writer's turn.
    """

    def __init__(self, address: int) -> None:
        self.address = address
        self.words = word_view(address, TABLE_BYTES // 8)

    @property
    def block(self) -> int:
        """Address of the index block in force; 0 if the table was erased."""
        return int(self.words[T_HEADER])

    @property
    def source(self) -> bytes:
        """What identifies the files that were loaded; zeros for none."""
        return self.words[T_SOURCE : T_SOURCE + 4].tobytes()

    @source.setter
    def source(self, digest: bytes) -> None:
        self.words[T_SOURCE : T_SOURCE + 4] = np.frombuffer(digest, np.int64)


class SharedHeader(StoreHeader):
    """The header of a table in a segment, and the watchers of this process.

    Thread safety: every method. The thread that follows other processes tells the watchers too (``SharedEpochs.step``).
    """

    def __init__(self, entry: TableEntry, epochs: SharedEpochs) -> None:
        self._entry, self._epochs = entry, epochs
        self.address = entry.address + 8 * T_HEADER
        self._none = np.zeros(1, np.int64)
        self._watchers = ()
        self._told = (0, 0)
        self.reset_after_fork()
        # a child inherits the watchers; the lock may be held by a thread that it has not
        epochs.renew_in_child(self)

    def reset_after_fork(self) -> None:
        """A new lock, in a forked child."""
        self._telling = threading.RLock()

    @property
    def block(self) -> int:
        return self._entry.block if self.is_attached else 0

    @property
    def is_attached(self) -> bool:
        """This process still reads the table."""
        return self.address != address_of(self._none)

    def snapshot(self) -> np.ndarray:
        return np.array([self.block], np.int64)

    def publish(self, block: int) -> None:
        publish(self._entry.address + 8 * T_HEADER, block)
        self._epochs.segment.note_published()
        self.notify(block)

    def notify(self, block: int) -> None:
        with self._telling:
            self._told = block, _generation_of(block)
            super().notify(block)

    def follow(self) -> bool:
        """Tell the watchers of the block in force if another process has published it; returns whether it has."""
        with self._telling:
            block = self.block
            if self._told == (block, _generation_of(block)):
                return False
            self.notify(block)
            return True

    def watch(self, watcher: Callable[[int], object]) -> None:
        if not self._watchers:
            self._epochs.follow(self)
        with self._telling:
            self.follow()
            super().watch(watcher)

    def unwatch(self, watcher: Callable[[int], object]) -> None:
        with self._telling:
            super().unwatch(watcher)
        if not self._watchers:
            self._epochs.unfollow(self)

    def detach(self) -> None:
        """Lead the readers of this process nowhere; the table stays."""
        self.address = address_of(self._none)
        self.notify(0)


def _generation_of(block: int) -> int:
    return int(word_view(block + META_GENERATION, 1)[0]) if block else 0


class SharedVersions(Versions):
    """The version that the header leads to, and how one takes the place of another.

    ``swap`` keeps the old version for this process until ``retire`` or ``restore``; if it dies before, the version is swept.

    Thread safety: every method in the writer's turn; ``current`` at any time, for its sizes.
    """

    def __init__(
        self, header: SharedHeader, epochs: SharedEpochs, segment: Segment, regions: Regions, entry: TableEntry, name: str
    ) -> None:
        self._header: SharedHeader = header
        self._epochs: SharedEpochs = epochs
        self._segment, self._regions, self._entry, self._name = segment, regions, entry, name
        self._seen: SharedContent | None = None

    @property
    def current(self) -> SharedContent:  # type: ignore[override]
        """The version in use; the last one that this process knew after ``end`` or ``erase``."""
        block = self._header.block
        seen = self._seen
        if seen is None or (block and not seen.is_at(block)):
            if not block:
                raise ClosedError(f"{self._name}: the store is closed")
            with self._epochs.reading():
                seen = self._seen = SharedContent.find(self._segment, self._regions, self._header.block, self._name)
        return seen

    @property
    def sizes(self) -> StoreBytes:
        return self.current.sizes

    @property
    def retired(self) -> int:
        """None waits here: the segment keeps them."""
        return 0

    def begin(self, first: TableContent) -> None:
        """Publish the first version."""
        assert isinstance(first, SharedContent)
        self._publish(first)

    def swap(self, new: TableContent) -> None:
        assert isinstance(new, SharedContent)
        old = self.current
        old.own()
        self._entry.source = bytes(32)
        self._publish(new)

    def restore(self, old: TableContent) -> TableContent:
        assert isinstance(old, SharedContent)
        new = self.current
        new.own()
        self._publish(old)
        return new

    def _publish(self, content: SharedContent) -> None:
        self._header.publish(content.block)
        self._seen = content
        content.disown()

    def retire(self, old: TableContent, seconds: float) -> None:
        assert isinstance(old, SharedContent)
        old.retire(self._epochs.advance())  # whoever needs the space frees it; nobody has to wait for its readers
        self._regions.collect()

    def end(self, seconds: float) -> None:
        """This process leaves the table, which stays."""
        self._header.detach()
        self._epochs.wait_for_own(seconds)

    def erase(self) -> None:
        """Drop the table for all processes."""
        old = self.current
        self._entry.source = bytes(32)
        self._entry.words[T_STATE] = T_ERASED
        self._header.publish(0)
        old.retire(self._epochs.advance())

    def collect(self) -> None:
        self._regions.collect()

    def repair(self) -> None:
        self._seen = None
        block = self._header.block
        self.current.repair(block, self._epochs)
        self._regions.sweep()
        self._segment.note_published()  # the writer may have died before it said so
        self._header.follow()


class SharedWriteLock(WriteLock):
    """One writer at a time in all processes.

    Attributes:
        others: writes that other processes have begun, but those that bring up rows; any number at first.
    """

    def __init__(self, name: str, header: SharedHeader, versions: SharedVersions, segment: Segment, entry: TableEntry) -> None:
        super().__init__(name, header, versions)
        self._shared_header, self._segment, self._entry = header, segment, entry
        self._counted = 0  # writes of this process that count for others
        self._promotes = False
        self._leaving = False  # the store is closed, or is about to be: writes that wait end

    @property
    def others(self) -> int:
        """Writes of other processes so far, counted from any number."""
        return int(self._entry.words[T_WRITES]) - self._counted

    def check_open(self) -> None:
        """
        Raises:
            ClosedError: the store is closed, or a thread waits to close it.
        """
        if self._leaving:
            raise self.closed_error()

    @contextmanager
    def closing(self) -> Iterator[bool]:
        """As ``WriteLock.closing``; writes that wait for another process raise ClosedError at once."""
        self._leaving = True
        try:
            with super().closing() as first:
                yield first
        finally:
            self._leaving = self.closed

    @contextmanager
    def writing(self) -> Iterator[TableContent]:
        with self._lock.held(), self._segment.turn(self.check_open):
            if self.closed or not self._entry.block:
                raise self.closed_error()
            if self._entry.address in self._segment.writing:  # by another store of the table in this process
                raise reentry_error(self._name, "a change")
            if not self._promotes:
                self._entry.words[T_WRITES] += 1
                self._counted += 1
            self._writes += 1
            self._tell_watchers()
            self._segment.writing.add(self._entry.address)
            try:
                yield self._begin()
            finally:
                self._segment.writing.discard(self._entry.address)
            self._entry.words[T_UNFINISHED] = 0

    @contextmanager
    def held_if_free(self) -> Iterator[bool]:
        """Keep all writers but this thread away, without waiting: gives False, and holds nothing, if one is at work.

        What this thread writes inside does not count for other processes: it brings up rows that are in other tiers too.
        """
        mutex = self._lock.mutex  # first, as for a write
        if not mutex.acquire(blocking=False):
            yield False
            return
        try:
            with self._segment.turn_if_free() as free:
                self._promotes = free
                yield free
        finally:
            self._promotes = False
            mutex.release()

    def _begin(self) -> TableContent:
        if self._entry.words[T_UNFINISHED]:
            self._versions.repair()
        self._entry.words[T_UNFINISHED] = 1
        self._shared_header.follow()
        self._versions.collect()
        return self._versions.current

    def settle(self) -> None:
        self._entry.words[T_UNFINISHED] = 0
