"""Work that no interrupt splits: done whole or not at all, its result and its errors handed over, never a hang."""

from __future__ import annotations

import _thread
import contextvars
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from support.interrupts import interrupted_everywhere
from support.waiting import HANG_SECONDS, join_all, wait_until

from hps_numba.errors import ReentryError
from hps_numba.runtime import shielded as module
from hps_numba.runtime.shielded import Ask, shielded

OWNER = object()


def run(work: Any) -> Any:
    return shielded(work, owner=OWNER, place="here")


def test_the_main_thread_gets_results_and_errors_of_another_thread() -> None:
    place = contextvars.ContextVar("place", default="lost")
    place.set("kept")
    assert run(lambda ask: (threading.current_thread() is threading.main_thread(), place.get())) == (False, "kept")
    assert run(lambda ask: ask(threading.current_thread)) is threading.main_thread()
    with pytest.raises(ZeroDivisionError):
        run(lambda ask: 1 // 0)
    with pytest.raises(KeyError, match="asked"):
        run(lambda ask: ask(lambda: {}["asked"]))


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_of_the_start_is_raised_when_the_work_is_done_once(monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    start, calls, done = module._workers.start, [0], [0]

    def interrupted(job: Any) -> None:
        calls[0] += 1
        if after or calls[0] > 1:
            start(job)
        if calls[0] == 1:
            raise KeyboardInterrupt

    def work(ask: Ask) -> None:
        ask(lambda: None)
        done[0] += 1

    monkeypatch.setattr(module._workers, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(work)
    assert done == [1] and calls == [2]


def test_other_threads_work_for_themselves() -> None:
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(run(lambda ask: (threading.get_ident(), ask(lambda: 5)))))
    thread.start()
    join_all(thread)
    assert got == [(thread.ident, 5)]


def test_work_is_done_whole_or_not_at_all_whatever_interrupts_the_caller() -> None:
    calls: list[list[int]] = []

    def call() -> None:
        steps: list[int] = []
        calls.append(steps)

        def work(ask: Ask) -> None:
            asked = ask(lambda: 7)
            steps.append(1)
            steps.append(asked)

        run(work)

    for interrupt in interrupted_everywhere(call, "runtime/shielded.py"):
        assert isinstance(interrupt, KeyboardInterrupt)
        run(lambda ask: None)  # nothing hangs
    # one may go on where the interrupt hit before the wait began
    wait_until(lambda: all(steps in ([], [1, 7]) for steps in calls))
    assert calls.count([]) > 20 and calls.count([1, 7]) > 20


@pytest.fixture
def two_interrupts() -> Iterator[None]:
    """Of the interrupts of a test, the first two are raised, and none that is still on its way when the test goes on."""
    left = [1, 2]

    def ring(*_: Any) -> None:
        if left:
            left.pop()
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, ring)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("two_interrupts")
def test_a_second_interrupt_lets_the_caller_go_and_the_work_goes_on() -> None:
    begun, finish, done = threading.Event(), threading.Event(), threading.Event()

    def work(ask: Ask) -> None:
        begun.set()
        assert finish.wait(HANG_SECONDS)
        done.set()

    def interrupt_twice() -> None:
        assert begun.wait(HANG_SECONDS)
        while not left.wait(0.05):
            _thread.interrupt_main()

    left = threading.Event()
    thread = threading.Thread(target=interrupt_twice)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run(work)
    finally:
        left.set()
    join_all(thread)
    assert not done.is_set()
    finish.set()
    assert done.wait(HANG_SECONDS)


def test_work_inside_work_of_the_same_owner_is_refused() -> None:
    with pytest.raises(ReentryError, match="here: expected a call from outside"):
        run(lambda ask: ask(lambda: run(lambda ask: None)))
    assert run(lambda ask: ask(lambda: shielded(lambda ask: 3, owner=[], place="there"))) == 3


def test_without_a_thread_the_caller_works_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(module._workers, "_idle", [])
    monkeypatch.setattr(module._thread, "start_new_thread", refuse)
    assert run(lambda ask: (ask(lambda: 1), threading.current_thread() is threading.main_thread())) == (1, True)
