"""Which parts of a segment are taken, and when they may be taken again.

A region in use is one of three: *reachable*, which means that a table's header leads to it; *owned* by a living process that
builds it or still needs it; or *retired* in an epoch, free once no reader of any process is in that epoch or an older one. What
is none of the three was left by a process that died: ``sweep`` retires it. So nothing about a region has to be undone, whenever
a process is killed. The pages of a region that is free stay in the segment, for the next one: devices may have pinned them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hps_numba.device.host_memory import human_bytes
from hps_numba.errors import CapacityError
from hps_numba.runtime.reentry import ExclusiveLock
from hps_numba.storage.shared.epochs import SharedEpochs
from hps_numba.storage.shared.layout import (
    PAGE,
    R_COMMITTED,
    R_OFFSET,
    R_OWNER,
    R_SIZE,
    R_TAG,
    REGION_AREA,
    REGION_WORDS,
    REGIONS,
    SPACE,
)
from hps_numba.storage.shared.segment import Segment
from hps_numba.storage.shared.segment_file import word_view

__all__ = ["Regions"]


class Regions:
    """The regions of a segment.

    Args:
        reachable: numbers of the regions that headers lead to, for ``sweep``.

    Thread safety: every method in the writer's turn; ``address`` and ``size`` of a region that stays at any time.
    """

    def __init__(self, segment: Segment, epochs: SharedEpochs, reachable: Callable[[], set[int]]) -> None:
        self._segment, self._epochs, self._reachable = segment, epochs, reachable
        self._exclusive = ExclusiveLock(str(segment.path))
        words = word_view(segment.address + REGION_AREA, REGIONS * REGION_WORDS)
        self._table = words.reshape(REGIONS, REGION_WORDS)

    def address(self, number: int) -> int:
        """Where a region begins."""
        return self._segment.address + int(self._table[number, R_OFFSET])

    def size(self, number: int) -> int:
        """Bytes of a region."""
        return int(self._table[number, R_SIZE])

    def committed(self, number: int) -> int:
        """Bytes from its start that have memory."""
        return int(self._table[number, R_COMMITTED])

    def at(self, address: int) -> int:
        """The number of the region with an address in it."""
        offsets, sizes = self._table[:, R_OFFSET], self._table[:, R_SIZE]
        offset = address - self._segment.address
        (found,) = np.flatnonzero((offsets <= offset) & (offset < offsets + sizes))
        return int(found)

    # -- taking -----------------------------------------------------------------------------------------------------------

    def allocate(self, size: int, purpose: str) -> int:
        """Take a region of ``size`` bytes, rounded up to pages, owned by this process; it has no memory yet.

        Raises:
            CapacityError: there is no such space.   ReentryError: this thread is inside ``allocate``.
        """
        with self._exclusive.held():
            return self._allocate(max(PAGE, _pages(size)), purpose)

    def _allocate(self, size: int, purpose: str) -> int:
        place = self._gap(size)
        if place is None:
            self.sweep()
            self._epochs.wait(self._epochs.advance(), 0.1)
            self.collect()
            place = self._gap(size)
        free = np.flatnonzero(self._table[:, R_SIZE] == 0)
        if place is None or not len(free):
            raise self._full(size, purpose)
        number = int(free[0])
        row = self._table[number]
        row[R_OWNER] = self._owner
        row[R_TAG], row[R_COMMITTED], row[R_OFFSET] = 0, 0, place
        row[R_SIZE] = size  # last: from now on it is in use
        return number

    def extend(self, number: int, size: int) -> bool:
        """Make a region larger where it is; False if the space after it is taken."""
        row, size = self._table[number], _pages(size)
        start = int(row[R_OFFSET])
        used = self._table[self._table[:, R_SIZE] > 0]
        after = used[used[:, R_OFFSET] > start, R_OFFSET]
        end = min([self._segment.size, *after.tolist()])
        if start + size > end:
            return False
        row[R_SIZE] = max(size, int(row[R_SIZE]))
        return True

    def shrink(self, number: int, size: int) -> None:
        """Undo ``extend``: a region that had ``size`` bytes before, and in which nobody uses more."""
        row = self._table[number]
        row[R_COMMITTED] = min(int(row[R_COMMITTED]), size)
        row[R_SIZE] = size

    def commit(self, number: int, size: int) -> None:
        """Take memory for the first ``size`` bytes of a region.

        Raises:
            CapacityError: the file system is full.
        """
        row, size = self._table[number], _pages(size)
        done = int(row[R_COMMITTED])
        if size > done:
            self._segment.fill(int(row[R_OFFSET]) + done, size - done)
            row[R_COMMITTED] = size

    @property
    def _owner(self) -> int:
        """This process, by its use of a block: blocks are used again, and pids too, as that of a container's only process."""
        if not self._segment.blocks:  # a forked child that found none free
            self._segment.claim_block()
        block = self._segment.blocks[0]
        return self._segment.claim_of(block) << 16 | block + 1

    def _is_gone(self, owner: int) -> bool:
        block = (owner & 0xFFFF) - 1
        return owner == 0 or self._segment.claim_of(block) != owner >> 16 or self._segment.is_dead(block)

    def _gap(self, size: int) -> int | None:
        """The first free place for ``size`` bytes."""
        used = self._table[self._table[:, R_SIZE] > 0]
        place = SPACE
        for offset, length in sorted(zip(used[:, R_OFFSET].tolist(), used[:, R_SIZE].tolist(), strict=True)):
            if offset - place >= size:
                return place
            place = max(place, offset + length)
        return place if self._segment.size - place >= size else None

    def _full(self, size: int, purpose: str) -> CapacityError:
        taken = int(self._table[:, R_SIZE].sum())
        space = self._segment.size - SPACE
        return CapacityError(
            f"{purpose}: expected {human_bytes(size)} in one piece of the shared segment {self._segment.path}, of whose "
            f"{human_bytes(space)} {human_bytes(taken)} are taken: a larger shared_memory_size has room"
        )

    # -- giving back ------------------------------------------------------------------------------------------------------

    def is_owned(self, number: int) -> bool:
        """Whether some process needs a region though no header leads to it."""
        return bool(self._table[number, R_OWNER])

    def own(self, *numbers: int) -> None:
        """This process needs regions though no header leads to them."""
        self._table[list(numbers), R_OWNER] = self._owner

    def disown(self, *numbers: int) -> None:
        """A header leads to them now."""
        self._table[list(numbers), R_OWNER] = 0

    def retire(self, number: int, tag: int) -> None:
        """Free a region after the epoch ``tag``."""
        self._table[number, R_TAG] = tag

    def free(self, number: int) -> None:
        """Free a region at once: nobody ever saw it."""
        self._table[number, R_SIZE] = 0

    def collect(self) -> None:
        """Free what is retired and has no readers any more."""
        tags = self._table[:, R_TAG]
        retired = np.flatnonzero((tags > 0) & (self._table[:, R_SIZE] > 0))
        if len(retired):
            oldest = self._epochs.oldest()
            for number in retired[tags[retired] < oldest].tolist():
                self._table[number, R_SIZE] = 0

    def sweep(self) -> None:
        """Retire what processes that died have left.

        One of them may have put another index in force and died before it said so: then caches still read what is lost, and
        whoever follows has to look at the headers before the epoch ends for it.
        """
        reachable = self._reachable()
        gone: dict[int, bool] = {}
        lost = []
        for number in np.flatnonzero((self._table[:, R_SIZE] > 0) & (self._table[:, R_TAG] == 0)).tolist():
            owner = int(self._table[number, R_OWNER])
            if owner not in gone:
                gone[owner] = self._is_gone(owner)
            if number not in reachable and gone[owner]:
                lost.append(number)
        if lost:
            self._segment.note_published()
            self._table[lost, R_TAG] = self._epochs.advance()


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE
