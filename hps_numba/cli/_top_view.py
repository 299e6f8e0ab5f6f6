"""What ``hps-numba top`` shows: numbers from two looks, by section, and the tables that they are printed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hps_numba.cli._output import human_rate, human_seconds
from hps_numba.cli._top_samples import Change

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["USED_METRICS", "look", "view"]

_OF_TABLE = ("model", "table")
Row = dict[str, Any]
Read = Callable[[Change, Mapping[str, str]], float | None]
Show = Callable[[Any], str]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _rate(number: float | None) -> str:
    return "-" if number is None else human_rate(number, "").strip()


def _count(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else human_seconds(seconds) if seconds else "0 s"


def _bytes(number: float | None) -> str:
    from hps_numba.device.host_memory import human_bytes

    return "-" if number is None else human_bytes(int(number))


@dataclass(frozen=True)
class _Field:
    """One number of a row: its name in JSON, the heading of its column (empty: in JSON only), how it is read and shown."""

    name: str
    heading: str
    read: Read
    show: Show
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class _Section:
    """Rows of one kind: a row for each combination of some labels that the metrics have."""

    name: str
    labels: tuple[str, ...]
    fields: tuple[_Field, ...]
    found_by: tuple[str, ...]

    def rows(self, change: Change, model: str | None) -> list[Row]:
        """One a combination of labels, in their order."""
        rows = []
        for values in change.after.combinations(self.found_by, self.labels):
            labels = dict(zip(self.labels, values, strict=True))
            if model is None or labels.get("model", model) == model:
                rows.append({**labels, **{field.name: field.read(change, labels) for field in self.fields}})
        return rows


def _rates(name: str, heading: str, metric: str, **fixed: str) -> _Field:
    return _Field(name, heading, lambda change, labels: change.rate(metric, **labels, **fixed), _rate, (metric,))


def _share(name: str, heading: str, part: str, whole: str, **fixed: str) -> _Field:
    def read(change: Change, labels: Mapping[str, str]) -> float | None:
        some, every = change.total(part, **labels, **fixed), change.total(whole, **labels)
        return None if some is None or not every else some / every

    return _Field(name, heading, read, _percent, (part, whole))


def _quantile(name: str, heading: str, share: float, *metrics: str) -> _Field:
    """Of the first of the histograms that counted anything."""

    def read(change: Change, labels: Mapping[str, str]) -> float | None:
        found = (change.quantile(share, metric, **labels) for metric in metrics)
        return next((seconds for seconds in found if seconds is not None), None)

    return _Field(name, heading, read, _seconds, metrics)


def _gauge(name: str, heading: str, metric: str, show: Show, *, largest: bool = False) -> _Field:
    def read(change: Change, labels: Mapping[str, str]) -> float | None:
        return change.max(metric, **labels) if largest else change.sum(metric, **labels)

    return _Field(name, heading, read, show, (metric,))


def _errors(name: str, heading: str, first: str) -> _Field:
    """Answers a second whose status begins with a digit."""
    metric = "hps_requests_total"

    def read(change: Change, labels: Mapping[str, str]) -> float | None:
        statuses = {sample.labels.get("status", "") for sample in change.after.of(metric, **labels)}
        return sum(change.rate(metric, **labels, status=status) or 0.0 for status in statuses if status.startswith(first))

    return _Field(name, heading, read, _rate, (metric,))


_LOOKUPS, _KEYS, _HITS = "hps_lookups_total", "hps_keys_total", "hps_hit_keys_total"
_WHOLE, _CALLS = ("hps_cache_lookup_seconds", "hps_host_lookup_seconds"), "hps_cache_call_seconds"
_SECTIONS = (
    _Section(
        "lookups",
        _OF_TABLE,
        (
            _rates("lookups_per_second", "lookups/s", _LOOKUPS),
            _rates("keys_per_second", "keys/s", _KEYS),
            _share("cache_hit_rate", "cache", _HITS, _KEYS, tier="cache"),
            _share("host_memory_hit_rate", "host", _HITS, _KEYS, tier="host_memory"),
            _share("slower_tiers_hit_rate", "slower", _HITS, _KEYS, tier="slower_tiers"),
            _share("default_rate", "default", "hps_absent_keys_total", _KEYS),
            _share("unanswered_rate", "unansw.", "hps_unanswered_keys_total", _KEYS),
            _quantile("p50_seconds", "p50", 0.5, *_WHOLE),
            _quantile("p99_seconds", "p99", 0.99, *_WHOLE),
            _quantile("call_p50_seconds", "", 0.5, _CALLS),
            _quantile("call_p99_seconds", "call p99", 0.99, _CALLS),
        ),
        (_LOOKUPS, _KEYS),
    ),
    _Section(
        "rows",
        _OF_TABLE,
        (
            _rates("inserted_rows_per_second", "insert/s", "hps_inserted_rows_total"),
            _rates("evicted_rows_per_second", "evict/s", "hps_evicted_rows_total"),
            _gauge("host_rows", "host rows", "hps_host_rows", _count),
            _gauge("host_bytes", "host bytes", "hps_host_memory_bytes", _bytes),
            _gauge("cache_capacity_rows", "cache rows", "hps_cache_capacity_rows", _count),
            _gauge("cache_bytes", "cache bytes", "hps_cache_memory_bytes", _bytes),
            _gauge("refresh_age_seconds", "refreshed", "hps_refresh_age_seconds", _seconds, largest=True),
        ),
        ("hps_host_rows", "hps_host_memory_bytes", "hps_cache_capacity_rows"),
    ),
    _Section(
        "tiers",
        (*_OF_TABLE, "tier"),
        (
            _rates("keys_per_second", "keys/s", "hps_tier_fetched_keys_total"),
            _share("found_rate", "found", "hps_tier_found_keys_total", "hps_tier_fetched_keys_total"),
            _rates("errors_per_second", "errors/s", "hps_tier_fetch_errors_total"),
            _quantile("p50_seconds", "p50", 0.5, "hps_tier_fetch_seconds"),
            _quantile("p99_seconds", "p99", 0.99, "hps_tier_fetch_seconds"),
        ),
        ("hps_tier_fetched_keys_total",),
    ),
    _Section(
        "models",
        ("model",),
        (
            _gauge("version", "version", "hps_model_version", _count, largest=True),
            _gauge("version_age_seconds", "since", "hps_model_version_age_seconds", _seconds, largest=True),
            _gauge("background_jobs", "jobs", "hps_background_jobs", _count),
            _rates("dropped_jobs_per_second", "dropped/s", "hps_background_dropped_jobs_total"),
            _gauge("prefetch_waiting_keys", "prefetch keys", "hps_prefetch_waiting_keys", _count),
        ),
        ("hps_model_version",),
    ),
    _Section(
        "updates",
        ("source", *_OF_TABLE),
        (
            _rates("rows_per_second", "rows/s", "hps_update_rows_total"),
            _rates("erased_rows_per_second", "erased/s", "hps_update_erased_rows_total"),
            _gauge("lag_messages", "lag", "hps_update_lag_messages", _count),
            _gauge("freshness_seconds", "freshness", "hps_update_freshness_seconds", _seconds, largest=True),
            _gauge("age_seconds", "age", "hps_update_age_seconds", _seconds, largest=True),
            _rates("retries_per_second", "retries/s", "hps_update_retries_total"),
        ),
        ("hps_update_rows_total",),
    ),
    _Section(
        "sources",
        ("source",),
        (
            _gauge("running", "running", "hps_update_source_running", lambda running: "yes" if running else "no"),
            _gauge("lag_messages", "lag", "hps_update_source_lag_messages", _count),
            _gauge("backlog_messages", "backlog", "hps_update_backlog_messages", _count),
            _gauge("backlog_bytes", "bytes", "hps_update_backlog_bytes", _bytes),
            _rates("skipped_per_second", "skipped/s", "hps_update_skipped_messages_total"),
            _rates("lost_per_second", "lost/s", "hps_update_lost_messages_total"),
        ),
        ("hps_update_source_running",),
    ),
    _Section(
        "requests",
        ("frontend", "protocol", "model"),
        (
            _rates("requests_per_second", "requests/s", "hps_requests_total"),
            _errors("refused_per_second", "4xx/s", "4"),
            _errors("failed_per_second", "5xx/s", "5"),
            _quantile("p50_seconds", "p50", 0.5, "hps_request_seconds"),
            _quantile("p99_seconds", "p99", 0.99, "hps_request_seconds"),
        ),
        ("hps_requests_total",),
    ),
    _Section(
        "frontends",
        ("frontend", "protocol"),
        (
            _gauge("in_flight", "in flight", "hps_requests_in_flight", _count),
            _gauge("queued", "queued", "hps_queued_requests", _count),
        ),
        ("hps_requests_in_flight",),
    ),
)

USED_METRICS = frozenset(metric for section in _SECTIONS for field in section.fields for metric in field.metrics)
"""Names of the metrics that are shown."""


def look(change: Change, model: str | None = None) -> dict[str, Any]:
    """Numbers by section, each a list of rows, for JSON; of one model, or of all for None."""
    return {"seconds": change.seconds, **{section.name: section.rows(change, model) for section in _SECTIONS}}


def view(found: Mapping[str, Any]) -> RenderableType:
    """The tables of what ``look`` found, without sections that have no rows; or the ``problem`` that there is instead."""
    from rich.console import Group
    from rich.text import Text

    if "problem" in found:
        return Text(found["problem"])
    shown: list[RenderableType] = []
    for section in _SECTIONS:
        if found[section.name]:
            shown += [*([Text()] if shown else []), _table(section, found[section.name])]
    return Group(*shown) if shown else Text("no model, table, source or front end has metrics")


def _table(section: _Section, rows: Sequence[Row]) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(Text(section.name), overflow="fold")
    fields = [field for field in section.fields if field.heading]
    for field in fields:
        table.add_column(Text(field.heading), justify="right", overflow="fold")
    for row in rows:
        names = "/".join(row[label] for label in section.labels if row[label])
        table.add_row(Text(names or "-"), *(Text(field.show(row[field.name])) for field in fields))
    return table
