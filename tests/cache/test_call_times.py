"""Which calls are timed, and where each is counted."""

from __future__ import annotations

import threading
from itertools import repeat
from typing import Any

import numpy as np
import pytest
from support.cache_bench import DIM, Bench, ints
from support.waiting import join_all

from hps_numba.cache.call_times import SAMPLED, CallTimes
from hps_numba.cache.group import CacheGroup
from hps_numba.metrics.histogram import Histogram

CYCLE, TIMED = 1021, 16  # of so many calls one after the other, so many are timed


def timed(times: CallTimes, calls: int) -> int:
    return sum(times.begin() != 0 for _ in range(calls))


def always(times: CallTimes) -> None:
    times.due = repeat(True)


def test_one_call_in_so_many_is_timed() -> None:
    times = CallTimes()
    assert timed(times, 3 * CYCLE) == 0, "at first none is"
    times.switch(True)
    assert [timed(times, CYCLE) for _ in range(3)] == [TIMED] * 3
    assert pytest.approx(SAMPLED, rel=0.01) == CYCLE / TIMED
    times.switch(False)
    assert timed(times, 3 * CYCLE) == 0


@pytest.mark.parametrize("rhythm", [2, 3, 16, 32, 510])
def test_no_rhythm_of_a_caller_meets_that_of_the_samples(rhythm: int) -> None:
    times = CallTimes()
    times.switch(True)
    taken = [times.begin() != 0 for _ in range(rhythm * CYCLE)]
    assert [sum(taken[first::rhythm]) for first in range(rhythm)] == [TIMED] * rhythm


def test_gaps_differ() -> None:
    times = CallTimes()
    times.switch(True)
    at = np.flatnonzero([times.begin() != 0 for _ in range(CYCLE)])
    assert len(set(np.diff(at))) > 4


def test_the_time_is_that_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1000, 1700, 5000, 5001])
    monkeypatch.setattr("hps_numba.cache.call_times.perf_counter_ns", lambda: next(clock))
    times = CallTimes()
    always(times)
    for _ in range(2):
        times.end(times.begin())
    assert (times.snapshot().count, times.snapshot().sum) == (2, 701)


def test_what_several_share_is_counted_in_turn() -> None:
    several = [CallTimes() for _ in range(3)]
    assert not CallTimes.of_all(several).on
    for one in several:
        one.switch(True)
    times = CallTimes.of_all(several)
    assert times.on
    for _ in range(7):
        times.end(1)
    assert [one.snapshot().count for one in several] == [3, 2, 2]
    assert times.snapshot().count == 7


def test_no_sample_of_threads_is_lost() -> None:
    times = CallTimes([Histogram()])
    times.switch(True)

    def call() -> None:
        for _ in range(20 * CYCLE):
            since = times.begin()
            if since:
                times.end(since)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    join_all(*threads)
    assert times.snapshot().count == 4 * 20 * TIMED


# -- calls of caches ---------------------------------------------------------------------


def calls_of(bench: Bench, what: str) -> Any:
    """A call of one cache, and the cache."""
    keys = ints(range(0, 60, 2))
    store = bench.store(keys)
    cache = bench.cache(store)
    if what == "pool":
        return lambda: cache.pool_arrays(keys[:6], ints([0, 2, 6])), cache
    return lambda: cache.lookup_arrays(keys[: 1 if what == "lookup" else 0]), cache


@pytest.mark.parametrize("what", ["lookup", "pool"])
def test_calls_of_a_cache(bench: Bench, what: str) -> None:
    call, cache = calls_of(bench, what)
    call()
    assert cache.calls.snapshot().count == 0, "at first none is timed"
    cache.calls.switch(True)
    for _ in range(CYCLE):
        call()
    assert cache.calls.snapshot().count == TIMED
    assert cache.calls.snapshot().sum > TIMED * 1000, "no call takes less than a microsecond"


def test_the_first_call_and_prepared_ones_are_timed_alike(bench: Bench) -> None:
    call, cache = calls_of(bench, "lookup")
    always(cache.calls)
    for _ in range(5):
        call()
    assert cache.calls.snapshot().count == 5


def test_a_call_that_fails_is_not_timed(bench: Bench) -> None:
    _, cache = calls_of(bench, "lookup")
    always(cache.calls)
    with pytest.raises(Exception, match="at most"):
        cache.lookup(0, 1 << 40, 0, 0, absent_list=8)
    assert cache.calls.snapshot().count == 0


def test_who_asks_for_the_list_of_absent_keys_times_the_whole(bench: Bench) -> None:
    _, cache = calls_of(bench, "lookup")
    if cache.device is not None:
        pytest.skip("addresses of the host")
    always(cache.calls)
    keys, out, absent = ints([0, 1, 2]), np.empty((3, DIM), np.float32), np.zeros(4, np.int64)
    cache.lookup(keys.ctypes.data, 3, out.ctypes.data, 0, absent_list=absent.ctypes.data)
    assert absent[0] == 1 and cache.calls.snapshot().count == 0


def test_a_call_of_several_caches_counts_for_one_of_them(bench: Bench) -> None:
    keys = ints(range(0, 60, 2))
    caches = [bench.cache(bench.store(keys)) for _ in range(3)]
    for cache in caches:
        cache.calls.switch(True)
    group = CacheGroup(caches)
    bench._opened.append(group)
    for _ in range(3 * CYCLE):
        group.lookup_arrays([keys[:2]] * 3)
    assert [cache.calls.snapshot().count for cache in caches] == [TIMED] * 3
