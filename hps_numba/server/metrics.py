"""The metrics of a server, read from what its parts count anyway; names and meaning are in ``metric_names``.

Nothing is counted for this a second time, and nothing is kept: a collection costs what ``HPS.stats`` costs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import fields

from hps_numba.cache.memory_use import CacheMemory
from hps_numba.metrics.families import Family, Metric
from hps_numba.server import metric_names as names
from hps_numba.server.catalog import Catalog
from hps_numba.server.model import ServedModel
from hps_numba.server.online_updates import OnlineUpdates
from hps_numba.server.stats import CacheStats, TableStats
from hps_numba.server.table import ServedTable
from hps_numba.server.update_stats import SourceStats, TableUpdates
from hps_numba.storage.host.store_bytes import StoreBytes

__all__ = ["SERVER_METRICS", "ServerMetrics"]

#: every metric of a server, in the order of a text
SERVER_METRICS: tuple[Metric, ...] = tuple(value for value in vars(names).values() if isinstance(value, Metric))

_OF_TABLE: dict[Metric, Callable[[TableStats], float]] = {
    names.LOOKUPS: lambda table: table.calls,
    names.KEYS: lambda table: table.keys,
    names.ABSENT_KEYS: lambda table: table.absent,
    names.UNANSWERED_KEYS: lambda table: table.unanswered,
    names.JOINED_KEYS: lambda table: table.joined,
    names.PREFETCHED_ROWS: lambda table: table.prefetched,
    names.HOST_ROWS: lambda table: table.rows,
}
_OF_CACHE: dict[Metric, Callable[[CacheStats], float]] = {
    names.CACHE_LOOKUPS: lambda cache: cache.calls,
    names.CACHE_KEYS: lambda cache: cache.keys,
    names.CACHE_CAPACITY: lambda cache: cache.capacity,
    names.CACHE_RESIDENT: lambda cache: cache.resident,
    names.CACHE_REFUSED: lambda cache: cache.refused,
    names.CACHE_STALE: lambda cache: cache.stale_dropped,
    names.CACHE_STAGED: lambda cache: cache.staged,
    names.CACHE_HELPED: lambda cache: cache.helped,
}
_OF_CACHE_BY_TIER: dict[Metric, Callable[[CacheStats], float]] = {
    names.HIT_KEYS: lambda cache: cache.hits,
    names.EVICTED_ROWS: lambda cache: cache.evictions,
    names.INSERTED_ROWS: lambda cache: cache.insertions,
}
_OF_SOURCE: dict[Metric, Callable[[SourceStats], float | None]] = {
    names.UPDATE_BACKLOG_MESSAGES: lambda source: source.backlog_messages,
    names.UPDATE_BACKLOG_BYTES: lambda source: source.backlog_bytes,
    names.UPDATE_SOURCE_LAG: lambda source: source.lag_messages,
    names.UPDATE_LOST: lambda source: source.lost,
    names.UPDATE_FAILED_READS: lambda source: source.failed_reads,
    names.UPDATE_FAILED_COMMITS: lambda source: source.failed_commits,
}
_OF_UPDATES: dict[Metric, Callable[[TableUpdates], float | None]] = {
    names.UPDATE_MESSAGES: lambda updates: updates.messages,
    names.UPDATE_ROWS: lambda updates: updates.rows,
    names.UPDATE_ERASED: lambda updates: updates.erased,
    names.UPDATE_HELD: lambda updates: updates.held_rows,
    names.UPDATE_RETRIES: lambda updates: updates.retries,
    names.UPDATE_LAG_MESSAGES: lambda updates: updates.lag_messages,
    names.UPDATE_LAG_SECONDS: lambda updates: updates.lag_seconds,
    names.UPDATE_AGE: lambda updates: updates.age_seconds,
    names.UPDATE_FRESHNESS: lambda updates: updates.freshness_seconds,
}


class ServerMetrics:
    """Collects the metrics of one server.

    Args:
        catalog: the models.   updates: the sources of online updates.

    Thread safety: every method.
    """

    def __init__(self, catalog: Catalog, updates: OnlineUpdates) -> None:
        self._catalog = catalog
        self._updates = updates

    def collect(self) -> Iterable[Family]:
        """All metrics now.

        Raises:
            ClosedError: the server was closed.
        """
        stats = self._updates.add_to(self._catalog.stats())
        found = {metric: Family(metric) for metric in SERVER_METRICS}
        found[names.BUILD_INFO].add(1, sys.modules["hps_numba"].__version__)
        for model in self._catalog.models.values():
            _add_model(found, model)
        for tables in stats.values():
            for table in tables.values():
                _add_table(found, table)
        for source in self._updates.stats():
            _add_source(found, source)
        return found.values()


_Found = dict[Metric, Family]


def _add_model(found: _Found, model: ServedModel) -> None:
    found[names.MODEL_VERSION].add(model.version, model.name)
    found[names.VERSION_AGE].add((time.monotonic_ns() - model.versions.since_ns) * 1e-9, model.name)
    found[names.REPLACEMENTS].add(model.replacements.nanoseconds, model.name)
    found[names.REPLACEMENT_ERRORS].add(model.replacements.errors, model.name)
    for pool, jobs in model.background.items():
        found[names.BACKGROUND_JOBS].add(jobs.waiting, model.name, pool)
        found[names.DROPPED_JOBS].add(jobs.dropped, model.name, pool)
    found[names.PREFETCH_KEYS].add(model.prefetches.waiting_keys, model.name)
    for plan in model.planned:
        _add_parts(found[names.HOST_PLANNED_BYTES], plan.host, plan.model, plan.table)
        if plan.cache_rows:
            for device in plan.devices or (None,):
                _add_parts(found[names.CACHE_PLANNED_BYTES], plan.cache, plan.model, plan.table, _device(device))
    for table in model.tables:
        _add_timings(found, model, table)


def _add_timings(found: _Found, model: ServedModel, table: ServedTable) -> None:
    own = model.name, table.spec.name
    found[names.HOST_LOOKUP_SECONDS].add(table.latency, *own)
    for tier, counts in model.tier_counts(table).items():
        found[names.FETCHED_KEYS].add(counts.keys, *own, tier)
        found[names.FOUND_KEYS].add(counts.found, *own, tier)
        found[names.FETCH_ERRORS].add(counts.errors, *own, tier)
        found[names.FETCH_SECONDS].add(counts.nanoseconds, *own, tier)
    for cache in table.caches or ():
        if cache.device is None:
            found[names.CACHE_LOOKUP_SECONDS].add(table.cached_lookups.snapshot(), *own, _device(None))
        else:
            found[names.CACHE_CALL_SECONDS].add(cache.calls.snapshot(), *own, _device(cache.device))
    if table.caches is not None:
        refreshes = table.caches.refreshes
        found[names.REFRESH_AGE].add(refreshes.age_seconds, *own)
        found[names.REFRESHES].add(refreshes.nanoseconds, *own)
        found[names.REFRESH_ERRORS].add(refreshes.errors, *own)


def _add_table(found: _Found, table: TableStats) -> None:
    own = table.model, table.table
    for metric, value in _OF_TABLE.items():
        found[metric].add(value(table), *own)
    for cache in table.caches:
        device = _device(cache.device)
        for metric, of_cache in _OF_CACHE.items():
            found[metric].add(of_cache(cache), *own, device)
        for metric, of_cache in _OF_CACHE_BY_TIER.items():
            found[metric].add(of_cache(cache), *own, names.CACHE, device)
        _add_parts(found[names.CACHE_BYTES], cache.memory, *own, device)
    found[names.HIT_KEYS].add(table.host_hits, *own, names.HOST_MEMORY, "")
    found[names.HIT_KEYS].add(table.tier_hits, *own, names.SLOWER_TIERS, "")
    found[names.EVICTED_ROWS].add(table.evicted, *own, names.HOST_MEMORY, "")
    _add_parts(found[names.HOST_BYTES], table.memory, *own)
    for updates in table.updates:
        for metric, of_updates in _OF_UPDATES.items():
            found[metric].add(of_updates(updates), *own, updates.source)


def _add_source(found: _Found, source: SourceStats) -> None:
    found[names.UPDATE_RUNNING].add(int(source.running), source.name, source.type)
    for metric, value in _OF_SOURCE.items():
        found[metric].add(value(source), source.name)
    for reason, messages in source.skipped.items():
        found[names.UPDATE_SKIPPED].add(messages, source.name, reason)


def _add_parts(family: Family, memory: CacheMemory | StoreBytes, *labels: str) -> None:
    for part in fields(memory):
        family.add(getattr(memory, part.name), *labels, part.name)


def _device(device: int | None) -> str:
    return "cpu" if device is None else str(device)
