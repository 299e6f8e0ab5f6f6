"""The caches of one table, one a device over one host store: made, filled, kept right, refreshed, counted.

A change of the table reaches every cache before the call that made it returns (``changed``). A cache takes the new row from the
host store, under the lock of its set, and not from the caller: two changes of one key may come to a device in either order, and
what stands in the end is what the host store has.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np

from hps_numba import plugins
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.cache.sizing import CacheShape
from hps_numba.config import ModelConfig, TableSpec
from hps_numba.errors import CapacityError
from hps_numba.kernels.policies._policy import Policy
from hps_numba.server.stats import CacheStats
from hps_numba.storage.host.store import HostStore

__all__ = ["TableCaches"]

log = logging.getLogger(__name__)
Fetch = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From int64 keys ``[n]`` to (bool ``[n]`` found, float32 rows ``[n, dim]``), from the slower tiers."""


class TableCaches:
    """The caches of a table.

    Args:
        spec: the table.   shape: of each cache.   devices: CUDA ordinals, or ``(None,)`` for a cache in host memory.
        policy: who leaves a dynamic cache.   store: the rows in host memory, if they are kept there.

    **Threads:** lookups from any thread; changes beside them.
    """

    def __init__(
        self,
        spec: TableSpec,
        model: ModelConfig,
        shape: CacheShape,
        devices: tuple[int | None, ...],
        policy: Policy,
        store: HostStore | None,
    ) -> None:
        self.spec = spec
        self._warms = model.init_ec or shape.kind != "dynamic"
        self._share = model.cache_refresh_percentage_per_iteration
        self._store = store
        self._resident: dict[int | None, int] = {}
        self._caches: dict[int | None, EmbeddingCache] = {}
        with ExitStack() as undo:
            for device in devices:
                cache = EmbeddingCache(
                    spec.dim,
                    shape.rows,
                    device=device,
                    kind=shape.kind,
                    whole=shape.whole and shape.kind == "dynamic",
                    policy=policy,
                    row_type=spec.cache_row_dtype,
                    default=spec.default_value,
                    store=store,
                    name=spec.tag,
                    buffers=model.num_of_worker_buffer_in_pool,
                    pagelock=model.enable_pagelock and shape.kind == "static",
                    miss_path=model.miss_path,
                )
                undo.callback(cache.close)
                self._caches[device] = cache
                if plugins.is_reference(policy.name):  # a user's own is compiled, or refused, at the start
                    cache.compile_policy()
            undo.pop_all()

    def on(self, device: int | None) -> EmbeddingCache | None:
        """The cache on a device."""
        return self._caches.get(device)

    def __iter__(self) -> Iterator[EmbeddingCache]:
        return iter(self._caches.values())

    def warm(self) -> None:
        """Fill every cache, before the first lookup, unless ``init_ec`` is off."""
        if not self._warms:
            return
        for device, cache in self._caches.items():
            self._resident[device] = cache.warm()
            log.info(
                "%s: %d of %d rows in the cache of %s", self.spec.tag, self._resident[device], cache.capacity, _place(device)
            )

    def set_policy(self, policy: Policy) -> None:
        """Let another policy decide who leaves, in every cache; done when this returns. Rows stay.

        Raises:
            ConfigError: fixed caches, which evict nothing.
            PolicyError, CapacityError: it does not compile for a device, or its memory is not there; all caches go on with the
                policy before.
        """
        with ExitStack() as undo:
            changes = []
            for cache in self:
                changes.append((cache, cache.prepare_policy(policy)))
                undo.callback(changes[-1][1].release)
            undo.pop_all()
        for cache, change in changes:
            cache.adopt_policy(change)

    def changed(self, keys: np.ndarray) -> None:
        """Bring the rows of int64 ``keys`` from the host store again; those it lacks are dropped, and fetched on demand."""
        for cache in self:
            if self._store is None:
                cache.erase(keys)
            else:
                cache.update(keys)

    def replaced(self) -> None:
        """The table has other content: drop all rows, and take new ones in as far as there is room."""
        for device, cache in self._caches.items():
            cache.clear()
            try:
                self._resident[device] = cache.warm() if self._warms else 0
            except CapacityError as problem:  # a static cache, and a content with more rows than the one before
                self._resident[device] = 0
                log.warning("%s: host memory serves the new version: %s", self.spec.tag, problem)

    def refresh(self, fetch: Fetch | None, *, drop: bool) -> None:
        """Renew the rows of all caches, a step after the other, from the host store and, if given, by ``fetch``.

        Args:
            drop: rows that are nowhere any more are dropped, else they stay.
        """
        for device, cache in self._caches.items():
            step = max(1, math.ceil(cache.sets * (self._share or 1.0)))
            for first in range(0, cache.sets, step):
                self._refresh_sets(cache, first, min(first + step, cache.sets), fetch, drop=drop)
            self._resident[device] = cache.check_fully_resident()

    def _refresh_sets(self, cache: EmbeddingCache, first: int, stop: int, fetch: Fetch | None, *, drop: bool) -> None:
        if self._store is not None:
            cache.refresh(first, stop, drop=drop and fetch is None)
        if fetch is None:
            return
        keys = cache.dump(first, stop)
        behind = keys if self._store is None else keys[~self._store.contains(keys)]
        if not len(behind):
            return
        found, rows = fetch(behind)
        if found.any():
            cache.update(behind[found], rows[found])
        if drop and not found.all():
            cache.erase(behind[~found])

    def stats(self) -> tuple[CacheStats, ...]:
        """What each cache did."""
        return tuple(self._stats_of(device, cache) for device, cache in self._caches.items())

    def _stats_of(self, device: int | None, cache: EmbeddingCache) -> CacheStats:
        counts = cache.counters()
        return CacheStats(
            device=device,
            capacity=cache.capacity,
            resident=self._resident.get(device, 0),
            bytes=cache.bytes,
            calls=counts.calls,
            keys=counts.keys,
            misses=counts.misses,
            absent=counts.absent,
            insertions=counts.inserted,
            evictions=counts.evicted,
            stale_dropped=counts.stale_dropped,
            refused=counts.refused,
            staged=counts.staged,
            index_mirror_bytes=cache.index_mirror_bytes,
            policy=cache.policy.name,
        )

    def close(self) -> None:
        """Give all memory back after the lookups at work."""
        for cache in self:
            cache.close()


def _place(device: int | None) -> str:
    return "host memory" if device is None else f"device {device}"
