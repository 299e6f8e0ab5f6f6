"""Figures of online updates on one bus: all rates in turn beside lookups, the table, and whether goals are met."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from redis_process import redis_server
from report import print_table, verdict
from update_load import Calls, Spec, calm, loaded, warm_up

import hps_numba

__all__ = ["BUSES", "RATES", "Figures", "is_missing", "measure", "opened_bus", "show"]

BUSES = ("in_process", "files", "redis_streams")
RATES = (10_000, 100_000, 1_000_000)
#: U-A, in seconds at the highest rate; U-B
FRESHNESS = {"p50": 0.1, "p99": 1.0}
RATE_KEPT, P99_GROWTH = 0.9, 1.3
_HEAD = ("rows/s", "reached", "fresh p50 ms", "p99", "max", "lookups/s", "without", "kept", "p50 us", "p99 us", "growth")
RATE_REACHED = 0.95
#: keys of the source: at a million rows a second, as many as come in an interval are one batch
TUNED = {"max_batch_size": 65_536}
_WARMUP = 0.2  # seconds
#: that a producer keeps: enough for some seconds
_KEPT = {"in_process": {}, "files": {"max_files": 2000, "sync": False}, "redis_streams": {"max_messages": 4000}}

Figures = list[dict[str, Any]]
Section = dict[str, Any]


def is_missing(bus: str) -> str:
    """Why a bus cannot be measured here; empty if it can."""
    return "needs redis-server" if bus == "redis_streams" and shutil.which("redis-server") is None else ""


@contextmanager
def opened_bus(bus: str, place: str | None) -> Iterator[tuple[Section, Section]]:
    """An empty bus: the section of its source and that of its producer; files are in the folder ``place``."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hps_bus_", dir=place)))
        section: Section = {"type": bus}
        if bus == "files":
            section["folder"] = str(folder / "bus")
        elif bus == "redis_streams":
            section["address"] = stack.enter_context(redis_server(folder))
        yield {**section, "poll_timeout_ms": 50, "start": "oldest", **TUNED}, {**section, **_KEPT[bus]}


def measure(server: hps_numba.HPS, calls: Calls, producer: Section, spec: Spec, rates: Sequence[int]) -> Figures:
    """Of all rates; the first entry is without updates."""
    start = warm_up(calls, producer, replace(spec, rate=rates[0], seconds=_WARMUP))
    start = warm_up(calls, producer, replace(spec, rate=rates[-1], seconds=_WARMUP), start)  # batches of another size
    figures: Figures = [{"rate": 0, **calm(calls, spec)}]
    for rate in rates:
        found = loaded(calls, producer, replace(spec, rate=rate), start)
        start += found["ticks"]
        figures.append({"rate": rate, **found})
    (stats,) = server.update_stats()
    if stats.lost or stats.skipped or stats.failed_reads or stats.retries:
        raise AssertionError(f"expected every update to be applied at once, got {stats}")
    return figures


def show(title: str, figures: Figures) -> None:
    """Print a table, and whether the goals are met at the highest rate."""
    print_table(title, _HEAD, [_cells(one) for one in figures])
    last = figures[-1]
    fresh = [f"{name} {verdict(last[f'freshness_{name}'], at_most=limit)}" for name, limit in FRESHNESS.items()]
    kept, growth = verdict(last["kept"], at_least=RATE_KEPT), verdict(last["growth"], at_most=P99_GROWTH)
    reached = verdict(last["rows_per_second"] / last["rate"], at_least=RATE_REACHED)
    print(
        f"at {last['rate']:,} rows/s: rate of the producer {reached}; U-A {', '.join(fresh)}; U-B rate {kept}, p99 {growth}\n",
        flush=True,
    )


def _cells(one: dict[str, Any]) -> tuple[str, ...]:
    lookups = f"{one['lookups_per_second']:,.0f}"
    micros = f"{1e6 * one['p50']:.0f}", f"{1e6 * one['p99']:.0f}"
    if not one["rate"]:
        return "none", "", "", "", "", "", lookups, "", *micros, ""
    fresh = [f"{1e3 * one[f'freshness_{name}']:.1f}" for name in ("p50", "p99", "max")]
    reached = f"{one['rows_per_second']:,.0f}"
    without = f"{one['calm']['lookups_per_second']:,.0f}"
    return f"{one['rate']:,}", reached, *fresh, lookups, without, f"{one['kept']:.2f}", *micros, f"{one['growth']:.2f}"
