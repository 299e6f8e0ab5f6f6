"""Writes to one table: they reach every tier, slowest first, and then every cache, before the call returns.

Problem: a row fetched from a slower tier enters host memory and the caches in the background. If the row is updated or erased
between the fetch and that insertion, the old row must not come back. Choice: every write holds a lock and counts up when it
begins and again when it ends; the insertion of fetched rows happens inside ``unwritten_since``, which tries the lock without
waiting, also that of other processes, and compares the count with the one read before the fetch. Turned down: an insertion
that waits for the lock, because a write may take as long as the slowest tier, and a version for each key, which costs memory
for every row.

Problem: where processes share host memory and slower tiers, two of them may write to the tiers in one order and to host memory
in the other. Choice: a lock of all processes for the table, around the whole write (``StoreMemory.alone``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import NamedTuple

import numpy as np

from hps_numba.cache.cache import EmbeddingCache
from hps_numba.config import TableSpec
from hps_numba.errors import CapacityError, TierError, TierUnavailable
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.reentry import ExclusiveLock
from hps_numba.server.evictions import Evictions
from hps_numba.server.table_caches import TableCaches
from hps_numba.storage.distinct import distinct_keys
from hps_numba.storage.host.bulk import Rewrite
from hps_numba.storage.host.content import address_of
from hps_numba.storage.host.store import HostStore
from hps_numba.storage.tier_stack import TierStack

__all__ = ["Applied", "Change", "RowsChange", "TableWrites"]

Change = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From float32 rows ``[n, dim]``, a copy that it may change, and bool ``[n]``, which of them exist, to new rows."""

RowsChange = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray | None]
"""Of int64 ``[n]``, the addresses of rows (the table's default value, or 0, where there is none), int64 ``[n]``, the
addresses where it writes new ones, which may be the same, and bool ``[n]``, which rows exist. All are its own to change. It may
return the new rows, float32 ``[n, dim]``, if it has them in one array anyway: caches then need not read them again.
"""


class Applied(NamedTuple):
    """What became of online updates.

    Attributes:
        unwritten: bool ``[n + m]``, of the keys with rows and then of those to be deleted: a slower tier could not take them,
            so they are as they were in all faster tiers and caches. They have to be applied again.
        problem: why, or None.
        left_out: how many keys are not applied, because a read-only tier has them and would serve its rows again.
    """

    unwritten: np.ndarray
    problem: TierError | None = None
    left_out: int = 0


def _nothing() -> None:
    """What comes before a write by default."""


