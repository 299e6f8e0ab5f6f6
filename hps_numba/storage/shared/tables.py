"""The tables of a segment, and the parts of a host store that is in one of them.

* ``segment``, ``segment_file``, ``file_locks``: the file, mapped at one address; the writer's turn; which processes live.
* ``epochs``: records of the readers of all processes; how caches follow what other processes publish.
* ``regions``: who has which part of the space.   ``content``: one version of a table.   ``table``: header, versions, turn.
* ``change_lock``: one process at a time changes a table in all its tiers.
* here: which tables there are, and ``SharedMemory``, from which ``HostStore`` gets its parts.

*What a killed process leaves.* A lock of the file: dropped by the kernel. Reader records: cleared by the next writer that they
hold up. A half-finished write: repaired by the next writer of the table. Space without a table: swept when space is needed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np

from hps_numba.device.host_memory import PlainHostAllocator
from hps_numba.errors import CapacityError, ConfigError, TierError
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.storage.host.bound import RECENCY_OF_POLICY
from hps_numba.storage.host.content import TableContent
from hps_numba.storage.host.header import StoreHeader
from hps_numba.storage.host.memory import Mark, StoreMemory
from hps_numba.storage.host.versions import Versions
from hps_numba.storage.host.write_lock import WriteLock
from hps_numba.storage.shared.change_lock import ChangeLock
from hps_numba.storage.shared.content import SharedContent
from hps_numba.storage.shared.epochs import SharedEpochs
from hps_numba.storage.shared.file_locks import Check, go_on
from hps_numba.storage.shared.layout import (
    C_ROWS,
    C_WORDS,
    T_DIM,
    T_ERASED,
    T_HEADER,
    T_IN_USE,
    T_MAX_ROWS,
    T_PATH,
    T_POLICY,
    T_REPLACED,
    T_SOURCE,
    T_STATE,
    T_TAG,
    T_TAG_LENGTH,
    T_TARGET,
    T_UNFINISHED,
    TABLE_AREA,
    TABLE_BYTES,
    TABLES,
    TAG_BYTES,
)
from hps_numba.storage.shared.regions import Regions
from hps_numba.storage.shared.segment import Segment, attach
from hps_numba.storage.shared.segment_file import word_view
from hps_numba.storage.shared.table import SharedHeader, SharedVersions, SharedWriteLock, TableEntry

__all__ = ["Bounds", "SharedMemory", "SharedTables", "attach_tables"]

_POLICIES = sorted(RECENCY_OF_POLICY)


@dataclass(frozen=True)
class Bounds:
    """How a table is bounded, by which all processes must go.

    Attributes:
        max_rows: rows that it holds, None for any number.   policy: which rows are evicted.   target: share that is kept.
    """

    max_rows: int | None
    policy: str
    target: float

    @property
    def _words(self) -> list[int]:
        if self.max_rows is None:
            return [0, 0, 0]
        return [self.max_rows, _POLICIES.index(self.policy), round(self.target * 1e9)]

    def note(self, entry: TableEntry) -> None:
        """Write them to an entry."""
        entry.words[[T_MAX_ROWS, T_POLICY, T_TARGET]] = self._words

    def check(self, tag: str, entry: TableEntry) -> None:
        """Raise ConfigError unless they are those of an entry."""
        noted = entry.words[[T_MAX_ROWS, T_POLICY, T_TARGET]].tolist()
        if noted != self._words:
            rows = f"{noted[0]} rows, {_POLICIES[noted[1]]}, {noted[2] / 1e9:g}" if noted[0] else "none"
            raise ConfigError(
                f"{tag}: expected the bound that its creator gave (overflow_margin * num_partitions, overflow_policy, "
                f"overflow_resolution_target: {rows}), got {self}"
            )


class SharedTables:
    """All tables of a segment.   Thread safety: every method."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.epochs = SharedEpochs(segment)
        self.regions = Regions(segment, self.epochs, self._reachable)
        self._change_locks: dict[int, ChangeLock] = {}

    def _entries(self) -> Iterator[tuple[str, TableEntry]]:
        """Tags and entries, erased ones too."""
        for number in range(TABLES):
            entry = TableEntry(self.segment.address + TABLE_AREA + number * TABLE_BYTES)
            if not entry.words[T_STATE]:
                return
            length = int(entry.words[T_TAG_LENGTH])
            yield entry.words[T_TAG:].tobytes()[:length].decode(), entry

    def tags(self) -> list[str]:
        """Tags of all tables, ascending."""
        return sorted(tag for tag, entry in self._entries() if entry.words[T_STATE] == T_IN_USE and entry.block)

    def find(self, tag: str) -> TableEntry | None:
        """The entry of a table; None if there is none."""
        return next((e for name, e in self._entries() if name == tag and e.words[T_STATE] == T_IN_USE and e.block), None)

    def change_lock(self, entry: TableEntry, name: str) -> ChangeLock:
        """The lock of a table, one for all its stores in this process."""
        return self._change_locks.setdefault(entry.address, ChangeLock(self.segment, entry, name))

    @staticmethod
    def dim(entry: TableEntry) -> int:
        """Width of the rows of a table."""
        return int(entry.words[T_DIM])

    def open(self, tag: str, dim: int, bounds: Bounds, check: Check = go_on) -> TableEntry:
        """The entry of a table, made if needed; its header leads nowhere until a store has made its first version.

        Args:
            check: called while another process writes; may raise.

        Raises:
            TierError: the tag is too long, or the table has another width.   ConfigError: it has other bounds.
            CapacityError: the segment has no entry left.
        """
        name = tag.encode()
        if len(name) > TAG_BYTES:
            raise TierError(f"{tag}: expected a tag of at most {TAG_BYTES} bytes, got {len(name)}")
        with self.segment.turn(check):
            known = [entry for other, entry in self._entries() if other == tag]
            for entry in known:
                if entry.words[T_STATE] == T_IN_USE and (entry.block or self.dim(entry) == dim):
                    if self.dim(entry) != dim:
                        raise TierError(f"{tag}: expected rows of width {self.dim(entry)}, got {dim}")
                    if entry.block:
                        bounds.check(tag, entry)
                        return entry
            # an entry that others may still hold leads only to rows of the same width
            again = next((entry for entry in known if self.dim(entry) == dim), None)
            return self._made(again or self._unused(tag), name, dim, bounds)

    def _unused(self, tag: str) -> TableEntry:
        used = sum(1 for _ in self._entries())
        if used == TABLES:
            raise CapacityError(f"{tag}: the segment {self.segment.path} has no entry left for another table, of {TABLES}")
        return TableEntry(self.segment.address + TABLE_AREA + used * TABLE_BYTES)

    def _made(self, entry: TableEntry, name: bytes, dim: int, bounds: Bounds) -> TableEntry:
        words = entry.words
        words[[T_HEADER, T_UNFINISHED]] = 0
        words[T_SOURCE:T_TAG] = 0
        words[[T_DIM, T_TAG_LENGTH]] = dim, len(name)
        words[T_TAG:] = np.frombuffer(name.ljust(TAG_BYTES, b"\0"), np.int64)
        bounds.note(entry)
        words[T_STATE] = T_IN_USE  # last: from now on there is a table
        return entry

    def _reachable(self) -> set[int]:
        reachable: set[int] = set()
        for _, entry in self._entries():
            if entry.block and entry.words[T_STATE] != T_ERASED:
                region = self.regions.at(entry.block)
                record = word_view(self.regions.address(region), C_WORDS)
                reachable |= {region, int(record[C_ROWS])}
        return reachable


