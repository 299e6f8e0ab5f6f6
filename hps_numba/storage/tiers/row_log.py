"""``row_log``: tables in append-only files of this host, with their index in memory; read at the disk's own rate.

For tables that are larger than memory, or that have to outlive the process. Any number of other processes may read them beside
the one that writes. ``docs/tiers/row-log.md`` says how rows are stored, and what survives what.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hps_numba.config import checked_options
from hps_numba.errors import TierError, TierUnavailable
from hps_numba.runtime.paths import settled_path
from hps_numba.runtime.shielded import shielded
from hps_numba.storage.row_log.log import RowLog
from hps_numba.storage.row_log.methods import ReadMethods
from hps_numba.storage.row_log.writing import Bound
from hps_numba.storage.tiers._tier import NO_LIMIT, Fetched, Tier

__all__ = ["PLUGIN", "RowLogOptions", "RowLogTier"]

log = logging.getLogger(__name__)
_MOST_REPORTED = 1000
_SEGMENTS_A_BOUND = 16
_LEAST_BOUND = 1 << 16


@dataclass(frozen=True)
class RowLogOptions:
    """Keys of a ``row_log`` in the config.

    Attributes:
        path: folder of the tables, made if missing.
        max_bytes: bytes of the files of a table, from 65536; by default no bound. Rows take two thirds of it at most.
        overflow_policy: which rows a table with a bound evicts.
        overflow_resolution_target: share of the rows that an eviction leaves.
        reads: how rows are read; ``auto``: ``mmap`` for a table up to half of the free memory, else ``io_uring``, or
            ``threads`` where the system refuses that.
        queue_depth: reads at a time of an io_uring, from 1 to 4096.
        threads: threads that read, from 1 to 256, where there is no io_uring.
        sync: ``always``: rows are on the disk when an insert returns; ``never``: the system writes them sooner or later, and a
            loss of power may lose them, but not the end of the process.
        segment_bytes: bytes of rows in a file, from 4096; a table with a bound has 16 files or more.
    """

    path: str
    max_bytes: int | None = None
    overflow_policy: Literal["evict_random", "evict_least_used", "evict_oldest"] = "evict_random"
    overflow_resolution_target: float = 0.8
    reads: Literal["auto", "io_uring", "threads", "mmap"] = "auto"
    queue_depth: int = 256
    threads: int = 32
    sync: Literal["always", "never"] = "always"
    segment_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if self.max_bytes is not None and self.max_bytes < _LEAST_BOUND:
            raise ValueError(f"max_bytes: expected at least {_LEAST_BOUND}, got {self.max_bytes}")
        for name, least, most in [("queue_depth", 1, 4096), ("threads", 1, 256), ("segment_bytes", 4096, 1 << 40)]:
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name}: expected {least} to {most}, got {getattr(self, name)}")
        if not 0 < self.overflow_resolution_target <= 1:
            raise ValueError(
                f"overflow_resolution_target: expected more than 0, up to 1, got {self.overflow_resolution_target}"
            )

    @property
    def bound(self) -> Bound:
        """How large a table may become."""
        segment = self.segment_bytes
        if self.max_bytes is not None:
            segment = min(segment, self.max_bytes // _SEGMENTS_A_BOUND)
        return Bound(self.max_bytes, self.overflow_resolution_target, segment, self.sync == "always")


class RowLogTier(Tier):
    """Rows on a disk of this host.

    Thread safety: every method. A write that the main thread makes is done whole, whatever interrupts it.
    """

    parallel_fetches = 2  # the reads of one batch are under way at the same time
    Options = RowLogOptions
    shared = persistent = True

    def __init__(self, section: Any, *, wide_keys: bool = True) -> None:
        if section.options is None:
            section = checked_options(section, RowLogOptions, ())
        super().__init__(section, wide_keys=wide_keys)
        options: RowLogOptions = self.options
        reads = ReadMethods(options.reads, depth=options.queue_depth, threads=options.threads)
        self._reported: set[str] = set()
        folder = settled_path(options.path, "row_log: path", error=TierUnavailable)
        self._log = RowLog(folder, reads, options.bound, options.overflow_policy, writable=not self.read_only)

    def fetch(self, table: str, keys: np.ndarray, rows: np.ndarray, *, deadline: float | None = None) -> Fetched:
        """``Tier.fetch``. Keys whose row is damaged or cannot be read are ``failed``; the log names file and offset."""
        found = np.zeros(len(keys), bool)
        here = self._log.table(table)
        if here is None:
            return Fetched(found, len(keys))
        if rows.shape != (len(keys), here.dim):
            raise TierError(f"{table}: rows: expected shape ({len(keys)}, {here.dim}), got {rows.shape}")
        keys = np.ascontiguousarray(keys, np.int64)
        straight = rows.flags.c_contiguous and rows.dtype == np.float32
        asked, failed = 0, None
        for part in self.batches(len(keys), deadline):
            target = rows[part] if straight else np.empty((part.stop - part.start, here.dim), np.float32)
            found[part], damaged = here.fetch(keys[part], target)
            if damaged:
                failed = np.zeros(len(keys), bool) if failed is None else failed
                failed[part.start + np.array(list(damaged))] = True
                self._report(table, list(damaged.values()))
            if not straight:
                rows[part][found[part]] = target[found[part]]
            asked = part.stop
        return Fetched(found, asked, failed)

    def _report(self, table: str, problems: list[str]) -> None:
        """Log each damaged row once."""
        for problem in problems:
            if problem not in self._reported and len(self._reported) < _MOST_REPORTED:
                self._reported.add(problem)
                log.error("%s: %s", table, problem)

    def insert(self, table: str, keys: np.ndarray, rows: np.ndarray) -> int:
        """``Tier.insert``; with ``sync`` ``always`` the rows are on the disk when it returns.

        Raises:
            TierError: the disk is full or fails: nothing of the insert is there, or for a table with a bound whole
                parts of it. Or rows of another width, or a tier that only reads.
        """
        if not len(keys):
            return 0
        return shielded(lambda ask: self._log.insert(table, keys, rows), owner=self, place=f"row_log: {table}")

    def erase(self, table: str, keys: np.ndarray | None = None) -> int:
        if keys is None:
            return shielded(lambda ask: self._log.drop(table), owner=self, place=f"row_log: {table}")
        return shielded(lambda ask: self._log.erase(table, keys), owner=self, place=f"row_log: {table}")

    def compact(self, table: str) -> int:
        """Free what updated, erased and evicted rows take on the disk, which otherwise happens when it is half of the table.

        Returns the bytes freed.
        """
        return shielded(lambda ask: self._log.compact(table), owner=self, place=f"row_log: {table}")

    def size(self, table: str) -> int:
        here = self._log.table(table)
        return 0 if here is None else len(here.index)

    def capacity(self, table: str) -> int:
        here = self._log.table(table)
        most = None if here is None else self._log.bound.max_rows(here.slot_size)
        return NO_LIMIT if most is None else most

    def disk_bytes(self, table: str) -> int:
        """Bytes that the files of a table take."""
        here = self._log.table(table)
        return 0 if here is None else here.bytes

    def index_bytes(self, table: str) -> int:
        """Bytes of memory that the index of a table takes."""
        here = self._log.table(table)
        return 0 if here is None else here.index.bytes

    def contains(self, table: str, keys: np.ndarray) -> np.ndarray:
        here = self._log.table(table)
        return np.zeros(len(keys), bool) if here is None else here.index.contains(np.ascontiguousarray(keys, np.int64))

    def tables(self) -> list[str]:
        return self._log.tags()

    def scan(self, table: str, chunk_rows: int = 65536) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        here = self._log.table(table)
        if here is not None:
            yield from here.scan(chunk_rows)

    def close(self) -> None:
        self._log.close()


PLUGIN = RowLogTier