class TableWrites:
    """Writes to one table, and the reads that must be exact.

    Args:
        spec: the table.
        store: its rows in host memory, or None.
        tiers: the slower tiers.

    Attributes:
        caches: the caches of the table, or None; set once the table is loaded.
        evictions: what becomes of rows that host memory evicts.

    Thread safety: every method. Writes to one table take turns; lookups never wait for them. A write from inside another one of
    the same thread (by a signal handler, ``__del__`` or a callback) raises ReentryError.
    """

    def __init__(self, spec: TableSpec, store: HostStore | None, tiers: TierStack) -> None:
        self.caches: TableCaches | None = None
        self._count = 0
        self._spec = spec
        self._store = store
        self._tiers = tiers
        self._lock = ExclusiveLock(spec.tag)
        #: keeps other processes away where there is more than host memory to be changed, which orders writes itself
        self._alone = store.memory.alone if store is not None and store.memory.shared and tiers else nullcontext
        self.evictions = Evictions(spec, tiers)
        if store is not None:
            store.bound.watcher = self.evictions
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """A new lock: in a forked child, nobody releases one that another thread held, or ends the writes in progress."""
        self._insertion_lock = threading.RLock()
        self._in_progress: dict[object, None] = {}

    # -- order ---------------------------------------------------------------------

    @property
    def count(self) -> int:
        """A number that changes when a write begins and again when it ends, of this process or another one."""
        return self._count + (0 if self._store is None else self._store.memory.foreign_writes)

    @property
    def held_here(self) -> bool:
        """This thread is inside ``changing``: another one that writes for it would wait for ever."""
        return self._lock.owned_here

    @contextmanager
    def changing(self, keys: np.ndarray | None = None) -> Iterator[None]:
        """A block in which other writes wait and rows fetched before or meanwhile stay out; then the caches reload ``keys``.

        Raises:
            ReentryError: this thread is in such a block already.
            TierUnavailable: another process has been in one for a minute; it shares the table in host memory.
        """
        with self._lock.held(), self._alone(), self.paused(keys):
            yield

    @contextmanager
    def paused(self, keys: np.ndarray | None = None, written: Sequence[np.ndarray] = ()) -> Iterator[None]:
        """``changing`` in which this thread may begin another write.

        ``written``: where the block appends the rows that host memory has now for ``keys``, which are distinct; or nothing.
        """
        with self._lock.mutex:
            write = object()
            try:
                self._in_progress[write] = None  # before the count, see ``settled_count``
                self._count += 1
                yield
            finally:
                self._count += 1
                self._in_progress.pop(write, None)
                if keys is not None and self.caches is not None:
                    self.caches.reload(keys, *written)

    def settled_count(self) -> int | None:
        """``count``, or None if a write is in progress: rows that are read next may then be older or newer than the count says.

        A row that is read after this returned a count is at least as new as what a lookup may see that begins at that count.
        """
        count = self.count  # first: a write that begins in between is then noticed here, or has another count
        return None if self._in_progress else count

    @contextmanager
    def unwritten_since(self, count: int) -> Iterator[bool]:
        """Whether no write is in progress and none has begun since ``count`` was read; writes wait until the block ends."""
        # whoever holds the lock is then a writer and not another insertion
        with self._insertion_lock, self._lock.held_if_free() as free, self._still(free) as still:
            yield still and self.count == count

    def _still(self, free: bool) -> AbstractContextManager[bool]:
        """Keeps away writers of other processes, if those of this one are; waits for none, as a lookup waits for it."""
        return self._store.memory.still() if free and self._store is not None else nullcontext(free)

    # -- rows that were fetched ---------------------------------------------------------------------

    def keep(self, keys: np.ndarray, rows: np.ndarray, since: int) -> None:
        """Insert fetched rows of distinct keys in host memory, those that it lacks, unless there was a write ``since``."""
        if self._store is None or not len(keys):
            return
        with self.unwritten_since(since) as unwritten:
            if not unwritten:
                return
            lacking = ~self._store.contains(keys)  # other lookups may have fetched them too
            if lacking.all():
                self._store.upsert(keys, rows)
            elif lacking.any():
                self._store.upsert(keys[lacking], rows[lacking])

    def keep_in_cache(self, cache: EmbeddingCache, keys: np.ndarray, rows: np.ndarray, since: int) -> None:
        """Insert fetched rows of distinct keys in a cache that evicts, unless there was a write ``since``."""
        if not cache.fixed and len(keys):
            with self.unwritten_since(since) as unwritten:
                if unwritten:
                    cache.insert(keys, rows)

    # -- writing ---------------------------------------------------------------------

    def insert(self, keys: np.ndarray, rows: np.ndarray) -> int:
        """Write a row for each key to every tier (upsert).

        Args:
            keys: int64 ``[n]``; of equal keys the last row wins.   rows: float32 ``[n, dim]``.

        Returns:
            How many keys were new to the fastest tier.

        Raises:
            TierUnavailable: there is no tier.
            TierError: every tier is read-only, or one failed; or host memory, which may evict rows, is in front of a read-only
                tier that has one of the keys.
            CapacityError: no memory for more rows. Slower tiers have the new rows and serve them: host memory has given up
                its own of these keys. Without slower tiers, the rows before the one that did not fit are written.
        """
        self._check_writable()
        with self.changing(keys):
            return self._insert(keys, rows)

    def _insert(self, keys: np.ndarray, rows: np.ndarray) -> int:
        if self._may_evict:
            self._check_reachable(keys, "insert")
        if self._store is None:
            new = len(distinct_keys(keys[~self._tiers.contains(self._spec.tag, keys)]))
            self._tiers.insert(self._spec.tag, keys, rows)
            return new
        self._tiers.insert(self._spec.tag, keys, rows)
        return self._write_host(self._store, self._store.upsert, keys, rows)

    def update(self, keys: np.ndarray, rows: np.ndarray) -> int:
        """Write the rows of those keys that some tier has, in the tiers that have them; returns how many of ``keys`` those are.

        Raises:
            TierError: a key is in a read-only tier, and in no faster one that keeps it; or a tier failed.
            CapacityError: as ``insert``.
        """
        with self.changing(keys):
            present = self.contains(keys)
            exposed = keys if self._store is None or self._may_evict else keys[~self._store.contains(keys)]
            self._check_reachable(exposed, "update")
            self._tiers.update(self._spec.tag, keys, rows)
            if self._store is not None:
                self._write_host(self._store, self._store.update, keys, rows)
            return int(present.sum())

    def erase(self, keys: np.ndarray) -> int:
        """Remove the rows of the keys from every tier; returns how many distinct keys had one.

        Raises:
            TierError: a key is in a read-only tier, or a tier failed.
        """
        with self.changing(keys):
            self._check_reachable(keys, "erase")
            present = len(distinct_keys(keys[self.contains(keys)]))
            self._tiers.erase(self._spec.tag, keys)
            if self._store is not None:
                self._store.erase(keys)
            return present

    def apply(
        self,
        keys: np.ndarray,
        rows: np.ndarray,
        erased: np.ndarray,
        tiers: Container[int],
        *,
        host: bool,
        first: Callable[[], object] = _nothing,
    ) -> Applied:
        """Write rows and delete others, as online updates ask for it: doing it once more changes nothing.

        A slower tier that fails costs its own keys: all others are written.

        Args:
            keys: int64 ``[n]``.   rows: float32 ``[n, dim]``.   erased: int64 ``[m]``; no key is in ``keys`` or here twice.
            tiers: numbers of the slower tiers to write, fastest first.   host: whether to write host memory.
            first: called when other writes wait and nothing is written yet; what it raises is raised.

        Raises:
            TierError: a tier broke its contract, or a read-only one failed; nothing faster was written.
            CapacityError: as ``insert``.
        """
        with self.changing(np.concatenate([keys, erased])):
            first()
            left_out = np.zeros(len(keys) + len(erased), bool)
            left_out[len(keys) :] = self._in_read_only_tiers(erased)
            if self._may_evict:
                left_out[: len(keys)] = self._in_read_only_tiers(keys)
            omitted = int(np.count_nonzero(left_out))
            taken = _without(left_out, keys, rows, erased) if omitted else (keys, rows, erased)
            written = self._tiers.apply(self._spec.tag, *taken, tiers)
            if self._store is not None and host:
                keys, rows, erased = _without(written.unwritten, *taken)
                if len(keys):
                    self._write_host(self._store, self._store.upsert, keys, rows)
                if len(erased):
                    self._store.erase(erased)
            if not omitted:
                return Applied(written.unwritten, written.problem)
            unwritten = np.zeros(len(left_out), bool)
            unwritten[~left_out] = written.unwritten
            return Applied(unwritten, written.problem, omitted)

    def read_modify_write(self, keys: np.ndarray, change: Change) -> int:
        """Write what ``change`` makes of the rows of distinct keys to every tier, with no other write in between.

        Returns how many keys were new.   Raises as ``read`` and ``insert``.
        """
        self._check_writable()
        with self._lock.held(), self._alone():
            rows = np.ascontiguousarray(change(*self.read(keys)), np.float32)
            with self.paused(keys):
                return self._insert(keys, rows)

    def rewrite(self, keys: np.ndarray, change: RowsChange) -> int:
        """``read_modify_write`` without copies: rows are made where they will be, if host memory is the only tier.

        Then all of the new rows are seen or none. Returns how many keys were new.   Raises as ``read_modify_write``.
        """
        self._check_writable()
        with self._lock.held(), self._alone(), ExitStack() as block:
            place = self._place_for(keys, block)
            if place is not None:
                rows = change(place.sources, place.targets, place.found)
                written: list[np.ndarray] = []
                with self.paused(keys, written):
                    with block.pop_all():  # ends before caches are reloaded: whoever changes a cache may wait for the store
                        new = place.publish()
                    written += [] if rows is None else [rows]
                return new
            copies, found = self.read(keys)
            places = address_of(copies) + 4 * self._spec.dim * np.arange(len(keys))
            change(places, places.copy(), found)
            with self.paused(keys):
                return self._insert(keys, copies)

    def _place_for(self, keys: np.ndarray, block: ExitStack) -> Rewrite | None:
        """Space in host memory for new rows, until the block ends; None if other tiers have rows too, or if there is no space.

        A table with a bound may evict a row between the write of one part of the keys and that of the next; while it is made,
        a table that processes share would keep the others waiting.
        """
        store = self._store
        if store is None or self._tiers or self._may_evict or store.memory.shared:
            return None
        try:
            return block.enter_context(store.rewriting(keys))
        except CapacityError:  # a few slots are enough to write row by row
            return None

    def adopt(self, content: HostStore | None) -> None:
        """Replace the rows in host memory by those of another store (None: there are none to replace) and reload the caches.

        The caller may be inside ``changing``.
        """
        with self.paused():
            if content is not None and self._store is not None:
                self._store.adopt(content)
            if self.caches is not None:
                self.caches.reload_all()

    def refresh(self, *, drop: bool = True) -> None:
        """Reload the rows of all caches from host memory and slower tiers.

        Args:
            drop: whether rows that are in no tier leave the caches.

        Raises:
            TierError: a slower tier failed, or its answer breaks its contract.
        """
        if self.caches is not None:
            # rows that lookups fetch meanwhile may be older and stay out
            with self._lock.held(), self.paused(), self.caches.refreshes.timed():
                self.caches.refresh(self._fetch_exact if self._tiers else None, drop=drop)

    # -- exact reads ---------------------------------------------------------------------

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """bool ``[n]``: which of the int64 keys ``[n]`` have a row in some tier."""
        found = np.zeros(len(keys), bool) if self._store is None else self._store.contains(keys)
        if self._tiers and not found.all():
            rest = ~found
            found[rest] = self._tiers.contains(self._spec.tag, keys[rest])
        return found

    def read(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read past the caches.

        Args:
            keys: int64 ``[n]``.

        Returns:
            ``(rows, found)``: float32 ``[n, dim]``, the default value where there is no row, and bool ``[n]``.

        Raises:
            TierError: a slower tier failed, so that whether it has a row is unknown.
        """
        rows = np.full((len(keys), self._spec.dim), self._spec.default_value, np.float32)
        found = np.zeros(len(keys), bool)
        if self._store is not None and len(keys):
            misses = np.empty(len(keys), np.int64)
            missing = self._store.lookup(keys, rows, self._spec.default_value, misses)
            found[:] = True
            found[misses[:missing]] = False
        absent = np.flatnonzero(~found)
        if self._tiers and len(absent):
            distinct, inverse = np.unique(keys[absent], return_inverse=True)
            present, fetched = self._fetch_exact(distinct)
            hits = present[inverse]
            rows[absent[hits]] = fetched[inverse[hits]]
            found[absent] = hits
        return rows, found

    def keys(self) -> np.ndarray:
        """int64: all keys with a row in some tier, ascending."""
        parts = [] if self._store is None else [self._store.keys()]
        for tier in self._tiers.checked:
            parts += [some for some, _ in tier.scan(self._spec.tag)]
        return distinct_keys(np.concatenate(parts)) if parts else np.empty(0, np.int64)

    def _fetch_exact(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(found, rows)`` of distinct keys in the slower tiers.

        Raises:
            TierError: a tier failed, so that which keys are gone is unknown.
        """
        rows = np.zeros((len(keys), self._spec.dim), np.float32)
        answer = self._tiers.fetch(self._spec.tag, keys, rows)
        if answer.unsure.any():
            raise TierError(f"{self._spec.tag}: a slower tier failed, {int(answer.unsure.sum())} keys are in doubt")
        return answer.found, rows

    # -- what may be written ---------------------------------------------------------------------

    @property
    def _may_evict(self) -> bool:
        """A row of host memory may be evicted, and that of a slower tier show again."""
        return self._store is not None and self._store.max_rows is not None

    def _write_host(
        self, store: HostStore, write: Callable[[np.ndarray, np.ndarray], int], keys: np.ndarray, rows: np.ndarray
    ) -> int:
        """``write`` to host memory; if it has no room, it must not serve rows that slower tiers have newer."""
        try:
            return write(keys, rows)
        except MemoryError:
            for tier in self._tiers.writable:
                store.erase(keys[tier.contains(self._spec.tag, keys)])
            raise

    def _check_writable(self) -> None:
        if self._store is None and not self._tiers:
            raise TierUnavailable(f"{self._spec.tag}: no volatile_db and no persistent_db: no tier holds rows")
        if self._store is None and not self._tiers.writable:
            raise TierError(f"{self._spec.tag}: expected a tier that can be written, got read-only tiers")

    def _in_read_only_tiers(self, keys: np.ndarray) -> np.ndarray:
        """bool ``[n]``: which keys have a row that cannot be changed."""
        found = np.zeros(len(keys), bool)
        for tier in self._tiers.checked if len(keys) else ():
            if tier.read_only:
                found |= tier.contains(self._spec.tag, keys)
        return found

    def _check_reachable(self, keys: np.ndarray, verb: str) -> None:
        """Refuse a change that would leave the old row in a read-only tier, which would serve it."""
        for tier in self._tiers.checked:
            if tier.read_only and (fixed := keys[tier.contains(self._spec.tag, keys)]).size:
                raise TierError(f"{self._spec.tag}: {verb}: key {fixed[0]} is in {tier.name}, which is read only")


def _without(
    left_out: np.ndarray, keys: np.ndarray, rows: np.ndarray, erased: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, rows and keys to be deleted but for those that are ``left_out``, bool ``[n + m]``."""
    if not left_out.any():
        return keys, rows, erased
    kept, still_erased = ~left_out[: len(keys)], ~left_out[len(keys) :]
    return keys[kept], rows[kept], erased[still_erased]
