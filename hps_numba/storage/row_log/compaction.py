"""Compaction: the live rows of old segments are copied to the end of the log, and the segments are deleted.

Rows that were updated, erased or evicted stay in their segment until then. A segment that is not the oldest may hold
erasures of rows in older ones: those of keys that are still absent are written again. Lookups go on meanwhile: a row is at its
old place until the index points to its copy, and files that are deleted stay until their last reader has ended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from hps_numba.errors import TierError
from hps_numba.kernels.layouts.row_log import UNIT_BITS, UNIT_MASK
from hps_numba.storage.distinct import distinct_keys
from hps_numba.storage.row_log.records import read_records
from hps_numba.storage.row_log.segment import Ends, Segment
from hps_numba.storage.row_log.writing import TableWriter

__all__ = ["Compaction", "delete_files"]

log = logging.getLogger(__name__)
_COPY_BYTES = 4 << 20
_SCAN_KEYS = 1 << 18
_SMALL_BYTES = 64 << 20  # garbage that is not worth a compaction in a table without a bound
_KEY_BYTES = 8
_PASSES, _PASSES_WITHOUT_LOSS = 16, 3
_LITTLE = 8  # a compaction that frees less than this share of the garbage met erasures that it had to keep


class Compaction:
    """Decides when a table is compacted, and does it.

    Args:
        drop_segments: notes in the manifest that segments are gone, and deletes their files.
        add_segment: as for the writer.

    Thread safety: called by the writer only.
    """

    def __init__(
        self, writer: TableWriter, add_segment: Callable[[], Segment], drop_segments: Callable[[list[int]], None]
    ) -> None:
        self._writer = writer
        self._table = writer.table
        self._add_segment = add_segment
        self._drop_segments = drop_segments

    @property
    def _live_bytes(self) -> int:
        return len(self._table.index) * (self._table.slot_size + _KEY_BYTES)

    def make_room(self, more: int) -> None:
        """Before ``more`` bytes are written: keep within the bound, or without one free garbage that is half of the table.

        Raises:
            TierError: the bound does not hold ``more``, or the disk fails.
        """
        bound = self._writer.bound
        self._writer.evict()
        if bound.max_bytes is None:
            garbage = self._table.bytes - self._live_bytes
            if garbage > max(_SMALL_BYTES, self._live_bytes) and self.run(garbage // 2) < garbage // _LITTLE:
                self.run_all()
            return
        allowed = bound.max_bytes - bound.segment_bytes - more

        def excess() -> int:
            return self._table.bytes + self._writer.unrecorded_bytes - allowed

        if excess() > 0:
            self.run(excess())
        for number in range(_PASSES):  # each makes groups larger, so that less is lost between them
            if excess() <= 0:
                return
            if number >= _PASSES_WITHOUT_LOSS:
                self._writer.evict(len(self._table.index) - 1)
            self.run_all()
        if excess() > 0:
            raise TierError(
                f"{self._table.folder}: max_bytes: expected room for {more} bytes more, "
                f"got {self._table.bytes} of {bound.max_bytes} in use"
            )

    def run(self, needed: int) -> int:
        """Compact the segments with the largest share of garbage until ``needed`` bytes are freed; returns how many were."""
        before = self._table.bytes
        for number in self._victims(needed):
            if number == self._table.entry.segments[-1]:
                self._add_segment()
            self._compact(self._table.segments[number])
        return before - self._table.bytes

    def run_all(self) -> None:
        """Compact all segments, the oldest first, so that no erasure has to be kept."""
        numbers = self._table.entry.segments
        self._add_segment()
        for number in numbers:
            if not self._table.segments[number].damaged:
                self._compact(self._table.segments[number])

    def _victims(self, needed: int) -> list[int]:
        """Segments with garbage, worst first, until they free ``needed`` bytes."""
        first = self._table.entry.segments[0]
        live = np.zeros(self._table.entry.segments[-1] - first + 1, np.int64)
        for _, locations in self._table.index.scan(_SCAN_KEYS):
            live += np.bincount((locations >> UNIT_BITS) - first, minlength=len(live))
        size = self._table.slot_size + _KEY_BYTES
        garbage = {
            number: segment.bytes - int(live[number - first]) * size
            for number, segment in self._table.segments.items()
            if not segment.damaged
        }
        garbage = {number: size_of for number, size_of in garbage.items() if size_of > size}
        ranked = sorted(garbage, key=lambda number: garbage[number] / self._table.segments[number].bytes, reverse=True)
        chosen: list[int] = []
        for number in ranked:
            if needed <= 0:
                break
            chosen.append(number)
            needed -= garbage[number]
        return chosen

    def _compact(self, victim: Segment) -> None:
        self._copy_rows(victim)
        if victim.damaged:
            return
        self._carry_erasures(victim)
        self._writer.settle()
        self._drop_segments([victim.number])
        self._writer.renew_view()

    def _copy_rows(self, victim: Segment) -> None:
        keys, locations = self._live_in(victim.number)
        units = locations & UNIT_MASK
        start = 0
        while start < len(keys):
            stop = int(np.searchsorted(units, units[start] + _COPY_BYTES // 8))
            some, old = keys[start:stop], locations[start:stop]
            rows = np.empty((len(some), self._table.dim), np.float32)
            whole = self._table.read_span(victim, some, old, rows)
            if not whole.all():
                victim.damaged = True
                log.warning("%s: %d rows are damaged: the segment is kept", victim.rows_path, int((~whole).sum()))
            if whole.any():
                self._writer.move(some[whole], rows[whole], old[whole])
            start = stop

    def _live_in(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and locations of the rows in a segment, by location."""
        found = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        for keys, locations in self._table.index.scan(_SCAN_KEYS):
            inside = locations >> UNIT_BITS == number
            found.append((keys[inside], locations[inside]))
        keys, locations = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.argsort(locations)
        return keys[order], locations[order]

    def _carry_erasures(self, victim: Segment) -> None:
        if victim.number == self._table.entry.segments[0]:
            return
        committed = victim.ends
        victim.ends = Ends()
        try:
            records = read_records(victim, self._table.slot_size, is_sealed=True)
        finally:
            victim.ends = committed
        erased = [record.keys for record in records if record.is_erasure]
        if erased:
            keys = distinct_keys(np.concatenate(erased))
            absent = keys[~self._table.index.contains(keys)]
            if len(absent):
                self._writer.record_erasure(absent)


def delete_files(segment: Segment) -> None:
    """Delete the files of a segment; those who have them open go on reading."""
    for path in (segment.keys_path, segment.rows_path):
        try:
            path.unlink()
        except OSError as problem:
            log.warning("%s: cannot be deleted: %s", path, problem.strerror)
