"""What a server did: counters that any thread adds to without a lock, and snapshots of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hps_numba.cache.memory_use import CacheMemory
from hps_numba.kernels.host.clock import HAS_CLOCK
from hps_numba.kernels.host.epoch import count
from hps_numba.kernels.layouts.host_store import (
    COUNTER_ABSENT,
    COUNTER_BYTES,
    COUNTER_CALLS,
    COUNTER_KEYS,
    COUNTER_LATENCY,
    COUNTER_MISSES,
    COUNTER_TIER_ERRORS,
    COUNTER_TIER_HITS,
    COUNTER_UNANSWERED,
)
from hps_numba.metrics.histogram import Histogram
from hps_numba.server.update_stats import TableUpdates
from hps_numba.storage.host.store_bytes import StoreBytes

__all__ = ["COUNTER_JOINED", "COUNTER_PREFETCHED", "CacheStats", "Counters", "TableStats"]

# words of ``Counters`` behind those that kernels add to
COUNTER_JOINED, COUNTER_PREFETCHED = COUNTER_BYTES, COUNTER_BYTES + 8
_WORDS = COUNTER_BYTES // 8 + 2
_NO_BYTES = StoreBytes()


@dataclass(frozen=True, kw_only=True)
class CacheStats:
    """One cache of a table: sizes now, and counts since the server started.

    Keys are counted as asked for, duplicates included: ``keys == hits + misses``.

    Attributes:
        device: CUDA ordinal, or None for a cache in host memory.
        capacity: rows that the cache has room for.
        resident: rows that it held when it was last filled or refreshed.
        bytes: bytes that it takes where it is, with the workspaces of lookups so far.
        calls: lookups.
        keys: keys that lookups asked for.
        misses: keys that were not in the cache.
        absent: keys that were not in host memory either.
        insertions: rows that entered after a lookup.
        evictions: rows that were evicted for others.
        stale_dropped: rows that changed in host memory on their way into the cache and were dropped.
        refused: insertion candidates that the policy did not admit.
        staged: lookups whose missed rows were gathered by host threads (``miss_path`` staged).
        helped: lookups for which host threads were asked for missed rows, as that is faster (``miss_path`` auto).
        index_mirror_bytes: of ``bytes``, those of the index mirror that misses are looked up in now, or 0.
        memory: bytes that it takes, by what they are for; ``TablePlan.cache`` is the plan of the same.
        policy: name of the cache policy.
    """

    device: int | None
    capacity: int
    resident: int
    bytes: int
    calls: int
    keys: int
    misses: int
    absent: int
    insertions: int
    evictions: int
    stale_dropped: int
    refused: int
    staged: int
    helped: int
    index_mirror_bytes: int
    memory: CacheMemory
    policy: str

    @property
    def hits(self) -> int:
        """Keys that were in the cache."""
        return self.keys - self.misses

    @property
    def direct(self) -> int:
        """Lookups without help of host threads: those of which it read the missed rows, if any, in place."""
        return self.calls - self.staged - self.helped


@dataclass(frozen=True, kw_only=True)
class TableStats:
    """One table: sizes now, and counts since the server started.

    Keys are counted as asked for, duplicates included; each is counted where it was answered:
    ``keys == cache_hits + host_hits + tier_hits + absent + unanswered`` once background jobs have ended.

    Attributes:
        model: name of the model.
        table: name of the table.
        rows: rows in host memory.
        bytes: bytes of host memory in use, index included.
        calls: lookups.
        keys: keys asked for.
        host_hits: keys answered from host memory.
        tier_hits: keys answered from slower tiers.
        absent: keys that are in no tier, answered with the default value.
        unanswered: keys answered with the default value because a slower tier was late or failed: they may exist.
        tier_errors: failed calls of slower tiers.
        evicted: rows that host memory evicted to keep its bound.
        joined: keys that no slower tier was asked for, as another lookup was just asking for them.
        prefetched: rows that ``prefetch`` found in slower tiers.
        version: of the model that is in force: 1 at first and one more with each replacement, or as that says.
        memory: bytes of host memory that the rows take, by what they are for, with memory for more rows; ``TablePlan.host``
            is the plan of the same.
        caches: what each cache did, one a device; ``keys``, ``calls`` and hits above count their lookups too.
        updates: what each source of online updates did to the table.
    """

    model: str
    table: str
    rows: int
    bytes: int
    calls: int
    keys: int
    host_hits: int
    tier_hits: int
    absent: int
    unanswered: int
    tier_errors: int
    evicted: int
    version: int
    joined: int = 0
    prefetched: int = 0
    memory: StoreBytes = _NO_BYTES
    caches: tuple[CacheStats, ...] = ()
    updates: tuple[TableUpdates, ...] = ()

    @property
    def cache_hits(self) -> int:
        """Keys answered from caches."""
        return sum(cache.hits for cache in self.caches)

    @property
    def cache_misses(self) -> int:
        """Keys that a cache was asked for and that were not in it."""
        return sum(cache.misses for cache in self.caches)

    @property
    def cache_insertions(self) -> int:
        """Rows that entered caches after a lookup."""
        return sum(cache.insertions for cache in self.caches)

    @property
    def cache_evictions(self) -> int:
        """Rows that caches evicted for others."""
        return sum(cache.evictions for cache in self.caches)

    @property
    def defaults(self) -> int:
        """Keys answered with the default value."""
        return self.absent + self.unanswered

    @property
    def hit_rate(self) -> float:
        """Share of keys answered from caches and host memory; 1.0 before the first key."""
        return (self.cache_hits + self.host_hits) / self.keys if self.keys else 1.0

    @property
    def cache_hit_rate(self) -> float:
        """Share of the keys that caches were asked for and that were in them; 1.0 before the first key."""
        asked = self.cache_hits + self.cache_misses
        return self.cache_hits / asked if asked else 1.0


class Counters:
    """The counters of one table, words at the offsets ``kernels.layouts.host_store.COUNTER_*``, which kernels also add to,
    and at those of this module.

    Attributes:
        address: of the first word.
        latency: ns that lookups spent in host memory: of a sample of them, one in ``kernels.host.histogram.SAMPLED``.

    Thread safety: every method; wait-free.
    """

    def __init__(self) -> None:
        self._words = np.zeros(_WORDS, np.int64)
        self.latency = Histogram()
        self.time_lookups(HAS_CLOCK)
        self.address: int = self._words.__array_interface__["data"][0]

    def time_lookups(self, timed: bool) -> None:
        """Whether a sample of lookups is timed from now on; at first it is."""
        self._words[COUNTER_LATENCY // 8] = self.latency.address if timed else 0

    def add(self, counter: int, amount: int) -> None:
        """Add ``amount`` to one counter."""
        if amount:
            count(self.address + counter, amount)

    def add_missed_call(self, n: int) -> None:
        """Count a lookup of ``n`` keys, none of them in host memory."""
        self.add(COUNTER_CALLS, 1)
        self.add(COUNTER_KEYS, n)
        self.add(COUNTER_MISSES, n)

    def _get(self, counter: int) -> int:
        return int(self._words[counter // 8])

    def read(
        self,
        *,
        model: str,
        table: str,
        rows: int,
        size: int,
        evicted: int,
        version: int,
        memory: StoreBytes = _NO_BYTES,
        caches: tuple[CacheStats, ...] = (),
        has_slower_tiers: bool = False,
    ) -> TableStats:
        """A snapshot of the counts, with what the caller knows of the table.

        Args:
            has_slower_tiers: keys that are neither in caches nor in host memory are looked up in slower tiers, and counted
                there.
        """
        keys, misses = self._get(COUNTER_KEYS), self._get(COUNTER_MISSES)
        host_hits_of_caches = sum(cache.misses - cache.absent for cache in caches)
        return TableStats(
            model=model,
            table=table,
            rows=rows,
            bytes=size,
            calls=self._get(COUNTER_CALLS) + sum(cache.calls for cache in caches),
            keys=keys + sum(cache.keys for cache in caches),
            host_hits=keys - misses + host_hits_of_caches,
            tier_hits=self._get(COUNTER_TIER_HITS),
            absent=self._get(COUNTER_ABSENT) + (0 if has_slower_tiers else sum(cache.absent for cache in caches)),
            unanswered=self._get(COUNTER_UNANSWERED),
            tier_errors=self._get(COUNTER_TIER_ERRORS),
            evicted=evicted,
            version=version,
            joined=self._get(COUNTER_JOINED),
            prefetched=self._get(COUNTER_PREFETCHED),
            memory=memory,
            caches=caches,
        )
