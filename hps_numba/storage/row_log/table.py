"""One table: its segments, its index, and reading rows. ``writing`` adds to it, in the process that has the folder's lock."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hps_numba.errors import TierError
from hps_numba.kernels.host.disk_reads import disk_mapped
from hps_numba.kernels.host.row_log import row_log_valid_slots
from hps_numba.kernels.layouts.row_log import UNIT_BITS, UNIT_MASK, slot_bytes
from hps_numba.runtime.progress import rows_progress
from hps_numba.storage.row_log.index import RowIndex
from hps_numba.storage.row_log.manifest import TableEntry
from hps_numba.storage.row_log.methods import ReadMethods, View
from hps_numba.storage.row_log.records import Record, read_records, recover_tail
from hps_numba.storage.row_log.segment import Segment, direct_block

__all__ = ["RowTable"]

log = logging.getLogger(__name__)
_PUT_KEYS = 1 << 20  # keys of small records that go to the index together


class RowTable:
    """A table of a folder.

    Args:
        tag: its name.   folder: of its files.   entry: as in the manifest.   policy, bounded: of the index.

    Attributes:
        writable: this process writes to it.
        slot_size: bytes of a row on disk.   segments: by number, ascending.   index: key -> location.
        recovered: by segment, records whose rows were there and which its key file lacks; for the writer to add.

    Raises:
        TierError: a file is missing or damaged.

    Thread safety: ``fetch``, ``scan``; the rest is called under a lock of the caller's.
    """

    def __init__(
        self, tag: str, folder: Path, entry: TableEntry, reads: ReadMethods, *, writable: bool, policy: str, bounded: bool
    ) -> None:
        self.tag, self.folder, self.entry = tag, folder, entry
        self.dim = entry.dim
        self.slot_size = slot_bytes(entry.dim)
        self.recovered: dict[int, list[Record]] = {}
        self.segments: dict[int, Segment] = {}
        self._short: dict[int, int] = {}  # sizes of files of rows that are damaged: too short for their records
        self._reads = reads
        self.writable = writable
        self._block: int | None = None
        self.index = RowIndex(tag, policy=policy, bounded=bounded)
        try:
            self.refresh(entry)
        except BaseException:
            self.index.close()
            raise
        self.view = self._new_view()

    # -- opening and following ------------------------------------------------------------------------------------------

    def open_segment(self, number: int, *, create: bool = False) -> Segment:
        """Open the files of a segment."""
        segment = Segment(self.folder, number, self.entry.seed, create=create, writable=self.writable)
        if self._reads.method != "mmap" and self._direct_block(segment):
            segment.open_direct()
        return segment

    def _direct_block(self, segment: Segment) -> int:
        """Block of direct reads, 0 if there are none; an empty file does not tell for good."""
        if self._block is not None:
            return self._block
        block = direct_block(segment.rows_path) or 0
        if os.fstat(segment.rows_fd).st_size:
            self._block = block
        return block

    def has_news(self, entry: TableEntry) -> bool:
        """Whether another process has written since the last ``refresh``."""
        if entry != self.entry:
            return True
        for number in reversed(entry.segments):
            segment = self.segments.get(number)
            if segment is None:  # another thread is just following
                return True
            if os.fstat(segment.keys_fd).st_size != segment.ends.keys:
                return True
            if segment.ends.keys:  # a commit that fails cuts this one, or none before it
                return False
        return False

    def was_cut(self) -> bool:
        """Whether records or rows that are in the index are on the disk no more, as their commit failed."""
        return any(
            os.fstat(segment.keys_fd).st_size < segment.ends.keys
            or os.fstat(segment.rows_fd).st_size < self._short.get(segment.number, segment.ends.rows)
            for segment in self.segments.values()
        )

    def refresh(self, entry: TableEntry) -> None:
        """Follow the manifest and the key files: what was committed before this call is in the index afterwards."""
        gone = self.segments.keys() - set(entry.segments)
        known = {number: self.segments.get(number) or self.open_segment(number) for number in entry.segments}
        if known.keys() - self.segments.keys():  # the index never knows a segment that the view does not have
            self.segments = {**self.segments, **known}
            self.view = self._new_view()
        total = sum(os.fstat(segment.keys_fd).st_size - segment.ends.keys for segment in known.values()) // 8
        with rows_progress(total, doing=f"{self.tag}: index") as advance:
            for number, segment in known.items():
                before = segment.ends.keys
                self._replay(segment, is_last=number == entry.segments[-1])
                self._note_size(segment)
                advance(self.tag, (segment.ends.keys - before) // 8)
        if gone:  # their live rows were copied before, so what still points to them was erased or evicted meanwhile
            self.index.erase(self.index.outside(set(known)))
        self.segments, self.entry = known, entry
        self.view = self._new_view()

    def _note_size(self, segment: Segment) -> None:
        size = os.fstat(segment.rows_fd).st_size
        if size < segment.ends.rows:
            self._short[segment.number] = size
        else:
            self._short.pop(segment.number, None)

    def _replay(self, segment: Segment, *, is_last: bool) -> None:
        """Bring the index up to what is in a key file; if that fails, the next call does it again from the same place."""
        before = segment.ends
        try:
            self._index(self._new_records(segment, is_last=is_last), segment)
        except BaseException:
            segment.ends = before
            self.recovered.pop(segment.number, None)
            raise

    def _new_records(self, segment: Segment, *, is_last: bool) -> list[Record]:
        records = read_records(segment, self.slot_size, is_sealed=self.writable or not is_last)
        if self.writable and (more := recover_tail(segment, self.slot_size)):
            rows = sum(len(record.keys) for record in more)
            log.warning(
                "%s: its end was damaged: %d rows were recovered from %s", segment.keys_path, rows, segment.rows_path.name
            )
            self.recovered[segment.number] = more
            records += more
        return records

    def _index(self, records: list[Record], segment: Segment) -> None:
        keys: list[np.ndarray] = []
        locations: list[np.ndarray] = []
        waiting = 0
        for record in records:
            if not record.is_erasure:
                keys.append(record.keys)
                locations.append(segment.locations(record.unit, len(record.keys), self.slot_size))
                waiting += len(record.keys)
            if waiting and (record.is_erasure or waiting >= _PUT_KEYS):
                self._put(keys, locations)
                waiting = 0
            if record.is_erasure:
                self.index.erase(record.keys)
        if waiting:
            self._put(keys, locations)

    def _put(self, keys: list[np.ndarray], locations: list[np.ndarray]) -> None:
        self.index.put(np.concatenate(keys), np.concatenate(locations))
        keys.clear()
        locations.clear()

    def _new_view(self) -> View:
        mapped = self._reads.maps(sum(segment.ends.rows for segment in self.segments.values()))
        block = self._direct_block(self.segments[self.entry.segments[0]]) if self._reads.method != "mmap" else 0
        return self._reads.view(self.segments, block, mapped=mapped)

    def renew_view(self) -> None:
        """After segments were added or removed, or grew."""
        self.view = self._new_view()

    # -- reading --------------------------------------------------------------------------------------------------------

    def fetch(self, keys: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """Copy the rows of keys to ``rows`` (float32 ``[n, dim]``, contiguous).

        Returns bool ``[n]``, which were copied, and by position what is wrong with rows that are damaged or cannot be read.
        """
        return self._fetch_at(keys, self.index.find(keys), rows)

    def _fetch_at(self, keys: np.ndarray, locations: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """``fetch`` for keys whose ``locations``, which change if they are not up to date, were found before."""
        left = self._reads.read(self.view, keys, locations, rows, self.slot_size)
        while len(left):  # moved by a compaction meanwhile, or in a segment that the view did not have yet
            fresh = self.index.find(keys[left])
            changed = fresh != locations[left]
            if not changed.any():
                break
            locations[left] = fresh
            some = np.empty((len(left), self.dim), np.float32)
            missing = self._reads.read(self.view, keys[left], fresh, some, self.slot_size)
            served = fresh != 0
            served[missing] = False
            rows[left[served]] = some[served]
            left = left[missing]
        damaged = self._read_each(self.view.segments, keys, locations, rows, left)
        found = locations != 0
        found[list(damaged)] = False
        return found, damaged

    def read_span(self, segment: Segment, keys: np.ndarray, locations: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Copy rows that lie close to each other in a segment, by one read; returns bool ``[n]``, which are whole.

        ``locations`` ascend.
        """
        begin = 8 * int(locations[0] & UNIT_MASK)
        end = 8 * int(locations[-1] & UNIT_MASK) + self.slot_size
        words = np.empty((end - begin) // 8, np.int64)
        unserved = np.ones(len(keys), np.uint8)
        try:
            size = os.preadv(segment.rows_fd, [words.data], begin)
        except OSError:  # one by one, to find out which
            size = 0
        fields = np.array([[segment.rows_fd, words.ctypes.data - begin, begin + size, segment.seed]], np.int64)
        disk_mapped(
            keys, locations, 0, len(keys), segment.number, fields, self.slot_size, 4 * self.dim, rows.ctypes.data, unserved
        )
        whole = unserved == 0
        left = np.flatnonzero(unserved)
        for i in set(left.tolist()) - self._read_each({segment.number: segment}, keys, locations, rows, left).keys():
            whole[i] = True
        return whole

    def _read_each(
        self, segments: dict[int, Segment], keys: np.ndarray, locations: np.ndarray, rows: np.ndarray, positions: np.ndarray
    ) -> dict[int, str]:
        """Read rows one by one; returns what is wrong with those that cannot be read, by position."""
        found = {int(i): self._read_patiently(segments, int(keys[i]), int(locations[i]), rows[i]) for i in positions}
        return {i: problem for i, problem in found.items() if problem is not None}

    def _read_patiently(self, segments: dict[int, Segment], key: int, location: int, row: np.ndarray) -> str | None:
        """Read one row without hurry; returns what is wrong with it in words."""
        segment = segments.get(location >> UNIT_BITS)
        if segment is None:
            return f"the row of key {key} is in segment {location >> UNIT_BITS}, which is gone"
        place = segment.place(location)
        try:
            content = os.pread(segment.rows_fd, self.slot_size, 8 * (location & UNIT_MASK))
        except OSError as problem:
            return f"{place}: the row of key {key} cannot be read: {problem.strerror}"
        if len(content) < self.slot_size:
            return f"{place}: expected the {self.slot_size} bytes of the row of key {key}, got {len(content)}: the file is cut"
        words = np.frombuffer(content, np.int64)
        found = np.empty(1, np.int64)
        if not row_log_valid_slots(words, self.slot_size, segment.seed, location & UNIT_MASK, 1, found):
            return f"{place}: the row of key {key} is damaged: its checksum does not match"
        if found[0] != key:
            return f"{place}: expected the row of key {key}, got that of {found[0]}"
        row[:] = words[2:].view(np.float32)[: self.dim]
        return None

    def scan(self, chunk_rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All (keys, rows) in chunks; of the keys that are there when it begins, the rows that are there when they are read.

        Raises:
            TierError: a row is damaged or cannot be read.
        """
        for keys, locations in self.index.scan(chunk_rows):
            rows = np.empty((len(keys), self.dim), np.float32)
            found, damaged = self._fetch_at(keys, locations, rows)
            if damaged:
                more = f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
                raise TierError(f"{self.tag}: {next(iter(damaged.values()))}{more}")
            if found.any():
                yield keys[found], rows[found]

    # -- size and end ---------------------------------------------------------------------------------------------------

    @property
    def bytes(self) -> int:
        """Bytes of all its files."""
        return sum(segment.bytes for segment in self.segments.values())

    def close(self) -> None:
        """Release the index; files are closed when the last reader has ended."""
        self.index.close()
