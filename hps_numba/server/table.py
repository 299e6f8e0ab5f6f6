"""One batch through the hierarchy: host store, then slower tiers, then the default value.

The way of a lookup: ``HPS.lookup`` (server_lookups.py) -> ``ServedTable.lookup`` (here) -> ``HostStore.lookup``
(storage/host_store.py) -> ``kernels.host.lookup`` (kernels/host/lookup.py); what the host store lacks -> ``TierStack.fetch``
(hierarchy.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np

from hps_numba.arrays.bags import DeviceBags
from hps_numba.arrays.cuda import DeviceKeys
from hps_numba.arrays.host import NUMPY
from hps_numba.cache.cache import KEY_BYTES, EmbeddingCache
from hps_numba.config import TableSpec
from hps_numba.device.driver import is_capturing
from hps_numba.errors import ArrayError, DeviceError, TierError, TierUnavailable
from hps_numba.kernels.dtypes import ELEMENT_BYTES
from hps_numba.kernels.layouts.cache import MAX_BATCH
from hps_numba.kernels.layouts.host_store import (
    COUNTER_ABSENT,
    COUNTER_CALLS,
    COUNTER_KEYS,
    COUNTER_MISSES,
    COUNTER_TIER_ERRORS,
    COUNTER_TIER_HITS,
    COUNTER_UNANSWERED,
)
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.server.miss_list import MissList
from hps_numba.server.stats import Counters, TableStats
from hps_numba.server.table_caches import TableCaches
from hps_numba.storage.host.content import address_of
from hps_numba.storage.host.pooling import Bags, Missing, pool_bags
from hps_numba.storage.host.store import HostStore
from hps_numba.storage.tier_stack import TierStack

__all__ = ["Change", "ServedTable"]

Background = Callable[[Callable[[], None]], bool]
"""Runs a job later; False if it never will."""
Change = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From float32 rows ``[n, dim]``, its own to write to, and bool ``[n]``, which of them exist, to new rows."""


