"""``rocks_db``: all rows on the local disk, in a RocksDB database that HugeCTR can open, and the other way round.

A table is a column family named by its tag, with raw keys of 8 or 4 bytes and raw float32 rows. A write is acknowledged once
RocksDB's log is on the disk, so it survives the end of the process and of the machine.

The number of rows, which RocksDB only estimates, is counted when it is first asked for, and kept from then on: there is one
writer. Turned down: a count stored in the database, which HugeCTR would not maintain.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np

from hps_numba.config import PersistentDatabaseConfig
from hps_numba.errors import HpsError, TierError, TierUnavailable
from hps_numba.runtime.blocks import Blocks
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.paths import settled_path
from hps_numba.runtime.reentry import ExclusiveLock, refuse_inside
from hps_numba.runtime.weak import members
from hps_numba.storage.rocksdb.database import Database
from hps_numba.storage.rocksdb.library import typed_errors
from hps_numba.storage.rocksdb.readers import Readers
from hps_numba.storage.rocksdb.table import Table
from hps_numba.storage.sst_dump import SstDump
from hps_numba.storage.tiers._tier import Fetched, Tier

__all__ = ["PLUGIN", "RocksTier"]

log = logging.getLogger(__name__)
_open: WeakSet[RocksTier] = WeakSet()  # of this process


class RocksTier(Tier):
    """Rows in a RocksDB database. Opened ``read_only`` it is as it was at that moment, whatever another process writes.

    ``num_threads``: of RocksDB's background work, and as many that read parts of one batch.

    Thread safety: every method; reads go on beside a write, writes wait for each other. In a forked child every call raises
    TierUnavailable.
    """

    Options = PersistentDatabaseConfig
    parallel_fetches = 2  # threads read the parts of one batch
    persistent = True
    section: PersistentDatabaseConfig

    #: seconds that ``close`` waits for calls that still read
    GRACE_SECONDS = 30.0

    def __init__(self, section: PersistentDatabaseConfig, *, wide_keys: bool = True) -> None:
        super().__init__(section, wide_keys=wide_keys)
        path = settled_path(section.path, "rocks_db: path", error=TierUnavailable)
        self._database = Database(path, section.num_threads, read_only=section.read_only)
        self._readers = Readers(section.num_threads)
        self._tables: dict[str, Table] = {}
        self._closed = False
        self._lock = ExclusiveLock(f"{section.path}: writes to RocksDB")
        self._new_locks()
        _open.add(self)
        register_fork_reset(self)

    def _new_locks(self) -> None:
        self._calls = Blocks()
        self._opening = threading.RLock()  # a table is looked up, created or dropped; reentrant, for signal handlers

    def reset_after_fork(self) -> None:
        """Forget the calls of threads that a forked child does not have, and leave the database to the parent."""
        self._new_locks()
        _open.discard(self)

    # -- calls --------------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        self._database.check_process()
        if self._closed:
            raise self.closed_error()

    def _check_writable(self, table: str) -> None:
        self._check_open()
        if self.read_only:
            raise TierError(f"{self._database.path}: {table}: expected a database open for writing, got one opened read_only")

    def _typed(self, table: str) -> AbstractContextManager[None]:
        """Errors of RocksDB become a TierError that names the database and the table."""
        return typed_errors(f"{self._database.path}: {table}")

    def _known(self, name: str) -> Table | None:
        """The table, if it exists."""
        self._check_open()
        table = self._tables.get(name)
        if table is None:
            with self._opening:
                column = self._database.column(name)
                if column is not None:
                    return self._opened(name, column, new=False)
        return table

    def _created(self, name: str) -> Table:
        """The table, created if it does not exist; while the lock is held."""
        table = self._known(name)
        if table is None:
            with self._opening:
                table = self._opened(name, self._database.create(name), new=True)
        return table

    def _opened(self, name: str, column: Any, *, new: bool) -> Table:
        table = Table(self._database, name, column, self._readers, wide_keys=self.wide_keys, new=new)
        return self._tables.setdefault(name, table)

    # -- reads --------------------------------------------------------------------------------------------------------

    def fetch(self, table: str, keys: np.ndarray, rows: np.ndarray, *, deadline: float | None = None) -> Fetched:
        found, asked = np.zeros(len(keys), bool), 0
        with self._calls.block(), self._typed(table):
            known = self._known(table)
            if known is None or known.dim is None:
                return Fetched(found, len(keys))
            if rows.shape != (len(keys), known.dim):
                raise TierError(f"{table}: rows: expected shape ({len(keys)}, {known.dim}), got {rows.shape}")
            for part in self.batches(len(keys), deadline):
                self._check_open()
                known.fetch(np.ascontiguousarray(keys[part], np.int64), rows[part], found[part])
                asked = part.stop
        return Fetched(found, asked)

    def contains(self, table: str, keys: np.ndarray) -> np.ndarray:
        found = np.zeros(len(keys), bool)
        with self._calls.block(), self._typed(table):
            known = self._known(table)
            if known is not None:
                for part in self.batches(len(keys), None):
                    self._check_open()
                    found[part][known.find(np.ascontiguousarray(keys[part], np.int64))[0]] = True
        return found

    def size(self, table: str) -> int:
        with self._calls.block(), self._typed(table):
            known = self._known(table)
            if known is None:
                return 0
            if known.count is not None:
                return known.count
            if self.read_only or self._lock.owned_here:
                return self._counted(known)
        with self._lock.held(), self._calls.block(), self._typed(table):  # writes wait, so that the number stays right
            known = self._known(table)
            return 0 if known is None else self._counted(known)

    def _counted(self, table: Table) -> int:
        count, last = 0, None
        while table.count is None:
            self._check_open()
            keys = table.next_keys(last)
            if not keys:
                table.count = count
                break
            count, last = count + len(keys), keys[-1]
        return table.count

    def tables(self) -> list[str]:
        self._check_open()
        return self._database.names()

    def scan(self, table: str, chunk_rows: int = 65536) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        last: bytes | None = None
        while (chunk := self._next_rows(table, last, chunk_rows)) is not None:  # a suspended scan keeps nothing open
            last, keys, rows = chunk
            yield keys, rows

    def _next_rows(self, table: str, last: bytes | None, most: int) -> tuple[bytes, np.ndarray, np.ndarray] | None:
        with self._calls.block(), self._typed(table):
            known = self._known(table)
            return None if known is None else known.next_rows(last, most)

    def scan_by_bytes(self, table: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return self.scan(table)

    # -- writes -------------------------------------------------------------------------------------------------------

    def insert(self, table: str, keys: np.ndarray, rows: np.ndarray) -> int:
        self._check_writable(table)
        if rows.ndim != 2 or len(rows) != len(keys) or not rows.shape[1]:
            raise TierError(f"{table}: rows: expected shape ({len(keys)}, width), got {rows.shape}")
        with self._lock.held(), self._calls.block(), self._typed(table):
            known = self._created(table)
            if known.dim is not None:
                self.check_width(table, known.dim, rows.shape[1])
            known.check_storable(keys)
            count, known.count, new = known.count, None, 0
            for part in self.batches(len(keys), None):
                new += known.put(
                    np.ascontiguousarray(keys[part], np.int64),
                    np.ascontiguousarray(rows[part]),
                    into_empty=count is not None and not count + new,
                )
            self._database.sync()
            known.count = None if count is None else count + new
        return new

    def erase(self, table: str, keys: np.ndarray | None = None) -> int:
        self._check_writable(table)
        with self._lock.held(), self._calls.block(), self._typed(table):
            known = self._known(table)
            if known is None:
                return 0
            if keys is None:
                return self._drop(known)
            count, known.count, gone = known.count, None, 0
            for part in self.batches(len(keys), None):
                gone += known.remove(np.ascontiguousarray(keys[part], np.int64))
            self._database.sync()
            known.count = None if count is None else count - gone
        return gone

    def _drop(self, table: Table) -> int:
        count = self._counted(table)
        with self._opening:
            self._database.drop(table.name)
            self._tables.pop(table.name, None)
        return count

    def load_dump(self, table: str, path: str | Path) -> int:
        """As ``Tier.load_dump``; RocksDB takes in an ``.sst`` file as a whole, checked before: all of its rows or none."""
        dump = self.open_dump(path)
        if not isinstance(dump, SstDump) or not dump.pairs:
            return super().load_dump(table, path)
        self._check_writable(table)
        with self._lock.held(), self._calls.block(), self._typed(table):
            known = self._created(table)
            if known.dim is not None:
                self.check_width(table, known.dim, dump.dim)
            known.ingest(dump)
        return dump.pairs

    def close(self) -> None:
        refuse_inside(f"{self._database.path}: close", (self._database, *self._tables.values()))
        with self._lock.held():  # a write ends first
            if self._closed:
                return
            self._closed = True
            self._calls.wait(self.GRACE_SECONDS)
            self._readers.close(self.GRACE_SECONDS)
            self._tables = {}
            self._database.close()


@atexit.register
def _close_all() -> None:
    """Let no thread be inside of RocksDB while Python ends: it ends a thread that comes back by unwinding its stack, which
    aborts the process in frames of Rust."""
    for tier in members(_open):
        try:
            tier.close()
        except HpsError as problem:  # there is no caller to raise it to
            log.warning("%s", problem)


PLUGIN = RocksTier