class SharedMemory:
    """Where a host store is that is a table of a segment.   Thread safety: every method.

    Args:
        check: called while the store is made and another process writes; may raise.
    """

    shared = True

    def __init__(self, tables: SharedTables, entry: TableEntry, name: str, check: Check = go_on) -> None:
        self._tables, self._entry, self._name, self._check = tables, entry, name, check
        self.epochs = tables.epochs
        self._changes = tables.change_lock(entry, name)
        self._lock: SharedWriteLock | None = None

    @property
    def is_erased(self) -> bool:
        """Some process has dropped the table."""
        return self._entry.words[T_STATE] != T_IN_USE or not self._entry.block

    @property
    def mark(self) -> Mark:
        """What the rows were loaded from; its digest is zeros after an interrupted change of versions."""
        words = self._entry.words
        path = words[T_PATH:T_TAG].tobytes().rstrip(b"\0").decode(errors="replace")
        return Mark(self._entry.source, path, bool(words[T_REPLACED]))

    @mark.setter
    def mark(self, mark: Mark) -> None:
        words, size = self._entry.words, 8 * (T_TAG - T_PATH)
        path = mark.path.encode(errors="replace")
        if len(path) > size:
            path = b"..." + path[3 - size :]
        with self._tables.segment.turn():
            words[T_PATH:T_TAG] = np.frombuffer(path.ljust(size, b"\0"), np.int64)
            self._entry.source = mark.digest.ljust(32, b"\0")
            words[T_REPLACED] = mark.replaced

    @property
    def foreign_writes(self) -> int:
        return 0 if self._lock is None else self._lock.others

    def header(self, name: str) -> StoreHeader:
        return SharedHeader(self._entry, self._tables.epochs)

    def content(self, dim: int, rows: int, recency: int, purpose: str) -> TableContent:
        tables = self._tables
        return SharedContent.create(tables.segment, tables.regions, dim, rows, recency=recency, purpose=purpose)

    def versions(self, header: StoreHeader, first: Callable[[], TableContent]) -> Versions:
        assert isinstance(header, SharedHeader)
        tables = self._tables
        versions = SharedVersions(header, tables.epochs, tables.segment, tables.regions, self._entry, self._name)
        with tables.segment.turn(self._check):
            if not self._entry.block:
                versions.begin(first())
        return versions

    def write_lock(self, name: str, header: StoreHeader, versions: Versions) -> WriteLock:
        assert isinstance(header, SharedHeader) and isinstance(versions, SharedVersions)
        self._lock = SharedWriteLock(name, header, versions, self._tables.segment, self._entry)
        return self._lock

    @contextmanager
    def still(self) -> Iterator[bool]:
        with self._changes.held_if_free() as free, self._writers_away(free) as still:
            yield still

    def _writers_away(self, free: bool) -> AbstractContextManager[bool]:
        return self._lock.held_if_free() if free and self._lock is not None else nullcontext(free)

    def alone(self) -> AbstractContextManager[None]:
        return self._changes.held(go_on if self._lock is None else self._lock.check_open)

    def turn(self) -> AbstractContextManager[None]:
        return self._tables.segment.turn()

    def aside(self) -> StoreMemory:
        return _AsideMemory(self._tables)


