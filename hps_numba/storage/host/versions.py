"""The version of a table that readers find, and older ones that readers may still hold.

``replace_model`` fills a new version aside and swaps it in with one atomic store to the header. An old version is released
once no reader is in an epoch in which it could be found (epoch-based reclamation, ``epochs``).
"""

from __future__ import annotations

from hps_numba.storage.host.content import TableContent
from hps_numba.storage.host.epochs import Epochs
from hps_numba.storage.host.header import StoreHeader
from hps_numba.storage.host.store_bytes import StoreBytes

__all__ = ["Versions"]

_NEVER = 1 << 62  # an epoch that does not end: readers can still find the version


class Versions:
    """What is in use, and what waits for its readers.

    An interrupt may hit between any two steps of ``swap``; ``repair`` then sees by the header which version readers use.

    Attributes:
        current: the version in use; the last one after ``invalidate``.

    Thread safety: every method under the write lock of the store.
    """

    def __init__(self, header: StoreHeader, epochs: Epochs, first: TableContent) -> None:
        self._header = header
        self._epochs = epochs
        self._next: TableContent | None = None  # a version that ``swap`` is about to publish
        self._retired: list[tuple[int, TableContent]] = []  # (last epoch in which it can be found, version)
        self.current = first
        header.publish(first.block)

    @property
    def retired(self) -> int:
        """Number of versions whose memory waits for readers."""
        return len(self._retired)

    @property
    def sizes(self) -> StoreBytes:
        """Bytes of all versions, by what they are for."""
        return sum((version.sizes for _, version in tuple(self._retired)), self.current.sizes)

    def swap(self, new: TableContent) -> None:
        """Use ``new`` from now on, at once for all readers; ``retire`` the old one next."""
        old = self.current
        self._next = new
        self._retired.append((_NEVER, old))  # noted before readers lose it: an interrupt must not free what they read
        self._header.publish(new.block)
        self.current = new
        self._next = None

    def restore(self, old: TableContent) -> TableContent:
        """Undo ``swap``; returns the version that was in use, which nobody releases here."""
        new = self.current
        self._header.publish(old.block)
        self.current = old
        self._retired = [entry for entry in self._retired if entry[1] is not old]
        return new

    def invalidate(self) -> None:
        """Publish that the store is closed; ``retire`` the current version next."""
        self._header.publish(0)  # the header itself stays: a reader that comes later finds no block
        self._retired.append((_NEVER, self.current))

    def retire(self, old: TableContent, seconds: float) -> None:
        """Release a version that can no longer be found, after waiting up to ``seconds`` for its readers; else keep it."""
        tag = self._epochs.advance()
        self._retired = [(tag if version is old else its, version) for its, version in self._retired]
        self._epochs.wait(tag, seconds)
        self.collect()

    def end(self, seconds: float) -> None:
        """Publish that the store is closed, and release its rows after waiting up to ``seconds`` for readers."""
        self.invalidate()
        self.retire(self.current, seconds)

    def collect(self) -> None:
        """Release the versions that no reader can hold any more."""
        if not self._retired:
            return
        oldest = self._epochs.oldest()
        for entry in [entry for entry in self._retired if entry[0] < oldest]:
            self._retired.remove(entry)
            entry[1].release()

    def repair(self) -> None:
        """After an interrupted write: agree with the header again, and rebuild the free list of the version in use."""
        block = self._header.block
        self._header.notify(block)
        if self._next is not None and self._next.block == block:
            self.current = self._next
        self._next = None
        tag = self._epochs.advance()
        self._retired = [
            (tag if its == _NEVER else its, version) for its, version in self._retired if version is not self.current
        ]
        self.current.repair(block, self._epochs)
        self._header.notify(block)  # of the new generation
