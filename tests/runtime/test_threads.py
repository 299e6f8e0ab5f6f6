"""Threads: the pool that large batches are cut over, lookups without the GIL, and the end of a server beside them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.factories import Workshop
from support.oracles import assert_same_bits, rows_of
from support.processes import environment
from support.waiting import HANG_SECONDS, join_all, wait_until

import hps_numba
from hps_numba.errors import ClosedError, UnknownModelError
from hps_numba.runtime import threads
from hps_numba.runtime.threads import SPLIT_BYTES, in_one_range, ranges_of, run_ranges
from hps_numba.storage.host import reading
from hps_numba.storage.host import store as host_store
from hps_numba.storage.host.store import HostStore

# --- the pool ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**7), st.integers(1, 4096), st.integers(1, 64))
def test_ranges_cover_every_item_once(n: int, item_bytes: int, cores: int) -> None:
    ranges = ranges_of(n, item_bytes, cores)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == n
    assert all(stop == start for (_, stop), (start, _) in pairwise(ranges))
    assert len(ranges) <= 4 * cores
    if n * item_bytes < SPLIT_BYTES or cores == 1:
        assert ranges == [(0, n)]


def test_work_in_the_background_of_lookups_is_one_range() -> None:
    many = 10 * SPLIT_BYTES
    with in_one_range():
        assert ranges_of(many, 1) == [(0, many)]
        assert len(ranges_of(many, 1, 4)) > 1  # who asks for threads gets them
        elsewhere: list[int] = []
        thread = threading.Thread(target=lambda: elsewhere.append(len(ranges_of(many, 1))))
        thread.start()
        join_all(thread)
    assert elsewhere == [len(ranges_of(many, 1))]


def test_results_come_in_order() -> None:
    ranges = [(i, i + 1) for i in range(50)]
    assert run_ranges(lambda start, stop: 10 * start + stop, ranges, 4) == [11 * i + 1 for i in range(50)]


def test_ranges_run_on_several_threads() -> None:
    meeting = threading.Barrier(2, timeout=HANG_SECONDS)

    def meet(start: int, stop: int) -> int:
        meeting.wait()
        return threading.get_ident()

    assert len(set(run_ranges(meet, [(0, 1), (1, 2)], 2))) == 2


def test_one_range_stays_on_the_callers_thread() -> None:
    assert run_ranges(lambda start, stop: threading.get_ident(), [(0, 5)], 8) == [threading.get_ident()]


@pytest.mark.parametrize("failing", [0, 1, 7])
def test_a_failure_is_raised_after_all_ranges_have_ended(failing: int) -> None:
    ended = []

    def work(start: int, stop: int) -> int:
        if start == failing:
            raise ValueError("range failed")
        time.sleep(0.001)
        ended.append(start)
        return 0

    with pytest.raises(ValueError, match="range failed"):
        run_ranges(work, [(i, i + 1) for i in range(8)], 3)
    count = len(ended)
    time.sleep(0.02)
    assert len(ended) == count


def test_a_busy_pool_does_not_hold_up_the_caller() -> None:
    release = threading.Event()
    started = threading.Event()

    def block(start: int, stop: int) -> int:
        started.set()
        return int(release.wait(HANG_SECONDS))

    blockers = [
        threading.Thread(target=run_ranges, args=(block, [(0, 1), (1, 2)], 64)) for _ in range(4 * threads._pool.threads)
    ]
    for blocker in blockers:
        blocker.start()
    assert started.wait(HANG_SECONDS)
    try:
        assert run_ranges(lambda start, stop: start, [(i, i + 1) for i in range(9)], 4) == list(range(9))
        nested = run_ranges(lambda start, stop: sum(run_ranges(lambda a, b: a, [(0, 1), (1, 2)], 4)), [(0, 1), (1, 2)], 4)
        assert nested == [1, 1]
    finally:
        release.set()
        join_all(*blockers)


_FORK = """
import os, sys
import numpy as np
import hps_numba
from hps_numba.runtime import threads

