"""Writes of many rows, which threads share: the same table as going from key to key, whatever the number of threads."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np
import pytest
from support.waiting import join_all

from hps_numba.device.host_memory import HostRegion, PlainHostAllocator
from hps_numba.errors import CapacityError
from hps_numba.runtime import threads as pool
from hps_numba.storage.host import bulk, writing
from hps_numba.storage.host.store import HostStore

DIM = 8


@pytest.fixture(params=[1, 2, 16])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So many threads, with ranges of a few keys each."""
    monkeypatch.setattr(pool._pool, "threads", request.param)
    monkeypatch.setattr(bulk, "ranges_of", lambda n, item_bytes: pool.ranges_of(n, 1, least=7))
    return int(request.param)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch, threads: int) -> list[int]:
    """Every write is one of many rows; gives the rows that went from key to key all the same."""
    each: list[int] = []
    write_each = writing.StoreWriter._write_each

    def counted(self: Any, content: Any, keys: np.ndarray, *more: Any) -> int:
        each.append(len(keys))
        return write_each(self, content, keys, *more)

    monkeypatch.setattr(writing.StoreWriter, "_write_each", counted)
    monkeypatch.setattr(writing, "pays_off", lambda rows, row_bytes: True)
    return each


def rows_of(keys: np.ndarray, stamp: float) -> np.ndarray:
    return (keys[:, None] + stamp + np.arange(DIM) / DIM).astype(np.float32)


def content_of(store: HostStore) -> dict[int, bytes]:
    keys = store.keys()
    rows = np.empty((len(keys), store.dim), np.float32)
    assert store.lookup(keys, rows) == 0
    return {key: row.tobytes() for key, row in zip(keys.tolist(), rows, strict=True)}


@pytest.mark.parametrize("policy", [None, "evict_oldest", "evict_least_used"])
def test_any_sequence_of_writes_gives_the_table_of_a_dictionary(always: list[int], policy: str | None) -> None:
    """Equal keys, new keys, erased ones, growth of slots and index."""
    bound: dict[str, Any] = {} if policy is None else {"max_rows": 100_000, "policy": policy}
    store = HostStore(DIM, growth_bytes=4 * DIM * 64, batch_rows=700, **bound)
    table: dict[int, np.ndarray] = {}
    random = np.random.default_rng(0)
    for stamp in range(60):
        keys = random.integers(-400, 2000, random.integers(1, 1500))
        rows = rows_of(keys, stamp) + random.random((len(keys), 1)).astype(np.float32)
        verb = random.choice(["upsert", "update", "erase"], p=[0.5, 0.3, 0.2])
        if verb == "upsert":
            assert store.upsert(keys, rows) == len(set(keys.tolist()) - set(table))
            table.update(zip(keys.tolist(), rows, strict=True))
        elif verb == "update":
            assert store.update(keys, rows) == sum(key in table for key in keys.tolist())
            table.update((key, row) for key, row in zip(keys.tolist(), rows, strict=True) if key in table)
        else:
            assert store.erase(keys) == len(set(keys.tolist()) & set(table))
            for key in keys.tolist():
                table.pop(key, None)
        assert len(store) == len(table) and store.added >= len(table)
        assert content_of(store) == {key: row.tobytes() for key, row in table.items()}
    assert store.slots <= 2400 + 2 * 700 + 200, store.slots
    assert sum(always) < 3000  # only while the index has to grow for more keys than it has


