"""Kernel calls and memory that writes take, whatever was erased, evicted or written twice before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.internals import set_uses, set_writes

from hps_numba.device.host_memory import HostRegion, PlainHostAllocator
from hps_numba.errors import CapacityError
from hps_numba.kernels.layouts.host_store import FIRST_SLOT, GENERATION_WRITES
from hps_numba.storage.host import writing
from hps_numba.storage.host.store import HostStore

DIM, N, BATCH = 8, 60_000, 10_000
KEYS = np.arange(N)
ROWS = np.arange(N * DIM, dtype=np.float32).reshape(N, DIM)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that each call of the kernel wrote."""
    seen: list[int] = []
    kernel = writing.host_upsert

    def counted(*args: Any) -> tuple[int, int]:
        done, changed = kernel(*args)
        seen.append(done)
        return done, changed

    monkeypatch.setattr(writing, "host_upsert", counted)
    return seen


def loaded(keys: np.ndarray, **options: Any) -> HostStore:
    """A store with exactly as many slots as keys, as after loading a file."""
    store = HostStore(DIM, batch_rows=BATCH, **options)
    content = store.new_content(len(keys))
    content.rows_view(0, len(keys))[:] = ROWS[: len(keys)]
    content.fill(keys, 1)
    store.replace(content)
    return store


def check(store: HostStore, keys: np.ndarray, rows: np.ndarray) -> None:
    out = np.empty_like(rows)
    assert store.lookup(keys, out) == 0 and np.array_equal(out, rows)


