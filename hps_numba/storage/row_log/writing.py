"""Writing to a table: commits that are there whole or not at all, and the bound of its size.

A commit writes rows, syncs them, writes records, syncs those, and only then changes the index. If any of it fails, the files
are cut to what was committed before, so that nothing of it is seen, now or after the next start.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from hps_numba.errors import TierError
from hps_numba.kernels.host.row_log import row_log_encode
from hps_numba.kernels.layouts.row_log import RECORD_WORDS
from hps_numba.storage.distinct import distinct_keys
from hps_numba.storage.row_log.records import record_bytes
from hps_numba.storage.row_log.segment import Ends, Segment, aligned
from hps_numba.storage.row_log.table import RowTable

__all__ = ["Bound", "TableWriter"]

log = logging.getLogger(__name__)
_WRITE_BYTES = 8 << 20
_KEY_BYTES = 8
_sync_data: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)
Group = tuple[np.ndarray, np.ndarray]
"""Keys, int64 ``[n]``, and rows, float32 ``[n, dim]``, both contiguous."""


@dataclass(frozen=True)
class Bound:
    """How large a table may become.

    Attributes:
        max_bytes: of its files; None for no bound.   target: share of the rows that an eviction leaves.
        segment_bytes: of its segments.   always_sync: what is acknowledged survives a loss of power.
    """

    max_bytes: int | None
    target: float
    segment_bytes: int
    always_sync: bool

    def max_rows(self, slot_size: int) -> int | None:
        """Rows that a table keeps at most: two thirds of ``max_bytes``, so that compaction finds something to free."""
        return None if self.max_bytes is None else max(1, self.max_bytes * 2 // 3 // (slot_size + _KEY_BYTES))


@dataclass
class _Piece:
    """Slots that a commit wrote: those of keys ``keys`` of the group ``group``, from ``unit`` of ``segment`` on."""

    segment: Segment
    unit: int
    keys: np.ndarray
    group: int


class TableWriter:
    """The writer of one table.

    Args:
        add_segment: makes a new segment, notes it in the manifest, and makes it the last one of the table.
        check_folder: raises TierError if the folder of the log is no more where it was.

    Thread safety: one thread at a time.
    """

    def __init__(
        self, table: RowTable, bound: Bound, add_segment: Callable[[], Segment], check_folder: Callable[[], object]
    ) -> None:
        self.table = table
        self.bound = bound
        self._add_segment = add_segment
        self._check_folder = check_folder
        self._drafts: dict[int, Ends] = {}  # of a commit that is being written, by segment
        self._unrecorded: list[np.ndarray] = []  # evicted keys that have no record yet
        self._broken: str | None = None
        self._rolls = False  # the next commit goes to a new segment
        self._viewed_bytes = table.bytes
        self._unsynced = set(table.segments)  # an earlier writer may have synced nothing

    @property
    def active(self) -> Segment:
        """The segment that is written to."""
        return self.table.segments[self.table.entry.segments[-1]]

    @property
    def unrecorded_bytes(self) -> int:
        """Bytes of the records of evictions that the next commit writes."""
        return sum(2 * _KEY_BYTES * (RECORD_WORDS + len(keys)) for keys in self._unrecorded)

    def repair(self) -> None:
        """Cut torn tails, and add the records that were recovered."""
        for segment in self.table.segments.values():
            _cut(segment.keys_fd, segment.ends.keys)
            _cut(segment.rows_fd, segment.ends.rows)
            records = self.table.recovered.pop(segment.number, ())
            number = segment.ends.records - len(records)
            for record in records:
                content = record_bytes(segment, segment.ends.keys, number, record.unit, record.keys)
                _write_all(segment.keys_fd, content, segment.ends.keys)
                segment.ends = segment.ends._replace(keys=segment.ends.keys + len(content))
                number += 1
            if records:
                os.fsync(segment.keys_fd)

    # -- commits --------------------------------------------------------------------------------------------------------

    def put(self, groups: Sequence[Group]) -> list[int]:
        """Commit groups of rows, in their order; returns how many keys of each were new.

        Raises:
            TierError: they cannot be written; nothing of them is there.
        """
        new = [0] * len(groups)
        pieces = self._write(groups)
        with self._ending():
            for piece in pieces:
                new[piece.group] += self.table.index.put(piece.keys, self._locations(piece))
        return new

    def move(self, keys: np.ndarray, rows: np.ndarray, old: np.ndarray) -> None:
        """Commit copies of rows whose locations are ``old``.

        Raises:
            TierError: they cannot be written.
        """
        start = 0
        pieces = self._write([(keys, rows)])
        with self._ending():
            for piece in pieces:
                stop = start + len(piece.keys)
                self.table.index.move(piece.keys, old[start:stop], self._locations(piece))
                start = stop

    def _locations(self, piece: _Piece) -> np.ndarray:
        return piece.segment.locations(piece.unit, len(piece.keys), self.table.slot_size)

    def _write(self, groups: Sequence[Group]) -> list[_Piece]:
        """Write and sync all of a commit but its end, which follows when the index has it."""
        pieces: list[_Piece] = []
        with self._committing("rows"):
            self._record_evictions()
            for number, (keys, rows) in enumerate(groups):
                self._write_rows(number, keys, rows, pieces)
            self._sync("rows_fd")
            for piece in pieces:
                self._write_record(piece.segment, piece.unit, piece.keys)
            self._sync("keys_fd")
            self._check_places()
        return pieces

    def _check_places(self) -> None:
        """Acknowledge nothing that is in files which nobody finds again: open files outlive their names.

        Raises:
            TierError: the folder of the log or of the table, or a file, was deleted, renamed or replaced.
        """
        self._check_folder()
        for number in self._drafts or (self.active.number,):
            segment = self.table.segments[number]
            if not segment.stays:
                raise TierError(
                    f"{segment.rows_path}: expected the file that is written to, beside {segment.keys_path.name}, got another "
                    "one or none: it was deleted, renamed or replaced, and nothing was written"
                )

    @contextmanager
    def _committing(self, what: str) -> Iterator[None]:
        """Undo what was written if not all of it can be."""
        if self._broken:
            raise TierError(f"{self.table.folder}: takes no more rows until it is opened again: {self._broken}")
        self._drafts = {}
        if self._rolls:  # the last commit failed: no new segment each time if it was because the files are gone
            self._check_places()
        try:
            yield
        except BaseException as problem:
            self._undo()
            if isinstance(problem, OSError) and not isinstance(problem, TierError):
                raise TierError(f"{self.table.folder}: {what} cannot be written: {problem.strerror}") from problem
            raise

    def erase(self, keys: np.ndarray) -> int:
        """Erase keys; returns how many there were.

        Raises:
            TierError: the erasure cannot be written; all keys are as they were.
        """
        present = distinct_keys(keys)
        present = present[self.table.index.contains(present)]
        if len(present) or self._unrecorded:
            self.record_erasure(present)
        return self.table.index.erase(present)

    def record_erasure(self, keys: np.ndarray) -> None:
        """Write the record of an erasure, whatever the index says of its keys."""
        with self._committing("an erasure"):
            self._record_evictions()
            if len(keys):
                self._write_erasure(keys)
            self._sync("keys_fd")
            self._check_places()
        with self._ending():
            pass

    def evict(self, most: int | None = None) -> None:
        """Evict by the policy if there are more rows than ``most``, by default what the bound allows.

        That is recorded with the next commit.
        """
        most = self.bound.max_rows(self.table.slot_size) if most is None else most
        if most is not None and len(self.table.index) > max(most, 0):
            self._unrecorded.append(self.table.index.evict(most, self.bound.target))

    def _write_rows(self, group: int, keys: np.ndarray, rows: np.ndarray, pieces: list[_Piece]) -> None:
        slot_size = self.table.slot_size
        start = 0
        while start < len(keys):
            segment = self._segment_with_room()
            draft = self._draft(segment)
            offset = aligned(draft.rows)
            room = max(slot_size, self.bound.segment_bytes - offset)
            n = min(len(keys) - start, max(1, min(room, _WRITE_BYTES) // slot_size))
            some = keys[start : start + n]
            content = np.zeros(n * slot_size // 8, np.int64)
            at = rows.ctypes.data + 4 * self.table.dim * start
            row_log_encode(some, at, slot_size, 4 * self.table.dim, segment.seed, offset // 8, content)
            _write_all(segment.rows_fd, content.data.cast("B"), offset)
            self._drafts[segment.number] = draft._replace(rows=offset + n * slot_size)
            pieces.append(_Piece(segment, offset // 8, some, group))
            start += n

    def _segment_with_room(self) -> Segment:
        draft = self._draft(self.active)
        full = aligned(draft.rows) + self.table.slot_size > self.bound.segment_bytes and draft.rows > 0
        if full or draft.keys > self.bound.segment_bytes or self._rolls:
            self._add_segment()
            self._rolls = False
        return self.active

    def _draft(self, segment: Segment) -> Ends:
        return self._drafts.setdefault(segment.number, segment.ends)

    def _record_evictions(self) -> None:
        for keys in self._unrecorded:
            self._write_erasure(keys)

    def _write_erasure(self, keys: np.ndarray) -> None:
        """Both copies, which have the same number."""
        segment = self._segment_with_room()
        first = self._draft(segment)
        self._write_record(segment, -1, keys)
        second = self._draft(segment)
        content = record_bytes(segment, second.keys, first.records, -1, keys)
        _write_all(segment.keys_fd, content, second.keys)
        self._drafts[segment.number] = second._replace(keys=second.keys + len(content))

    def _write_record(self, segment: Segment, unit: int, keys: np.ndarray) -> None:
        draft = self._draft(segment)
        content = record_bytes(segment, draft.keys, draft.records, unit, keys)
        _write_all(segment.keys_fd, content, draft.keys)
        self._drafts[segment.number] = draft._replace(keys=draft.keys + len(content), records=draft.records + 1)

    def _sync(self, which: str) -> None:
        if not self.bound.always_sync:
            self._unsynced.update(self._drafts)
            return
        for number in self._drafts:
            _sync_data(getattr(self.table.segments[number], which))

    def settle(self) -> None:
        """See that all that was committed and evicted is on the disk, with either ``sync``: what it replaces is deleted next.

        An eviction without a record would leave an older row of its key to be found after a crash.

        Raises:
            TierError: it cannot be written or synced; nothing may be deleted.
        """
        if self._unrecorded:
            self.record_erasure(np.empty(0, np.int64))
        if self._broken:
            raise TierError(f"{self.table.folder}: {self._broken}")
        for number in sorted(self._unsynced & self.table.segments.keys()):
            segment = self.table.segments[number]
            try:
                _sync_data(segment.rows_fd)
                _sync_data(segment.keys_fd)
            except OSError as problem:  # a second attempt could succeed without what is lost
                self._broken = f"{segment.rows_path}: cannot be synced: {problem.strerror}"
                raise TierError(self._broken) from problem
        self._unsynced.clear()

    def _undo(self) -> None:
        """Cut the files to what was committed before.

        Another process may have read records that are cut: it sees that the file became shorter, as that one is not written to
        again. It looks at the last one that it read from first, so that one is cut first.
        """
        for number, draft in reversed(self._drafts.items()):
            segment = self.table.segments[number]
            self._rolls = self._rolls or draft.keys > segment.ends.keys
            try:
                _cut(segment.keys_fd, segment.ends.keys)
                _cut(segment.rows_fd, segment.ends.rows)
            except OSError as problem:
                self._broken = f"{segment.keys_path}: cannot be cut to what is committed: {problem.strerror}"
                log.warning("%s", self._broken)
        self._drafts = {}

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """Change the index: the commit is on the disk. If there is no memory for it, what is there shows at the next start."""
        try:
            yield
        except BaseException as problem:
            self._broken = f"the index lacks what is on the disk: {problem}"
            raise
        finally:
            for number, draft in self._drafts.items():
                self.table.segments[number].ends = draft
            self._drafts = {}
            self._unrecorded.clear()
        if self.table.bytes - self._viewed_bytes >= 1 << 20:
            self.renew_view()

    def renew_view(self) -> None:
        """Let readers see new segments, and map what was added."""
        self._viewed_bytes = self.table.bytes
        self.table.renew_view()


def _cut(descriptor: int, size: int) -> None:
    if os.fstat(descriptor).st_size > size:
        os.ftruncate(descriptor, size)


def _write_all(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    view = memoryview(content)
    while len(view):
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
