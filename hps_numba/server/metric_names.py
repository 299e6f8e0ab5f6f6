"""The metrics of a server: names, labels, units and meaning, as ``docs/metrics.md`` lists them. Names stay.

Labels: ``model`` and ``table`` by name; ``device`` is a CUDA ordinal, ``cpu`` for a cache in host memory, or empty; ``tier`` is
``cache``, ``host_memory``, ``slower_tiers`` or the type of one slower tier; ``source`` is a source of online updates.
"""

from __future__ import annotations

from hps_numba.metrics.families import Metric
from hps_numba.metrics.histogram import edges_between

__all__ = ["CACHE", "HOST_MEMORY", "SLOWER_TIERS"]

#: values of the label ``tier``
CACHE, HOST_MEMORY, SLOWER_TIERS = "cache", "host_memory", "slower_tiers"

_MODEL = ("model",)
_TABLE = ("model", "table")
_CACHE = (*_TABLE, "device")
_TIER = (*_TABLE, "tier")
_BY_TIER = (*_TABLE, "tier", "device")
_SOURCE = ("source",)
_UPDATES = (*_TABLE, "source")


def _counter(what: str, unit: str, help: str, labels: tuple[str, ...] = _TABLE) -> Metric:
    return Metric(name=f"hps_{what}_total", kind="counter", help=help, labels=labels, unit=unit)


def _gauge(what: str, unit: str, help: str, labels: tuple[str, ...] = _TABLE) -> Metric:
    return Metric(name=f"hps_{what}", kind="gauge", help=help, labels=labels, unit=unit)


def _seconds(what: str, help: str, edges: tuple[int, ...], labels: tuple[str, ...]) -> Metric:
    name = f"hps_{what}_seconds"
    return Metric(name=name, kind="histogram", help=help, labels=labels, unit="seconds", edges=edges, scale=1e-9)


# edges in ns: of lookups in host memory from 128 ns to 1.1 s, of fetches and of lookups in caches from 1 us to 69 s, of slow
# work from 1 ms to 2.4 h
_QUICK, _FETCHES, _SLOW = edges_between(1 << 7, 1 << 30), edges_between(1 << 10, 1 << 36), edges_between(1 << 20, 1 << 43, 1)

# -- server and models
BUILD_INFO = _gauge("build_info", "", "1; the label is the version of hps_numba.", ("version",))
MODEL_VERSION = _gauge("model_version", "", "Number of the version of the model that is in force.", _MODEL)
VERSION_AGE = _gauge(
    "model_version_age_seconds", "seconds", "Since this version came into force, or was loaded at first.", _MODEL
)
REPLACEMENTS = _seconds("replacement", "How long replacements of the model took, from the plan to the end.", _SLOW, _MODEL)
REPLACEMENT_ERRORS = _counter("replacement_errors", "errors", "Replacements of the model that failed.", _MODEL)
BACKGROUND_JOBS = _gauge(
    "background_jobs", "jobs", "Jobs that wait or are at work in the background, by pool.", (*_MODEL, "pool")
)
DROPPED_JOBS = _counter(
    "background_dropped_jobs", "jobs", "Jobs in the background that were dropped because too many waited.", (*_MODEL, "pool")
)
PREFETCH_KEYS = _gauge("prefetch_waiting_keys", "keys", "Keys of prefetches that wait or are at work.", _MODEL)

# -- lookups
LOOKUPS = _counter("lookups", "lookups", "Lookups.")
KEYS = _counter("keys", "keys", "Keys that lookups asked for, duplicates included.")
HIT_KEYS = _counter("hit_keys", "keys", "Keys that were answered with a stored row, by where it was found.", _BY_TIER)
ABSENT_KEYS = _counter("absent_keys", "keys", "Keys in no tier, answered with the default value.")
UNANSWERED_KEYS = _counter(
    "unanswered_keys",
    "keys",
    "Keys answered with the default value because a slower tier was late, failed or was not waited for: they may exist.",
)
JOINED_KEYS = _counter("joined_keys", "keys", "Keys for which a lookup waited for the fetch of another one.")
PREFETCHED_ROWS = _counter("prefetched_rows", "rows", "Rows that prefetches found in slower tiers.")

HOST_LOOKUP_SECONDS = _seconds(
    "host_lookup",
    "Time in the compiled lookup of keys in host memory, of a sample of lookups (one in 16).",
    _QUICK,
    _TABLE,
)
CACHE_LOOKUP_SECONDS = _seconds(
    "cache_lookup",
    "Time of a whole lookup that a cache in host memory answers, until its rows are there, of a sample (one in 64).",
    _FETCHES,
    _CACHE,
)
CACHE_CALL_SECONDS = _seconds(
    "cache_call",
    "Time until a call that looks up in a cache on a GPU returned, of a sample (one in 64): the GPU may still be at work.",
    _FETCHES,
    _CACHE,
)

# -- slower tiers, one by one
FETCHED_KEYS = _counter("tier_fetched_keys", "keys", "Keys that a slower tier was asked for, prefetches included.", _TIER)
FOUND_KEYS = _counter("tier_found_keys", "keys", "Keys that a slower tier was asked for and had.", _TIER)
FETCH_ERRORS = _counter("tier_fetch_errors", "errors", "Fetches from a slower tier that failed, also in part.", _TIER)
FETCH_SECONDS = _seconds("tier_fetch", "How long fetches from a slower tier took.", _FETCHES, _TIER)

