"""Histograms as kernels write them: equal to those of Python, exact with many threads; and which lookups are timed."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from support.waiting import join_all

from hps_numba.kernels.host.histogram import SAMPLED, begin_timed, end_timed, record, record_fetch
from hps_numba.kernels.layouts import histogram as layout
from hps_numba.kernels.layouts.host_store import COUNTER_BYTES, COUNTER_CALLS, COUNTER_LATENCY
from hps_numba.metrics import histogram as python
from hps_numba.metrics.histogram import Histogram


def test_the_layout_is_that_of_python() -> None:
    assert (layout.BUCKETS, layout.SUM) == (python.BUCKETS, 8 * python.SUM)


def test_kernels_count_as_python_does() -> None:
    powers = np.array([1 << i for i in range(54)])
    random = np.random.default_rng(0).integers(0, 1 << np.arange(1, 50).repeat(40))
    values = np.concatenate([[-5, 0, 1, 2, 3, 4, 5, 6], powers, powers - 1, powers + 1, powers + (powers >> 2), random])
    by_kernel, by_python = Histogram(), Histogram()
    for value in values.tolist():
        record(by_kernel.address, value)
        by_python.record(value)
    assert (by_kernel.words == by_python.words).all()


def test_no_value_of_any_thread_is_lost() -> None:
    histogram = Histogram()
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        for _ in range(5000):
            record(histogram.address, 3)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    join_all(*threads)
    assert (histogram.snapshot().count, histogram.snapshot().sum) == (20_000, 60_000)


def test_a_fetch_is_counted_in_one_step() -> None:
    words = np.zeros(3 + python.WORDS, np.int64)
    record_fetch(words.ctypes.data, 10, 7, True, 1000)
    record_fetch(words.ctypes.data, 5, 5, False, 2000)
    assert words[:3].tolist() == [15, 12, 1]
    assert python.HistogramSnapshot.of_words(words[3:]).sum == 3000


def counters_of(histogram: Histogram | None) -> np.ndarray:
    counters = np.zeros(COUNTER_BYTES // 8, np.int64)
    counters[COUNTER_LATENCY // 8] = 0 if histogram is None else histogram.address
    return counters


@pytest.mark.parametrize("period", [1, 2, 3, 8, 16, 26, 64, 100])
def test_one_lookup_in_so_many_is_timed_in_any_rhythm(period: int) -> None:
    """Of the lookups with one place in a rhythm, such as every second one, as large a share is timed as of all."""
    counters = counters_of(Histogram())
    timed = np.zeros(200 * SAMPLED * period // 8, bool)
    for number in range(len(timed)):
        counters[COUNTER_CALLS // 8] = number
        timed[number] = begin_timed(counters.ctypes.data) != 0
    for place in range(0, period, max(1, period // 4)):
        assert timed[place::period].mean() == pytest.approx(1 / SAMPLED, rel=0.25)


def test_the_time_of_a_lookup_is_recorded() -> None:
    histogram = Histogram()
    counters = counters_of(histogram)
    since = begin_timed(counters.ctypes.data)
    assert since > 0
    end_timed(counters.ctypes.data, since)
    end_timed(counters.ctypes.data, since - 1_000_000)
    snapshot = histogram.snapshot()
    assert snapshot.count == 2
    assert snapshot.sum > 1_000_000


def test_nothing_is_timed_without_counters_or_a_histogram() -> None:
    assert begin_timed(0) == 0
    assert begin_timed(counters_of(None).ctypes.data) == 0
