"""A RocksDB database: opened and closed with typed errors, in the process that opened it and no other.

In a forked child every call raises TierUnavailable (``library``), and the handle is never destroyed: that would crash.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from hps_numba.errors import TierError, TierNotMade, TierUnavailable
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.immortal import keep_forever
from hps_numba.runtime.paths import is_free
from hps_numba.storage.rocksdb.library import column_options, database_options, one_line, rocksdict, typed_errors
from hps_numba.storage.rocksdb.links import folder_of_links, names_of_files

__all__ = ["Database"]

log = logging.getLogger(__name__)
_DEFAULT = "default"  # the column family that every database has; no table
_LOCKED = ("lock hold by current process", "LOCK: Resource temporarily unavailable")
_ATTEMPTS = 10  # at opening for reading beside a process that writes


def _files_of_rows(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith((".sst", ".log", ".blob"))]


class Database:
    """An open database.

    Attributes:
        path: its folder.
        package: rocksdict.
        in_use: native iterators that are in use, so that a forked child does not destroy them.

    Thread safety: reads from any thread; ``create``, ``drop``, ``write`` and ``ingest`` one at a time; ``close`` alone.
    """

    def __init__(self, path: Path, threads: int, *, read_only: bool) -> None:
        """Open the database at ``path``; unless ``read_only``, create it and its folder if there is none.

        Raises:
            TierUnavailable: rocksdict is missing, another process has the database open for writing, or it cannot be read or
                written, or is damaged.   TierNotMade: there is none, and it is opened ``read_only``.
        """
        self.path = path
        self.package = rocksdict(str(path))
        self.in_use: set[Any] = set()
        self._threads = threads
        self._process = os.getpid()
        self._columns: dict[str, Any] = {}
        self._handle = self._open_for_reading() if read_only else self._open()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Keep a reference to each native object of the parent forever."""
        for native in (self._handle, *self._columns.values(), *self.in_use):
            keep_forever(native)

    # -- opening ------------------------------------------------------------------------------------------------------

    def _open(self) -> Any:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise TierUnavailable(f"{self.path}: expected a folder for the database, got a file") from None
        except OSError as problem:
            raise TierUnavailable(f"{self.path}: the folder of the database cannot be made: {problem.strerror}") from problem
        names = names_of_files(self.path)
        create = "CURRENT" not in names
        rows = _files_of_rows(names)
        if rows and create:  # RocksDB would start with an empty one, and delete them
            raise TierUnavailable(f"{self.path}: expected a file CURRENT beside {rows[0]}, got none: the database is damaged")
        try:
            return self._opened(self.path, self.package.AccessType.read_write(), create=create)
        except Exception as problem:
            raise self._open_error(problem) from problem

    def _open_for_reading(self) -> Any:
        if is_free(self.path):
            raise TierNotMade(
                f"{self.path}: expected a database, as it is opened read-only, got nothing: no process has made it yet"
            )
        access = self.package.AccessType.read_only(False)
        for attempt in range(_ATTEMPTS):
            names = names_of_files(self.path)
            if "CURRENT" not in names:
                kind = TierUnavailable if _files_of_rows(names) else TierNotMade
                raise kind(f"{self.path}: expected a database, as it is opened read-only, got no file CURRENT")
            try:
                with folder_of_links(self.path) as links:
                    return self._opened(links, access, create=False)
            except TierUnavailable:
                raise
            except Exception as problem:  # perhaps the writer deleted a file meanwhile
                if attempt == _ATTEMPTS - 1 or names == names_of_files(self.path):
                    raise self._open_error(problem) from problem
        raise AssertionError  # the loop returns or raises

    def _opened(self, path: Path, access: Any, *, create: bool) -> Any:
        options = database_options(self.package, self._threads, create=create)
        names = [_DEFAULT] if create else self.package.Rdict.list_cf(str(path))
        columns = {name: column_options(self.package) for name in names if name != _DEFAULT}
        handle = self.package.Rdict(str(path), options, columns, access)
        self._columns = {name: handle.get_column_family(name) for name in columns}
        for name in columns:
            log.debug("%s: opened table %s", self.path, name)
        return handle

    def _open_error(self, problem: Exception) -> TierUnavailable:
        text = one_line(problem)
        if any(sign in text for sign in _LOCKED):
            return TierUnavailable(
                f"{self.path}: expected a database that nothing else has open for writing, got one whose lock "
                f"{self.path / 'LOCK'} is held; read_only opens it beside its writer ({text})"
            )
        return TierUnavailable(f"{self.path}: cannot be opened: {text}")

    # -- use ----------------------------------------------------------------------------------------------------------

    def check_process(self) -> None:
        """Raise TierUnavailable in a forked child."""
        if os.getpid() != self._process:
            raise TierUnavailable(
                f"{self.path}: expected a call from process {self._process}, which opened the database, got one from its "
                f"forked child {os.getpid()}: open it after the fork only"
            )

    def names(self) -> list[str]:
        """Names of all column families but the default one."""
        return sorted(self._columns)

    def column(self, name: str) -> Any | None:
        """The column family of this name; it stays readable after it was dropped."""
        return self._columns.get(name)

    def create(self, name: str) -> Any:
        """Create a column family.

        Raises:
            TierError: RocksDB refuses.
        """
        if name == _DEFAULT:
            raise TierError(f"{self.path}: expected the tag of a table, got {name!r}, which RocksDB itself uses")
        with typed_errors(f"{self.path}: {name}: cannot create the table"):
            column = self._handle.create_column_family(name, column_options(self.package))
        self._columns[name] = column
        return column

    def drop(self, name: str) -> None:
        """Drop a column family and all that is in it.

        Raises:
            TierError: RocksDB refuses.
        """
        with typed_errors(f"{self.path}: {name}: cannot drop the table"):
            self._handle.drop_column_family(name)
        del self._columns[name]

    def batch(self, name: str) -> Any:
        """An empty batch of writes to a column family."""
        batch = self.package.WriteBatch(raw_mode=True)
        batch.set_default_column_family(self._handle.get_column_family_handle(name))
        return batch

    def write(self, batch: Any) -> None:
        """Apply a batch as a whole; ``sync`` makes it permanent."""
        self._handle.write(batch)

    def sync(self) -> None:
        """Return when all that was written is on the disk."""
        self._handle.flush_wal(True)

    def close(self) -> None:
        """Close the database; its lock is free once no call uses it. In a forked child nothing happens.

        What was synced is safe, so RocksDB's complaint about a log that it could not write to is a warning.
        """
        self._columns, handle, self._handle = {}, self._handle, None
        if os.getpid() == self._process:
            try:
                handle.close()
            except Exception as problem:
                log.warning("%s: closed after an error: %s", self.path, one_line(problem))
