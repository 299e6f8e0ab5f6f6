"""Many rows written at once: threads find the keys, write the rows where no reader is, and point the index to them.

Problem: a write that goes from key to key waits for memory three times for each (the line of the index, the slot, the row
that it comes from), on one thread. Choice: steps over all keys, each divided among threads (``kernels.host.rewrite``). Until
the last step nothing of it can be seen, so that a write can also be given up, and so that the rows of two stores can be written
both or neither. Turned down: threads that each upsert a part of the keys, which would have to share the free list, the counts
and the empty entries of the index under locks.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from hps_numba.kernels.host.rewrite import (
    host_addresses_of,
    host_enter,
    host_locate,
    host_place,
    host_publish,
    host_retire,
    host_take,
)
from hps_numba.kernels.layouts.host_store import ENTRY_BYTES, FIRST_SLOT, META_BYTES, SLOT_MASK
from hps_numba.runtime.threads import ranges_of, run_ranges
from hps_numba.storage.host.content import TableContent, address_of, entries_of
from hps_numba.storage.host.epochs import Epochs

__all__ = ["BulkWrite", "Rewrite", "pays_off"]

_PROBE_BYTES = 128  # that finding a key, or changing its entry, costs about as much time as copying so many
_STREAM_BYTES = 32 << 20  # rows of at least this size are written past the CPU caches


def pays_off(rows: int, row_bytes: int) -> bool:
    """Whether the rows of a write are so many that threads share them; one thread is as fast going from key to key."""
    return len(ranges_of(rows, row_bytes)) > 1


class BulkWrite:
    """One write of many rows: ``locate``, ``take``, then the rows, then ``publish`` or ``abandon``.

    Attributes:
        keys: int64 ``[n]``, contiguous.
        new_keys: how many have no entry in the index, equal keys counted each.

    Thread safety: by the writer of the store, under its lock, which nobody else holds until the end.
    """

    def __init__(self, content: TableContent, keys: np.ndarray) -> None:
        self._content = content
        self.keys = keys
        self.new_keys = 0
        self._entries, self._words, self._fresh = (np.empty(len(keys), np.int64) for _ in range(3))
        self._steps = ranges_of(len(keys), _PROBE_BYTES)
        self._rows = ranges_of(len(keys), _PROBE_BYTES + 3 * content.row_bytes)
        self._block = 0

    # -- before anything is changed ---------------------------------------------------------------------------------------

    def locate(self) -> None:
        """Find the keys in the index in use, unless that was done."""
        block = self._content.block
        if self._block == block:
            return

        def locate_range(start: int, stop: int) -> int:
            without: int = host_locate(block, self.keys, start, stop, self._entries, self._words)
            return without

        self.new_keys = sum(run_ranges(locate_range, self._steps))
        self._block = block

    @property
    def found(self) -> np.ndarray:
        """bool ``[n]``: which keys have a row."""
        return (self._words & SLOT_MASK) >= FIRST_SLOT

    def take(self, *, only_present: bool) -> None:
        """Take a slot for each key, or for each that has a row; there are enough of them."""
        content = self._content
        host_take(self._words, only_present, content.state, content.free, self._fresh)

    def sources(self) -> np.ndarray:
        """int64 ``[n]``: addresses of the rows that keys have now, 0 where there is none."""
        return self._addresses(self._words)

    def targets(self) -> np.ndarray:
        """int64 ``[n]``: addresses of the new rows, 0 where none will be written."""
        return self._addresses(self._fresh)

    def _addresses(self, words: np.ndarray) -> np.ndarray:
        addresses = np.empty(len(words), np.int64)

        def range_of_words(start: int, stop: int) -> int:
            host_addresses_of(self._block, words, start, stop, addresses)
            return 0

        run_ranges(range_of_words, ranges_of(len(words), 24))
        return addresses

    def place(self, rows: np.ndarray) -> None:
        """Write float32 rows ``[n, dim]``, contiguous, to the slots that were taken."""
        block, source = self._block, address_of(rows)
        streamed = rows.nbytes >= _STREAM_BYTES and self._content.row_bytes % 64 == 0

        def place_range(start: int, stop: int) -> int:
            host_place(block, source, self._fresh, start, stop, streamed)
            return 0

        run_ranges(place_range, self._rows)

    # -- the end ----------------------------------------------------------------------------------------------------------

    def publish(self, epochs: Epochs) -> tuple[int, int]:
        """Let readers see the rows; returns how many keys were new, and how many rows were written."""
        content, block, now = self._content, self._block, time.monotonic_ns()
        retired = content.reserve_retired(len(self.keys))
        first, size = block + META_BYTES, ENTRY_BYTES * entries_of(block)

        def publish_part(start: int, stop: int) -> int:
            low, high = first + size * start // parts, first + size * stop // parts
            new: int = host_publish(block, self._entries, self._words, self._fresh, low, high, now)
            return new

        parts = -(-len(self._steps) // 8)  # half as many as threads: each goes through all keys
        added = sum(run_ranges(publish_part, [(part, part + 1) for part in range(parts)]))
        if self.new_keys:
            added += host_enter(block, self.keys, self._words, self._fresh, content.state, now)
        written: int = host_retire(self._words, self._fresh, added, content.state, retired)
        content.retire_slots(epochs)
        return added, written

    def abandon(self) -> None:
        """Write nothing after all: the slots that were taken are free again."""
        self._content.give_back(self._fresh[self._fresh != 0])


class Rewrite:
    """New rows for distinct keys, made from those that they have; no reader sees one before ``publish`` lets them see all.

    Attributes:
        found: bool ``[n]``: which keys have a row.
        sources: int64 ``[n]``: addresses of these rows, which nobody changes; 0 where there is none.
        targets: int64 ``[n]``: addresses for the new rows, each to be written whole before ``publish``.
    """

    def __init__(self, bulk: BulkWrite, epochs: Epochs, on_added: Callable[[int], object]) -> None:
        self._bulk: BulkWrite | None = bulk
        self._epochs, self._on_added = epochs, on_added
        self._done = False
        self.found = bulk.found
        self.sources, self.targets = bulk.sources(), bulk.targets()

    def publish(self) -> int:
        """Let readers see the new rows; returns how many keys were new. Once."""
        assert self._bulk is not None
        bulk, self._bulk = self._bulk, None
        added, _ = bulk.publish(self._epochs)
        self._on_added(added)
        self._done = True
        return added

    def abandon(self) -> bool:
        """Give up what was not published; False if the publication was interrupted, so that the table has to be repaired."""
        bulk, self._bulk = self._bulk, None
        if bulk is not None:
            bulk.abandon()
        return bulk is not None or self._done