class ServedTable:
    """One table as it is served.

    Args:
        spec: the table.
        store: its rows in host memory, or None if the config has no volatile database.
        slower: the tiers behind.
        time_budget: seconds that a lookup waits for slower tiers, or None.
        keep_missed: rows found in slower tiers also enter the host store, in the background (``cache_missed_embeddings``).
        background: runs a job on the server's background thread.
        output_type: element type of answers: float32, float16 or bfloat16.
        hit_rate_threshold: share of a batch's keys found in cache and host memory from which a lookup through a cache does not
            wait for slower tiers; 0 or less never waits (spec 6.6, by requests).

    *A row that was fetched must not come back after it was changed.* Between a fetch from a slower tier and its insertion in
    the background the row may have been updated or erased. Every write of the user's holds ``_write_lock`` and counts
    ``_writes`` up at its start and at its end; the insertion takes the lock too, and gives up if a write holds it or if the
    count is not what it was before the fetch. So the background never waits for a writer who waits for a slow tier.

    **Threads:** every method.
    """

    def __init__(
        self,
        spec: TableSpec,
        store: HostStore | None,
        slower: TierStack,
        *,
        time_budget: float | None = None,
        keep_missed: bool = False,
        background: Background | None = None,
        output_type: str = "float32",
        hit_rate_threshold: float = 1.0,
    ) -> None:
        self.spec = spec
        self.output_type = output_type
        self.store = store
        #: set once the table is loaded, where it has caches
        self.caches: TableCaches | None = None
        self._threshold = hit_rate_threshold
        self._slower = slower
        self._time_budget = time_budget
        self._background = background
        self._keeps_missed = keep_missed and store is not None
        self._counters = Counters()
        self._writes = 0
        self.reset_after_fork()
        register_fork_reset(self)

    @property
    def output_dtype(self) -> np.dtype:
        """NumPy's dtype of answers in host memory.

        Raises:
            ArrayError: it has none.
        """
        if self.output_type == "bfloat16":
            raise ArrayError("output_dtype: 'bfloat16' has no NumPy dtype; keys in host memory get float32 or float16")
        return np.dtype(self.output_type)

    def reset_after_fork(self) -> None:
        """New locks: in a forked child nobody gives back those that another thread held."""
        self._write_lock = threading.RLock()
        self._taking_in = threading.Lock()

    def lookup(self, keys: np.ndarray, out: np.ndarray) -> None:
        """Write the row of each key to ``out``.

        Args:
            keys: int64 ``[n]``, contiguous.
            out: float32 ``[n, dim]``, contiguous; all of it is written.
        """
        if not len(keys):
            return
        twin = self.cache_on(None)
        if twin is not None:
            batch = DeviceKeys(address_of(keys), len(keys), keys.shape, "int64", NUMPY, 0, keys)
            self.lookup_cached(twin, batch, address_of(out), 0)
            return
        if self.store is None:
            self._lookup_without_store(keys, out)
            return
        if not self._slower:
            missing = self.store.lookup(keys, out, self.spec.default_value, counters=self._counters.address)
            self._counters.add(COUNTER_ABSENT, missing)
            return
        writes = self._writes
        misses = np.empty(len(keys), np.int64)
        missing = self.store.lookup(keys, out, self.spec.default_value, misses, counters=self._counters.address)
        if missing:
            self._fetch(keys, misses[:missing], out, writes)

    def _lookup_without_store(self, keys: np.ndarray, out: np.ndarray) -> None:
        out[:] = self.spec.default_value
        self._counters.add(COUNTER_CALLS, 1)
        self._counters.add(COUNTER_KEYS, len(keys))
        self._counters.add(COUNTER_MISSES, len(keys))
        if self._slower:
            self._fetch(keys, np.arange(len(keys)), out, self._writes)
        else:
            self._counters.add(COUNTER_ABSENT, len(keys))

    def lookup_pooled(self, bags: Bags, out: np.ndarray) -> None:
        """Write the pooled row of each bag to ``out``, from host memory and what is behind it.

        Args:
            out: float32 ``[bags, dim]``, contiguous; a bag without keys gets 0.
        """
        n, default = len(bags.keys), self.spec.default_value
        missing = Missing(n) if self._slower else None
        writes = self._writes
        pool = partial(pool_bags, 0, None) if self.store is None else self.store.pool
        missed = pool(bags, out, default, counters=self._counters.address, missing=missing)
        if missing is None:
            self._counters.add(COUNTER_ABSENT, missed)
        elif missed:
            wanted, rows, found, inverse = self._fetch_rows(bags.keys[missing.positions])
            missing.answer(rows, inverse)
            pool(bags, out, default, missing=missing)
            self._keep_later(wanted[found], rows[found], writes)

    # -- through a cache ---------------------------------------------------------------------

    def cache_on(self, device: int | None) -> EmbeddingCache | None:
        """The cache of the table on a device; None stands for the CPU."""
        return None if self.caches is None else self.caches.on(device)

    def lookup_cached(self, cache: EmbeddingCache, keys: DeviceKeys, out: int, stream: int) -> None:
        """Write the row of each key to ``out``, in the order of a stream of the cache's device.

        Args:
            keys: where the cache lives.   out: address of rows, of ``output_type`` on a device and float32 on the CPU.

        Without slower tiers nothing waits for the device, but for batches whose rows host threads gather (``miss_path``). With
        them, the keys that neither cache nor host memory has are fetched before the call returns if fewer than
        ``hit_rate_threshold`` of the batch were found; else they are answered with the default now, counted as unanswered, and
        fetched in the background.

        Raises:
            DeviceError: the stream is captured by a graph, which cannot wait for slower tiers.
        """
        out_type = "float32" if cache.device is None else self.output_type
        if not self._slower:
            cache.lookup(keys.address, keys.n, out, stream, key_form=keys.form, out_type=out_type)
            return
        if cache.device is not None and is_capturing(stream):
            raise DeviceError(f"{self.spec.tag}: a graph cannot capture lookups of a table with slower tiers: they may wait")
        for start in range(0, keys.n, MAX_BATCH):
            part = _part(keys, start)
            self._lookup_behind(cache, part, out + start * self.spec.dim * ELEMENT_BYTES[out_type], stream, out_type)

    def pools_on(self, cache: EmbeddingCache | None, n: int) -> bool:
        """``pool_cached`` can take ``n`` keys: there is a cache, and nothing behind host memory has to be waited for."""
        return cache is not None and not self._slower and n <= MAX_BATCH

    def pool_cached(self, cache: EmbeddingCache, bags: DeviceBags, out: int, stream: int) -> None:
        """Write the pooled row of each bag to ``out``, in the order of a stream of the cache's device.

        Args:
            bags: where the cache lives.   out: address of rows of ``output_type`` on a device.
        """
        cache.pool(
            bags.keys.address,
            bags.keys.n,
            bags.offsets,
            bags.count,
            out,
            stream,
            combiner=bags.combiner,
            weights=bags.weights,
            options=bags.options,
            padding=bags.padding,
            key_form=bags.keys.form,
            out_type="float32" if cache.device is None else self.output_type,
        )

    def _lookup_behind(self, cache: EmbeddingCache, keys: DeviceKeys, out: int, stream: int, out_type: str) -> None:
        writes = self._writes
        background = self._background
        never_waits = self._threshold <= 0 and background is not None
        absent = MissList(cache, keys, stream, later=self._threshold <= 1)
        handed_over = False
        try:
            cache.lookup(keys.address, keys.n, out, stream, key_form=keys.form, out_type=out_type, absent_list=absent.address)
            absent.record()
            missing = -1 if never_waits else absent.count()
            if missing == 0:
                return
            if background is not None and (never_waits or 1 - missing / keys.n >= self._threshold):
                handed_over = background(lambda: self._fetch_later(cache, absent, missing, writes))
                if not (handed_over and never_waits):  # else the job counts
                    self._counters.add(COUNTER_UNANSWERED, absent.count() if missing < 0 else missing)
                return
            positions, wanted = absent.read(missing)
            distinct, rows, found, inverse = self._fetch_rows(wanted)
            cache.scatter(positions, rows[inverse], out, stream, out_type)
            self._take_in(cache, distinct[found], rows[found], writes)
            self._keep_later(distinct[found], rows[found], writes)
        finally:
            if not handed_over:
                absent.release()

    def _fetch_later(self, cache: EmbeddingCache, absent: MissList, missing: int, writes: int) -> None:
        try:
            if missing < 0:
                missing = absent.count()
                self._counters.add(COUNTER_UNANSWERED, missing)
            if missing:
                distinct = np.unique(absent.read(missing)[1])
                rows = np.empty((len(distinct), self.spec.dim), np.float32)
                answer = self._slower.fetch(self.spec.tag, distinct, rows)
                self._counters.add(COUNTER_TIER_ERRORS, answer.errors)
                self._take_in(cache, distinct[answer.found], rows[answer.found], writes)
                if self._keeps_missed:
                    self._keep(distinct[answer.found], rows[answer.found], writes)
        finally:
            absent.release()

    def _take_in(self, cache: EmbeddingCache, keys: np.ndarray, rows: np.ndarray, writes: int) -> None:
        """Rows that came from slower tiers enter the cache, unless the table was written meanwhile."""
        if not cache.fixed and len(keys):
            with self._unless_written_since(writes) as unwritten:
                if unwritten:
                    cache.insert(keys, rows)

    @contextmanager
    def _unless_written_since(self, writes: int) -> Iterator[bool]:
        """Whether no write is at work, and none was since ``_writes`` was read; writes wait until the end of the block."""
        lock = self._write_lock
        with self._taking_in:  # so that whoever has the lock is a writer, and not one like us
            if not lock.acquire(blocking=False):
                yield False
                return
            try:
                yield self._writes == writes
            finally:
                lock.release()

    def refresh(self, *, drop: bool = True) -> None:
        """Renew the rows of all caches from host memory and slower tiers; rows that are nowhere are dropped, or stay.

        Raises:
            TierError: the answer of a slower tier breaks its contract.
        """
        if self.caches is not None:
            with self.changing():  # rows fetched for lookups meanwhile, older than ours perhaps, stay out
                self.caches.refresh(self._present if self._slower else None, drop=drop)

    def _present(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(found, rows)`` of distinct keys in the slower tiers.

        Raises:
            TierError: a tier failed: which keys are gone cannot be told.
        """
        rows = np.zeros((len(keys), self.spec.dim), np.float32)
        answer = self._slower.fetch(self.spec.tag, keys, rows)
        if answer.unsure.any():
            raise TierError(f"{self.spec.tag}: refresh: a slower tier failed, {int(answer.unsure.sum())} keys are in doubt")
        return answer.found, rows

    # -- behind host memory ---------------------------------------------------------------------

    def _fetch_rows(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """``(distinct keys, their rows, found, inverse)`` from the slower tiers, within the time budget; counts what came."""
        deadline = None if self._time_budget is None else time.monotonic() + self._time_budget
        wanted, inverse = np.unique(keys, return_inverse=True)
        rows = np.full((len(wanted), self.spec.dim), self.spec.default_value, np.float32)
        answer = self._slower.fetch(self.spec.tag, wanted, rows, deadline=deadline)
        hits, unsure = int(answer.found[inverse].sum()), int(answer.unsure[inverse].sum())
        self._counters.add(COUNTER_TIER_HITS, hits)
        self._counters.add(COUNTER_UNANSWERED, unsure)
        self._counters.add(COUNTER_ABSENT, len(keys) - hits - unsure)
        self._counters.add(COUNTER_TIER_ERRORS, answer.errors)
        return wanted, rows, answer.found, inverse

    def _fetch(self, keys: np.ndarray, positions: np.ndarray, out: np.ndarray, writes: int) -> None:
        """Answer the keys at ``positions`` of a batch from the slower tiers: each distinct key once, within the time budget."""
        wanted, rows, found, inverse = self._fetch_rows(keys[positions])
        out[positions] = rows[inverse]
        self._keep_later(wanted[found], rows[found], writes)

    def _keep_later(self, keys: np.ndarray, rows: np.ndarray, writes: int) -> None:
        """Let rows that came from slower tiers enter host memory in the background, if asked to."""
        if self._keeps_missed and self._background is not None and len(keys):
            self._background(lambda: self._keep(keys, rows, writes))

    def _keep(self, keys: np.ndarray, rows: np.ndarray, writes: int) -> None:
        with self._unless_written_since(writes) as unwritten:
            if unwritten and self.store is not None:
                self.store.upsert(keys, rows)

    @contextmanager
    def changing(self, keys: np.ndarray | None = None) -> Iterator[None]:
        """Keep other writes, and rows fetched before or meanwhile, out of all tiers; then bring ``keys`` to the caches."""
        with self._write_lock:
            self._writes += 1
            try:
                yield
            finally:
                self._writes += 1
                if keys is not None and self.caches is not None:
                    self.caches.changed(keys)

    # -- writing ---------------------------------------------------------------------

    def insert(self, keys: np.ndarray, rows: np.ndarray) -> int:
        """Write a row for each key to every tier; returns how many keys were new to the fastest.

        Raises:
            TierUnavailable: there is no tier.
            TierError: every tier is read only, or one failed; or host memory, which may evict rows, is in front of a tier
                that has one of the keys and is read only.
            CapacityError: no memory for more rows. Slower tiers have the new rows and serve them: host memory has given up
                its own of these keys. Without slower tiers, the rows before the one that did not fit are written.
        """
        self._check_writable()
        with self.changing(keys):
            if self._may_evict:
                self._check_reachable(keys, "insert")
            if self.store is None:
                new = len(np.unique(keys[~self._slower.contains(self.spec.tag, keys)]))
                self._slower.insert(self.spec.tag, keys, rows)
                return new
            self._slower.insert(self.spec.tag, keys, rows)
            try:
                return self.store.upsert(keys, rows)
            except MemoryError:
                self._uncover(keys)
                raise

    @property
    def _may_evict(self) -> bool:
        """A row of host memory may leave it, and that of a slower tier show again."""
        return self.store is not None and self.store.max_rows is not None

    def _uncover(self, keys: np.ndarray) -> None:
        """Drop rows that slower tiers have newer: host memory had no room for the new ones and must not serve the old."""
        assert self.store is not None
        for tier in self._slower.writable:
            self.store.erase(keys[tier.contains(self.spec.tag, keys)])

    def _check_writable(self) -> None:
        if self.store is None and not self._slower:
            raise TierUnavailable(f"{self.spec.tag}: no volatile_db and no persistent_db: there is no place for rows")
        if self.store is None and not self._slower.writable:
            raise TierError(f"{self.spec.tag}: every tier is read only, wanted one that takes rows")

    def _check_reachable(self, keys: np.ndarray, verb: str) -> None:
        """Refuse a change that would leave the old row in a tier that cannot be written, from where it would be served."""
        for tier in self._slower.tiers:
            if tier.read_only and (fixed := keys[tier.contains(self.spec.tag, keys)]).size:
                raise TierError(f"{self.spec.tag}: {verb}: key {fixed[0]} is in {type(tier).__name__}, which is read only")

    def update(self, keys: np.ndarray, rows: np.ndarray) -> int:
        """Write the rows of those keys that some tier has, there; returns how many of ``keys`` that were.

        Raises:
            TierError: a key stands in a tier that is read only, and in no faster one that keeps it; or a tier failed.
            CapacityError: as ``insert``.
        """
        with self.changing(keys):
            present = self.contains(keys)
            exposed = keys if self.store is None or self._may_evict else keys[~self.store.contains(keys)]
            self._check_reachable(exposed, "update")
            self._slower.update(self.spec.tag, keys, rows)
            if self.store is not None:
                try:
                    self.store.update(keys, rows)
                except MemoryError:
                    self._uncover(keys)
                    raise
            return int(present.sum())

    def erase(self, keys: np.ndarray) -> int:
        """Remove the rows of the keys from every tier; returns how many distinct keys had one.

        Raises:
            TierError: a key stands in a tier that is read only, or a tier failed.
        """
        with self.changing(keys):
            self._check_reachable(keys, "erase")
            present = len(np.unique(keys[self.contains(keys)]))
            self._slower.erase(self.spec.tag, keys)
            if self.store is not None:
                self.store.erase(keys)
            return present

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """bool ``[n]``: which keys have a row in some tier."""
        found = np.zeros(len(keys), bool) if self.store is None else self.store.contains(keys)
        if self._slower and not found.all():
            rest = ~found
            found[rest] = self._slower.contains(self.spec.tag, keys[rest])
        return found

    # -- reading to write ---------------------------------------------------------------------

    def read(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(rows, found)`` of int64 keys, past the caches: float32 ``[n, dim]``, the default where bool ``[n]`` is off.

        Raises:
            TierError: a slower tier failed: whether it has a row cannot be told.
        """
        rows = np.full((len(keys), self.spec.dim), self.spec.default_value, np.float32)
        found = np.zeros(len(keys), bool)
        if self.store is not None and len(keys):
            misses = np.empty(len(keys), np.int64)
            missing = self.store.lookup(keys, rows, self.spec.default_value, misses)
            found[:] = True
            found[misses[:missing]] = False
        behind = np.flatnonzero(~found)
        if self._slower and len(behind):
            wanted, inverse = np.unique(keys[behind], return_inverse=True)
            there, theirs = self._present(wanted)
            here = there[inverse]
            rows[behind[here]] = theirs[inverse[here]]
            found[behind] = here
        return rows, found

    def read_modify_write(self, keys: np.ndarray, change: Change) -> int:
        """Write what ``change`` makes of the rows of distinct keys to every tier, with no other write between.

        Returns how many keys were new.   Raises as ``read`` and ``insert``.
        """
        self._check_writable()
        with self._write_lock:
            return self.insert(keys, np.ascontiguousarray(change(*self.read(keys)), np.float32))

    def keys(self) -> np.ndarray:
        """int64: all keys with a row in some tier, ascending."""
        parts = [] if self.store is None else [self.store.keys()]
        for tier in self._slower.tiers:
            parts += [some for some, _ in tier.scan(self.spec.tag)]
        return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.int64)

    def adopt(self, content: HostStore | None) -> None:
        """Put a loaded version of the table in the place of the present one."""
        with self.changing():
            if content is not None and self.store is not None:
                self.store.adopt(content)
            if self.caches is not None:
                self.caches.replaced()

    def stats(self, version: int) -> TableStats:
        """Counts since the server started."""
        store = self.store
        return self._counters.read(
            model=self.spec.model,
            table=self.spec.name,
            rows=0 if store is None else len(store),
            size=0 if store is None else store.bytes,
            evicted=0 if store is None else store.evicted,
            version=version,
            caches=() if self.caches is None else self.caches.stats(),
            asks_further=bool(self._slower),
        )


def _part(keys: DeviceKeys, start: int) -> DeviceKeys:
    """The keys from ``start`` on, as many as a batch may have."""
    n = min(keys.n - start, MAX_BATCH)
    return keys._replace(address=keys.address + start * KEY_BYTES[keys.form], n=n)
