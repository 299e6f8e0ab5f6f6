"""Jobs in the background: dropped rather than waited for, never run twice or late, their threads end with their owner."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator

import pytest
from support.interrupts import interrupted_everywhere
from support.waiting import HANG_SECONDS, wait_until

from hps_numba.runtime.background import BackgroundJobs
from hps_numba.runtime.threads import Ahead


@pytest.fixture
def threads() -> Iterator[Callable[[], int]]:
    """The number of threads for jobs; those of servers of former tests do not count."""
    others = threading.enumerate()

    def number() -> int:
        own = [thread for thread in threading.enumerate() if thread not in others]
        return sum(thread.name.startswith("hps_numba_background") for thread in own)

    assert number() == 0
    yield number


def refuse(*_: object) -> None:
    raise RuntimeError("can't start new thread")


def test_jobs_that_are_too_many_are_dropped(threads: Callable[[], int]) -> None:
    jobs, go_on, ran = BackgroundJobs(), threading.Event(), []
    assert jobs.submit(lambda: go_on.wait(HANG_SECONDS))
    taken = [jobs.submit(lambda: ran.append(1)) for _ in range(2 * jobs.LIMIT)]
    assert taken.count(True) == jobs.LIMIT - 1
    go_on.set()
    wait_until(lambda: not jobs.waiting)
    assert len(ran) == jobs.LIMIT - 1
    jobs.close()
    assert not jobs.submit(lambda: ran.append(1))
    assert threads() == 0


def test_a_job_without_a_thread_never_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, ran, done = BackgroundJobs(), [], threading.Event()
    with monkeypatch.context() as broken:
        broken.setattr(threading.Thread, "start", refuse)
        assert not jobs.submit(lambda: ran.append(1))
    assert jobs.submit(done.set) and done.wait(HANG_SECONDS)
    assert not ran
    jobs.close()


def test_threads_end_with_their_owner(threads: Callable[[], int]) -> None:
    jobs, done = BackgroundJobs(3), threading.Event()
    for _ in range(3):
        assert jobs.submit(done.set)
    assert done.wait(HANG_SECONDS) and threads() == 3
    del jobs
    gc.collect()
    wait_until(lambda: not threads())


def test_no_interrupt_loses_the_way_to_submit_and_close() -> None:
    kept = []

    def use() -> None:
        jobs = BackgroundJobs()
        kept.append(jobs)
        jobs.submit(lambda: None)
        jobs.close()

    for _ in interrupted_everywhere(use, "runtime/background.py"):
        jobs = kept.pop() if kept else BackgroundJobs()
        done = threading.Event()
        if jobs.submit(done.set):
            assert done.wait(HANG_SECONDS)
        jobs.close()
        assert not jobs.submit(done.set)


def test_a_call_ahead_is_made_by_the_caller_if_there_is_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Ahead(threading.get_ident, name="ahead").result() != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        Ahead(lambda: 1 // 0, name="ahead").result()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert Ahead(threading.get_ident, name="ahead").result() == threading.get_ident()
