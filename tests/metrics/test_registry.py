"""Collectors of a registry, and metrics that are counted in Python."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from support.waiting import join_all

from hps_numba.errors import ConfigError
from hps_numba.metrics import Distribution, Family, HistogramSnapshot, Metric, Number, Registry
from hps_numba.metrics.histogram import edges_between

COUNT = Metric(name="hps_t_total", kind="counter", help="Count.", labels=("a",))
SIZES = Metric(name="hps_t_keys", kind="histogram", help="Sizes.", labels=("a",), unit="keys", edges=edges_between(1, 1024, 1))


def collector(metric: Metric, *samples: Any) -> Any:
    def collect() -> list[Family]:
        return [Family(metric, [*samples])]

    return collect


def test_samples_of_several_collectors_come_as_one_family() -> None:
    registry = Registry()
    registry.add(collector(COUNT, (("1",), 1)))
    remove = registry.add(collector(COUNT, (("2",), 2)))
    assert [family.samples for family in registry.collect()] == [[(("1",), 1), (("2",), 2)]]
    assert [family.samples for family in registry.collect()] == [[(("1",), 1), (("2",), 2)]]  # and asking again adds nothing
    remove()
    remove()
    assert [family.samples for family in registry.collect()] == [[(("1",), 1)]]


def test_two_metrics_of_one_name_are_an_error() -> None:
    registry = Registry()
    registry.add(collector(COUNT))
    registry.add(collector(Metric(name="hps_t_total", kind="counter", help="Another.")))
    with pytest.raises(ConfigError, match="hps_t_total"):
        registry.collect()


def test_a_value_is_found_by_labels() -> None:
    family = Family(COUNT, [(("1",), 5), (("2",), 6)])
    assert family.value(a=2) == 6
    with pytest.raises(LookupError, match="got 0"):
        family.value(a=3)
    with pytest.raises(LookupError, match="got 2"):
        family.value()


def test_no_count_of_any_thread_is_lost() -> None:
    count, sizes = Number(COUNT), Distribution(SIZES)
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for _ in range(2000):
            count.add(1, "x")
            sizes.record(number, "x")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    join_all(*threads)
    assert count.collect().value(a="x") == 16_000
    snapshot = sizes.collect().value(a="x")
    assert isinstance(snapshot, HistogramSnapshot)
    assert (snapshot.count, snapshot.sum) == (16_000, 2000 * sum(range(8)))


def test_a_gauge_is_set() -> None:
    gauge = Number(Metric(name="hps_t", kind="gauge", help="Gauge."))
    assert gauge.collect().samples == []
    gauge.set(4)
    gauge.add(-1)
    assert gauge.collect().samples == [((), 3)]
