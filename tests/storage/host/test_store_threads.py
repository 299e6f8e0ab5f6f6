"""Readers beside a writer: no torn row, no wrong row, no lock, no lost memory."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
from support.waiting import HANG_SECONDS, Span, join_all, wait_until

from hps_numba.device.host_memory import PlainHostAllocator
from hps_numba.storage.host import store as store_module
from hps_numba.storage.host.epochs import Epochs
from hps_numba.storage.host.store import HostStore

DIM = 512
KEYS = np.arange(64, dtype=np.int64)


class Readers:
    """Threads that look all keys up until they are stopped, and note rows whose elements are not all the same."""

    def __init__(self, store, threads=3):
        self.errors, self._torn, self._lookups = [], [], []  # lists: += on a number loses counts between threads
        self._store = store
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._read, daemon=True) for _ in range(threads)]

    def _read(self):
        out = np.empty((len(KEYS), DIM), np.float32)
        try:
            while not self._stop.is_set():
                assert self._store.lookup(KEYS, out, -1.0) == 0
                self._torn.append(int((out != out[:, :1]).any(axis=1).sum()))
                self._lookups.append(1)
        except BaseException as problem:
            self.errors.append(problem)

    @property
    def torn(self):
        return sum(self._torn)

    @property
    def looked_up(self):
        return len(self._lookups)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        join_all(*self._threads)


def filled_store():
    store = HostStore(DIM, growth_bytes=DIM * 4 * 64)
    store.upsert(KEYS, np.zeros((len(KEYS), DIM), np.float32))
    return store


def test_no_torn_rows_during_writes():
    store = filled_store()
    with Readers(store) as readers:
        value = 0
        span = Span(1, lambda: readers.looked_up >= 200 and value > 50)
        while span.goes_on() and not readers.errors:
            value += 1
            store.upsert(KEYS, np.full((len(KEYS), DIM), value, np.float32))
    assert not readers.errors
    assert readers.torn == 0
    assert readers.looked_up >= 200 and value > 50


def test_the_torn_row_test_finds_a_store_that_writes_in_place():
    """The same readers, beside a writer that overwrites the rows where they stand: what this design avoids."""
    store = filled_store()
    rows = store.versions.current.rows_view(0, len(KEYS))
    with Readers(store) as readers:
        value, span = 0, Span(0, lambda: readers.torn)
        while span.goes_on() and not readers.errors:
            value += 1
            rows[:] = np.float32(value)
    assert not readers.errors
    assert readers.torn > 0
    del rows


def test_growth_does_not_stop_readers():
    store = filled_store()
    grown = 20_000
    with Readers(store) as readers:
        for start in range(1000, grown, 500):
            seen = readers.looked_up
            store.upsert(np.arange(start, start + 500), np.full((500, DIM), start, np.float32))
            wait_until(lambda seen=seen: readers.looked_up > seen or readers.errors)
    assert not readers.errors
    assert readers.torn == 0
    assert len(store) == len(KEYS) + grown - 1000


def test_erased_and_written_again_is_seen_as_row_or_absent():
    store = filled_store()
    stop = threading.Event()
    wrong = []

    def read():
        out = np.empty((len(KEYS), DIM), np.float32)
        misses = np.empty(len(KEYS), np.int64)
        while not stop.is_set():
            missing = store.lookup(KEYS, out, -1.0, misses)
            absent = np.zeros(len(KEYS), bool)
            absent[misses[:missing]] = True
            if (out != out[:, :1]).any() or not np.array_equal(out[:, 0] == -1, absent):
                wrong.append(out[:, 0].copy())

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for value in range(1, 400):
        store.erase(KEYS[::2])
        store.upsert(KEYS[::2], np.full((32, DIM), value, np.float32))
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_absent_key_never_takes_the_row_of_a_key_that_is_being_inserted():
    """The search for an absent key ends at an empty entry; the writer fills such entries with other keys all the time."""
    absent = np.arange(1 << 40, (1 << 40) + 512, dtype=np.int64)
    stop = threading.Event()
    wrong = []

    def read(store):
        out = np.empty((len(absent), 1), np.float32)
        while not stop.is_set():
            if store.lookup(absent, out, -1.0) != len(absent) or (out != -1).any():
                wrong.append(out[out != -1])

    store = HostStore(1, rows=40_000)
    thread = threading.Thread(target=read, args=(store,))
    thread.start()
    keys, rows = np.arange(40_000), np.ones((40_000, 1), np.float32)
    for _ in range(150):
        store.upsert(keys, rows)
        store.replace(store.new_content(40_000))
    stop.set()
    thread.join()
    assert not wrong


def test_closing_during_reads_ends_them_cleanly(monkeypatch):
    monkeypatch.setattr(store_module, "_CLOSE_SECONDS", HANG_SECONDS)
    store = filled_store()
    with Readers(store) as readers:
        wait_until(lambda: readers.looked_up >= 20 or readers.errors)
        store.close()
        wait_until(lambda: len(readers.errors) == 3)
    assert {type(problem).__name__ for problem in readers.errors} == {"ClosedError"}
    assert readers.torn == 0


def test_slots_stay_while_a_reader_may_hold_them():
    epochs = Epochs()
    store = HostStore(4, epochs=epochs)
    store.upsert(KEYS, np.ones((len(KEYS), 4), np.float32))
    with epochs.reading():
        store.upsert(KEYS, np.full((len(KEYS), 4), 2, np.float32))
        with_old_rows = store.bytes
        store.upsert(KEYS, np.full((len(KEYS), 4), 3, np.float32))
        assert store.bytes == with_old_rows + KEYS.size * 16
    most = store.bytes
    for value in range(50):
        store.upsert(KEYS, np.full((len(KEYS), 4), value, np.float32))
    assert store.bytes == most  # the old slots came back after the reader left


def test_an_open_scan_blocks_nobody(monkeypatch):
    monkeypatch.setattr(store_module, "_GRACE_SECONDS", HANG_SECONDS)
    monkeypatch.setattr(store_module, "_CLOSE_SECONDS", HANG_SECONDS)
    store, other = filled_store(), filled_store()
    scan = store.scan(8)
    keys, rows = next(scan)

    def write():
        for value in range(200):
            store.upsert(KEYS, np.full((len(KEYS), DIM), value, np.float32))
        size = store.bytes
        for value in range(200):
            store.upsert(KEYS, np.full((len(KEYS), DIM), value, np.float32))
        sizes.append((size, store.bytes))
        store.erase(KEYS[-8:])
        store.replace(store.new_content(0))
        other.clear()
        other.close()

    sizes = []
    writer = threading.Thread(target=write)
    writer.start()
    join_all(writer)
    assert sizes[0][0] == sizes[0][1] <= 4 * KEYS.size * DIM * 4 + (1 << 16)
    assert (rows == 0).all() and keys.size == 8
    assert list(scan) == []  # the rows that were left have gone
    store.close()


def test_a_scan_does_not_touch_recency():
    store = HostStore(1, max_rows=100, target=0.5, policy="evict_oldest")
    for start in range(0, 100, 50):
        store.upsert(np.arange(start, start + 50), np.ones((50, 1), np.float32))
    reading = store.scan(10)
    next(reading)
    store.lookup(np.arange(25), np.empty((25, 1), np.float32))
    list(reading)
    store.upsert(np.arange(100, 101), np.ones((1, 1), np.float32))
    assert store.contains(np.arange(25)).all() and not store.contains(np.arange(25, 50)).any()


def test_replacing_during_reads_releases_memory(monkeypatch):
    monkeypatch.setattr(store_module, "_GRACE_SECONDS", HANG_SECONDS)
    allocator = PlainHostAllocator()
    store = HostStore(DIM, allocator=allocator)

    def version(value):
        content = store.new_content(len(KEYS))
        content.rows_view(0, len(KEYS))[:] = value
        content.fill(KEYS, 1)
        return content

    store.replace(version(0))
    start = allocator.in_use
    with Readers(store) as readers:
        for value in range(100):
            store.replace(version(value))
    assert not readers.errors and readers.torn == 0
    assert allocator.in_use == start


class Kernels:
    """A guard that is in an epoch of the distant past."""

    def oldest(self, now):
        return 0


def test_guards_come_and_go_from_any_thread():
    epochs, lost = Epochs(), []
    interval = sys.getswitchinterval()

    def come_and_go():
        for _ in range(2000):
            guard = Kernels()
            epochs.add_guard(guard)
            if guard not in epochs._guards.copy().values():
                lost.append(guard)
            epochs.remove_guard(guard)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=come_and_go) for _ in range(3)]
        for thread in threads:
            thread.start()
        join_all(*threads)
    finally:
        sys.setswitchinterval(interval)
    assert not lost and epochs.oldest() == epochs.now


@pytest.mark.parametrize("readers", [1, 3])
def test_epochs_hold_what_was_retired_until_readers_leave(readers):
    epochs = Epochs()
    tag = epochs.advance()
    assert epochs.oldest() > tag
    contexts = [epochs.reading() for _ in range(readers)]
    for context in contexts:
        context.__enter__()
    tag = epochs.advance()
    assert epochs.oldest() <= tag and not epochs.wait(tag, 0.02)
    for context in contexts:
        context.__exit__(None, None, None)
    assert epochs.wait(tag, HANG_SECONDS)


def test_more_readers_than_records_get_new_records():
    epochs = Epochs()
    records = [epochs.acquire() for _ in range(200)]
    assert len(set(records)) == 200
    for record in records:
        epochs.release(record)
    assert epochs.acquire() in records