@pytest.mark.parametrize("growth_rows", [1, 100, 1 << 20])
@pytest.mark.parametrize("spare", [0, 1, 2, 50])
def test_few_free_slots_cost_few_kernel_calls(calls: list[int], spare: int, growth_rows: int) -> None:
    store = loaded(KEYS, growth_bytes=4 * DIM * growth_rows)
    store.erase(KEYS[:spare])
    for _ in range(3):
        store.update(KEYS, ROWS + 1)
    assert len(calls) <= 3 * (N // BATCH) * 4, calls[:20]
    check(store, KEYS[spare:], ROWS[spare:] + 1)


def test_equal_keys_in_a_file_cost_few_kernel_calls(calls: list[int]) -> None:
    keys = KEYS.copy()
    keys[[7, 9]] = keys[[8, 10]]
    store = loaded(keys, growth_bytes=4 * DIM * 1000)
    assert store.upsert(KEYS, ROWS + 2) == 2
    assert len(calls) <= (N // BATCH) * 4
    check(store, KEYS, ROWS + 2)


def test_memory_of_endless_changes_is_bounded() -> None:
    store = loaded(KEYS, growth_bytes=4 * DIM * 1000)
    store.erase(KEYS[:1])
    slots = []
    for turn in range(30):
        store.update(KEYS, ROWS + turn)
        store.erase(KEYS[turn::7])
        store.upsert(KEYS, ROWS - turn)
        slots.append(store.slots)
    assert slots[-1] == slots[5] <= N + 3 * BATCH
    check(store, KEYS, ROWS - 29)


@pytest.mark.parametrize("policy", ["evict_random", "evict_oldest", "evict_least_used"])
def test_memory_of_endless_evictions_is_bounded(policy: str, calls: list[int]) -> None:
    bound = 20_000
    store = HostStore(DIM, batch_rows=1000, max_rows=bound, policy=policy, growth_bytes=4 * DIM * 100)
    slots, turns = [], 40
    for turn in range(turns):
        keys = np.arange(turn * 7000, turn * 7000 + 15_000)
        store.upsert(keys, ROWS[: len(keys)] + turn)
        store.update(keys, ROWS[: len(keys)] + turn)
        slots.append(store.slots)
        assert len(store) <= bound
    assert slots[-1] == slots[turns // 2] <= bound + 6 * 4096
    assert len(calls) <= turns * 30 * 3


def test_the_index_grows_by_a_share_of_its_size(calls: list[int]) -> None:
    store = HostStore(DIM, growth_bytes=4 * DIM * N, batch_rows=N)
    store.upsert(KEYS, ROWS)
    assert len(calls) < 30
    calls.clear()
    for turn in range(10):  # keys that come and go leave entries behind
        keys = np.arange(10_000) + (turn + 1) * 100_000
        store.upsert(keys, ROWS[:10_000])
        store.erase(keys)
    assert len(calls) <= 10 + 5


class Limited(PlainHostAllocator):
    """Refuses to commit rows beyond a size."""

    limit = 1 << 62

    def on_commit(self, region: HostRegion, end: int) -> None:
        if region.purpose.endswith("rows") and end > self.limit:
            raise CapacityError("no memory")


def limited(rows: int) -> HostStore:
    allocator = Limited()
    store = loaded(KEYS[:rows], growth_bytes=4 * DIM * 100, allocator=allocator)
    allocator.limit = 0
    return store


def test_rows_are_written_as_long_as_there_is_a_slot(calls: list[int]) -> None:
    store = limited(5000)
    store.erase(KEYS[:2000])
    assert store.update(KEYS[2000:5000], ROWS[2000:5000] + 1) == 3000
    check(store, KEYS[2000:5000], ROWS[2000:5000] + 1)
    assert len(calls) < 10


def test_without_memory_and_slots_a_write_raises_and_needs_no_repair() -> None:
    store = limited(1000)
    for write in (store.update, store.upsert):
        with pytest.raises(CapacityError):
            write(KEYS[:1000], ROWS[:1000] + 1)
        with store.at_rest() as (_, block):
            assert block == store.block
    check(store, KEYS[:1000], ROWS[:1000])
    store.erase(KEYS[:10])
    assert store.upsert(KEYS[:10], ROWS[:10] + 3) == 10
    check(store, KEYS[:10], ROWS[:10] + 3)


# -- index words -----------------------------------------------------------------------------------------------------------


def words_of(store: HostStore, keys: np.ndarray) -> tuple[np.ndarray, int]:
    """The index words of keys, and their generation."""
    words = np.empty(len(keys), np.int64)
    _, generation = store.gather(keys, np.empty((len(keys), DIM), np.float32), words)
    return words, generation


def test_a_slot_has_another_word_each_time_it_is_used() -> None:
    store = loaded(KEYS[:1], growth_bytes=4 * DIM)
    seen = set()
    for turn in range(50):
        if turn % 7 == 3:
            store.erase(KEYS[:1])
        store.upsert(KEYS[:1], ROWS[turn : turn + 1])
        seen.add(int(words_of(store, KEYS[:1])[0][0]))
    assert len(seen) == 50 and store.slots < 10


def test_the_count_of_uses_wraps_and_stays_positive() -> None:
    store = loaded(KEYS[:1], growth_bytes=4 * DIM)
    store.upsert(KEYS[:1], ROWS[1:2])
    set_uses(store, (1 << 23) - 1)
    for turn in range(20):
        store.upsert(KEYS[:1], ROWS[turn : turn + 1])
        assert words_of(store, KEYS[:1])[0][0] >= FIRST_SLOT
        check(store, KEYS[:1], ROWS[turn : turn + 1])


def test_a_generation_ends_before_words_can_recur() -> None:
    """In fewer writes than a slot has different words."""
    told: list[int] = []
    store = loaded(KEYS[:100], growth_bytes=4 * DIM * 10)
    store.watch(told.append)
    _, first = words_of(store, KEYS[:100])
    set_writes(store, GENERATION_WRITES - 150)
    told.clear()
    store.update(KEYS[:100], ROWS[:100] + 1)
    assert words_of(store, KEYS[:100])[1] == first and not told
    store.update(KEYS[:100], ROWS[:100] + 2)
    second = words_of(store, KEYS[:100])[1]
    assert second > first and told[-1] == store.block and GENERATION_WRITES < 1 << 23
    store.update(KEYS[:100], ROWS[:100] + 3)
    assert words_of(store, KEYS[:100])[1] == second
    check(store, KEYS[:100], ROWS[:100] + 3)


def test_every_version_has_a_generation_of_its_own() -> None:
    stores = [loaded(KEYS[:10]) for _ in range(3)]
    generations = [words_of(store, KEYS[:10])[1] for store in stores]
    stores[0].replace(stores[0].new_content(10))
    stores[0].upsert(KEYS[:10], ROWS[:10])
    generations.append(words_of(stores[0], KEYS[:10])[1])
    stores[0].upsert(KEYS[:1000], ROWS[:1000])  # a larger index
    assert words_of(stores[0], KEYS[:10])[1] == generations[-1]
    with pytest.raises(KeyboardInterrupt), stores[1].write_lock.writing():
        raise KeyboardInterrupt
    stores[1].upsert(KEYS[:1], ROWS[:1])
    generations.append(words_of(stores[1], KEYS[:10])[1])
    assert len(set(generations)) == 5 and min(generations) > 0