with hps_numba.HPS(sys.argv[1]) as server:
    threads._pool.threads = 4                         # also on a machine with one core
    keys = np.arange(40_000) % 9
    expected = server.lookup(keys, "m", 0)
    assert threads._pool.started
    child = os.fork()
    if child == 0:
        threads._pool.threads = 4
        ok = not threads._pool.started and np.array_equal(server.lookup(keys, "m", 0), expected)
        server.insert([100], expected[:1], "m", 0)
        ok = ok and threads._pool.started > 0 and np.array_equal(server.lookup([100], "m", 0), expected[:1])
        server.close()
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "child failed"
    assert np.array_equal(server.lookup(keys, "m", 0), expected)
    assert not server.contains([100], "m", 0)[0]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_makes_its_own_pool_and_serves(workshop: Workshop) -> None:
    workshop.open_file(workshop.model((range(9), 16)))
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _FORK, str(workshop.folder / "ps.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr


# --- lookups without the GIL ------------------------------------------------------------------------------------------


@pytest.fixture
def no_forced_switches() -> Iterator[None]:
    """A thread gets the GIL only where another gives it up by itself."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)


def steps_of_another_thread(work: Callable[[], Any]) -> int:
    """How far another Python thread gets while ``work`` runs."""
    steps = 0
    stop, started = threading.Event(), threading.Event()

    def other() -> None:
        nonlocal steps
        while not stop.is_set():
            steps += 1
            started.set()
            time.sleep(0.0005)

    thread = threading.Thread(target=other)
    thread.start()
    started.wait()
    before = steps
    work()
    after = steps
    stop.set()
    thread.join()
    return after - before


@pytest.fixture
def long_lookup(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A lookup of about 100 ms by one kernel on the calling thread."""
    server = workshop.open(workshop.model((range(9), 128)))
    keys = np.arange(400_000) % 9
    out = np.empty((len(keys), 128), np.float32)
    server.lookup(keys, "m", 0, out=out)  # compiled, and all pages of out touched
    monkeypatch.setattr(threads._pool, "threads", 1)
    return lambda: server.lookup(keys, "m", 0, out=out)


def test_a_lookup_lets_other_threads_run(long_lookup: Callable[[], Any], no_forced_switches: None) -> None:  # N04
    assert any(steps_of_another_thread(long_lookup) >= 3 for _ in range(100))  # on a busy machine not in each


@pytest.mark.skipif(os.name == "nt", reason="the control sleeps by libc")
def test_the_test_before_would_notice_a_held_gil(no_forced_switches: None) -> None:  # N04
    with_gil = ctypes.PyDLL(None)
    assert steps_of_another_thread(lambda: with_gil.usleep(50_000)) == 0


def test_many_threads_look_up_and_write_at_once(workshop: Workshop) -> None:  # N04
    server = workshop.open(workshop.model((range(500), 8), (range(500), 5)))
    wrong: list[Any] = []
    errors: list[BaseException] = []

    def look_up(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(60):
                keys = rng.integers(0, 500, rng.integers(1, 300))
                for table, dim in ((0, 8), (1, 5)):
                    rows = server.lookup(keys, "m", table)
                    if not np.array_equal(rows, rows_of(keys, dim)):
                        wrong.append((table, keys, rows))
        except BaseException as problem:
            errors.append(problem)

    def write() -> None:
        for step in range(30):
            keys = np.arange(1000 + 50 * step, 1050 + 50 * step)
            server.insert(keys, rows_of(keys, 8), "m", 0)
            server.update(np.arange(100), rows_of(np.arange(100), 5), "m", 1)
            server.erase(keys[::2], "m", 0)

    readers = [threading.Thread(target=look_up, args=(seed,)) for seed in range(4)]
    for thread in [*readers, writer := threading.Thread(target=write)]:
        thread.start()
    join_all(*readers, writer)
    assert not errors
    assert not wrong
    assert server.stats()["m"]["sparse_embedding0"].rows == 500 + 30 * 25


# --- the end of a server beside lookups -------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "unload_model"])
def test_a_server_ends_while_others_look_up(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, end: str) -> None:  # N05
    monkeypatch.setattr(host_store, "_CLOSE_SECONDS", HANG_SECONDS)
    server = workshop.open(workshop.model((range(500), 64)))
    keys = np.arange(5000) % 500
    expected = rows_of(keys, 64)
    outcomes: list[Any] = []
    running = threading.Barrier(4, timeout=HANG_SECONDS)

    def look_up() -> None:
        running.wait()
        try:
            while np.array_equal(server.lookup(keys, "m", 0), expected):
                pass
            outcomes.append("wrong rows")
        except hps_numba.HpsError as problem:
            outcomes.append(type(problem))

    readers = [threading.Thread(target=look_up) for _ in range(3)]
    for reader in readers:
        reader.start()
    running.wait()
    time.sleep(0.02)
    if end == "close":
        server.close()
    else:
        server.unload_model("m")
    join_all(*readers)
    assert outcomes == [ClosedError if end == "close" else UnknownModelError] * 3
    assert server._loader.allocator.in_use <= 64


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_a_lookup_whose_model_is_unloaded_says_so(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, many: bool, again: bool
) -> None:
    server = workshop.open(workshop.model((range(9), 4), (range(9), 4)))
    table = server._catalog.models["m"].tables[0]
    look_up = table.lookup

    def unloaded_before(keys: np.ndarray, out: np.ndarray) -> None:
        if many:
            look_up(keys, out)  # the first table is answered, the second is not: not from another model of that name
        server.unload_model("m")
        if again:
            server.load_model(workshop.model((range(9), 4), (range(9), 4), stamp=1))
        if not many:
            look_up(keys, out)

    monkeypatch.setattr(table, "lookup", unloaded_before)
    with pytest.raises(UnknownModelError, match="model_name: 'm' was unloaded during the lookup"):
        server.lookup_many([[1], [2]], "m") if many else server.lookup([1], "m", 0)


def test_lookup_many_waits_for_a_switch_and_looks_up_once(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(9), 4), (range(9), 4)))
    deployment = server._catalog.models["m"]
    answers: list[Any] = []
    reader = threading.Thread(target=lambda: answers.append(server.lookup_many([[1], [2]], "m")))
    deployment.switch.turns += 1
    try:
        reader.start()
        time.sleep(0.05)
        assert not answers
    finally:
        deployment.switch.turns += 1
    join_all(reader)
    assert_same_bits(answers[0][1], rows_of([2], 4))
    assert [table.calls for table in server.stats()["m"].values()] == [1, 1]


