"""The caches of one table, one a device over one host store: opened, filled, updated, refreshed, counted.

A write to the table reaches every cache before the call that made it returns (``reload``). A cache reads the new row from the
host store, under the lock of its set, and does not take it from the caller: two writes of one key may reach a device in either
order, and in the end the cache holds what the host store has. A caller that keeps other writes away until the caches are done,
and has the rows in one array, may hand them over: reads over the bus row by row are limited by the translation of addresses.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace

import numpy as np

from hps_numba import plugins
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.cache.parts import CacheParts
from hps_numba.cache.promised import promise
from hps_numba.cache.sizing import CacheShape
from hps_numba.cache.version_switch import VersionSwitch
from hps_numba.config import ModelConfig, TableSpec
from hps_numba.errors import CapacityError, HpsError
from hps_numba.kernels.policies._policy import Policy
from hps_numba.runtime.hugectr_log import TRACE
from hps_numba.server.start_log import place, share
from hps_numba.server.stats import CacheStats
from hps_numba.server.timings import Timings
from hps_numba.storage.host.store import HostStore

__all__ = ["TableCaches"]

_POLICIES = "hps_numba.kernels.policies"
log = logging.getLogger(__name__)
Fetch = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From int64 keys ``[n]`` to (bool ``[n]`` found, float32 rows ``[n, dim]``), from the slower tiers."""
GroupBytes = Callable[[EmbeddingCache], tuple[int, int]]
"""Bytes of lookups of several tables for a cache: of workspaces, and of those that graphs keep."""


