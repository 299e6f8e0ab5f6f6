"""The timer of background refreshes: what it calls and when, what a failure costs, how it ends."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest
from support.children import in_child
from support.interrupts import interrupted_everywhere
from support.waiting import HANG_SECONDS, join_all, wait_until

from hps_numba.errors import CapacityError, ClosedError, TierError
from hps_numba.runtime.timer import Timer

SOON = 0.02
NEVER = 3600.0


@pytest.fixture
def timer() -> Iterator[Timer]:
    made = Timer("refresh")
    yield made
    made.close()


class Calls:
    """A refresh that notes when it was called."""

    def __init__(self, work: Callable[[], None] = lambda: None) -> None:
        self.times: list[float] = []
        self.active = self.most_active = 0
        self._work = work
        self._changed = threading.Condition()

    def __call__(self) -> None:
        with self._changed:
            self.times.append(time.monotonic())
            self.active += 1
            self.most_active = max(self.most_active, self.active)
            self._changed.notify_all()
        try:
            self._work()
        finally:
            with self._changed:
                self.active -= 1

    def reach(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.times) >= count, HANG_SECONDS)


others: list[threading.Thread] = []


@pytest.fixture(autouse=True)
def threads_of_others() -> None:
    """Those of servers of former tests."""
    others[:] = threading.enumerate()


def threads(name: str = "refresh") -> list[threading.Thread]:
    """Threads of timers of the test."""
    return [thread for thread in threading.enumerate() if thread not in others and thread.name == f"hps_numba_{name}"]


def test_an_interval_of_fractions_of_a_second(timer: Timer) -> None:  # G21
    calls, start = Calls(), time.monotonic()
    timer.add("m", calls, delay=0, interval=0.05)
    calls.reach(4)
    assert calls.times[0] - start >= 0.05  # the first after an interval
    assert calls.times[3] - start >= 0.2


def test_the_delay_precedes_the_first_refresh(timer: Timer) -> None:  # G21
    calls, start = Calls(), time.monotonic()
    timer.add("m", calls, delay=0.15, interval=SOON)
    calls.reach(3)
    assert calls.times[0] - start >= 0.15
    assert calls.times[2] - start >= 0.15 + 2 * SOON  # then by the interval, which is shorter


def test_a_delay_without_an_interval_is_one_refresh(timer: Timer) -> None:  # G21
    calls, other = Calls(), Calls()
    timer.add("once", calls, delay=SOON, interval=0)
    timer.add("often", other, delay=0, interval=SOON)
    other.reach(5)
    assert len(calls.times) == 1


def test_a_timer_without_work_has_no_thread(timer: Timer) -> None:  # G21
    calls = Calls()
    timer.add("m", calls, delay=0, interval=0)
    assert not threads()
    time.sleep(SOON)
    assert not calls.times


def test_a_distant_refresh_does_not_delay_another(timer: Timer) -> None:
    late, soon = Calls(), Calls()
    timer.add("late", late, delay=NEVER, interval=0)
    timer.add("soon", soon, delay=SOON, interval=0)  # the thread sleeps already, for an hour
    soon.reach(1)
    assert not late.times
    assert len(threads()) == 1


def test_a_slow_refresh_is_not_doubled() -> None:  # G19, G21
    timer, go_on = Timer("refresh"), threading.Event()
    calls = Calls(lambda: assert_waits(go_on))
    timer.add("m", calls, delay=0, interval=0.01)
    calls.reach(1)
    time.sleep(0.1)  # ten intervals pass
    assert len(calls.times) == 1
    released = time.monotonic()
    go_on.set()
    calls.reach(12)
    timer.close()
    assert calls.most_active == 1
    # the first comes late, the second may follow at once; those that were missed are not made up for
    assert all(at - released >= 0.01 * number for number, at in enumerate(calls.times[2:]))


def assert_waits(event: threading.Event) -> None:
    assert event.wait(HANG_SECONDS)


def test_a_refresh_that_fails_is_a_warning_and_the_next_one_comes(timer: Timer, caplog: pytest.LogCaptureFixture) -> None:
    problems: Iterator[Exception] = iter(
        [TierError("a tier is out of order"), ValueError("of somebody's own"), ClosedError("gone")]
    )

    def fail() -> None:
        problem = next(problems, None)
        if problem is not None:
            raise problem

    calls = Calls(fail)
    with caplog.at_level(logging.WARNING):
        timer.add("m", calls, delay=0, interval=SOON)
        calls.reach(5)
    assert [r.getMessage() for r in caplog.records] == [
        "m: the refresh failed: a tier is out of order",
        "m: the refresh failed: of somebody's own",
    ]


def test_a_removed_model_is_no_longer_refreshed(timer: Timer) -> None:
    gone, stays = Calls(), Calls()
    timer.add("gone", gone, delay=0, interval=SOON)
    timer.add("stays", stays, delay=0, interval=SOON)
    gone.reach(1)
    timer.remove("gone")
    timer.remove("gone")
    stays.reach(len(stays.times) + 2)  # one may have been at work
    count = len(gone.times)
    stays.reach(len(stays.times) + 3)
    assert len(gone.times) == count


def test_close_lets_the_refresh_at_work_end() -> None:
    timer, go_on = Timer("refresh"), threading.Event()
    calls = Calls(lambda: assert_waits(go_on))
    timer.add("m", calls, delay=SOON, interval=SOON)
    calls.reach(1)
    closing = threading.Thread(target=timer.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    go_on.set()
    join_all(closing)
    assert not closing.is_alive()
    assert not threads()
    assert len(calls.times) == 1
    timer.close()
    timer.add("m", calls, delay=0, interval=SOON)  # too late
    assert not threads()


def test_a_refresh_may_close_the_timer(timer: Timer) -> None:
    calls = Calls(timer.close)
    timer.add("m", calls, delay=SOON, interval=SOON)
    calls.reach(1)
    join_all(*threads())
    assert not threads()
    assert len(calls.times) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_starts_with_nothing_due(timer: Timer) -> None:
    go_on = threading.Event()
    calls = Calls(lambda: assert_waits(go_on))
    timer.add("m", calls, delay=SOON, interval=SOON)
    calls.reach(1)  # a refresh that never ends in a child

    def in_the_child() -> bool:
        own, before = Calls(), len(calls.times)
        timer.add("own", own, delay=0, interval=SOON)
        own.reach(3)
        timer.close()
        return len(calls.times) == before

    assert in_child(in_the_child) == 0
    go_on.set()
    calls.reach(2)


def test_a_timer_that_is_dropped_takes_its_thread_along() -> None:
    class Owner:
        def __init__(self) -> None:
            self.timer = Timer("dropped")
            self.timer.add("m", self.refresh, delay=0, interval=NEVER)

        def refresh(self) -> None: ...

    owner = Owner()
    (thread,) = threads("dropped")
    gone = weakref.ref(owner)
    del owner

    def is_gone() -> bool:
        gc.collect()
        return gone() is None

    wait_until(is_gone)  # the thread may be about to look what is due
    join_all(thread)


def test_without_a_thread_the_error_says_what_to_do(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    calls = Calls()
    with monkeypatch.context() as broken:
        broken.setattr(threading.Thread, "start", refuse)
        with pytest.raises(CapacityError, match=r"^refresh: expected one more thread, got can't start new thread.*ulimit -u"):
            timer.add("m", calls, delay=SOON)
    timer.add("m", calls, delay=SOON)
    calls.reach(1)


def test_no_interrupt_of_add_or_close_hangs_a_timer() -> None:
    def use() -> None:
        timer = Timer("interrupted")
        timer.add("m", use, delay=NEVER)
        timer.remove("m")
        timer.close()

    kept = list(interrupted_everywhere(use, "runtime/timer.py"))
    assert len(kept) > 30
    kept.clear()

    def is_over() -> bool:
        gc.collect()
        return not threads("interrupted")

    wait_until(is_over)
