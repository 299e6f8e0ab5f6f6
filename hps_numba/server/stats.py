"""What a server did: counters that any thread adds to without a lock, and their readings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hps_numba.kernels.host.epoch import count
from hps_numba.kernels.layouts.host_store import (
    COUNTER_ABSENT,
    COUNTER_BYTES,
    COUNTER_CALLS,
    COUNTER_KEYS,
    COUNTER_MISSES,
    COUNTER_TIER_ERRORS,
    COUNTER_TIER_HITS,
    COUNTER_UNANSWERED,
)

__all__ = ["CacheStats", "Counters", "TableStats"]


@dataclass(frozen=True, kw_only=True)
class CacheStats:
    """One cache of a table since the server started.

    Attributes:
        device: CUDA ordinal, or None for a cache in host memory.
        capacity: rows that it has room for.
        resident: rows that it held when it was last filled or refreshed.
        bytes: bytes of the device that it takes, with the buffers of batches so far.
        calls, keys: lookups and keys asked for.   hits, misses: keys that it had, or lacked.
        absent: keys that host memory lacked too.
        insertions: rows that entered after a lookup.   evictions: rows that left for others.
        stale_dropped: rows that changed in host memory on their way into the cache, and were not shown.
        refused: newcomers that the policy did not admit.   policy: its name.
        staged: lookups whose missed rows were gathered by host threads (``miss_path``).
        index_mirror_bytes: of ``bytes``, those of a copy of host memory's index that misses are looked up in now, or 0.
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
    index_mirror_bytes: int
    policy: str

    @property
    def hits(self) -> int:
        """Keys that it had."""
        return self.keys - self.misses


@dataclass(frozen=True, kw_only=True)
class TableStats:
    """One table since the server started. Keys are counted as asked for, duplicates included.

    Attributes:
        rows: rows in host memory.
        bytes: bytes of host memory in use, index included.
        calls: lookups.
        keys: keys asked for.
        host_hits: keys answered from host memory.
        tier_hits: keys answered from slower tiers.
        absent: keys that no tier has, answered with the default value.
        unanswered: keys answered with the default value because a slower tier was late or failed: they may exist.
        tier_errors: failed calls of slower tiers.
        evicted: rows that the bound of the host store pushed out.
        version: number of the model's content, 1 at first and one more with each replacement.
        caches: what each cache did, one a device; ``keys``, ``calls`` and hits above count their lookups too.
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
    caches: tuple[CacheStats, ...] = ()

    @property
    def cache_hits(self) -> int:
        """Keys answered from caches."""
        return sum(cache.hits for cache in self.caches)

    @property
    def cache_misses(self) -> int:
        """Keys that a cache was asked for and lacked."""
        return sum(cache.misses for cache in self.caches)

    @property
    def cache_insertions(self) -> int:
        """Rows that entered caches after a lookup."""
        return sum(cache.insertions for cache in self.caches)

    @property
    def cache_evictions(self) -> int:
        """Rows that left caches for others."""
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
        """Share of the keys that caches were asked for and had; 1.0 before the first key."""
        asked = self.cache_hits + self.cache_misses
        return self.cache_hits / asked if asked else 1.0


class Counters:
    """The ``layout.COUNTER_*`` words of one table.   **Threads:** ``add`` from any thread, wait-free."""

    def __init__(self) -> None:
        self._words = np.zeros(COUNTER_BYTES // 8, np.int64)
        self.address: int = self._words.__array_interface__["data"][0]

    def add(self, counter: int, amount: int) -> None:
        """Add ``amount`` to one counter."""
        if amount:
            count(self.address + counter, amount)

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
        caches: tuple[CacheStats, ...] = (),
        asks_further: bool = False,
    ) -> TableStats:
        """The present counts, with what the caller knows of the table.

        ``asks_further``: what caches and host memory lack is asked for in slower tiers, and counted there.
        """
        keys, misses = self._get(COUNTER_KEYS), self._get(COUNTER_MISSES)
        behind = sum(cache.misses - cache.absent for cache in caches)  # keys that host memory had for a cache
        return TableStats(
            model=model,
            table=table,
            rows=rows,
            bytes=size,
            calls=self._get(COUNTER_CALLS) + sum(cache.calls for cache in caches),
            keys=keys + sum(cache.keys for cache in caches),
            host_hits=keys - misses + behind,
            tier_hits=self._get(COUNTER_TIER_HITS),
            absent=self._get(COUNTER_ABSENT) + (0 if asks_further else sum(cache.absent for cache in caches)),
            unanswered=self._get(COUNTER_UNANSWERED),
            tier_errors=self._get(COUNTER_TIER_ERRORS),
            evicted=evicted,
            version=version,
            caches=caches,
        )