class _AsideMemory:
    """Versions in the segment that only this process knows, for a store that another one will take over."""

    shared = True
    foreign_writes = 0

    def __init__(self, tables: SharedTables) -> None:
        self._tables = tables
        self.epochs = tables.epochs
        self.mark = Mark()

    def header(self, name: str) -> StoreHeader:
        return StoreHeader(PlainHostAllocator(), name)

    def content(self, dim: int, rows: int, recency: int, purpose: str) -> TableContent:
        tables = self._tables
        return SharedContent.create(tables.segment, tables.regions, dim, rows, recency=recency, purpose=purpose)

    def versions(self, header: StoreHeader, first: Callable[[], TableContent]) -> Versions:
        return Versions(header, self.epochs, first())

    def write_lock(self, name: str, header: StoreHeader, versions: Versions) -> WriteLock:
        return WriteLock(name, header, versions)

    def still(self) -> AbstractContextManager[bool]:
        return nullcontext(True)  # no other process knows it

    def alone(self) -> AbstractContextManager[None]:
        return nullcontext()

    def turn(self) -> AbstractContextManager[None]:
        return self._tables.segment.turn()

    def aside(self) -> StoreMemory:
        return _AsideMemory(self._tables)


class _Known:
    """The tables of the segments of this process."""

    def __init__(self) -> None:
        self.of: WeakKeyDictionary[Segment, SharedTables] = WeakKeyDictionary()
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        self.lock = threading.RLock()


_known = _Known()


def attach_tables(name: str, size: int, *, auto_remove: bool) -> SharedTables:
    """The tables of a segment; whoever calls this calls ``segment.leave`` of it once.

    Raises:
        As ``segment_file.open_segment``.
    """
    with _known.lock:
        segment = attach(name, size, auto_remove=auto_remove)
        tables = _known.of.get(segment)
        if tables is None:
            tables = _known.of[segment] = SharedTables(segment)
            segment.leaving.append(partial(_known.of.pop, segment, None))
        return tables
