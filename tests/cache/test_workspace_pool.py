"""Workspaces come back whatever happens to the calls that had them, and waiting for one is fair."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.cache_bench import DIM, Bench, ints
from support.interrupts import interrupted_everywhere
from support.oracles import assert_same_bits, rows_of
from support.waiting import HANG_SECONDS, Span, join_all, wait_until

from hps_numba.cache.backends import CpuBackend
from hps_numba.cache.workspace import StreamMemory
from hps_numba.cache.workspace_pool import WorkspacePool
from hps_numba.errors import ClosedError, ReentryError
from hps_numba.kernels.policies._load import load_policy

FILES = ("cache/workspace_pool.py", "cache/workspace_set.py", "cache/lookup.py", "cache/workspace.py", "cache/group.py")
KEYS = ints(range(20))


class Plain(StreamMemory):
    """Memory that knows who is working with it."""

    def __init__(self) -> None:
        super().__init__(CpuBackend())
        self.limit = 100
        self.working = self.invalidated = self.released = 0

    def reserve(self, n: int, absent: bool, stream: int) -> None:
        self.limit = 100

    def invalidate(self) -> None:
        self.invalidated += 1
        self.limit = 100

    def release(self, stream: int) -> None:
        self.released += 1

    def work(self) -> None:
        self.working += 1
        assert self.working == 1, "two calls have one workspace"
        time.sleep(0)
        self.working -= 1


def in_time(call: Callable[[], Any]) -> Any:
    """What ``call`` returns; fails if it waits for ever."""
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(call()), daemon=True)
    thread.start()
    join_all(thread)
    assert got, "it waits for ever, or failed"
    return got[0]


@pytest.mark.parametrize("buffers", [1, 2])
def test_no_interrupt_of_a_lookup_loses_a_workspace(cpu_bench: Bench, buffers: int) -> None:  # G of the interrupts
    cache = cpu_bench.cache(cpu_bench.store(KEYS), 400, buffers=buffers)
    expected = rows_of(KEYS, DIM)
    cache.lookup_arrays(KEYS)
    out = np.empty_like(expected)
    pool, kept, interrupts = cache.parts.workspaces.pool, [], 0

    def look_up() -> None:
        cache.lookup(KEYS.ctypes.data, len(KEYS), out.ctypes.data, 0)

    for interrupt in interrupted_everywhere(look_up, *FILES):
        kept[:] = [interrupt]  # as in a notebook: the frames of the interrupted call live on
        interrupts += 1
        if interrupts % 8 == 0:  # from this thread and another one
            assert_same_bits(cache.lookup_arrays(KEYS), expected)
            assert_same_bits(in_time(lambda: cache.lookup_arrays(KEYS)), expected)
            assert len(pool.workspaces) <= buffers
    assert interrupts > 50
    in_time(lambda: cache.close() or True)
    assert not pool.workspaces


def test_no_interrupt_of_the_slow_way_loses_a_workspace(cpu_bench: Bench) -> None:
    cache = cpu_bench.cache(cpu_bench.store(KEYS), 400)
    expected, out = rows_of(KEYS, DIM), np.empty((len(KEYS), DIM), np.float32)
    kept, interrupts = [], 0

    def look_up() -> None:
        cache.lookup(KEYS.ctypes.data, len(KEYS), out.ctypes.data, 0, capturing=False)

    for interrupt in interrupted_everywhere(look_up, *FILES):
        kept[:] = [interrupt]
        interrupts += 1
        out[:] = 0
        in_time(lambda: look_up() or True)
        assert_same_bits(out, expected)
    assert interrupts > 200
    in_time(lambda: cache.close() or True)


def test_no_interrupt_of_a_change_of_policy_stops_lookups(cpu_bench: Bench) -> None:
    cache = cpu_bench.cache(cpu_bench.store(KEYS), 400)
    kept, policies = [], [load_policy("lru"), load_policy("fifo")]
    for number, interrupt in enumerate(
        interrupted_everywhere(lambda: cache.set_policy(policies[0]), "cache/workspace_pool.py", step=3)
    ):
        kept[:] = [interrupt]
        policies.reverse()
        if number % 10 == 0:
            assert_same_bits(cache.lookup_arrays(KEYS), rows_of(KEYS, DIM))
    cache.set_policy(policies[0])
    assert_same_bits(cache.lookup_arrays(KEYS), rows_of(KEYS, DIM))


def test_a_second_close_finishes_what_an_interrupted_one_left(cpu_bench: Bench) -> None:
    interrupts = []
    for step in range(1, 500, 17):
        cache = cpu_bench.cache(cpu_bench.store(KEYS), 100)
        cache.lookup_arrays(KEYS)
        for interrupt in interrupted_everywhere(cache.close, "/workspace_pool.py", "/parts.py", "/workspace_set.py", step=step):
            interrupts.append(interrupt)
        cache.close()
        assert not cache.parts.workspaces.pool.workspaces
        with pytest.raises(ClosedError):
            cache.lookup_arrays(KEYS)
    assert len(interrupts) > 30


def pool_of(limit: int) -> tuple[WorkspacePool[Plain], list[Plain]]:
    made: list[Plain] = []

    def make() -> Plain:
        made.append(Plain())
        return made[-1]

    return WorkspacePool(make, limit, "pool"), made


def test_busy_threads_do_not_starve_another(cpu_bench: Bench) -> None:  # G: 20 s and more for 5 keys
    cache = cpu_bench.cache(cpu_bench.store(range(4000)), 8000)
    some, few = ints(range(4000)), ints(range(5))
    stop, turns = threading.Event(), [0, 0]

    def keep_busy(number: int) -> None:
        out = np.empty((len(some), DIM), np.float32)
        while not stop.is_set():
            cache.lookup(some.ctypes.data, len(some), out.ctypes.data, 0)
            turns[number] += 1

    cache.lookup_arrays(some)
    busy = [threading.Thread(target=keep_busy, args=(n,), daemon=True) for n in (0, 1)]
    for thread in busy:
        thread.start()
    wait_until(lambda: min(turns) > 0)
    waits, out = [], np.empty((len(few), DIM), np.float32)
    for _ in range(41):
        before = sum(turns)
        cache.lookup(few.ctypes.data, len(few), out.ctypes.data, 0)
        waits.append(sum(turns) - before)
    stop.set()
    join_all(*busy)
    assert_same_bits(out, rows_of(few, DIM))
    assert sorted(waits)[20] <= 6  # the one at work, the one before in the queue, and some luck


def test_those_who_wait_are_served_in_turn() -> None:
    pool, _ = pool_of(1)
    order, holding, free = [], threading.Event(), threading.Event()

    def hold(workspace: Plain) -> None:
        holding.set()
        assert free.wait(HANG_SECONDS)

    threads = [threading.Thread(target=pool.lend, args=(0, hold), daemon=True)]
    threads[0].start()
    assert holding.wait(HANG_SECONDS)
    for number in range(5):
        threads.append(threading.Thread(target=pool.lend, args=(0, lambda _, number=number: order.append(number)), daemon=True))
        threads[-1].start()
        wait_until(lambda number=number: len(pool._waiting) == number + 1)
    free.set()
    join_all(*threads)
    assert order == [0, 1, 2, 3, 4]


def test_a_lookup_inside_an_interrupted_lookup_of_its_thread_is_answered() -> None:
    """As in a signal handler: the outer call goes on only when the inner one has returned."""
    pool, made = pool_of(1)
    inner: list[Plain] = []

    def work(workspace: Plain) -> None:
        pool.lend(0, inner.append)
        assert not pool.reuse(0, 1, lambda _: True)

    pool.lend(0, work)
    assert inner[0] is not made[0] and inner[0].released == 1
    assert pool.workspaces == [made[0]]


def test_a_close_inside_a_lookup_of_its_thread_is_refused() -> None:
    pool, made = pool_of(1)
    with pytest.raises(ReentryError, match="pool: change or close inside a lookup of the same thread"):
        pool.lend(0, lambda workspace: pool.close(0))
    pool.close(0)
    assert made[0].released == 1
    with pytest.raises(ClosedError, match="pool: the cache is closed"):
        pool.lend(0, print)


@pytest.mark.parametrize("nested", [False, True])
def test_a_lookup_that_makes_a_workspace_while_the_pool_is_closed_does_not_get_it(nested: bool) -> None:
    """Otherwise it would work with memory of a cache that has been freed."""
    pool, made = pool_of(1)
    make, closing = pool.make, threading.Thread(target=pool.close, args=(0,), daemon=True)
    late: list[Plain] = []

    def make_while_closing() -> Plain:
        closing.start()
        wait_until(lambda: (pool._closed and pool._emptying is not None) or not closing.is_alive())
        return make()

    def look_up(_: Plain | None = None) -> None:
        pool.make = make_while_closing
        with pytest.raises(ClosedError, match="pool: the cache is closed"):
            pool.lend(0, late.append)

    if nested:
        pool.lend(0, look_up)
    else:
        look_up()
    join_all(closing)
    assert not late and not pool.workspaces
    assert [workspace.released for workspace in made[:-1]] == [1] * nested and made[-1].released == 0


def test_a_nested_lookup_is_waited_for_by_a_close() -> None:
    pool, _ = pool_of(1)
    closing = threading.Thread(target=pool.close, args=(0,), daemon=True)
    seen: list[bool] = []

    def inner(workspace: Plain) -> None:
        closing.start()
        wait_until(lambda: pool._closed)
        seen.append(workspace.released == 0 and closing.is_alive())

    pool.lend(0, lambda _: pool.lend(0, inner))
    join_all(closing)
    assert seen == [True] and not pool.workspaces


def test_many_threads_interrupts_and_changes_share_few_workspaces() -> None:
    """No workspace is ever with two calls, and none is lost, while some calls are cut off without giving back."""
    pool, made = pool_of(3)
    problems, turns = [], [0] * 8
    span = Span(2, lambda: min(turns) > 0)

    def call(number: int) -> None:
        rng = np.random.default_rng(number)

        def start(workspace: Plain) -> bool:
            workspace.work()
            return True

        try:
            while span.goes_on():
                if rng.random() < 0.05:
                    calls = interrupted_everywhere(
                        lambda: pool.lend(number % 3, start), "workspace_pool.py", step=int(rng.integers(20, 400))
                    )
                    next(calls, None)
                    next(calls, None)
                    calls.close()
                    for workspace in made:
                        del workspace
                elif not pool.reuse(number % 3, 1, start):
                    pool.lend(number % 3, start)
                turns[number] += 1
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=call, args=(n,), daemon=True) for n in range(8)]
    for thread in threads:
        thread.start()
    join_all(*threads)
    assert not problems and min(turns) > 0
    in_time(lambda: pool.close(0) or True)
    assert not pool.workspaces
