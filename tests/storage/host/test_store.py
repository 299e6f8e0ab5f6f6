"""The host hash store against a dict: any order of writes, growth, bounds, versions."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hps_numba.device.host_memory import PlainHostAllocator
from hps_numba.errors import CapacityError, ClosedError, HpsError
from hps_numba.kernels.layouts.host_store import DEFAULT_LOAD, MAX_LOAD
from hps_numba.storage.host.store import HostStore
from hps_numba.storage.host.store_bytes import plan_store

EXTREMES = [0, -1, 1, 2**63 - 1, -(2**63), 2**32 - 1, 2**32, 2**31]
keys_strategy = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(0, 40), st.sampled_from(EXTREMES))


def rows_for(keys, dim, stamp=0):
    """A row that tells its key and when it was written."""
    base = np.asarray(keys, np.int64).astype(np.float32)[:, None]
    return base * 3 + np.arange(dim, dtype=np.float32) + np.float32(stamp)


def ints(values):
    return np.asarray(values, np.int64)


def assert_same(store, truth, dim, default=-7.5):
    """Every key of the dict has its row; keys that are not in it have the default; a scan gives exactly the dict."""
    absent = [key for key in [*range(-5, 45), *EXTREMES] if key not in truth]
    keys = ints([*truth, *absent])
    out = np.full((len(keys), dim), np.nan, np.float32)
    misses = np.empty(len(keys), np.int64)
    missing = store.lookup(keys, out, default, misses)
    assert len(store) == len(truth)
    assert misses[:missing].tolist() == list(range(len(truth), len(keys)))
    assert np.array_equal(out[len(truth) :], np.full((len(absent), dim), default, np.float32))
    if truth:
        assert np.array_equal(out[: len(truth)], np.stack(list(truth.values())))
    assert store.contains(keys).tolist() == [True] * len(truth) + [False] * len(absent)
    scanned = {int(k): row for some, rows in store.scan(7) for k, row in zip(some, rows, strict=True)}
    assert scanned.keys() == truth.keys()
    assert all(np.array_equal(scanned[key], truth[key]) for key in truth)


operation = st.tuples(st.sampled_from(["upsert", "update", "erase", "replace"]), st.lists(keys_strategy, max_size=60))


@settings(max_examples=150, deadline=None)
@given(operations=st.lists(operation, max_size=12), dim=st.sampled_from([1, 3, 16, 17]), batch=st.sampled_from([1, 5, 64]))
def test_any_interleaving_equals_a_dict(operations, dim, batch):
    store, truth = HostStore(dim, growth_bytes=4 * dim, batch_rows=batch), {}
    try:
        for stamp, (verb, keys) in enumerate(operations):
            rows = rows_for(keys, dim, stamp)
            if verb == "upsert":
                assert store.upsert(ints(keys), rows) == len(set(keys) - truth.keys())
                truth.update(zip(keys, rows, strict=True))
            elif verb == "update":
                assert store.update(ints(keys), rows) == sum(key in truth for key in keys)
                truth.update({key: row for key, row in zip(keys, rows, strict=True) if key in truth})
            elif verb == "erase":
                assert store.erase(ints(keys)) == len(set(keys) & truth.keys())
                truth = {key: row for key, row in truth.items() if key not in keys}
            else:
                content = store.new_content(len(keys))
                content.rows_view(0, len(keys))[:] = rows
                content.fill(ints(keys), 1)
                store.replace(content)
                truth = dict(zip(keys, rows, strict=True))
            assert_same(store, truth, dim)
    finally:
        store.close()


@pytest.mark.parametrize("dim", [1, 2, 3, 15, 16, 17, 31, 32, 100, 128, 384, 1000])
def test_rows_of_every_width_are_copied_bit_for_bit(dim):
    bits = np.random.default_rng(dim).integers(0, 2**32, (200, dim), np.uint32)  # NaN payloads and denormals included
    keys = np.random.default_rng(1).permutation(200).astype(np.int64)
    store = HostStore(dim)
    store.upsert(keys, bits.view(np.float32))
    guard = np.full(200 * dim + 32, 7.0, np.float32)
    out = guard[16 : 16 + 200 * dim].reshape(200, dim)
    assert store.lookup(keys, out) == 0
    assert np.array_equal(out.view(np.uint32), bits)
    assert (guard[:16] == 7).all() and (guard[-16:] == 7).all()  # nothing beside the rows was written


def test_every_key_is_legal():
    keys = ints(EXTREMES)
    store = HostStore(4)
    out = np.empty((len(keys), 4), np.float32)
    assert store.lookup(keys, out, 0.5) == len(keys)
    assert (out == 0.5).all()
    store.upsert(keys, rows_for(range(len(keys)), 4))
    assert store.lookup(keys, out) == 0
    assert np.array_equal(out, rows_for(range(len(keys)), 4))


def test_duplicates_in_a_batch_last_wins_and_lookups_keep_order():
    store = HostStore(1)
    assert store.upsert(ints([5, 6, 5, 5]), np.float32([[1], [2], [3], [4]])) == 2
    out = np.empty((5, 1), np.float32)
    store.lookup(ints([6, 5, 5, 6, 7]), out, -1)
    assert out.ravel().tolist() == [2, 4, 4, 2, -1]


def test_no_keys_is_fine():
    store = HostStore(8)
    none, rows = np.empty(0, np.int64), np.empty((0, 8), np.float32)
    assert store.lookup(none, rows) == store.upsert(none, rows) == store.update(none, rows) == store.erase(none) == 0
    assert list(store.scan()) == [] and store.contains(none).shape == (0,)


def test_keys_and_rows_are_copied():
    store, row = HostStore(2), np.ones((1, 2), np.float32)
    store.upsert(ints([1]), row)
    row[:] = 9
    out = np.empty((1, 2), np.float32)
    store.lookup(ints([1]), out)
    assert (out == 1).all()
    keys, rows = next(store.scan())
    rows[:] = 5
    keys[:] = 8
    store.lookup(ints([1]), out)
    assert (out == 1).all()


def test_strided_rows_and_keys_are_taken_in_order():
    store, rows = HostStore(3), rows_for(range(20), 6)
    store.upsert(np.arange(20)[::2], rows[::2, ::2])
    out = np.empty((10, 3), np.float32)
    assert store.lookup(np.arange(0, 20, 2), out) == 0
    assert np.array_equal(out, rows[::2, ::2])


def test_wrong_shape_of_rows_names_both_shapes():
    with pytest.raises(HpsError, match=r"rows: expected shape \(2, 4\), got \(3, 4\)"):
        HostStore(4).upsert(ints([1, 2]), np.zeros((3, 4), np.float32))


def test_a_large_batch_is_split_over_threads_and_keeps_the_order_of_misses():
    n, dim = 200_000, 8
    store = HostStore(dim)
    store.upsert(np.arange(0, n, 2), rows_for(range(0, n, 2), dim))
    keys = np.random.default_rng(0).permutation(n).astype(np.int64)
    for threads in (1, 2, 5):
        out, misses = np.empty((n, dim), np.float32), np.empty(n, np.int64)
        missing = store.lookup(keys, out, -1.0, misses, threads=threads)
        odd = keys % 2 == 1
        assert misses[:missing].tolist() == np.flatnonzero(odd).tolist()
        assert (out[odd] == -1).all() and np.array_equal(out[~odd], rows_for(keys[~odd], dim))


def test_growth_keeps_load_and_frees_old_indexes():
    allocator = PlainHostAllocator()
    store = HostStore(4, allocator=allocator, growth_bytes=1 << 20)
    for start in range(0, 100_000, 1000):
        store.upsert(np.arange(start, start + 1000), rows_for(range(start, start + 1000), 4))
        assert store.index_load <= MAX_LOAD
    out = np.empty((100_000, 4), np.float32)
    assert store.lookup(np.arange(100_000), out) == 0
    assert np.array_equal(out, rows_for(range(100_000), 4))
    assert allocator.in_use < plan_store(100_000, 4).bytes * 1.5 + (2 << 20)


def test_updating_one_key_repeatedly_takes_no_more_memory():
    store = HostStore(64, growth_bytes=64 * 4)
    store.upsert(np.arange(10), np.zeros((10, 64), np.float32))
    before = store.bytes
    for value in range(500):
        store.update(ints([3]), np.full((1, 64), value, np.float32))
    assert store.bytes <= before + 4 * 64 * 4
    out = np.empty((1, 64), np.float32)
    store.lookup(ints([3]), out)
    assert (out == 499).all()


def test_inserting_and_erasing_keys_takes_no_more_memory():
    store = HostStore(8, growth_bytes=8 * 4 * 64)
    sizes = []
    for round_ in range(200):
        keys = np.arange(round_ * 100, round_ * 100 + 100)
        store.upsert(keys, rows_for(keys, 8))
        store.erase(keys)
        sizes.append(store.bytes)
    assert len(store) == 0
    assert max(sizes[20:]) <= 2 * sizes[20]


def test_a_filled_version_takes_the_planned_memory():
    allocator = PlainHostAllocator()
    store = HostStore(16, allocator=allocator)
    empty = allocator.in_use
    content = store.new_content(10_000)
    content.rows_view(0, 10_000)[:] = rows_for(range(10_000), 16)
    content.fill(np.arange(10_000), 1)
    store.replace(content)
    assert store.bytes == plan_store(10_000, 16).bytes
    assert allocator.in_use == pytest.approx(plan_store(10_000, 16).bytes, abs=empty)
    assert store.index_load == pytest.approx(DEFAULT_LOAD, rel=0.01)
    store.clear()
    assert len(store) == 0 and allocator.in_use <= empty
    store.close()


def test_duplicates_in_a_filled_version_last_wins_and_their_slots_are_used_again():
    store = HostStore(2)
    keys = ints([1, 2, 1, 3, 1, 2])
    content = store.new_content(len(keys))
    content.rows_view(0, len(keys))[:] = rows_for(range(len(keys)), 2)
    content.fill(keys, 1)
    store.replace(content)
    before = store.bytes
    out = np.empty((3, 2), np.float32)
    assert store.lookup(ints([1, 2, 3]), out) == 0
    assert np.array_equal(out, rows_for([4, 5, 3], 2))
    store.upsert(ints([7, 8, 9]), rows_for([7, 8, 9], 2))
    assert store.bytes == before


@pytest.mark.parametrize("policy", ["evict_random", "evict_least_used", "evict_oldest"])
def test_bound_is_kept_and_trimmed_to_the_target(policy):
    store = HostStore(2, max_rows=100, target=0.7, policy=policy, batch_rows=10)
    for start in range(0, 1000, 10):
        store.upsert(np.arange(start, start + 10), rows_for(range(start, start + 10), 2))
        assert len(store) <= 100
        if start == 100:
            assert len(store) == 70
    assert store.evicted == 1000 - len(store)
    for keys, rows in store.scan():
        assert np.array_equal(rows, rows_for(keys, 2))


def test_least_used_keeps_rows_looked_up_most():
    store = HostStore(1, max_rows=100, target=0.5, policy="evict_least_used")
    store.upsert(np.arange(100), rows_for(range(100), 1))
    for often in range(1, 4):
        keys = np.arange(50 + 10 * often, 100)
        store.lookup(keys, np.empty((len(keys), 1), np.float32))
    store.update(np.arange(90, 100), rows_for(range(90, 100), 1))  # an update does not make a row unpopular
    store.upsert(ints([1000]), rows_for([1000], 1))
    kept = store.contains(np.arange(100))
    assert len(store) == 50
    assert kept[60:].all() and kept[:60].sum() + store.contains(ints([1000]))[0] == 10


def test_oldest_keeps_rows_written_or_looked_up_last():
    store = HostStore(1, max_rows=100, target=0.5, policy="evict_oldest", batch_rows=10)
    for start in range(0, 100, 10):
        store.upsert(np.arange(start, start + 10), rows_for(range(start, start + 10), 1))
    store.lookup(np.arange(10), np.empty((10, 1), np.float32))
    store.upsert(ints([1000]), rows_for([1000], 1))
    assert len(store) == 50
    kept = set(np.flatnonzero(store.contains(np.arange(100))))
    assert kept >= set(range(10)) and kept >= set(range(70, 100)) and store.contains(ints([1000]))[0]
    assert not kept & set(range(10, 60))


def test_random_eviction_covers_all_rows_and_differs_between_rounds():
    survivors = []
    for seed in range(2):
        store = HostStore(1, max_rows=10_000, target=0.5, policy="evict_random", seed=seed)
        store.upsert(np.arange(10_001), np.zeros((10_001, 1), np.float32))
        kept = store.contains(np.arange(10_001))
        assert len(store) == 5000
        assert all(400 < part.sum() < 600 for part in np.array_split(kept, 10))  # 500 +- 6 sigma
        survivors.append(kept)
    assert 0.4 < (survivors[0] == survivors[1]).mean() < 0.6


def test_memory_that_the_machine_lacks_is_refused_and_nothing_breaks(monkeypatch):
    store = HostStore(1024, growth_bytes=16 << 20)
    store.upsert(np.arange(100), rows_for(range(100), 1024))
    monkeypatch.setattr("hps_numba.device.host_memory.available_bytes", lambda: 0)
    with pytest.raises(CapacityError, match="free"):
        store.upsert(np.arange(100, 10_000), rows_for(range(100, 10_000), 1024))
    monkeypatch.undo()
    out = np.empty((100, 1024), np.float32)
    assert store.lookup(np.arange(100), out) == 0 and np.array_equal(out, rows_for(range(100), 1024))
    assert store.upsert(np.arange(100, 10_000), rows_for(range(100, 10_000), 1024)) >= 0
    assert len(store) == 10_000


def test_a_growth_step_smaller_than_a_row_is_refused():
    with pytest.raises(CapacityError, match="allocation_rate"):
        HostStore(16, growth_bytes=63)


def use_and_close(allocator):
    store = HostStore(4, allocator=allocator)
    store.upsert(np.arange(1000), rows_for(range(1000), 4))
    store.close()
    store.close()
    out = np.empty((1, 4), np.float32)
    for call in (
        lambda: store.lookup(ints([1]), out),
        lambda: store.contains(ints([1])),
        lambda: store.upsert(ints([1]), out),
        lambda: store.erase(ints([1])),
        lambda: list(store.scan()),
        lambda: store.clear(),
    ):
        with pytest.raises(ClosedError):
            call()


def test_closed_store_raises_and_releases_memory():
    allocator = PlainHostAllocator()
    use_and_close(allocator)
    gc.collect()
    assert allocator.in_use == 0
