"""Counts of the server among Triton's own metrics: its endpoint shows them beside those of requests.

The instances of a model are processes that report to one family: counters add up; a gauge is that of whoever reported last.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from hps_numba.errors import ClosedError
from hps_numba.frontends.triton.python_backend import backend
from hps_numba.runtime.timer import Timer
from hps_numba.server.hps import HPS
from hps_numba.server.stats import TableStats

__all__ = ["FAMILIES", "MetricsReporter"]

log = logging.getLogger(__name__)
_WHAT = "report"
_Values = Iterator[tuple[Mapping[str, str], float]]
_Key = tuple[str, tuple[tuple[str, str], ...]]  # name of a family, labels


@dataclass(frozen=True)
class _Family:
    name: str
    kind: str  # COUNTER or GAUGE
    help: str
    values: Callable[[TableStats], _Values]


def _counter(name: str, help: str, values: Callable[[TableStats], _Values]) -> _Family:
    return _Family(f"hps_{name}_total", "COUNTER", help, values)


def _one(value: Callable[[TableStats], float]) -> Callable[[TableStats], _Values]:
    def values(table: TableStats) -> _Values:
        yield {}, value(table)

    return values


def _hits(table: TableStats) -> _Values:
    yield {"tier": "host_memory", "device": ""}, table.host_hits
    yield {"tier": "slower_tiers", "device": ""}, table.tier_hits
    for cache in table.caches:
        yield {"tier": "cache", "device": _device(cache.device)}, cache.hits


def _evictions(table: TableStats) -> _Values:
    yield {"tier": "host_memory", "device": ""}, table.evicted
    for cache in table.caches:
        yield {"tier": "cache", "device": _device(cache.device)}, cache.evictions


def _bytes(table: TableStats) -> _Values:
    for part in fields(table.memory):
        yield {"part": part.name}, getattr(table.memory, part.name)


def _update_lag(table: TableStats) -> _Values:
    for updates in table.updates:
        if updates.lag_seconds is not None:
            yield {"source": updates.source}, updates.lag_seconds


def _device(ordinal: int | None) -> str:
    return "cpu" if ordinal is None else str(ordinal)


#: what is reported of each table, with labels ``model`` and ``table``
FAMILIES = (
    _counter("lookups", "Lookups.", _one(lambda table: table.calls)),
    _counter("keys", "Keys that lookups asked for, duplicates included.", _one(lambda table: table.keys)),
    _counter("hit_keys", "Keys that were answered with a stored row, by where it was found.", _hits),
    _counter("absent_keys", "Keys in no tier, answered with the default value.", _one(lambda table: table.absent)),
    _counter(
        "unanswered_keys",
        "Keys answered with the default value because a slower tier was late or failed: they may exist.",
        _one(lambda table: table.unanswered),
    ),
    _counter("evicted_rows", "Rows evicted for others, from caches and from host memory.", _evictions),
    _Family("hps_host_rows", "GAUGE", "Rows in host memory.", _one(lambda table: table.rows)),
    _Family("hps_host_memory_bytes", "GAUGE", "Bytes of host memory in use, by what they are for.", _bytes),
    _Family("hps_update_lag_seconds", "GAUGE", "Age of the newest applied update while others wait, else 0.", _update_lag),
)


class MetricsReporter:
    """Reports to Triton every ``interval`` seconds, from a thread of its own; 0: never.

    Thread safety: ``report`` by one thread at a time, which is that of the timer.
    """

    def __init__(self, server: HPS, interval: float) -> None:
        self._server = server
        self._families: dict[str, Any] = {}
        self._metrics: dict[_Key, Any] = {}
        self._reported: dict[_Key, float] = {}
        self._timer = Timer("metrics")
        self._timer.add(_WHAT, self._report_or_end, delay=interval, interval=interval)

    def _report_or_end(self) -> None:
        try:
            self.report()
        except ClosedError:
            raise
        except Exception as problem:  # such as: Triton runs without metrics
            self._timer.remove(_WHAT)
            log.warning("metrics: Triton does not take them, and gets no more: %s", problem)

    def report(self) -> None:
        """Report what has changed since the last report.

        Raises:
            ClosedError: the server was closed.   What Triton raises, for one if its metrics are switched off.
        """
        for tables in self._server.stats().values():
            for table in tables.values():
                own = {"model": table.model, "table": table.table}
                for family in FAMILIES:
                    for labels, value in family.values(table):
                        self._set(family, {**own, **labels}, value)

    def _set(self, family: _Family, labels: dict[str, str], value: float) -> None:
        key = family.name, tuple(labels.items())
        metric = self._metrics.get(key)
        if metric is None:
            metric = self._metrics[key] = self._family(family).Metric(labels=labels)
        before = self._reported.get(key, 0.0)
        if value == before:
            return
        if family.kind == "GAUGE":
            metric.set(float(value))
        elif value > before:
            metric.increment(float(value - before))
        self._reported[key] = value

    def _family(self, family: _Family) -> Any:
        if family.name not in self._families:
            kind = backend().MetricFamily
            self._families[family.name] = kind(name=family.name, description=family.help, kind=getattr(kind, family.kind))
        return self._families[family.name]

    def close(self) -> None:
        """End the reports."""
        self._timer.close()
