"""All tables of a folder: its lock, its manifest, and the commits that concurrent inserts share."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hps_numba.errors import ClosedError, TierError
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.reentry import ExclusiveLock
from hps_numba.storage.row_log.compaction import Compaction, delete_files
from hps_numba.storage.row_log.folders import check_folder, clear_orphans, manifest_of
from hps_numba.storage.row_log.lock import WriterLock
from hps_numba.storage.row_log.manifest import (
    MANIFEST,
    Manifest,
    Signature,
    TableEntry,
    signature_of,
    sync_folder,
    write_manifest,
)
from hps_numba.storage.row_log.methods import ReadMethods
from hps_numba.storage.row_log.segment import Segment, segment_paths
from hps_numba.storage.row_log.table import RowTable
from hps_numba.storage.row_log.writing import Bound, TableWriter

__all__ = ["RowLog"]

log = logging.getLogger(__name__)
_MAX_SEGMENT = (1 << 22) - 1
_PART_ROWS_SHARE = 2  # a part of an insert into a bounded table is at most this share of a segment
_FOLLOW_ATTEMPTS = 100


@dataclass(eq=False)
class _Insert:
    """One insert that waits for a commit."""

    tag: str
    keys: np.ndarray
    rows: np.ndarray
    new: int = 0
    problem: BaseException | None = None
    done: bool = False


class RowLog:
    """The tables of a folder, in this process.

    One process has the lock and writes; every other one reads, and looks before each fetch whether there is something new,
    which costs two calls of ``stat``: what was acknowledged before the fetch began is found. A child that is forked from the
    writer reads like any other process.

    Args:
        writable: take the lock of the folder.   bound: of each table.   policy: what is evicted.

    Raises:
        TierUnavailable: another process writes to the folder, or it is not there.   TierError: it is damaged.

    Thread safety: every method.
    """

    def __init__(self, folder: Path, reads: ReadMethods, bound: Bound, policy: str, *, writable: bool) -> None:
        self.folder = folder
        self.reads = reads
        self.bound = bound
        self._policy = policy
        self._place = f"row_log in {folder}"
        self._lock = ExclusiveLock(self._place)
        self._waiting: deque[_Insert] = deque()
        self._tables: dict[str, RowTable] = {}
        self._writers: dict[str, tuple[TableWriter, Compaction]] = {}
        self._signature: Signature = None
        self._closed = self._changing = False
        self._pid = os.getpid()
        check_folder(folder, make=writable)
        self._writer_lock = WriterLock(folder) if writable else None
        register_fork_reset(self)
        try:
            self._manifest = manifest_of(folder)
            if writable:
                clear_orphans(folder, self._manifest)
            self._follow()
        except BaseException:
            self.close()
            raise

    def reset_after_fork(self) -> None:
        """In the child: read like any other process; from the start if another thread was changing something."""
        self._waiting = deque()
        self._writers = {}
        self._signature = None
        for table in self._tables.values():
            table.writable = False
        if self._changing:
            self._tables = {}
            self._changing = False

    @property
    def writes(self) -> bool:
        """Whether this process has the lock."""
        return self._writer_lock is not None and self._writer_lock.held

    # -- reading --------------------------------------------------------------------------------------------------------

    def table(self, tag: str) -> RowTable | None:
        """A table, with all that was acknowledged before this call; None if there is none."""
        if self._closed:
            raise self._closed_error()
        if not self.writes:
            self._look_for_news(tag)
        return self._tables.get(tag)

    def tags(self) -> list[str]:
        """Tags of all tables."""
        if self._closed:
            raise self._closed_error()
        if not self.writes:
            self._look_for_news(None)
        return sorted(self._tables)

    def _look_for_news(self, tag: str | None) -> None:
        table = self._tables.get(tag) if tag is not None else None
        try:
            same = signature_of(self.folder / MANIFEST) == self._signature and self._signature is not None
        except OSError as problem:
            raise TierError(f"{self.folder / MANIFEST}: cannot be looked at: {problem.strerror}") from problem
        if same:
            if table is not None and not table.has_news(table.entry):
                return
            if table is None and (tag is None or tag not in self._manifest.tables):
                return
        with self._change():
            self._follow()

    def _follow(self) -> None:
        """Follow the manifest, again if a compaction deletes a segment in between."""
        for attempt in range(_FOLLOW_ATTEMPTS):
            signature = signature_of(self.folder / MANIFEST)
            if not self.writes and (signature != self._signature or signature is None):
                self._manifest = manifest_of(self.folder)
            try:
                for tag, entry in self._manifest.tables.items():
                    self._follow_table(tag, entry)
                break
            except TierError:
                if signature_of(self.folder / MANIFEST) == signature or attempt == _FOLLOW_ATTEMPTS - 1:
                    raise
        for tag in self._tables.keys() - self._manifest.tables.keys():
            del self._tables[tag]
        self._signature = signature

    def _follow_table(self, tag: str, entry: TableEntry) -> None:
        """Follow the files of a table, or open it.

        One that is replaced is used until the new one is complete. It is not closed, but left to those who read from it: it
        ends with the last of them.
        """
        table = self._tables.get(tag)
        replaced = table is not None and table.entry.number != entry.number  # dropped, and made again
        if table is not None and not replaced and (self.writes or not table.was_cut()):
            if table.has_news(entry):
                table.refresh(entry)
            return
        table = RowTable(
            tag,
            self.folder / entry.folder,
            entry,
            self.reads,
            writable=self.writes,
            policy=self._policy,
            bounded=self.bound.max_bytes is not None,
        )
        if self.writes:
            self._writer_of(table)[0].repair()
            table.renew_view()
        self._tables[tag] = table

    # -- writing --------------------------------------------------------------------------------------------------------

    def insert(self, tag: str, keys: np.ndarray, rows: np.ndarray) -> int:
        """Commit rows; those of concurrent calls share one commit. Returns how many keys were new.

        Raises:
            TierError: it cannot be written; nothing of it is there, but for a table with a bound whole parts of it.
        """
        job = _Insert(tag, np.ascontiguousarray(keys, np.int64), np.ascontiguousarray(rows, np.float32))
        self._waiting.append(job)
        try:
            with self._change():
                if not job.done:
                    self._check_writable()
                    self._commit_all(self._all_waiting())
        finally:
            if not job.done:  # refused: nobody is to write it later
                with suppress(ValueError):
                    self._waiting.remove(job)
        if job.problem is not None:
            raise job.problem
        return job.new

    def _all_waiting(self) -> list[_Insert]:
        """Take what waits out of the queue, to which other threads go on adding."""
        jobs: list[_Insert] = []
        with suppress(IndexError):
            while True:
                jobs.append(self._waiting.popleft())
        return jobs

    def _commit_all(self, jobs: list[_Insert]) -> None:
        by_tag: dict[str, list[_Insert]] = {}
        for job in jobs:
            by_tag.setdefault(job.tag, []).append(job)
        for tag, some in by_tag.items():
            fitting: list[_Insert] = []
            try:
                table = self._table_for(tag, some[0].rows.shape[1])
                for job in some:
                    if job.rows.shape != (len(job.keys), table.dim):
                        job.problem = TierError(f"{tag}: expected rows of width {table.dim}, got {job.rows.shape[1]}")
                    else:
                        fitting.append(job)
                self._commit(table, fitting)
            except BaseException as problem:
                for job in fitting or some:
                    job.problem = problem
            for job in some:
                job.done = True

    def _commit(self, table: RowTable, jobs: list[_Insert]) -> None:
        writer, compaction = self._writers[table.tag]
        total = sum(len(job.keys) for job in jobs)
        size = table.slot_size + 8
        part = max(1, self.bound.segment_bytes // _PART_ROWS_SHARE // size)
        if self.bound.max_bytes is None or total <= part:
            compaction.make_room(total * size + 1024 * len(jobs))
            for job, new in zip(jobs, writer.put([(job.keys, job.rows) for job in jobs]), strict=True):
                job.new = new
            writer.evict()
            return
        for job in jobs:
            for start in range(0, len(job.keys), part):
                compaction.make_room(part * size + 1024)
                job.new += writer.put([(job.keys[start : start + part], job.rows[start : start + part])])[0]
                writer.evict()

    def erase(self, tag: str, keys: np.ndarray) -> int:
        """Erase keys of a table; returns how many there were."""
        with self._change():
            self._check_writable()
            if tag not in self._tables:
                return 0
            return self._writers[tag][0].erase(np.ascontiguousarray(keys, np.int64))

    def drop(self, tag: str) -> int:
        """Remove a table; returns how many rows it had."""
        with self._change():
            self._check_writable()
            table = self._tables.get(tag)
            if table is None:
                return 0
            rows = len(table.index)
            self._save(self._manifest.with_table(tag, None))
            del self._tables[tag], self._writers[tag]
            shutil.rmtree(table.folder, ignore_errors=True)
            return rows

    def compact(self, tag: str) -> int:
        """Free what updated, erased and evicted rows of a table take; returns the bytes freed."""
        with self._change():
            self._check_writable()
            if tag not in self._tables:
                return 0
            return self._writers[tag][1].run(self._tables[tag].bytes)

    def _table_for(self, tag: str, dim: int) -> RowTable:
        table = self._tables.get(tag)
        if table is not None:
            return table
        self._check_folder()  # another log may have its place
        entry = TableEntry(self._manifest.next_number, dim, secrets.randbits(62), (1,))
        folder = self.folder / entry.folder
        try:
            folder.mkdir(exist_ok=True)
            for path in segment_paths(folder, 1):
                path.write_bytes(b"")
            sync_folder(folder)
        except OSError as problem:
            raise TierError(f"{folder}: cannot be made: {problem.strerror}") from problem
        self._save(self._manifest.with_table(tag, entry))
        self._follow_table(tag, entry)
        return self._tables[tag]

    def _writer_of(self, table: RowTable) -> tuple[TableWriter, Compaction]:
        def add_segment() -> Segment:
            return self._add_segment(table)

        writer = TableWriter(table, self.bound, add_segment, self._check_folder)
        pair = writer, Compaction(writer, add_segment, lambda numbers: self._drop_segments(table, numbers))
        self._writers[table.tag] = pair
        return pair

    def _add_segment(self, table: RowTable) -> Segment:
        number = table.entry.segments[-1] + 1
        if number > _MAX_SEGMENT:
            raise TierError(
                f"{table.folder}: expected at most {_MAX_SEGMENT} segments, got one more: copy the table to a new one"
            )
        self._check_folder()
        segment = table.open_segment(number, create=True)
        sync_folder(table.folder)
        entry = table.entry.with_segments(*table.entry.segments, number)
        self._save(self._manifest.with_table(table.tag, entry))
        table.segments = {**table.segments, number: segment}
        table.entry = entry
        table.renew_view()
        return segment

    def _drop_segments(self, table: RowTable, numbers: list[int]) -> None:
        entry = table.entry.with_segments(*(number for number in table.entry.segments if number not in numbers))
        self._save(self._manifest.with_table(table.tag, entry))
        gone = [table.segments[number] for number in numbers]
        table.segments = {number: segment for number, segment in table.segments.items() if number not in numbers}
        table.entry = entry
        for segment in gone:
            delete_files(segment)

    def _check_folder(self) -> None:
        """Whether what is written is found again, and by nobody else written to: once a commit, 5 microseconds.

        Raises:
            TierError: the folder, its lock or its manifest was deleted, renamed or replaced.
        """
        try:
            stays = self._writer_lock is not None and self._writer_lock.stays
            has_manifest = not self._manifest.tables or signature_of(self.folder / MANIFEST) is not None
        except OSError as problem:
            raise TierError(f"{self.folder}: cannot be looked at: {problem.strerror}") from problem
        if not stays:
            raise TierError(
                f"{self.folder}: expected the folder that was opened, got another one or none, or one without its file lock: "
                "it was deleted, renamed or replaced, and nothing was written"
            )
        if not has_manifest:
            raise TierError(f"{self.folder / MANIFEST}: expected the manifest of the tables, got no file: nothing was written")

    def _save(self, manifest: Manifest) -> None:
        self._check_folder()
        write_manifest(self.folder, manifest)
        self._manifest = manifest

    @contextmanager
    def _change(self) -> Iterator[None]:
        with self._lock.held():
            if self._closed:
                raise self._closed_error()
            self._changing = True
            try:
                yield
            finally:
                self._changing = False

    def _check_writable(self) -> None:
        if not self.writes:
            why = (
                "is opened with read_only"
                if self._writer_lock is None
                else f"belongs to process {self._pid}, which forked this one"
            )
            raise TierError(f"{self.folder}: expected a writer, got one that {why}")

    def _closed_error(self) -> ClosedError:
        return ClosedError(f"{self._place}: the tier is closed")

    def close(self) -> None:
        """Let the next writer in, and release everything; reads that are active end well, or with ClosedError."""
        with self._lock.held():
            self._closed = True
            if self._writer_lock is not None:
                self._writer_lock.release()
            self._writers = {}
            while self._tables:
                self._tables.popitem()[1].close()
        self.reads.close()
