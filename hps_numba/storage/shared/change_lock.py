"""One process at a time changes a table in all its tiers.

The turn of a segment's writers orders writes to host memory only: between the slower tiers and host memory, another process
could write to both, and the two would differ from then on. So a table with slower tiers has a lock of its own, a byte of the
segment's file, from before the first tier is written until after the last one. It is taken before the lock of the store and
the turn, and the kernel drops it when its holder dies.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hps_numba.errors import TierUnavailable
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.storage.shared.file_locks import Check, go_on, wait_for
from hps_numba.storage.shared.layout import CHANGE_LOCKS, T_CHANGER, TABLE_AREA, TABLE_BYTES
from hps_numba.storage.shared.segment import Segment
from hps_numba.storage.shared.segment_file import LOCK_SECONDS
from hps_numba.storage.shared.table import TableEntry

__all__ = ["ChangeLock"]

_CHECK_SECONDS = 0.01  # between two looks at whether a wait for another thread is of any use


class ChangeLock:
    """The lock of one table, of all its stores in this process.

    Thread safety: every method. A thread may begin another block inside one.
    """

    def __init__(self, segment: Segment, entry: TableEntry, name: str) -> None:
        self._segment, self._entry, self._name = segment, entry, name
        self._byte = CHANGE_LOCKS + (entry.address - segment.address - TABLE_AREA) // TABLE_BYTES
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """In a forked child, which holds no lock of the file."""
        self._mutex, self._depth = threading.RLock(), 0

    @contextmanager
    def held(self, check: Check = go_on) -> Iterator[None]:
        """A block in which no other thread or process is.

        Args:
            check: called while it waits; may raise.

        Raises:
            TierUnavailable: another one has been in it for a minute.   ClosedError: this process has left the segment.
        """
        with self._taken(LOCK_SECONDS, check) as taken:
            if not taken:
                raise TierUnavailable(
                    f"{self._name}: process {self._entry.words[T_CHANGER]} has been changing the table in all its tiers for "
                    f"{LOCK_SECONDS:g} s: nothing was written"
                )
            yield

    @contextmanager
    def held_if_free(self) -> Iterator[bool]:
        """``held`` without waiting: gives False, and holds nothing, if another thread or process is in such a block."""
        with self._taken(0.0) as taken:
            yield taken

    @contextmanager
    def _taken(self, seconds: float, check: Check = go_on) -> Iterator[bool]:
        mutex = self._mutex
        if not wait_for(lambda: mutex.acquire(timeout=min(seconds, _CHECK_SECONDS)), seconds, check):
            yield False
            return
        before = self._depth
        try:
            taken = before > 0 or self._segment.lock_byte(self._byte, seconds, check)
            if taken:
                self._entry.words[T_CHANGER] = os.getpid()
                self._depth = before + 1
            yield taken
        finally:
            self._depth = before
            if before == 0:
                self._segment.unlock_byte(self._byte)
            mutex.release()