def test_index_words_and_recency_are_those_of_writes_from_key_to_key(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A count of uses moves along with an updated row, whichever way it was written."""
    stores = [HostStore(DIM, max_rows=50, policy="evict_least_used", target=0.5, growth_bytes=4 * DIM * 500) for _ in range(2)]
    keys = np.arange(50)
    for store, many in zip(stores, (False, True), strict=True):
        monkeypatch.setattr(writing, "pays_off", lambda rows, row_bytes, many=many: many)
        store.upsert(keys, rows_of(keys, 0))
        for used in range(40, 50):
            store.lookup(np.full(used, used), np.empty((used, DIM), np.float32))
        store.update(np.append(keys, keys), np.concatenate([rows_of(keys, 1), rows_of(keys, 2)]))
        store.upsert(np.array([50]), rows_of(np.array([50]), 0))
        assert set(range(40, 50)) <= set(store.keys().tolist())
    first, second = (content_of(store) for store in stores)
    assert {key: first[key] for key in range(40, 50)} == {key: second[key] for key in range(40, 50)}
    assert len(first) == len(second) == 25


class Limited(PlainHostAllocator):
    """Refuses to commit more rows, or another index, once it is full."""

    full = False

    def on_commit(self, region: HostRegion, end: int) -> None:
        if self.full and region.purpose.endswith(("rows", "index")):
            raise CapacityError("no memory")


def test_where_memory_ends_rows_are_written_from_key_to_key(always: list[int]) -> None:
    allocator = Limited()
    store = HostStore(DIM, rows=1000, allocator=allocator, growth_bytes=4 * DIM)
    keys = np.arange(1000)
    store.upsert(keys, rows_of(keys, 0))
    store.erase(keys[:100])
    allocator.full = True
    always.clear()
    assert store.update(keys[100:], rows_of(keys[100:], 1)) == 900 and always == [900]  # 100 slots for 900 rows
    assert content_of(store) == dict(zip(range(100, 1000), map(np.ndarray.tobytes, rows_of(keys[100:], 1)), strict=True))
    with pytest.raises(CapacityError):
        store.upsert(np.arange(5000, 9000), rows_of(np.arange(5000, 9000), 1))
    with store.at_rest() as (_, block):
        assert block == store.block  # nothing to repair
    assert np.isin(keys[100:], store.keys()).all()


# -- rewriting ---------------------------------------------------------------------------------------------------------------


def row_at(address: int) -> np.ndarray:
    view: np.ndarray = np.frombuffer((ctypes.c_float * DIM).from_address(int(address)), np.float32)  # type: ignore[call-overload]
    return view


def test_new_rows_are_seen_when_they_are_published_and_then_all(threads: int) -> None:
    store = HostStore(DIM, growth_bytes=4 * DIM * 10)
    keys = np.arange(300)
    store.upsert(keys[:200], rows_of(keys[:200], 0))
    before = content_of(store)
    with store.rewriting(keys) as rewrite:
        assert rewrite.found.tolist() == [True] * 200 + [False] * 100
        assert [row_at(place).tobytes() for place in rewrite.sources[:200]] == [before[key] for key in range(200)]
        assert not rewrite.sources[200:].any() and len(set(rewrite.targets.tolist())) == 300
        for place, row in zip(rewrite.targets, rows_of(keys, 1), strict=True):
            row_at(place)[:] = row
        assert content_of(store) == before
        assert rewrite.publish() == 100
    assert content_of(store) == dict(zip(range(300), map(np.ndarray.tobytes, rows_of(keys, 1)), strict=True))
    assert len(store) == 300 and store.added == 300


def test_a_rewrite_that_is_not_published_changes_nothing(threads: int) -> None:
    store = HostStore(DIM, growth_bytes=4 * DIM * 10)
    keys = np.arange(300)
    store.upsert(keys[:200], rows_of(keys[:200], 0))
    before, slots = content_of(store), []
    for problem in [None, ZeroDivisionError, KeyboardInterrupt] * 3:
        try:
            with store.rewriting(keys) as rewrite:
                row_at(rewrite.targets[0])[:] = -1
                if problem is not None:
                    raise problem
        except (ZeroDivisionError, KeyboardInterrupt):
            assert problem is not None
        slots.append(store.slots)
        with store.at_rest() as (_, block):
            assert block == store.block
    assert content_of(store) == before and len(store) == 200 and slots[-1] == slots[0]


def test_a_publication_that_was_interrupted_is_repaired(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key has its old row or its new one; what fails after the publication needs no repair."""
    store = HostStore(DIM, growth_bytes=4 * DIM * 10)
    keys = np.arange(300)
    store.upsert(keys, rows_of(keys, 0))

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    for moment in ("host_publish", "host_retire", None):
        with monkeypatch.context() as patch:
            if moment is not None:
                patch.setattr(bulk, moment, interrupted)
            with pytest.raises((KeyboardInterrupt, ZeroDivisionError)), store.rewriting(keys) as rewrite:
                for place, row in zip(rewrite.targets, rows_of(keys, 1), strict=True):
                    row_at(place)[:] = row
                rewrite.publish()
                raise ZeroDivisionError
        with store.at_rest() as (_, block):
            assert (block == store.block) == (moment is None)
        stamp = 0 if moment == "host_publish" else 1
        assert content_of(store) == dict(zip(range(300), map(np.ndarray.tobytes, rows_of(keys, stamp)), strict=True))
        store.upsert(keys, rows_of(keys, 0))
        assert len(store) == 300 and store.slots <= 1300


def test_no_memory_for_a_rewrite_changes_nothing(threads: int) -> None:
    allocator = Limited()
    store = HostStore(DIM, rows=100, allocator=allocator, growth_bytes=4 * DIM)
    keys = np.arange(100)
    store.upsert(keys, rows_of(keys, 0))
    store.erase(keys[:5])
    allocator.full = True
    with pytest.raises(CapacityError, match="no memory for 95 rows"), store.rewriting(keys[5:]):
        raise AssertionError
    assert len(store) == 95
    store.upsert(keys[:3], rows_of(keys[:3], 1))
    assert len(store) == 98


def test_readers_beside_rewrites_see_whole_rows_of_one_step(threads: int) -> None:
    """Elements of a row are equal, and a key never goes back to an older row."""
    store = HostStore(DIM)
    keys = np.arange(2000)
    store.upsert(keys, np.zeros((2000, DIM), np.float32))
    wrong: list[str] = []
    stop = threading.Event()

    def look() -> None:
        out, last = np.empty((2000, DIM), np.float32), np.zeros(2000, np.float32)
        while not stop.is_set():
            store.lookup(keys, out)
            if (out != out[:, :1]).any() or (out[:, 0] < last).any():
                wrong.append(f"torn or old: {out}")
            last = out[:, 0].copy()

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for stamp in range(1, 120):
            with store.rewriting(keys) as rewrite:
                rows = np.full((2000, DIM), stamp, np.float32)
                if stamp % 2:
                    for place, row in zip(rewrite.targets, rows, strict=True):
                        ctypes.memmove(int(place), row.ctypes.data, row.nbytes)
                    rewrite.publish()
            if not stamp % 2:
                store.upsert(keys, rows)
    finally:
        stop.set()
        join_all(*readers)
    assert not wrong, wrong[0]
    before = store.slots  # however long a reader was kept from its core, it is gone now, and slots of old rows are used again
    for stamp in range(120, 140):
        store.upsert(keys, np.full((2000, DIM), stamp, np.float32))
    assert store.slots <= before + 2 * 2000