def test_a_switch_does_not_begin_before_the_writes_at_work_have_ended(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(9), 4), (range(9), 4)))
    deployment = server._catalog.models["m"]
    held, go_on = threading.Event(), threading.Event()

    def write() -> None:
        with deployment.tables[1].writes.changing():
            held.set()
            assert go_on.wait(HANG_SECONDS)

    writer, changer = threading.Thread(target=write), threading.Thread(target=lambda: server.replace_model("m"))
    writer.start()
    assert held.wait(HANG_SECONDS)
    changer.start()
    try:
        time.sleep(0.2)
        assert (changer.is_alive(), deployment.switch.turns) == (True, 0)
        server.lookup_many([[1], [2]], "m")
    finally:
        go_on.set()
        join_all(writer, changer)
    assert deployment.switch.turns == 2


def test_a_batch_that_is_cut_reads_one_version_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HostStore(2)
    keys = np.arange(40)
    store.upsert(keys, rows_of(keys, 2))
    monkeypatch.setattr(reading, "ranges_of", lambda *args: [(0, 10), (10, 30), (30, 40)])

    def replaced_between(function: Callable[[int, int], int], ranges: Any, threads: Any) -> list[int]:
        results = [function(*ranges[0])]
        sibling = store.sibling()
        sibling.upsert(keys[:35], rows_of(keys[:35], 2, 1))
        thread = threading.Thread(target=store.adopt, args=(sibling,))
        thread.start()
        wait_until(lambda: sibling.write_lock.closed and len(store) != 40)  # the new version is in force ...
        results += [function(*some) for some in ranges[1:]]  # ... and the old one is still whole
        waiting.append(thread)
        return results

    waiting: list[threading.Thread] = []
    monkeypatch.setattr(reading, "run_ranges", replaced_between)
    out, misses = np.empty((40, 2), np.float32), np.empty(40, np.int64)
    assert store.lookup(keys, out, -1.0, misses) == 0
    assert_same_bits(out, rows_of(keys, 2))
    join_all(waiting[0])
    monkeypatch.setattr(reading, "run_ranges", run_ranges)
    assert store.lookup(keys, out, -1.0, misses) == 5
    assert misses[:5].tolist() == [35, 36, 37, 38, 39]
    assert_same_bits(out[:35], rows_of(keys[:35], 2, 1))
    store.close()


def test_a_batch_that_is_cut_is_whole_or_an_error_when_the_store_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HostStore(2)
    keys = np.arange(40)
    store.upsert(keys, rows_of(keys, 2))
    monkeypatch.setattr(reading, "ranges_of", lambda *args: [(0, 10), (10, 40)])
    closing = threading.Thread(target=store.close)

    def closed_between(function: Callable[[int, int], int], ranges: Any, threads: Any) -> list[int]:
        results = [function(*ranges[0])]
        closing.start()
        wait_until(lambda: store.write_lock.closed)
        return results + [function(*some) for some in ranges[1:]]

    monkeypatch.setattr(reading, "run_ranges", closed_between)
    out = np.full((40, 2), np.nan, np.float32)
    store.lookup(keys, out)
    assert_same_bits(out, rows_of(keys, 2))
    join_all(closing)
    monkeypatch.setattr(reading, "run_ranges", run_ranges)
    with pytest.raises(ClosedError):
        store.lookup(keys, out)