# -- rows and memory
HOST_ROWS = _gauge("host_rows", "rows", "Rows in host memory.")
EVICTED_ROWS = _counter("evicted_rows", "rows", "Rows evicted for others, from caches and from host memory.", _BY_TIER)
INSERTED_ROWS = _counter("inserted_rows", "rows", "Rows that entered a cache after a lookup missed them.", _BY_TIER)
HOST_BYTES = _gauge("host_memory_bytes", "bytes", "Bytes of host memory in use, by what they are for.", (*_TABLE, "part"))
HOST_PLANNED_BYTES = _gauge(
    "host_memory_planned_bytes", "bytes", "Bytes of host memory that were planned when the model was loaded.", (*_TABLE, "part")
)
CACHE_BYTES = _gauge("cache_memory_bytes", "bytes", "Bytes of a cache in use, by what they are for.", (*_CACHE, "part"))
CACHE_PLANNED_BYTES = _gauge(
    "cache_memory_planned_bytes", "bytes", "Bytes of a cache that were planned when the model was loaded.", (*_CACHE, "part")
)

# -- caches
CACHE_LOOKUPS = _counter("cache_lookups", "lookups", "Lookups of a cache.", _CACHE)
CACHE_KEYS = _counter("cache_keys", "keys", "Keys that a cache was asked for.", _CACHE)
CACHE_CAPACITY = _gauge("cache_capacity_rows", "rows", "Rows that a cache has room for.", _CACHE)
CACHE_RESIDENT = _gauge("cache_resident_rows", "rows", "Rows that a cache held when it was last filled or refreshed.", _CACHE)
CACHE_REFUSED = _counter("cache_refused_rows", "rows", "Rows that the cache policy did not admit.", _CACHE)
CACHE_STALE = _counter(
    "cache_stale_dropped_rows", "rows", "Rows that changed in host memory on their way into the cache and were dropped.", _CACHE
)
CACHE_STAGED = _counter(
    "cache_staged_lookups", "lookups", "Lookups whose missed rows host threads gathered (miss_path staged).", _CACHE
)
CACHE_HELPED = _counter(
    "cache_helped_lookups", "lookups", "Lookups of which host threads gathered some missed rows (miss_path auto).", _CACHE
)

REFRESH_AGE = _gauge(
    "refresh_age_seconds", "seconds", "Since the caches of the table were last refreshed, filled or emptied for a new version."
)
REFRESHES = _seconds("refresh", "How long refreshes of the caches of the table took.", _SLOW, _TABLE)
REFRESH_ERRORS = _counter("refresh_errors", "errors", "Refreshes of the caches of the table that failed.")

# -- online updates, by source
UPDATE_RUNNING = _gauge("update_source_running", "", "1 while the source reads and applies, else 0.", (*_SOURCE, "type"))
UPDATE_BACKLOG_MESSAGES = _gauge("update_backlog_messages", "messages", "Messages read and not applied yet.", _SOURCE)
UPDATE_BACKLOG_BYTES = _gauge("update_backlog_bytes", "bytes", "Bytes of messages read and not applied yet.", _SOURCE)
UPDATE_SOURCE_LAG = _gauge("update_source_lag_messages", "messages", "Messages on the bus and not applied yet.", _SOURCE)
UPDATE_LOST = _counter(
    "update_lost_messages", "messages", "Messages that the bus dropped before they were read, as far as it tells.", _SOURCE
)
UPDATE_SKIPPED = _counter(
    "update_skipped_messages", "messages", "Messages that were not applied, by reason.", (*_SOURCE, "reason")
)
UPDATE_FAILED_READS = _counter("update_failed_reads", "reads", "Failed attempts to read from the bus.", _SOURCE)
UPDATE_FAILED_COMMITS = _counter("update_failed_commits", "commits", "Failed attempts to commit to the bus.", _SOURCE)

# -- online updates, by table
UPDATE_MESSAGES = _counter("update_messages", "messages", "Messages of online updates that were applied.", _UPDATES)
UPDATE_ROWS = _counter("update_rows", "rows", "Rows that online updates wrote.", _UPDATES)
UPDATE_ERASED = _counter("update_erased_rows", "rows", "Rows that online updates erased.", _UPDATES)
UPDATE_HELD = _gauge("update_held_rows", "rows", "Updates that a slower tier cannot take now; they are tried again.", _UPDATES)
UPDATE_RETRIES = _counter("update_retries", "retries", "Failed attempts to apply an update; each is repeated.", _UPDATES)
UPDATE_LAG_MESSAGES = _gauge(
    "update_lag_messages", "messages", "Updates of the table (or all, if the bus does not tell) that are not applied.", _UPDATES
)
UPDATE_LAG_SECONDS = _gauge(
    "update_lag_seconds", "seconds", "Age of the newest applied update while others wait, else 0.", _UPDATES
)
UPDATE_AGE = _gauge("update_age_seconds", "seconds", "Since the newest update that was applied happened.", _UPDATES)
UPDATE_FRESHNESS = _gauge(
    "update_freshness_seconds",
    "seconds",
    "From the oldest event of the last batch of updates until lookups saw it in every tier and cache.",
    _UPDATES,
)
