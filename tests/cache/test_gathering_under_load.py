"""Every way to bring missed rows: many threads and streams beside writers, and caches that close, forks, threads that end.

``HPS_NUMBA_STRESS_SECONDS`` (1) is how long each way is under load.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from support.cache_bench import DEFAULT, Bench, ints
from support.factories import ON_BOTH
from support.gathering import gather_small_batches
from support.oracles import assert_same_bits, rows_of
from support.waiting import HANG_SECONDS, Span, join_all, wait_until

from hps_numba.cache import gathering, host_threads
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.cache.host_threads import HostThreads
from hps_numba.errors import CapacityError, ClosedError
from hps_numba.kernels.host.gathering import wake_gatherers
from hps_numba.kernels.layouts.gathering import STOP

SECONDS = float(os.environ.get("HPS_NUMBA_STRESS_SECONDS", "1"))
DIM, ROWS, CACHED = 32, 3000, 400
THREADS, STREAMS = 8, 8
MOST = 2000  # keys of a batch
WAYS = ["direct", "staged", "auto, 0", "auto, 0.5", "auto, 1", "auto"]


@pytest.fixture(autouse=True)
def every_batch_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    gather_small_batches(monkeypatch)


class Written:
    """Rows that tell key and version, and what every lookup may find of them: the oracle.

    Attributes:
        versions: of each key, that were written.   present: it has a row.
        changes: of each key: goes up before it is erased or inserted again and once more afterwards; odd meanwhile.
    """

    def __init__(self) -> None:
        self.versions = np.zeros(ROWS, np.int64)
        self.present = np.ones(ROWS, bool)
        self.changes = np.zeros(ROWS, np.int64)

    @staticmethod
    def rows(keys: np.ndarray, versions: np.ndarray) -> np.ndarray:
        rows = (keys * 31 + versions * 1009)[:, None] % 65_521 + np.arange(DIM)
        rows[:, 0], rows[:, 1] = keys, versions
        return rows.astype(np.float32)

    def before(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.changes[keys], self.versions[keys], self.present[keys]

    def problem(self, keys: np.ndarray, got: np.ndarray, before: tuple[np.ndarray, np.ndarray, np.ndarray]) -> str:
        """What is wrong with an answer, given what was known before it was asked for; empty: nothing."""
        changes, least, present = before
        absent = (got == np.float32(DEFAULT)).all(axis=1)
        known = (changes == self.changes[keys]) & (changes % 2 == 0)
        versions = got[:, 1].astype(np.int64)
        whole = (got == self.rows(keys, versions)).all(axis=1)
        wrong = {
            "torn, or of another key": ~absent & ~whole,
            "old": ~absent & whole & (versions < least),
            "absent": absent & known & present,
            "there after it was erased": ~absent & known & ~present,
        }
        return "; ".join(f"{what}: {keys[which][:3]}, {got[which][:1, :6]}" for what, which in wrong.items() if which.any())


class Load:
    """Readers on streams of their own, two writers, over one cache."""

    def __init__(self, bench: Bench, way: str) -> None:
        path, _, self.share = way.partition(", ")
        self.written = Written()
        keys = np.arange(ROWS)
        self.store = bench.store(dim=DIM, growth_bytes=1 << 16)
        self.store.upsert(keys, Written.rows(keys, self.written.versions))
        self.cache = bench.cache(self.store, CACHED, miss_path=path, buffers=4)
        self.cache.mirror_index()
        self.problems: list[object] = []
        self.batches = self.writes = self.copies = 0

    def read(self, rng: np.random.Generator, streams: list[int]) -> None:
        """One batch on each stream, all started before any is looked at."""
        cache, backend = self.cache, self.cache.backend
        with backend.current(), ExitStack() as held:
            started = []
            for stream in streams:
                keys = np.minimum(rng.zipf(1.1, int(np.exp(rng.uniform(0, np.log(MOST))))) - 1, ROWS - 1)
                at, out = (backend.allocate(size, "a batch") for size in (keys.nbytes, 4 * DIM * len(keys)))
                held.callback(at.release)
                held.callback(out.release)
                backend.from_host(at.address, keys, stream)
                before = self.written.before(keys)
                cache.lookup(at.address, len(keys), out.address, stream)
                started.append((keys, before, out.address, stream))
            for keys, before, address, stream in started:
                got = np.empty((len(keys), DIM), np.float32)
                backend.to_host(got, address, stream)
                problem = self.written.problem(keys, got, before)
                if problem:
                    self.problems.append(problem)
                self.batches += 1

    def write(self, rng: np.random.Generator, mine: np.ndarray) -> None:
        written, some = self.written, np.unique(rng.choice(mine, 40))
        erased = some[~written.present[some]]
        if rng.random() < 0.15:
            written.changes[some] += 1
            self.store.erase(some)
            self.cache.erase(some)
            written.present[some] = False
            written.changes[some] += 1
            return
        written.changes[erased] += 1
        versions = written.versions[some] + 1
        self.store.upsert(some, Written.rows(some, versions))
        self.cache.update(some)
        written.versions[some], written.present[erased] = versions, True
        written.changes[erased] += 1
        self.writes += 1
        if rng.random() < 0.3:
            self.copies += self.cache.mirror_index()
        if rng.random() < 0.05:
            self.cache.refresh(0, int(rng.integers(1, self.cache.sets + 1)))

    def run(self, enough: Callable[[], object]) -> None:
        span = Span(SECONDS, lambda: self.batches > 20 and self.writes > 20 and enough())

        def again(work: Callable[..., None], seed: int, with_them: Any) -> None:
            rng = np.random.default_rng(seed)
            try:
                while not self.problems and span.goes_on():
                    work(rng, with_them)
            except BaseException as problem:
                self.problems.append(problem)

        backend, on_device = self.cache.backend, self.cache.device is not None
        threads, streams = (THREADS, STREAMS) if on_device else (2, 1)
        with backend.current():
            of_threads = [[backend.new_stream() for _ in range(streams)] for _ in range(threads)]
        work = [threading.Thread(target=again, args=(self.read, i, of_threads[i])) for i in range(threads)]
        parts = np.array_split(np.arange(ROWS), 2)
        work += [threading.Thread(target=again, args=(self.write, 99 + i, part)) for i, part in enumerate(parts)]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join(SECONDS + HANG_SECONDS)
        assert not any(thread.is_alive() for thread in work)
        assert not self.problems, self.problems[:2]
        with backend.current():
            for stream in (stream for some in of_threads for stream in some if stream):
                backend.destroy_stream(stream)

    def check_all(self) -> None:
        """At rest every row is as it was last written, or gone, in the store and in the cache."""
        written, keys = self.written, np.arange(ROWS)
        expected = np.where(written.present[:, None], Written.rows(keys, written.versions), np.float32(DEFAULT))
        here = ints(entry.key for entry in self.cache.entries())
        assert_same_bits(self.cache.query(here)[0], expected[here])
        assert_same_bits(self.cache.lookup_arrays(keys), expected)


@pytest.mark.timeout(2 * HANG_SECONDS + SECONDS)
@pytest.mark.parametrize("device", ON_BOTH)
@pytest.mark.parametrize("way", WAYS)
def test_answers_beside_writers_are_whole_and_fresh(device: int | None, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPS_NUMBA_HOST_SHARE", way.partition(", ")[2])
    bench = Bench(device)
    load = Load(bench, way)
    helps, stages = way in ("auto, 0.5", "auto, 1", "auto"), way == "staged"

    def enough() -> bool:
        counts = load.cache.counters()
        return (not helps or counts.helped > 20) and (not stages or counts.staged > 20) and counts.evicted > 0

    load.run(enough)
    load.check_all()
    counts = load.cache.counters()
    assert enough() and (counts.helped > 0) == helps and (counts.staged > 0) == stages
    assert counts.helped + counts.staged <= counts.calls
    bench.close()


# -- when something ends ----------------------------------------------------------------------------------------------------


def gathering_cache(bench: Bench, monkeypatch: pytest.MonkeyPatch, rows: int = ROWS) -> EmbeddingCache:
    monkeypatch.setenv("HPS_NUMBA_HOST_SHARE", "0.7")
    cache = bench.cache(bench.store(range(rows), dim=DIM), CACHED, miss_path="auto", buffers=4)
    cache.mirror_index()
    return cache


class Readers:
    """Threads that look up until a cache is closed, or until they are told to end."""

    def __init__(self, cache: EmbeddingCache, threads: int = 3) -> None:
        self.cache, self.ended, self.closed = cache, False, 0
        self.batches = [0] * threads
        self.problems: list[object] = []
        self.threads = [threading.Thread(target=self.read, args=(number,)) for number in range(threads)]
        for thread in self.threads:
            thread.start()

    def read(self, number: int) -> None:
        rng = np.random.default_rng(number)
        try:
            while not self.ended:
                keys = rng.integers(0, ROWS, 1500)
                if not np.array_equal(self.cache.lookup_arrays(keys), rows_of(keys, DIM)):
                    self.problems.append(keys)
                self.batches[number] += 1
        except ClosedError:
            self.closed += 1
        except BaseException as problem:
            self.problems.append(problem)

    def wait_for(self, batches: int) -> None:
        start = list(self.batches)
        wait_until(lambda: self.problems or all(now - then >= batches for now, then in zip(self.batches, start)))

    def join(self) -> None:
        join_all(*self.threads)
        assert not self.problems, self.problems[:1]


@pytest.mark.parametrize("device", ON_BOTH)
def test_close_waits_for_gathered_lookups_of_other_threads(device: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        bench = Bench(device)
        cache = gathering_cache(bench, monkeypatch)
        readers = Readers(cache)
        readers.wait_for(2)
        assert cache.counters().helped > 0
        cache.close()
        readers.join()
        assert readers.closed == len(readers.threads)
        bench.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_beside_gathered_lookups_leaves_both_at_work(cpu_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = gathering_cache(cpu_bench, monkeypatch)
    readers, keys = Readers(cache), np.arange(ROWS)
    for _ in range(5):
        readers.wait_for(1)
        child = os.fork()
        if child == 0:
            signal.alarm(int(HANG_SECONDS))  # ends a child that hangs
            status = 1
            try:
                good = np.array_equal(cache.lookup_arrays(keys), rows_of(keys, DIM))
                cache.close()
                status = 0 if good else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    readers.wait_for(1)
    readers.ended = True
    readers.join()
    assert readers.closed == 0


@pytest.fixture
def threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostThreads]:
    """Threads that no other test knows; the first ones of a process, as it were."""
    own = HostThreads()
    own.count = max(own.count, 3)
    monkeypatch.setattr(gathering, "host_threads", own)
    yield own
    own._control[STOP // 8] = 1
    wake_gatherers(own._address)
    join_all(*own._started)


@pytest.mark.parametrize("there_are", [0, 1])
@pytest.mark.parametrize("device", ON_BOTH)
def test_threads_that_cannot_be_started_are_done_without(
    device: int | None, there_are: int, threads_of_its_own: HostThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = host_threads.start_thread, []

    def refuse(*args: Any, **options: Any) -> threading.Thread:
        if len(started) == there_are:
            raise CapacityError("expected one more thread, got none")
        started.append(start(*args, **options))
        return started[-1]

    monkeypatch.setattr(host_threads, "start_thread", refuse)
    bench = Bench(device)
    cache, keys = gathering_cache(bench, monkeypatch), np.arange(ROWS)
    for _ in range(3):
        assert_same_bits(cache.lookup_arrays(keys), rows_of(keys, DIM))
    assert cache.counters().helped == 3 * there_are and threads_of_its_own.count == there_are
    bench.close()


@pytest.mark.parametrize("dying", [1, 3])
@pytest.mark.parametrize("device", ON_BOTH)
def test_threads_that_die_are_done_without(
    device: int | None,
    dying: int,
    threads_of_its_own: HostThreads,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gather, numbers, dead = host_threads.gather_for_devices, itertools.count(), []

    def die(control: int, state: int) -> None:
        if next(numbers) < dying:
            dead.append(state)
            raise MemoryError("no memory for the words of a thread")
        gather(control, state)

    threads_of_its_own.count = 3
    monkeypatch.setattr(host_threads, "gather_for_devices", die)
    bench = Bench(device)
    cache, keys = gathering_cache(bench, monkeypatch), np.arange(ROWS)
    for _ in range(3):
        assert_same_bits(cache.lookup_arrays(keys), rows_of(keys, DIM))
    assert cache.counters().helped == (3 if dying < 3 else 0)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == dying and "no memory for the words of a thread" in caplog.text
    for state in dead:
        threads_of_its_own._control[(state - threads_of_its_own._address) // 8] = 7  # as if they had looked before
    bench.close()  # does not wait for those that have ended


@pytest.mark.parametrize("device", ON_BOTH)
def test_when_the_last_thread_has_ended_the_device_reads_all(
    device: int | None, threads_of_its_own: HostThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(device)
    cache, keys = gathering_cache(bench, monkeypatch), np.arange(ROWS)
    assert_same_bits(cache.lookup_arrays(keys), rows_of(keys, DIM))
    assert cache.counters().helped == 1
    threads_of_its_own._control[STOP // 8] = 1
    wake_gatherers(threads_of_its_own._address)
    join_all(*threads_of_its_own._started)
    for _ in range(3):
        assert_same_bits(cache.lookup_arrays(keys), rows_of(keys, DIM))
    assert cache.counters().helped == 1 and cache.parts.gathered is not None and cache.parts.gathered.declined == 3
    bench.close()
