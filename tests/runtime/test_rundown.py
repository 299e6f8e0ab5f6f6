"""Threads that write to a caller's memory: he is gone only when they are, however many handlers of signals raise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest
from support.processes import environment
from support.waiting import HANG_SECONDS, join_all, wait_until

from hps_numba.runtime.rundown import Rundown
from hps_numba.runtime.threads import Ahead, Pool, run_ranges
from hps_numba.storage import loading
from hps_numba.storage.host.store import HostStore

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)


class Interrupt(Exception):
    """Raised by the handler of a signal, which it names."""


@pytest.fixture
def raising() -> Iterator[None]:
    """Handlers of several signals that raise, where the threads' memory is at stake and not in the test."""
    codes = run_ranges.__code__, loading._fill_in_place.__code__

    def ring(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code in codes:
                raise Interrupt(number)
            frame = frame.f_back

    before = {number: signal.signal(number, ring) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send_all_at_once() -> None:
    """All signals come before the main thread runs the handler of the first."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(HANG_SECONDS)  # the main thread does not run meanwhile
    try:
        for number in SIGNALS:
            os.kill(os.getpid(), number)
    finally:
        sys.setswitchinterval(before)


def interrupted(
    call: Callable[[], object], at_work: threading.Event, proceed: threading.Event, waits: Callable[[], object]
) -> None:
    """Make a call, whose threads wait for ``proceed``, and send all signals once it waits for them; it raises an Interrupt."""

    def send() -> None:
        assert at_work.wait(HANG_SECONDS)
        wait_until(waits)
        send_all_at_once()
        time.sleep(0.05)  # a wait that an interrupt can break has been broken by now
        proceed.set()

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(Interrupt):
        call()
    proceed_was_set = proceed.is_set()
    join_all(sender)
    assert proceed_was_set, "returned while its threads were at work"


def waits_in(code: CodeType) -> Callable[[], bool]:
    """Whether the main thread is in a function, and in none that this one has called."""
    main = threading.get_ident()
    return lambda: sys._current_frames()[main].f_code is code


def waits_in_threading() -> bool:
    """Whether the main thread waits for the end of another one."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return frame.f_code.co_filename == threading.__file__


@pytest.mark.usefixtures("raising")
def test_signals_at_once_do_not_end_the_wait_for_threads() -> None:
    main, at_work, proceed, written = threading.get_ident(), threading.Event(), threading.Event(), np.zeros(2, np.int64)

    def work(start: int, stop: int) -> int:
        if threading.get_ident() == main:
            assert at_work.wait(HANG_SECONDS)
            return 0
        at_work.set()
        proceed.wait()
        written[start] = 1
        return 1

    waits = waits_in(run_ranges.__code__)
    interrupted(lambda: run_ranges(work, [(0, 1), (1, 2)], 2, Pool(2)), at_work, proceed, waits)
    assert written.sum() == 1


def test_no_range_begins_after_an_interrupt() -> None:
    main, at_work, begun = threading.get_ident(), threading.Event(), []

    def work(start: int, stop: int) -> int:
        begun.append(start)
        if threading.get_ident() != main:
            at_work.set()
            wait_until(lambda: raised)
            return 0
        assert at_work.wait(HANG_SECONDS)
        raised.append(1)
        raise Interrupt

    raised: list[int] = []
    with pytest.raises(Interrupt):
        run_ranges(work, [(i, i + 1) for i in range(50)], 2, Pool(2))
    assert len(begun) < 50


class _SlowReader:
    """A model file whose reading waits. It looks at the memory that it writes to."""

    dim, path = 4, "slow"

    def __init__(self, at_work: threading.Event, proceed: threading.Event) -> None:
        self.at_work, self.proceed, self.reading = at_work, proceed, 0

    def read(self, start: int, stop: int, keys: np.ndarray, rows: np.ndarray) -> None:
        self.reading += 1
        self.at_work.set()
        self.proceed.wait()
        keys[:], rows[:] = np.arange(start, stop), 1.0
        self.reading -= 1


@pytest.mark.usefixtures("raising")
def test_signals_at_once_do_not_free_the_memory_that_a_file_is_read_to(monkeypatch: pytest.MonkeyPatch) -> None:
    at_work, proceed = threading.Event(), threading.Event()
    reader, store = _SlowReader(at_work, proceed), HostStore(4)
    at_release: list[int] = []
    new_content = store.new_content

    def watched(rows: int) -> Any:
        content = new_content(rows)
        release = content.release

        def watched_release() -> None:
            at_release.append(reader.reading)
            release()

        monkeypatch.setattr(content, "release", watched_release, raising=False)
        return content

    monkeypatch.setattr(store, "new_content", watched, raising=False)
    fill = partial(loading._fill_in_place, store, reader, 64, key_bits=64, on_rows=None)  # type: ignore[arg-type]
    interrupted(fill, at_work, proceed, waits_in_threading)
    assert set(at_release) <= {0}
    store.close()


_STORM = """
import random, signal, sys, threading, time
import numpy as np
from hps_numba.runtime import threads

theirs, main, raised = [], threading.get_ident(), [0]
code = threads.run_ranges.__code__

def ring(number, frame):
    signal.setitimer(timers[number], random.uniform(1e-6, 2e-4))
    while frame is not None:
        if frame.f_code is code:
            raised[0] += 1
            raise InterruptedError(number)
        frame = frame.f_back

timers = {signal.SIGALRM: signal.ITIMER_REAL, signal.SIGPROF: signal.ITIMER_PROF, signal.SIGVTALRM: signal.ITIMER_VIRTUAL}
for number, timer in timers.items():
    signal.signal(number, ring)
    signal.setitimer(timer, 1e-4)

def work(start, stop):
    if threading.get_ident() != main:
        theirs.append(start)
        time.sleep(random.uniform(0, 1e-3))
        theirs.remove(start)
    return start

pool, ranges, whole, cut = threads.Pool(4), [(i, i + 1) for i in range(6)], 0, 0
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end or not cut:
    try:
        got = threads.run_ranges(work, ranges, 4, pool)
    except InterruptedError:
        cut += 1
    else:
        whole += 1
        assert got == [0, 1, 2, 3, 4, 5], got
    assert not theirs, f"left {theirs} at work after {cut} interrupted calls"
for timer in timers.values():
    signal.setitimer(timer, 0)
print("done", whole, cut, raised[0])
"""


def test_a_storm_of_signals_leaves_no_thread_at_work() -> None:
    """The callers' own ranges may be cut: they run on this thread."""
    seconds = os.environ.get("HPS_NUMBA_STORM_SECONDS", "1")
    ended = subprocess.run(
        [sys.executable, "-c", _STORM, seconds], env=environment(), capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert ended.returncode == 0 and ended.stdout.startswith("done"), ended.stderr


def test_whoever_comes_late_stays_out() -> None:
    rundown, inside, leave, waited = Rundown(), threading.Event(), threading.Event(), threading.Event()

    def visit() -> None:
        assert rundown.enter()
        inside.set()
        leave.wait(HANG_SECONDS)
        rundown.leave()

    def end() -> None:
        rundown.wait()
        waited.set()

    visitor, ending = threading.Thread(target=visit), threading.Thread(target=end)
    visitor.start()
    assert inside.wait(HANG_SECONDS) and rundown.enter()
    rundown.leave()
    ending.start()
    time.sleep(0.01)
    assert not waited.is_set()
    leave.set()
    join_all(visitor, ending)
    late: list[bool] = []
    thread = threading.Thread(target=lambda: late.append(rundown.enter()))
    thread.start()
    join_all(thread)
    assert late == [False]


def test_a_call_that_is_made_ahead_is_not_made_after_the_end() -> None:
    rundown, calls = Rundown(), []
    rundown.wait()
    ahead = Ahead(lambda: calls.append(1), name="ahead", inside=rundown)
    wait_until(lambda: ahead._thread is not None and not ahead._thread.is_alive())
    assert not calls
