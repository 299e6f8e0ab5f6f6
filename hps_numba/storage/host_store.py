"""The host hash store of one table: key -> float32 row in host memory, read by any number of threads beside one writer.

*How a torn row cannot happen.* An upsert writes the row to a slot that no reader can hold, then swings the index word to it
with one atomic store. The slot that the word left is used again only after every reader that was at work has finished
(``storage/epochs.py``). So a reader sees the old row or the new one, takes no lock and never waits for the writer; a lookup
needs no check after the copy. Turned down: a version a row or a set (readers would retry, and write-heavy keys starve them),
and a reader-writer lock (the original's; one insertion stops all lookups, spec 8.3).

*Growth.* Rows never move; the index is rebuilt beside the old one and published through the header (``layout.py``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np

from hps_numba.errors import CapacityError, ClosedError, HpsError
from hps_numba.kernels.host_epoch import publish
from hps_numba.kernels.host_evict import HISTOGRAM, host_evict
from hps_numba.kernels.host_lookup import host_contains, host_lookup
from hps_numba.kernels.host_scan import host_scan
from hps_numba.kernels.host_write import STATE_LIVE, STATE_RETIRED, host_erase, host_upsert
from hps_numba.layout import (
    ENTRIES_PER_LINE,
    HEADER_BYTES,
    META_LINES,
    RECENCY_COUNT,
    RECENCY_NONE,
    RECENCY_TIME,
)
from hps_numba.memory import HostAllocator, PlainHostAllocator
from hps_numba.storage.epochs import EPOCHS, Epochs
from hps_numba.storage.table_content import TableContent, address_of
from hps_numba.threads import ranges_of, run_ranges

__all__ = ["RECENCY_OF_POLICY", "HostStore"]

#: what each overflow policy (spec 1.7) keeps a slot
RECENCY_OF_POLICY = {"evict_random": RECENCY_NONE, "evict_least_used": RECENCY_COUNT, "evict_oldest": RECENCY_TIME}

_GRACE_SECONDS = 5.0


class HostStore:
    """One table in host memory.

    Args:
        dim: row width in float32 elements.
        rows: rows to make room for at once; the store grows beyond.
        allocator: where memory comes from.
        growth_bytes: bytes of rows added when slots run out (``allocation_rate``, spec 1.4).
        max_rows: bound; a batch that passes it is followed by an eviction down to ``round(max_rows * target)``.
        policy: who leaves: ``evict_random``, ``evict_least_used`` (fewest lookups), ``evict_oldest`` (longest not written or
            looked up).
        batch_rows: rows written between two checks of the bound (``max_batch_size``).
        seed: of the random policy.

    **Threads:** lookups, ``contains`` and ``scan`` from any number of threads at any time, without a lock; writers take turns.
    """

    def __init__(
        self,
        dim: int,
        *,
        name: str = "table",
        rows: int = 0,
        allocator: HostAllocator | None = None,
        epochs: Epochs = EPOCHS,
        growth_bytes: int = 256 << 20,
        max_rows: int | None = None,
        policy: str = "evict_random",
        target: float = 0.8,
        batch_rows: int = 65536,
        seed: int = 0,
    ) -> None:
        if growth_bytes < 4 * dim:
            raise CapacityError(f"{name}: allocation_rate: {growth_bytes} bytes do not hold one row of {4 * dim} bytes")
        self.name = name
        self.dim = dim
        self.max_rows = max_rows
        self._allocator: HostAllocator = allocator if allocator is not None else PlainHostAllocator()
        self._epochs = epochs
        self._growth_bytes = growth_bytes
        self._recency = RECENCY_OF_POLICY[policy] if max_rows is not None else RECENCY_NONE
        self._policy, self._target = policy, target
        self._keep = None if max_rows is None else round(max_rows * target)
        self._batch_rows = batch_rows
        self._seed = seed
        self._lock = threading.RLock()
        self._closed = False
        self._old_contents: list[tuple[int, TableContent]] = []
        #: rows that the bound pushed out so far
        self.evicted = 0
        self._header = self._allocator.reserve(HEADER_BYTES, f"{name}: header")
        self._header.commit(HEADER_BYTES)
        #: address of the header, fixed for the life of the store
        self.header: int = self._header.address
        self._content = self.new_content(rows)
        publish(self.header, self._content.block)

    def sibling(self, rows: int = 0) -> HostStore:
        """An empty store with the same options and room for ``rows``, to fill aside and then ``adopt``.

        A bound store takes room for no more than its bound and one batch: more rows are never there at once.
        """
        return HostStore(
            self.dim,
            name=self.name,
            rows=rows if self.max_rows is None else min(rows, self.max_rows + self._batch_rows),
            allocator=self._allocator,
            epochs=self._epochs,
            growth_bytes=self._growth_bytes,
            max_rows=self.max_rows,
            policy=self._policy,
            target=self._target,
            batch_rows=self._batch_rows,
            seed=self._seed,
        )

    def new_content(self, rows: int) -> TableContent:
        """An empty version of this table with room for ``rows``, to be filled and then given to ``replace``."""
        return TableContent(self.dim, rows, allocator=self._allocator, recency=self._recency, purpose=self.name)

    # -- reading: no lock -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._content.live

    @property
    def bytes(self) -> int:
        """Bytes of host memory in use."""
        return self._content.bytes

    @property
    def index_load(self) -> float:
        """Share of index entries that hold a row."""
        entries = int(self._content.index.view(np.int64, (1,), META_LINES)[0]) * ENTRIES_PER_LINE
        return self._content.live / entries

    def lookup(
        self,
        keys: np.ndarray,
        out: np.ndarray,
        default: float = 0.0,
        misses: np.ndarray | None = None,
        *,
        counters: int = 0,
        threads: int | None = None,
    ) -> int:
        """Write the row of each key to ``out``; where there is none, ``default``.

        Args:
            keys: int64 ``[n]``, contiguous.
            out: float32 ``[n, dim]``, contiguous.
            misses: int64 ``[n]``; the positions of keys without a row are written to its head, ascending.
            counters: address of the ``layout.COUNTER_*`` words to add to, or 0.
            threads: at most so many (default: all cores); small batches take one.

        Returns the number of keys without a row.
        """
        ranges = ranges_of(len(keys), 4 * self.dim + 64, threads)
        if len(ranges) == 1:
            return self._lookup_ranges(self.header, ranges, keys, out, default, misses, counters, threads)[0]
        with self._epochs.reading():  # all ranges read one version of the table, and it stays until the last has ended
            snapshot = self._header.view(np.int64, (1,)).copy()
            found = self._lookup_ranges(address_of(snapshot), ranges, keys, out, default, misses, counters, threads)
        if misses is not None:
            end = 0
            for (start, _), missing in zip(ranges, found, strict=True):
                misses[end : end + missing] = misses[start : start + missing]
                end += missing
        return sum(found)

    def _lookup_ranges(
        self,
        header: int,
        ranges: Sequence[tuple[int, int]],
        keys: np.ndarray,
        out: np.ndarray,
        default: float,
        misses: np.ndarray | None,
        counters: int,
        threads: int | None,
    ) -> list[int]:
        """Numbers of missing keys, a range each."""
        now = time.monotonic_ns()
        key_address, out_address = address_of(keys), address_of(out)
        miss_address = 0 if misses is None else address_of(misses)

        def part(start: int, stop: int) -> int:
            record = self._epochs.take()
            try:
                missing: int = host_lookup(
                    header,
                    key_address,
                    start,
                    stop,
                    out_address,
                    default,
                    miss_address and miss_address + 8 * start,
                    self._epochs.address,
                    record,
                    now,
                    counters,
                )
                return missing
            finally:
                self._epochs.give(record)

        found = run_ranges(part, ranges, threads)
        if found[0] < 0:
            raise self._is_closed()
        return found

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """bool ``[n]``: which of the int64 keys have a row."""
        found = np.empty(len(keys), np.int64)
        record = self._epochs.take()
        try:
            done = host_contains(self.header, address_of(keys), len(keys), address_of(found), self._epochs.address, record)
        finally:
            self._epochs.give(record)
        if done < 0:
            raise self._is_closed()
        return found.astype(bool)

    def scan(self, chunk_rows: int = 65536) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All (keys int64 ``[n]``, rows float32 ``[n, dim]``) in chunks of copies, each key once, in no order.

        Writes made meanwhile may or may not be seen. Slots are not reused before the scan ends, so end it.
        """
        with self._epochs.reading():
            block = int(self._header.view(np.int64, (1,))[0])
            if block == 0:
                raise self._is_closed()
            number, room = 0, max(1, chunk_rows)
            while True:
                keys, rows = np.empty(room, np.int64), np.empty((room, self.dim), np.float32)
                got, number = host_scan(block, number, room, address_of(keys), address_of(rows))
                if got == 0:
                    return
                yield keys[:got], rows[:got]

    # -- writing: one at a time ---------------------------------------------------------------------------------------------

    def upsert(self, keys: np.ndarray, rows: np.ndarray) -> int:
        """Write the row of each key (int64 ``[n]``, float32 ``[n, dim]``); the last of equal keys wins.

        Returns how many keys were new.

        Raises:
            CapacityError: no memory for more rows; those before stand.
        """
        return self._write(keys, rows, only_present=False)

    def update(self, keys: np.ndarray, rows: np.ndarray) -> int:
        """Write the rows of those keys that have one; returns how many."""
        return self._write(keys, rows, only_present=True)

    def erase(self, keys: np.ndarray) -> int:
        """Erase the rows of the keys; returns how many there were."""
        erased = 0
        keys = np.ascontiguousarray(keys, np.int64)
        with self._writing() as content:
            for start in range(0, len(keys), self._batch_rows):
                part = keys[start : start + self._batch_rows]
                retired = np.empty(len(part), np.int64)
                erased += host_erase(content.block, address_of(part), len(part), content.state, retired)
                self._retire(content, retired)
        return erased

    def _write(self, keys: np.ndarray, rows: np.ndarray, *, only_present: bool) -> int:
        keys = np.ascontiguousarray(keys, np.int64)
        rows = np.ascontiguousarray(rows, np.float32)
        if rows.shape != (len(keys), self.dim):
            raise HpsError(f"{self.name}: rows of shape {rows.shape}, wanted ({len(keys)}, {self.dim})")
        changed = 0
        now = time.monotonic_ns()
        with self._writing() as content:
            for start in range(0, len(keys), self._batch_rows):
                part = slice(start, start + self._batch_rows)
                changed += self._write_batch(content, keys[part], rows[part], only_present, now)
                self._trim(content)
        return changed

    def _write_batch(self, content: TableContent, keys: np.ndarray, rows: np.ndarray, only_present: bool, now: int) -> int:
        done = changed = 0
        retired = np.empty(len(keys), np.int64)
        while done < len(keys):
            content.collect(self._epochs)
            step, more = host_upsert(
                content.block,
                address_of(keys) + 8 * done,
                address_of(rows) + content.row_bytes * done,
                len(keys) - done,
                only_present,
                content.state,
                content.free,
                retired,
                now,
            )
            self._retire(content, retired)
            done += step
            changed += more
            if done < len(keys):
                self._make_room(content)
        return changed

    def _make_room(self, content: TableContent) -> None:
        """After a kernel stopped early: a roomier index, or slots (those that readers have left, else new ones)."""
        if content.index_is_full:
            old = content.rebuild_index()
            publish(self.header, content.block)
            content.retire_index(old, self._epochs.advance())
            return
        content.collect(self._epochs)
        if not content.has_slots:
            content.grow_slots(self._growth_bytes)

    def _retire(self, content: TableContent, retired: np.ndarray, number: int | None = None) -> None:
        number = int(content.state[STATE_RETIRED]) if number is None else number
        if number:
            content.retire_slots(retired, number, self._epochs.advance())

    def _trim(self, content: TableContent) -> None:
        """Evict down to the target once the bound is reached (spec 8.3; decisions: to the target, not past it)."""
        if self.max_rows is None or self._keep is None or content.live <= self.max_rows:
            return
        histogram = np.empty(HISTOGRAM, np.int64)
        while (excess := content.live - self._keep) > 0:
            self._seed += 1
            retired = np.empty(excess, np.int64)
            evicted = host_evict(content.block, excess, self._seed, histogram, retired)
            content.state[STATE_LIVE] -= evicted
            self._retire(content, retired, evicted)
            self.evicted += evicted

    # -- versions ---------------------------------------------------------------------

    def replace(self, content: TableContent) -> None:
        """Put a filled version in the place of the present one, at once for all readers; then free the old one."""
        with self._writing() as old:
            publish(self.header, content.block)
            self._content = content
            self._let_go(old)

    def adopt(self, sibling: HostStore) -> None:
        """Put the rows of a ``sibling``, which ends, in the place of the present ones, at once for all readers."""
        with sibling._writing() as content:
            sibling._closed = True
            publish(sibling.header, 0)
            self.replace(content)
            self.evicted += sibling.evicted

    def clear(self) -> None:
        """Drop all rows."""
        self.replace(self.new_content(0))

    def close(self) -> None:
        """Free everything once the lookups at work have ended; later calls raise ClosedError."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            publish(self.header, 0)  # a reader that comes later finds no block; the header itself stays as long as the store
            self._let_go(self._content, until_free=True)

    def _let_go(self, content: TableContent, *, until_free: bool = False) -> None:
        tag = self._epochs.advance()
        self._old_contents.append((tag, content))
        self._epochs.wait(tag, 60.0 if until_free else _GRACE_SECONDS)
        self._free_old()

    def _free_old(self) -> None:
        oldest = self._epochs.oldest()
        for tag, content in self._old_contents:
            if tag < oldest:
                content.release()
        self._old_contents = [(tag, content) for tag, content in self._old_contents if tag >= oldest]

    def _is_closed(self) -> ClosedError:
        return ClosedError(f"{self.name}: the store is closed")

    def _writing(self) -> _Writing:
        return _Writing(self)


class _Writing:
    """The writer's turn: the content it may change."""

    def __init__(self, store: HostStore) -> None:
        self._store = store

    def __enter__(self) -> TableContent:
        store = self._store
        store._lock.acquire()
        if store._closed:
            store._lock.release()
            raise store._is_closed()
        if store._old_contents:
            store._free_old()
        return store._content

    def __exit__(self, *error: object) -> None:
        self._store._lock.release()
