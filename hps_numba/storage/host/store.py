"""The host hash store of one table: key -> float32 row in host memory, read by any number of threads beside one writer.

*How a torn row cannot happen.* An upsert writes the row to a slot that no reader can hold, then swings the index word to it
with one atomic store. The slot that the word left is used again only after every reader that was at work has finished
(``storage/epochs.py``). So a reader sees the old row or the new one, takes no lock and never waits for the writer; a lookup
needs no check after the copy. Turned down: a version a row or a set (readers would retry, and write-heavy keys starve them),
and a reader-writer lock (the original's; one insertion stops all lookups, spec 8.3).

*Growth.* Rows never move; the index is rebuilt beside the old one and published through the header (``layout.py``).
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np

from hps_numba.device.host_memory import HostAllocator, PlainHostAllocator
from hps_numba.errors import ArrayError, CapacityError, ClosedError, HpsError, KeyDtypeError
from hps_numba.kernels.host.epoch import publish
from hps_numba.kernels.host.evict import HISTOGRAM, host_evict
from hps_numba.kernels.host.gather import host_gather
from hps_numba.kernels.host.lookup import host_addresses, host_contains, host_lookup
from hps_numba.kernels.host.scan import host_keys
from hps_numba.kernels.host.write import host_erase, host_upsert
from hps_numba.kernels.layouts.host_store import (
    HEADER_BYTES,
    META_ROWS,
    RECENCY_COUNT,
    RECENCY_NONE,
    RECENCY_TIME,
)
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.threads import ranges_of, run_ranges
from hps_numba.storage.host.content import TableContent, address_of, entries_of
from hps_numba.storage.host.epochs import Epochs
from hps_numba.storage.host.pooling import Bags, Missing, pool_bags

__all__ = ["RECENCY_OF_POLICY", "HostStore"]

#: what each overflow policy (spec 1.7) keeps a slot
RECENCY_OF_POLICY = {"evict_random": RECENCY_NONE, "evict_least_used": RECENCY_COUNT, "evict_oldest": RECENCY_TIME}

log = logging.getLogger(__name__)
#: an answer from this size on is written past the caches: it would push out everything, itself too, and a line that is
#: written through a cache is read from memory first
_STREAM_BYTES = 32 << 20
#: of a range of ``gather``: a device waits, so that a second thread is worth its while sooner
_GATHERED_BYTES = 256 << 10
_GRACE_SECONDS = 1.0
_CLOSE_SECONDS = 60.0
_NEVER = 1 << 62  # an epoch that is not over


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
        epochs: Epochs | None = None,
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
        self._epochs = epochs if epochs is not None else Epochs()
        self._growth_bytes = growth_bytes
        self._recency = RECENCY_OF_POLICY[policy] if max_rows is not None else RECENCY_NONE
        self._policy, self._target = policy, target
        self._keep = None if max_rows is None else round(max_rows * target)
        self._batch_rows = batch_rows
        self._seed = seed
        self._watchers: tuple[Callable[[int], object], ...] = ()
        self._before_turns: tuple[Callable[[], object], ...] = ()
        self._turns = 0  # of writers, so far
        self.reset_after_fork()
        register_fork_reset(self)
        self._closed = False
        self._unfinished = False  # a writer was interrupted, or is at work
        self._next: TableContent | None = None  # a version that is being put in force
        self._old_contents: list[tuple[int, TableContent]] = []
        #: rows that the bound pushed out so far
        self.evicted = 0
        #: keys that came in so far, again included
        self.added = 0
        self._header = self._allocator.reserve(HEADER_BYTES, f"{name}: header")
        self._header.commit(HEADER_BYTES)
        #: address of the header, fixed for the life of the store
        self.header: int = self._header.address
        self._content = self.new_content(rows)
        publish(self.header, self._content.block)

    def reset_after_fork(self) -> None:
        """Make the lock anew, as a forked child has to; a turn that another thread had not finished is repaired by the next."""
        self._lock = threading.RLock()

    def sibling(self, rows: int = 0) -> HostStore:
        """An empty store with the same options and room for ``rows``, to fill aside and then ``adopt``.

        A bound store takes room for no more than its bound and one batch: more rows are never there at once.
        """
        return HostStore(
            self.dim,
            name=self.name,
            rows=rows if self.max_rows is None else min(rows, self.max_rows + self._batch_rows),
            allocator=self._allocator,
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
        return self._content.live / entries_of(self._content.block)

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
        self._check_keys(keys)
        if out.dtype != np.float32 or out.shape != (len(keys), self.dim) or not out.flags.c_contiguous:
            raise ArrayError(f"{self.name}: out is {out.dtype}{list(out.shape)}, wanted float32[{len(keys)}, {self.dim}]")
        return self._lookup(keys, out, default, misses, time.monotonic_ns(), counters, threads)

    def _check_keys(self, keys: np.ndarray) -> None:
        if keys.dtype != np.int64 or keys.ndim != 1 or not keys.flags.c_contiguous:
            raise KeyDtypeError(f"{self.name}: keys are {keys.dtype}{list(keys.shape)}, contiguous int64[n] is wanted")

    def _lookup(
        self,
        keys: np.ndarray,
        out: np.ndarray,
        default: float,
        misses: np.ndarray | None,
        now: int,
        counters: int,
        threads: int | None,
    ) -> int:
        row_bytes = 4 * self.dim
        key_address, out_address = host_addresses(keys, out)
        miss_address = 0 if misses is None else address_of(misses)
        streamed = len(keys) * row_bytes >= _STREAM_BYTES and (row_bytes | out_address) % 64 == 0
        fixed: tuple[int, int, float, int, int, int, bool]
        fixed = (key_address, out_address, default, miss_address, now, counters, streamed)
        ranges = ranges_of(len(keys), row_bytes + 64, threads)
        if len(ranges) == 1:
            return self._lookup_range(self.header, 0, len(keys), *fixed)
        with self._epochs.reading():  # all ranges read one version of the table, and it stays until the last has ended
            snapshot = self._header.view(np.int64, (1,)).copy()
            header = address_of(snapshot)
            found = run_ranges(lambda start, stop: self._lookup_range(header, start, stop, *fixed), ranges, threads)
        if misses is not None:
            end = 0
            for (start, _), missing in zip(ranges, found, strict=True):
                misses[end : end + missing] = misses[start : start + missing]
                end += missing
        return sum(found)

    def _lookup_range(
        self,
        header: int,
        start: int,
        stop: int,
        keys: int,
        out: int,
        default: float,
        misses: int,
        now: int,
        counters: int,
        streamed: bool,
    ) -> int:
        """``kernels.host.lookup`` in an epoch of its own; returns the number of missing keys."""
        epochs = self._epochs
        record = epochs.acquire()
        try:
            missing: int = host_lookup(
                header,
                keys,
                start,
                stop,
                out,
                default,
                misses and misses + 8 * start,
                epochs.address,
                record,
                now,
                counters,
                streamed,
            )
        finally:
            epochs.release(record)
        if missing < 0:
            raise self._is_closed()
        return missing

    def pool(
        self, bags: Bags, out: np.ndarray, default: float = 0.0, *, counters: int = 0, missing: Missing | None = None
    ) -> int:
        """Write the pooled row of each bag to ``out`` (``storage/host_pooling.py`` says what a bag is).

        Args:
            out: float32 ``[bags, dim]``, contiguous; a bag without keys gets 0.
            default: fills the row of a key that is nowhere.   counters: as for ``lookup``.
            missing: takes the positions of keys without a row here, and has rows for some of them.

        Returns the number of keys without a row.
        """
        with self._epochs.reading():  # one version of the table, which stays until the last range has ended
            snapshot = self._header.view(np.int64, (1,)).copy()
            missed = pool_bags(address_of(snapshot), self._epochs, bags, out, default, counters=counters, missing=missing)
        if missed < 0:
            raise self._is_closed()
        return missed

    def gather(
        self, keys: np.ndarray, rows: np.ndarray, words: np.ndarray, default: float = 0.0, *, threads: int | None = None
    ) -> tuple[int, int]:
        """``lookup`` for a device: it also tells under which index words the rows were read.

        Args:
            keys: int64 ``[n]``, contiguous.
            rows: float32 ``[n, dim]``, contiguous; all of it is written, ``default`` where there is no row.
            words: int64 ``[n]``, contiguous; the index word of each key (``layout``).
            threads: at most so many (default: all cores).

        Returns the number of keys without a row, and the address of the rows in memory that the words belong to.
        """
        self._check_keys(keys)
        with self._epochs.reading():
            block = self.block
            if block == 0:
                raise self._is_closed()
            at = (address_of(keys), address_of(rows), address_of(words))
            now = time.monotonic_ns()

            def gather_range(start: int, stop: int) -> int:
                missing: int = host_gather(block, at[0], start, stop, at[1], default, at[2], now, False)
                return missing

            ranges = ranges_of(len(keys), 4 * self.dim + 64, threads, least=_GATHERED_BYTES)
            missing = sum(run_ranges(gather_range, ranges, threads))
            return missing, ctypes.c_int64.from_address(block + META_ROWS).value

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """bool ``[n]``: which of the int64 keys have a row."""
        self._check_keys(keys)
        found = np.empty(len(keys), np.int64)
        record = self._epochs.acquire()
        try:
            done = host_contains(self.header, address_of(keys), len(keys), address_of(found), self._epochs.address, record)
        finally:
            self._epochs.release(record)
        if done < 0:
            raise self._is_closed()
        return found.astype(bool)

    def scan(self, chunk_rows: int = 65536) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All (keys int64 ``[n]``, rows float32 ``[n, dim]``) in chunks of copies, each key once, in no order.

        The keys are those of the moment when the scan begins (8 bytes each are kept), the rows those of the moment when their
        chunk is read; keys erased by then are left out. Nothing waits for a scan, and it ages no row.
        """
        keys = self.keys()
        for start in range(0, len(keys), max(1, chunk_rows)):
            some = keys[start : start + max(1, chunk_rows)]
            rows, misses = np.empty((len(some), self.dim), np.float32), np.empty(len(some), np.int64)
            missing = self._lookup(some, rows, 0.0, misses, -1, 0, 1)
            here = np.ones(len(some), bool)
            here[misses[:missing]] = False
            if missing < len(some):
                yield some[here], rows[here] if missing else rows

    def keys(self, *, in_order: bool = False) -> np.ndarray:
        """The keys, int64 ``[n]``; those that a writer adds or erases meanwhile may be among them.

        Args:
            in_order: of their rows in memory: that of the sparse model as far as rows were not written since. Else in none.
        """
        with self._epochs.reading():
            block = self.block
            if block == 0:
                raise self._is_closed()
            keys = np.empty(entries_of(block), np.int64)  # pages are taken as keys are written
            slots = np.empty(len(keys) if in_order else 0, np.int64)
            count = host_keys(block, address_of(keys), address_of(slots) if in_order else 0)
        return keys[:count][np.argsort(slots[:count])] if in_order else keys[:count]

    @property
    def block(self) -> int:
        """Address of the index block in force (``layout``); 0 if the store is closed."""
        return int(self._header.view(np.int64, (1,))[0])

    # -- readers elsewhere ------------------------------------------------------------------------------------------------

    @property
    def epochs(self) -> Epochs:
        """The epochs of this store's readers."""
        return self._epochs

    def reading(self) -> AbstractContextManager[None]:
        """What is in force inside the ``with`` block stays in memory until its end."""
        return self._epochs.reading()

    @property
    def slots(self) -> int:
        """Rows that were in use at a time, or are: slots have numbers below this one."""
        return self._content.slots

    def watch(self, watcher: Callable[[int], object]) -> None:
        """Call ``watcher`` with the address of the index block in force: now, and whenever another takes its place.

        It is told before anything is written to the new block or freed of the old one, under the lock of the writers, and
        must raise nothing. 0 stands for a store that is closed.
        """
        with self._lock:
            self._watchers = (*self._watchers, watcher)
            watcher(self.block)

    def unwatch(self, watcher: Callable[[int], object]) -> None:
        """Take back a ``watch``."""
        with self._lock:
            self._watchers = tuple(other for other in self._watchers if other != watcher)

    def watch_turns(self, watcher: Callable[[], object]) -> None:
        """Call ``watcher`` at the beginning of each turn of a writer, before anything is changed.

        It is told under the lock of the writers. If it raises, nothing is changed.
        """
        with self._lock:
            self._before_turns = (*self._before_turns, watcher)

    def unwatch_turns(self, watcher: Callable[[], object]) -> None:
        """Take back a ``watch_turns``."""
        with self._lock:
            self._before_turns = tuple(other for other in self._before_turns if other != watcher)

    @contextmanager
    def at_rest(self, seconds: float = 0.1) -> Iterator[tuple[int, int]]:
        """Keep writers away; gives the number of their turns so far, and the address of the index block in force.

        The block is 0 if a writer was at work for so many seconds, the store is closed, or a turn was interrupted and its book
        of slots is still to be repaired. Not to be entered inside ``reading``: a writer may wait for readers.
        """
        if not self._lock.acquire(timeout=seconds):
            yield -1, 0
            return
        try:
            yield self._turns, 0 if self._unfinished else self.block
        finally:
            self._lock.release()

    def _publish(self, block: int) -> None:
        publish(self.header, block)
        self._tell(block)

    def _tell(self, block: int) -> None:
        for watcher in self._watchers:
            watcher(block)

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
                retired = content.room_to_retire(len(part))
                erased += host_erase(content.block, address_of(part), len(part), content.state, retired)
                content.retire_slots(self._epochs)
        return erased

    def _write(self, keys: np.ndarray, rows: np.ndarray, *, only_present: bool) -> int:
        keys = np.ascontiguousarray(keys, np.int64)
        rows = np.ascontiguousarray(rows, np.float32)
        if rows.shape != (len(keys), self.dim):
            raise ArrayError(f"{self.name}: rows of shape {rows.shape}, wanted ({len(keys)}, {self.dim})")
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
        while done < len(keys):
            content.collect(self._epochs)
            retired = content.room_to_retire(len(keys) - done)
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
            content.retire_slots(self._epochs)
            done += step
            changed += more
            self.added += 0 if only_present else more
            if done < len(keys):
                self._make_room(content)
        return changed

    def _make_room(self, content: TableContent) -> None:
        """After a kernel stopped early: a roomier index, or slots (those that readers have left, else new ones)."""
        if content.index_is_full:
            old = content.index
            new, live = content.build_index()
            self._publish(new.address)
            content.use_index(new, live)
            content.retire_index(old, self._epochs.advance())
            return
        content.collect(self._epochs)
        if not content.has_slots:
            content.grow_slots(self._growth_bytes)

    def _trim(self, content: TableContent) -> None:
        """Evict down to the target once the bound is reached (spec 8.3; decisions: to the target, not past it)."""
        if self.max_rows is None or self._keep is None or content.live <= self.max_rows:
            return
        histogram = np.empty(HISTOGRAM, np.int64)
        by_recency = True
        while (excess := content.live - self._keep) > 0:
            self._seed += 1
            retired = content.room_to_retire(excess)
            self.evicted += host_evict(content.block, excess, by_recency, self._seed, histogram, content.state, retired)
            content.retire_slots(self._epochs)
            by_recency = False  # what lookups saved from the first round is left to chance: no reader can prolong this

    # -- versions ---------------------------------------------------------------------

    def replace(self, content: TableContent) -> None:
        """Put a filled version in the place of the present one, at once for all readers; then free the old one."""
        with self._writing() as old:
            self._next = content
            self._old_contents.append((_NEVER, old))  # held before it goes out of force: readers are in it
            self._publish(content.block)
            self._content = content
            self.added += content.live
            self._next = None
            self._let_go(old, _GRACE_SECONDS)

    def adopt(self, sibling: HostStore) -> None:
        """Put the rows of a ``sibling``, which ends, in the place of the present ones, at once for all readers."""
        with sibling._writing() as content:
            sibling._closed = True
            sibling._publish(0)
            with self._writing():
                self.evicted += sibling.evicted
            self.replace(content)

    def clear(self) -> None:
        """Drop all rows."""
        self.replace(self.new_content(0))

    def close(self) -> None:
        """Free everything once the lookups at work have ended; later calls raise ClosedError."""
        with self._lock:
            if self._closed:
                return
            for watcher in self._before_turns:
                watcher()
            self._closed = True
            self._publish(0)  # a reader that comes later finds no block; the header itself stays as long as the store
            self._old_contents.append((_NEVER, self._content))
            self._let_go(self._content, _CLOSE_SECONDS)
            if self._old_contents:
                log.warning("%s: closed while lookups were at work for %g s: memory is kept", self.name, _CLOSE_SECONDS)

    def _let_go(self, content: TableContent, seconds: float) -> None:
        """Free a version once its readers have left; waits so long for that, and leaves it to a later writer otherwise."""
        tag = self._epochs.advance()
        self._old_contents = [(tag if old is content else its, old) for its, old in self._old_contents]
        self._epochs.wait(tag, seconds)
        self._free_old()

    def _free_old(self) -> None:
        oldest = self._epochs.oldest()
        for entry in [entry for entry in self._old_contents if entry[0] < oldest]:
            self._old_contents.remove(entry)
            entry[1].release()

    def _is_closed(self) -> ClosedError:
        return ClosedError(f"{self.name}: the store is closed")

    @contextmanager
    def _writing(self) -> Iterator[TableContent]:
        """The writer's turn: gives the content it may change.

        An interrupt (Ctrl-C, a time-out of a test runner, a fork in another thread) may hit between any two lines of a turn.
        The turn then stays unfinished, and the next one first repairs the book of slots from the index, which readers use
        and kernels never leave half-written.
        """
        with self._lock:
            if self._closed:
                raise self._is_closed()
            self._turns += 1
            for watcher in self._before_turns:
                watcher()
            if self._unfinished:
                self._repair()
            self._unfinished = True
            if self._old_contents:
                self._free_old()
            try:
                yield self._content
            except HpsError:  # raised by ourselves, between two steps
                self._unfinished = False
                raise
            self._unfinished = False

    def _repair(self) -> None:
        block = self.block
        self._tell(block)
        if self._next is not None and self._next.block == block:
            self._content = self._next
        self._next = None
        tag = self._epochs.advance()
        self._old_contents = [
            (tag if its == _NEVER else its, old) for its, old in self._old_contents if old is not self._content
        ]
        self._content.repair(block, self._epochs)