class TableCaches:
    """The caches of a table.

    Args:
        spec: the table.   model: config of its model.   shape: of each cache.
        devices: CUDA ordinals, or ``(None,)`` for a cache in host memory.
        policy: decides which entry a dynamic cache evicts.   store: the rows in host memory, if they are kept there.
        switch: of the versions of the model.   planned_bytes: that each cache will take (``cache.promised``).

    Attributes:
        refreshes: when all rows were last read again, or the caches filled, and how long refreshes took.

    Raises:
        CapacityError: no memory for a cache.   PolicyError: the policy does not compile.

    Thread safety: lookups from any thread, beside everything else; other methods by one thread at a time.
    """

    def __init__(
        self,
        spec: TableSpec,
        model: ModelConfig,
        shape: CacheShape,
        devices: tuple[int | None, ...],
        policy: Policy,
        store: HostStore | None,
        switch: VersionSwitch,
        planned_bytes: int = 0,
    ) -> None:
        self.spec = spec
        self.refreshes = Timings()
        self._fills_at_start = model.init_ec or shape.kind != "dynamic"
        self._refresh_share = model.cache_refresh_percentage_per_iteration
        self._store = store
        self._resident: dict[int | None, int] = {}
        self._caches: dict[int | None, EmbeddingCache] = {}
        with ExitStack() as undo:
            for device in devices:
                cache = self._caches[device] = _open_cache(spec, model, shape, device, policy, store, switch)
                undo.callback(cache.close)
                if device is not None:
                    cache.calls.switch(True)  # in host memory, whole lookups are timed (``server.lookups``)
                    promise(device, cache.parts, planned_bytes)
                if not plugins.is_built_in(_POLICIES, policy.name):  # compiled, or refused, at the start
                    cache.compile_policy()
            undo.pop_all()

    def on(self, device: int | None) -> EmbeddingCache | None:
        """The cache on a device, by CUDA ordinal, or in host memory for None; None if there is none."""
        return self._caches.get(device)

    def __iter__(self) -> Iterator[EmbeddingCache]:
        return iter(self._caches.values())

    def warm(self) -> None:
        """Fill every cache, before the first lookup, unless ``init_ec`` is off.

        Raises:
            CapacityError: a static cache with room for fewer rows than host memory has.
        """
        if not self._fills_at_start:
            return
        for device, cache in self._caches.items():
            self._resident[device] = cache.warm()
            rows, held = 0 if self._store is None else len(self._store), self._resident[device]
            log.info(
                "%s: cached %d of %d rows in the cache of %s, %s",
                self.spec.tag,
                held,
                rows,
                place(device),
                share(held, cache.capacity),
            )
        self.refreshes.done()

    def set_policy(self, policy: Policy) -> None:
        """Switch every cache to another policy; done when this returns. Rows stay.

        Raises:
            ConfigError: fixed caches, which evict nothing.
            PolicyError, CapacityError: the policy does not compile for a device, or there is no memory for its state; all
                caches keep the policy that they have.
        """
        with ExitStack() as undo:
            changes = []
            for cache in self:
                changes.append((cache, cache.prepare_policy(policy)))
                undo.callback(changes[-1][1].release)
            undo.pop_all()
        for cache, change in changes:
            cache.adopt_policy(change)

    def reload(self, keys: np.ndarray, rows: np.ndarray | None = None) -> None:
        """Read the rows of int64 ``keys`` from the host store again; those it lacks are dropped, and fetched on demand.

        ``rows``: what the store has for ``keys``, which are distinct, if the caller knows that no other write can come before
        this returns: then a cache needs not read it row by row.
        """
        for cache in self:
            if self._store is None:
                cache.erase(keys)
            elif rows is None:
                cache.update(keys)
            else:
                cache.take_written(keys, rows)

    def stand_ins(self, store: HostStore | None) -> dict[int, CacheParts]:
        """What answers instead of each cache, from another store, while the rows of the caches are replaced; to be closed.

        Raises:
            CapacityError: no memory.
        """
        made: dict[int, CacheParts] = {}
        with ExitStack() as undo:
            for cache in self:
                stand_in = made[cache.parts.state.address] = cache.stand_in(store)
                undo.callback(stand_in.close)
            undo.pop_all()
        return made

    def hold(self) -> None:
        """Let the caches stay at the present version of the store, whatever happens to it, until ``follow``."""
        for cache in self:
            cache.hold()

    def let_go(self) -> None:
        """Undo ``hold``, as the store has not changed."""
        for cache in self:
            cache.let_go()

    def drain(self) -> None:
        """Wait for all lookups that have begun, and for their work on devices."""
        for cache in self:
            cache.drain()

    @property
    def has_graphs(self) -> bool:
        """Some graph has captured a lookup."""
        return any(cache.has_graphs for cache in self)

    def follow(self) -> None:
        """Drop all rows, and answer from what the store has now. A cache that fails serves no more."""
        self.refreshes.done()
        for device, cache in self._caches.items():
            self._resident[device] = 0
            try:
                cache.take_new_version()
            except HpsError as problem:
                self._fail(cache, problem)

    def fill(self) -> None:
        """Fill the caches with what the store has, unless ``init_ec`` is off. A cache that fails serves no more."""
        for device, cache in self._caches.items() if self._fills_at_start else ():
            try:
                self._resident[device] = cache.warm()
            except CapacityError as problem:  # a static cache, and more rows than it was opened for
                log.warning("%s: host memory serves the new version: %s", self.spec.tag, problem)
            except HpsError as problem:
                self._fail(cache, problem)

    def _fail(self, cache: EmbeddingCache, problem: HpsError) -> None:
        log.error("%s: the cache could not take the new version: %s", self.spec.tag, problem)
        cache.fail(problem)

    def end_stand_ins(self, stand_ins: Mapping[int, CacheParts]) -> None:
        """Close ``stand_ins``, after the lookups in progress; what they counted is counted for the caches."""
        for cache in self:
            counters = stand_ins[cache.parts.state.address].close()
            if counters is not None:
                cache.parts.inspection.carry(counters)

    def reload_all(self) -> None:
        """Drop all rows and fill the caches again, as the table has other content; nobody looks up yet."""
        self.follow()
        self.fill()

    def refresh(self, fetch: Fetch | None, *, drop: bool) -> None:
        """Read the rows of all caches again, some sets at a time, from the host store and, if given, by ``fetch``.

        Args:
            drop: whether rows that are in no tier any more are dropped.

        Raises:
            TierError: as ``fetch``.
        """
        for device, cache in self._caches.items():
            step = max(1, math.ceil(cache.sets * (self._refresh_share or 1.0)))
            for first in range(0, cache.sets, step):
                began, stop = time.perf_counter(), min(first + step, cache.sets)
                self._refresh_sets(cache, first, stop, fetch, drop=drop)
                log.log(TRACE, "%s: sets %d to %d refreshed in %.3g s", self.spec.tag, first, stop, time.perf_counter() - began)
            self._resident[device] = cache.check_fully_resident()

    def _refresh_sets(self, cache: EmbeddingCache, first: int, stop: int, fetch: Fetch | None, *, drop: bool) -> None:
        if self._store is not None:
            cache.refresh(first, stop, drop=drop and fetch is None)
        if fetch is None:
            return
        keys = cache.dump(first, stop)
        absent = keys if self._store is None else keys[~self._store.contains(keys)]
        if not len(absent):
            return
        found, rows = fetch(absent)
        if found.any():
            cache.update(absent[found], rows[found])
        if drop and not found.all():
            cache.erase(absent[~found])

    def stats(self, group_bytes: GroupBytes) -> tuple[CacheStats, ...]:
        """A snapshot of each cache."""
        return tuple(_stats_of(cache, self._resident.get(device, 0), group_bytes) for device, cache in self._caches.items())

    def close(self) -> None:
        """Free all memory, after the lookups in progress."""
        for cache in self:
            cache.close()


def _open_cache(
    spec: TableSpec,
    model: ModelConfig,
    shape: CacheShape,
    device: int | None,
    policy: Policy,
    store: HostStore | None,
    switch: VersionSwitch,
) -> EmbeddingCache:
    return EmbeddingCache(
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
        switch=switch,
        keys=spec.max_keys,
    )


def _stats_of(cache: EmbeddingCache, resident: int, group_bytes: GroupBytes) -> CacheStats:
    counts, memory = cache.counters(), cache.memory
    of_groups, of_graphs = group_bytes(cache)
    memory = replace(memory, group_workspaces=of_groups, graphs=memory.graphs + of_graphs)
    return CacheStats(
        device=cache.device,
        capacity=cache.capacity,
        resident=resident,
        bytes=memory.bytes,
        calls=counts.calls,
        keys=counts.keys,
        misses=counts.misses,
        absent=counts.absent,
        insertions=counts.inserted,
        evictions=counts.evicted,
        stale_dropped=counts.stale_dropped,
        refused=counts.refused,
        staged=counts.staged,
        helped=counts.helped,
        index_mirror_bytes=cache.index_mirror_bytes,
        memory=memory,
        policy=cache.policy.name,
    )
