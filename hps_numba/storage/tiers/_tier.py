"""What a storage tier promises: rows of embedding tables by key, in memory, on disk or across a network.

A tier is one file in this folder that defines ``PLUGIN``, a subclass of :class:`Tier`; an entry point of the group
``hps_numba.tiers``; or a class of the user's own, named in the config as ``module:NAME`` or ``file.py:NAME``. Six methods are
enough; everything else is built on them. Tables are named by tag, ``hps_et.<model>.<table>``. Every tier passes
``hps_numba.testing.TierContract``.

A tier that fails raises TierError (or TierUnavailable): then the next tier is asked, and keys found in no tier count as
unanswered. Any other exception, also SystemExit, and any answer of another form is a defect: the caller of the lookup gets it,
as a TierError with the exception as its cause.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from hps_numba.errors import ClosedError, TierError
from hps_numba.storage.bin_dump import Dump, read_bin, write_bin
from hps_numba.storage.formats._format import rows_per_chunk
from hps_numba.storage.rocksdb.keys import KEY_BYTES, sorted_by_bytes
from hps_numba.storage.sst_dump import read_sst, write_sst

if TYPE_CHECKING:
    from hps_numba.config import PersistentDatabaseConfig, TierConfig, VolatileDatabaseConfig

__all__ = ["NO_LIMIT", "Fetched", "PartialWriteError", "Tier"]

#: ``capacity`` of a tier without a bound
NO_LIMIT = 2**64 - 1


@dataclass(frozen=True)
class Fetched:
    """The answer of a tier.

    Attributes:
        found: bool ``[n]``, which keys had a row; the rows of the others were left as they were.
        asked: how many keys, from the first on, were looked for before time ran out; ``n`` if it did not.
        failed: bool ``[n]``, keys that could not be looked for, as a part of the tier is out of order (a node of a cluster);
            they may exist. None: there are none.
    """

    found: np.ndarray
    asked: int
    failed: np.ndarray | None = None

    def check_complete(self, table: str) -> None:
        """Check that all keys were looked for.

        Raises:
            TierError: some were not; how many.
        """
        n = len(self.found)
        lost = n - self.asked + (0 if self.failed is None else int(self.failed[: self.asked].sum()))
        if lost:
            raise TierError(f"{table}: {lost:,} of {n:,} keys could not be looked for: a part of the tier is out of order")


class PartialWriteError(TierError):
    """``insert`` or ``erase`` of keys reached a part of a tier only, as another part is out of order (a node of a cluster).

    Attributes:
        failed: bool ``[n]``, the keys that may not be written; all others are.
    """

    def __init__(self, message: str, failed: np.ndarray) -> None:
        super().__init__(message)
        self.failed = failed

    def __reduce__(self) -> tuple[type[PartialWriteError], tuple[str, np.ndarray]]:
        return type(self), (str(self), self.failed)


class Tier(abc.ABC):
    """One storage tier, shared by all models of a server.

    Class attributes:
        shared: other processes see the same rows.
        persistent: rows outlive the process.
        parallel_fetches: calls of ``fetch`` at a time that it answers faster than one after the other, at least 1; keys of
            further lookups are collected and fetched together. Few for a tier that gains little from more, such as one with a
            single connection; many for one whose answers take their time on the way. It stays as it is while the tier is open.
        Options: dataclass or pydantic model of the tier's own keys in the config; None: it takes those of every tier only.

    Attributes:
        section: the part of the config that named the tier, with the keys of every tier, such as ``max_batch_size`` and
            ``read_only``.
        wide_keys: keys have 64 bits, else 32.

    Thread safety: every method, from any thread.
    """

    shared: ClassVar[bool] = False
    persistent: ClassVar[bool] = False
    parallel_fetches: int = 16
    Options: ClassVar[type | None] = None

    def __init__(
        self, section: VolatileDatabaseConfig | PersistentDatabaseConfig | TierConfig, *, wide_keys: bool = True
    ) -> None:
        """Open the tier that a section of the config describes.

        Raises:
            TierUnavailable: it cannot be reached, or what it needs is not installed.
        """
        self.section = section
        self.wide_keys = wide_keys

    @classmethod
    def from_options(cls, *, wide_keys: bool = True, **keys: Any) -> Self:
        """Open a tier without a config file: ``keys`` are what its section would hold beside ``type``.

        Raises:
            ConfigError: a key is unknown, or its value is not valid.
        """
        from hps_numba.config import checked_options, tier_config

        section = tier_config({"type": f"{cls.__module__}:{cls.__name__}", **keys})
        return cls(checked_options(section, cls.Options, (), strict=True), wide_keys=wide_keys)

    @property
    def options(self) -> Any:
        """The instance of ``Options`` that the config describes; None if the tier declares none."""
        return self.section.options

    @property
    def read_only(self) -> bool:
        """Rows cannot be written."""
        return bool(getattr(self.section, "read_only", False))

    # -- to be written ---------------------------------------------------------------------

    @abc.abstractmethod
    def fetch(self, table: str, keys: np.ndarray, rows: np.ndarray, *, deadline: float | None = None) -> Fetched:
        """Copy the rows of those keys (int64 ``[n]``) that the tier has to ``rows`` (float32 ``[n, dim]``).

        Rows of absent keys stay as they are; an unknown table has no keys. ``deadline`` is a ``time.monotonic()`` after which
        no further batch is begun (``batches`` observes it). Once the call has ended, nothing writes to ``rows`` any more.
        """

    @abc.abstractmethod
    def insert(self, table: str, keys: np.ndarray, rows: np.ndarray) -> int:
        """Write a row for each key, creating the table if needed; the last of equal keys wins. Returns how many were new.

        Keys and rows are copied. A table has one width, that of its first rows: another is a TierError.

        Raises:
            PartialWriteError: the other keys are written. Online updates then go on with them; after any other TierError, none
                of the keys counts as written.
        """

    @abc.abstractmethod
    def erase(self, table: str, keys: np.ndarray | None = None) -> int:
        """Remove keys, or with None the whole table; returns how many rows there were.

        Raises:
            PartialWriteError: as ``insert``; the other keys are removed.
        """

    @abc.abstractmethod
    def size(self, table: str) -> int:
        """Number of rows in a table; 0 if it is unknown."""

    @abc.abstractmethod
    def tables(self) -> list[str]:
        """Tags of all tables."""

    @abc.abstractmethod
    def scan(self, table: str, chunk_rows: int = 65536) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All (keys, rows) of a table in chunks, each key once."""

    # -- built on it ---------------------------------------------------------------------

    def capacity(self, table: str) -> int:
        """Rows that a table may hold; NO_LIMIT if it has no bound."""
        return NO_LIMIT

    def contains(self, table: str, keys: np.ndarray) -> np.ndarray:
        """bool ``[n]``: which keys have a row."""
        dim = next((rows.shape[1] for _, rows in self.scan(table, 1)), 1)
        return self.fetch(table, keys, np.empty((len(keys), dim), np.float32)).found

    def find_tables(self, model: str) -> list[str]:
        """Tags of the tables of one model."""
        return sorted(tag for tag in self.tables() if tag.startswith(f"hps_et.{model}."))

    def scan_by_bytes(self, table: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All (keys, rows) in the order of the raw bytes of the keys, as RocksDB sorts them.

        The keys are sorted in memory, 24 bytes a row at most, and rows are fetched by them, 8 MiB at a time. Rows that are
        erased meanwhile are left out. A tier that has rows in this order overrides it.

        Raises:
            TierError: also if only a part of the tier is out of order.
        """
        parts = [(keys, rows.shape[1]) for keys, rows in self.scan(table)]
        if not parts:
            return
        dim = parts[0][1]
        keys = np.concatenate([keys for keys, _ in parts])
        del parts
        keys = keys[sorted_by_bytes(keys, KEY_BYTES[self.wide_keys])]
        step = rows_per_chunk(dim)
        for start in range(0, len(keys), step):
            some = keys[start : start + step]
            rows = np.empty((len(some), dim), np.float32)
            answer = self.fetch(table, some, rows)
            answer.check_complete(table)
            yield some[answer.found], rows[answer.found]

    def dump(self, table: str, path: str | Path) -> int:
        """Write a table to a ``.bin`` file (``storage.bin_dump``) or an ``.sst`` file (``storage.sst_dump``).

        Returns the number of rows.

        Raises:
            ModelFileError: the file cannot be written, or replaces another thing than such a dump.
            TierError: another ending, or an ``.sst`` file of no rows.   TierUnavailable: ``.sst`` without rocksdict.
        """
        sorted_keys = self._is_sst(path)
        chunks = self.scan_by_bytes(table) if sorted_keys else self.scan(table)
        first = next(chunks, None)
        dim = 1 if first is None else first[1].shape[1]
        rest = [] if first is None else [first]
        write = write_sst if sorted_keys else write_bin
        return write(path, KEY_BYTES[self.wide_keys], dim, _chained(rest, chunks), overwrite=True)

    def load_dump(self, table: str, path: str | Path) -> int:
        """Insert the rows of a ``.bin`` or ``.sst`` file into a table; returns their number.

        Raises:
            ModelFileError: a damaged file.   TierError: keys of another width than the tier's, or another ending.
            TierUnavailable: ``.sst`` without rocksdict.
        """
        dump = self.open_dump(path)
        for keys, rows in dump.chunks(self.section.max_batch_size):
            self.insert(table, keys, rows)
        return dump.pairs

    def open_dump(self, path: str | Path) -> Dump:
        """Open a ``.bin`` or ``.sst`` file whose keys are as wide as the tier's; raises as ``load_dump``."""
        dump = read_sst(path) if self._is_sst(path) else read_bin(path)
        expected = KEY_BYTES[self.wide_keys]
        if dump.key_bytes != expected and dump.pairs:
            raise TierError(f"{path}: expected keys of {expected} bytes (supportlonglong), got {dump.key_bytes}")
        return dump

    @staticmethod
    def _is_sst(path: str | Path) -> bool:
        ending = Path(path).suffix
        if ending not in (".bin", ".sst"):
            raise TierError(f"{path}: expected a .bin or .sst file")
        return ending == ".sst"

    def batches(self, n: int, deadline: float | None) -> Iterator[slice]:
        """Cut ``n`` keys into batches of ``max_batch_size``; stops when the deadline has passed."""
        step = self.section.max_batch_size
        for start in range(0, n, step):
            if deadline is not None and time.monotonic() >= deadline:
                return
            yield slice(start, min(start + step, n))

    @staticmethod
    def check_width(table: str, width: int, dim: int) -> None:
        """Raise TierError unless rows of width ``dim`` fit a table whose rows have ``width`` elements."""
        if dim != width:
            raise TierError(f"{table}: expected rows of width {width}, got {dim}")

    def close(self) -> None:
        """Release everything; later calls may raise ClosedError."""

    def closed_error(self) -> ClosedError:
        """The error of a call after ``close``."""
        return ClosedError(f"{type(self).__name__}: the tier is closed")


def _chained(
    first: list[tuple[np.ndarray, np.ndarray]], rest: Iterator[tuple[np.ndarray, np.ndarray]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    yield from first
    yield from rest
