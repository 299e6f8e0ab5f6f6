"""The embedding cache against its oracle: every way, score and row, on the CPU and (marker gpu) on a device."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from typing import Any

import numpy as np
import pytest
from support.cache_bench import DEFAULT, DIM, Bench, ints
from support.cache_pairs import OPERATIONS, Pair, _alternate_set_of, _set_of, primary_in
from support.internals import renew_generation, set_writes
from support.oracles import EXTREME_64, assert_same_bits, rows_of
from support.waiting import HANG_SECONDS, Span, join_all, wait_until

from hps_numba.cache.backends import CpuBackend
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.cache.sizing import index_sets
from hps_numba.cache.store_link import StoreLink
from hps_numba.errors import ArrayError, CapacityError, ClosedError, ConfigError, KeyDtypeError
from hps_numba.kernels.cache.bulk_load import place_keys
from hps_numba.kernels.layouts.cache import GUARD_ENTERED, GUARD_LEFT, OVERFLOW, SET_BYTES, STATE_BYTES, STATE_HOST
from hps_numba.kernels.layouts.host_store import GENERATION_WRITES
from hps_numba.kernels.policies._load import load_policy
from hps_numba.storage.host.store import HostStore


def keys_of_set(sets: int, expected: int, count: int) -> list[int]:
    primary = primary_in(sets)
    return [key for key in range(200 * sets) if primary(key)[0] == expected][:count]


# -- any operations ---------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "dim"), [("lru", 1), ("lfu", 3), ("fifo", 16), ("lru", 17)])
def test_any_sequence_of_operations_equals_the_oracle(bench: Bench, policy: str, dim: int) -> None:
    pair = Pair(bench, policy, dim, seed=dim)
    for _ in range(150):
        getattr(pair, pair.rng.choice(OPERATIONS))()
        pair.check()
    entries = pair.oracle.dump(0, pair.sets)
    assert len(entries) > 10
    rows, missing = pair.cache.query(ints(entry.key for entry in entries))
    assert not len(missing)
    assert_same_bits(rows, np.stack([entry.row for entry in entries]))


# -- lookups ----------------------------------------------------------------------------------


def test_extreme_keys_are_ordinary_keys(bench: Bench) -> None:
    keys = ints(EXTREME_64)
    cache = bench.cache(bench.store(keys), 40)
    for _ in range(2):
        assert_same_bits(cache.lookup_arrays(keys), rows_of(keys, DIM))
    assert cache.counters().misses == len(keys)
    assert cache.erase(keys) == len(keys)
    assert cache.resident() == 0


def test_extreme_keys_in_no_tier_get_the_default(bench: Bench) -> None:
    cache = bench.cache(bench.store(range(5)), 40)
    out = cache.lookup_arrays(ints(EXTREME_64[1:2] + EXTREME_64[3:]))
    assert (out == np.float32(DEFAULT)).all()
    assert cache.counters().absent == len(out)


def test_empty_calls_do_nothing(bench: Bench) -> None:
    cache = bench.cache(bench.store(range(5)), 40)
    nothing = ints([])
    assert cache.lookup_arrays(nothing).shape == (0, DIM)
    rows, missing = cache.query(nothing)
    assert rows.shape == (0, DIM) and len(missing) == 0
    cache.insert(nothing, np.empty((0, DIM), np.float32))
    cache.update(nothing)
    cache.update(nothing, np.empty((0, DIM), np.float32))
    assert cache.erase(nothing) == 0
    assert len(cache.dump(1, 1)) == 0
    assert cache.counters().calls == 0


def test_duplicates_in_a_batch_are_inserted_once(bench: Bench) -> None:
    cache = bench.cache(bench.store(range(5)), policy="lfu", set_count=2)
    keys = ints([3, 1, 3, 3, 1, 99, 99])
    assert_same_bits(cache.lookup_arrays(keys)[:5], rows_of(keys[:5], DIM))
    assert {entry.key: entry.score for entry in cache.entries()} == {1: 2, 3: 3}
    cache.lookup_arrays(keys)
    assert {entry.key: entry.score for entry in cache.entries()} == {1: 4, 3: 6}
    assert cache.counters().inserted == 2


def test_default_rows_are_never_cached(bench: Bench) -> None:
    store = bench.store([1])
    cache = bench.cache(store, 40)
    assert (cache.lookup_arrays(ints([7, 7])) == np.float32(DEFAULT)).all()
    assert cache.resident() == 0
    store.upsert(ints([7]), rows_of([7], DIM))
    assert_same_bits(cache.lookup_arrays(ints([7])), rows_of([7], DIM))
    assert cache.counters().absent == 2


def test_without_a_store_only_what_was_inserted_is_found(bench: Bench) -> None:
    cache = bench.cache(None, 40)
    keys = ints([1, 2])
    cache.insert(keys, rows_of(keys, DIM))
    cache.insert(keys, rows_of(keys, DIM, 1))  # present: touched only
    expected = np.vstack([rows_of(keys, DIM), np.full((1, DIM), DEFAULT, np.float32)])
    assert_same_bits(cache.lookup_arrays(ints([1, 2, 3])), expected)
    assert cache.warm() == 0


def test_workspace_grows_with_larger_batches(bench: Bench) -> None:
    keys = np.arange(5000)
    cache = bench.cache(bench.store(keys), 6000)
    for n in (1, 300, 5000, 20):
        assert_same_bits(cache.lookup_arrays(keys[:n]), rows_of(keys[:n], DIM))
    assert cache.bytes > 6000 * 4 * DIM


class Addresses:
    """Raw calls on NumPy arrays of the CPU."""

    def __init__(self, cache: EmbeddingCache) -> None:
        self.cache = cache

    def lookup(self, keys: np.ndarray, out: np.ndarray, **options: Any) -> np.ndarray:
        self.cache.lookup(keys.ctypes.data, len(keys), out.ctypes.data, 0, **options)
        return out


@pytest.mark.parametrize(
    ("form", "dtype", "keys", "known"),
    [
        ("int32", np.int32, [-1, 5, -(2**31)], [-1, 5, -(2**31)]),
        ("uint32", np.uint32, [2**32 - 1, 5], [2**32 - 1, 5]),
        ("checked32_in_int64", np.int64, [2**32 - 1, 5], [2**32 - 1, 5]),
    ],
)
def test_lookup_accepts_every_key_form(cpu_bench: Bench, form: str, dtype: Any, keys: list[int], known: list[int]) -> None:
    call = Addresses(cpu_bench.cache(cpu_bench.store(known), 40))
    for _ in range(2):
        out = call.lookup(np.array(keys, dtype), np.empty((len(keys), DIM), np.float32), key_form=form)
        assert_same_bits(out, rows_of(ints(known), DIM))


def test_key_outside_32_bits_is_absent_with_checked_32_bit_keys(cpu_bench: Bench) -> None:
    keys = ints([-1, 2**32])
    cache = cpu_bench.cache(cpu_bench.store(keys), 40)
    out = Addresses(cache).lookup(keys, np.empty((2, DIM), np.float32), key_form="checked32_in_int64")
    assert (out == np.float32(DEFAULT)).all()
    assert cache.resident() == 0


def test_lookup_writes_half_precision_answers(cpu_bench: Bench) -> None:
    keys = np.arange(20)
    call = Addresses(cpu_bench.cache(cpu_bench.store(keys), 40))
    rows = rows_of(keys, DIM)
    for _ in range(2):  # from the host store, from the cache
        half = call.lookup(keys, np.empty((20, DIM), np.float16), out_type="float16")
        np.testing.assert_array_equal(half, rows.astype(np.float16))
        brain = call.lookup(keys, np.empty((20, DIM), np.uint16), out_type="bfloat16")
        np.testing.assert_allclose((brain.astype(np.uint32) << 16).view(np.float32), rows, rtol=2**-8)


def test_lookup_lists_positions_of_absent_keys(cpu_bench: Bench) -> None:
    cache = cpu_bench.cache(cpu_bench.store(range(10)), 40)
    out, absent = np.empty((4, DIM), np.float32), np.full(5, -1, np.int64)
    for keys, expected in (([50, 1, 60, 2], [0, 2]), ([1, 2, 3, 4], []), ([9, 9, 9, 70], [3])):
        Addresses(cache).lookup(ints(keys), out, absent_list=absent.ctypes.data)
        assert absent[1 : 1 + absent[0]].tolist() == expected
    cache.lookup(0, 0, 0, 0, absent_list=absent.ctypes.data)
    assert absent[0] == 0


def test_a_captured_call_keeps_its_workspace(cpu_bench: Bench) -> None:
    cache = cpu_bench.cache(cpu_bench.store(range(10)), 40)
    before = cache.bytes
    out = Addresses(cache).lookup(np.arange(10), np.empty((10, DIM), np.float32), capturing=True)
    assert_same_bits(out, rows_of(np.arange(10), DIM))
    captured = cache.bytes - before
    assert captured > 0
    Addresses(cache).lookup(np.arange(10), out, capturing=True)
    assert cache.bytes - before == 2 * captured


# -- rows in low precision ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row_type", "dim", "relative", "absolute"),
    [("float16", 16, 2**-11, 0), ("bfloat16", 3, 2**-8, 0), ("int8", 3, 0, 0.01), ("float8_e4m3", 16, 0, 0.05)],
)
def test_low_precision_rows_are_close_and_stable(
    bench: Bench, row_type: str, dim: int, relative: float, absolute: float
) -> None:
    store = bench.store(dim=dim)
    keys = np.arange(50)
    rows = np.random.default_rng(1).uniform(-1, 1, (50, dim)).astype(np.float32)
    rows[0], rows[1] = 0, -0.5
    store.upsert(keys, rows)
    cache = bench.cache(store, 200, row_type=row_type)
    assert_same_bits(cache.lookup_arrays(keys), rows)  # from the host store
    once, again = cache.lookup_arrays(keys), cache.lookup_arrays(keys)
    assert cache.counters().misses == 50
    np.testing.assert_allclose(once, rows, rtol=relative, atol=absolute or 2**-25)
    assert_same_bits(once, again)
    cache.refresh()
    assert_same_bits(cache.lookup_arrays(keys), once)


# -- the host store ---------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["upsert", "erase"])
def test_row_changed_between_lookup_and_insertion_is_not_inserted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    store = bench.store([5, 6])
    cache = bench.cache(store, 40)
    finish = cache.parts.plan.finish_lookup

    def change_and_finish(*args: Any) -> None:
        cache.backend.synchronize(cache.parts.state.stream)  # the lookup has read the old row
        if change == "upsert":
            store.upsert(ints([5]), rows_of([5], DIM, 1))
        else:
            store.erase(ints([5]))
        cache.update(ints([5]))  # finds nothing yet
        finish(*args)

    with monkeypatch.context() as patch:
        patch.setattr(cache.parts.plan, "finish_lookup", change_and_finish)
        assert_same_bits(cache.lookup_arrays(ints([5, 6])), rows_of([5, 6], DIM))
    assert [entry.key for entry in cache.entries()] == [6]
    assert cache.counters().stale_dropped == 1
    new = rows_of([5], DIM, 1) if change == "upsert" else np.full((1, DIM), DEFAULT, np.float32)
    assert_same_bits(cache.lookup_arrays(ints([5])), new)


@pytest.mark.parametrize("change", ["replaced twice", "slot used 2**23 times", "interrupted"])
def test_an_old_row_under_an_index_word_that_returned_is_not_inserted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Word and address of the rows are those of the lookup again, and the row is another one."""
    store = bench.store([5, 6])
    cache = bench.cache(store, 40)
    finish = cache.parts.plan.finish_lookup
    rows, words = np.empty((2, DIM), np.float32), np.empty((2, 2), np.int64)

    def change_and_finish(*args: Any) -> None:
        cache.backend.synchronize(cache.parts.state.stream)
        store.gather(ints([5, 6]), rows, words[0])
        # in place: as another version at the same address, or a slot that is used again, would have it
        store.versions.current.rows_view(0, 2)[:] = rows_of([5, 6], DIM, 1)
        if change == "replaced twice":
            renew_generation(store)
        elif change == "slot used 2**23 times":
            set_writes(store, GENERATION_WRITES)
        else:
            with contextlib.suppress(KeyboardInterrupt), store.write_lock.writing():
                raise KeyboardInterrupt
        store.upsert(ints([7]), rows_of([7], DIM))
        store.gather(ints([5, 6]), rows, words[1])
        assert (words[0] == words[1]).all()
        finish(*args)

    with monkeypatch.context() as patch:
        patch.setattr(cache.parts.plan, "finish_lookup", change_and_finish)
        cache.lookup_arrays(ints([5, 6]))
    assert cache.entries() == [] and cache.counters().stale_dropped == 2
    assert_same_bits(cache.lookup_arrays(ints([5, 6])), rows_of([5, 6], DIM, 1))


def test_lookups_follow_a_store_that_grows_and_is_replaced(bench: Bench) -> None:
    store = bench.store(range(4), growth_bytes=4 * DIM)
    cache = bench.cache(store, 100)
    for end in (4, 50, 700, 3000):
        keys = np.arange(end)
        store.upsert(keys, rows_of(keys, DIM))
        assert_same_bits(cache.lookup_arrays(keys), rows_of(keys, DIM))
    sibling = store.sibling()
    sibling.upsert(np.arange(20), rows_of(np.arange(20), DIM, 1))
    store.adopt(sibling)
    cache.refresh()
    keys = np.arange(40)
    expected = np.vstack([rows_of(keys[:20], DIM, 1), np.full((20, DIM), DEFAULT, np.float32)])
    assert_same_bits(cache.lookup_arrays(keys), expected)


def test_lookups_follow_more_indexes_than_the_ring_has(bench: Bench) -> None:
    store = bench.store(range(4))
    cache = bench.cache(store, 100)
    for stamp in range(70):  # more than the ring of descriptors has
        content = store.new_content(1)
        content.rows_view(0, 1)[:] = rows_of([9], DIM, stamp % 3)
        content.fill(ints([9]), 1)
        store.replace(content)
        cache.update(ints([9]))
        assert_same_bits(cache.lookup_arrays(ints([9])), rows_of([9], DIM, stamp % 3))


def test_closed_store_answers_with_defaults(bench: Bench) -> None:
    store = bench.store(range(4))
    cache = bench.cache(store, 100)
    cache.lookup_arrays(ints([1]))
    store.close()
    expected = np.vstack([rows_of([1], DIM), np.full((1, DIM), DEFAULT, np.float32)])
    assert_same_bits(cache.lookup_arrays(ints([1, 2])), expected)
    with pytest.raises(ClosedError):
        cache.warm()


# -- warming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 16, 1000])
def test_cache_of_a_whole_table_holds_every_row(bench: Bench, rows: int) -> None:
    keys = np.random.default_rng(2).permutation(np.arange(-500, 5000))[:rows]
    cache = bench.cache(bench.store(keys), rows, whole=True)
    assert cache.warm() == rows
    assert_same_bits(cache.lookup_arrays(keys), rows_of(keys, DIM))
    assert cache.counters().misses == 0
    assert sorted(cache.dump().tolist()) == sorted(keys.tolist())


def test_overflowed_rows_are_updated_and_erased(bench: Bench) -> None:
    keys = ints(keys_of_set(3, 1, 14))  # set 1 has 10 ways, four rows are in set 2
    store = bench.store(keys)
    cache = bench.cache(store, 14, whole=True, set_count=3)
    assert cache.warm() == 14
    store.upsert(keys, rows_of(keys, DIM, 1))
    cache.update(keys)
    assert_same_bits(cache.lookup_arrays(keys), rows_of(keys, DIM, 1))
    assert cache.counters().misses == 0
    assert cache.erase(keys) == 14


@pytest.mark.parametrize("kind", ["static", "uvm"])
def test_fixed_caches_hold_their_rows(bench: Bench, kind: str) -> None:
    keys = np.arange(300)
    store = bench.store(keys)
    cache = bench.cache(store, 300, kind=kind, pagelock=True)
    assert cache.warm() == 300
    asked = np.arange(310)
    expected = np.vstack([rows_of(keys, DIM), np.full((10, DIM), DEFAULT, np.float32)])
    assert_same_bits(cache.lookup_arrays(asked), expected)
    assert (cache.counters().misses, cache.counters().inserted) == (10, 0)
    store.upsert(ints([5, 305]), rows_of([5, 305], DIM, 2))
    cache.update(ints([5, 305]))
    assert_same_bits(cache.lookup_arrays(ints([5, 305])), rows_of([5, 305], DIM, 2))
    rows, missing = cache.query(ints([305, 7]))
    assert missing.tolist() == [0]
    assert_same_bits(rows, np.vstack([np.zeros((1, DIM), np.float32), rows_of([7], DIM)]))
    with pytest.raises(ConfigError, match="dynamic"):
        cache.insert(ints([400]), rows_of([400], DIM))


def test_static_cache_refuses_more_rows_than_its_capacity(bench: Bench) -> None:
    cache = bench.cache(bench.store(range(11)), 10, kind="static")
    with pytest.raises(CapacityError, match="expected at most 10 rows, as the static cache has to hold all, got 11"):
        cache.warm()


def test_uvm_holds_as_many_as_fit_and_serves_all(bench: Bench) -> None:
    cache = bench.cache(bench.store(range(100)), 40, kind="uvm")
    assert cache.warm() == 40
    assert_same_bits(cache.lookup_arrays(np.arange(100)), rows_of(np.arange(100), DIM))
    assert (cache.counters().misses, cache.resident()) == (60, 40)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cache_in_use_can_be_warmed_again(bench: Bench, kind: str) -> None:
    keys = np.arange(100)
    store = bench.store(keys)
    cache = bench.cache(store, 400, kind=kind)
    assert cache.warm() == 100
    cache.lookup_arrays(keys)
    sibling = store.sibling()
    sibling.upsert(keys[:60], rows_of(keys[:60], DIM, 1))
    store.adopt(sibling)
    assert cache.warm() == 60
    before = cache.counters().misses
    assert_same_bits(cache.lookup_arrays(keys[:60]), rows_of(keys[:60], DIM, 1))
    assert cache.counters().misses == before


def test_warming_stops_when_sets_are_full(bench: Bench) -> None:
    keys = np.arange(200)
    cache = bench.cache(bench.store(keys), set_count=3, policy="lfu")
    warm = cache.warm()
    assert 20 < warm <= 30
    assert {entry.score for entry in cache.entries()} == {1}
    assert_same_bits(cache.lookup_arrays(keys), rows_of(keys, DIM))


def test_number_of_sets_follows_from_rows() -> None:
    assert index_sets(1000, fixed=False, whole=False) == 100
    assert index_sets(1001, fixed=False, whole=False) == 101
    assert index_sets(1000, fixed=False, whole=True) == 125
    assert index_sets(600, fixed=True, whole=False) == 100
    assert index_sets(0, fixed=False, whole=False) == 2


# -- bad calls, the end -------------------------------------------------------------------------


def test_bad_arguments_of_calls_are_refused(bench: Bench) -> None:
    cache = bench.cache(bench.store(range(4)), 40)
    for first, stop in ((-1, 2), (3, 2), (0, 5)):
        with pytest.raises(ConfigError, match="expected a range within 0 to 4"):
            cache.dump(first, stop)
        with pytest.raises(ConfigError, match="expected a range within 0 to 4"):
            cache.refresh(first, stop)
    with pytest.raises(KeyDtypeError, match=r"int32\[4\]"):
        cache.lookup_arrays(np.arange(4, dtype=np.int32))
    with pytest.raises(ArrayError, match=r"rows: expected float32\[\d+, \d+\], got float64"):
        cache.insert(np.arange(2), np.zeros((2, DIM)))
    with pytest.raises(ArrayError, match="out: expected contiguous float32"):
        cache.lookup_arrays(np.arange(2), np.zeros((2, DIM + 1), np.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "stochastic"}, "stochastic"),
        ({"row_type": "int4"}, "int4"),
        ({"rows": -1}, "rows of the cache: expected 0 or more, got -1"),
        ({"buffers": 0}, "buffers of the cache: expected 1 or more, got 0"),
    ],
)
def test_bad_options_are_refused(cpu_bench: Bench, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cpu_bench.cache(None, **options)
    with pytest.raises(ConfigError, match=f"width of the cache: expected {DIM}, as of its host store, got 4"):
        EmbeddingCache(4, 10, device=None, policy=load_policy("lru"), store=cpu_bench.store())


def test_calls_after_close_raise(bench: Bench) -> None:
    store = bench.store(range(4))
    cache = bench.cache(store, 40)
    cache.lookup_arrays(np.arange(4))
    cache.close()
    cache.close()
    for call in (cache.dump, cache.clear, cache.warm, cache.counters, lambda: cache.lookup_arrays(np.arange(4))):
        with pytest.raises(ClosedError):
            call()
    store.upsert(np.arange(500), rows_of(np.arange(500), DIM))  # nobody follows its indexes any more
    store.close()


def test_failure_between_kernels_leaves_the_cache_usable(cpu_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cpu_bench.cache(cpu_bench.store(range(20)), 40, buffers=1)

    def fails(*args: Any) -> None:
        raise CapacityError("between two kernels")

    with monkeypatch.context() as patch:
        patch.setattr(cache.parts.plan, "finish_lookup", fails)
        for _ in range(3):
            with pytest.raises(CapacityError, match="between"):
                cache.lookup_arrays(np.arange(10))
    assert cache.resident() == 0
    assert_same_bits(cache.lookup_arrays(np.arange(10, 20)), rows_of(np.arange(10, 20), DIM))
    assert sorted(cache.dump().tolist()) == list(range(10, 20))


# -- threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_concurrent_lookups_and_writes_see_whole_fresh_rows(bench: Bench, kind: str) -> None:
    keys = np.arange(60)
    store = bench.store(keys)
    cache = bench.cache(store, kind=kind, rows=60, set_count=None if kind == "static" else 4, buffers=2)
    cache.warm()
    cache.lookup_arrays(keys)  # kernels are compiled before the clock starts
    cache.update(keys)
    told = [0]  # the stamp that every cache was told of
    problems: list[str] = []
    answers: list[int] = []
    span = Span(1, lambda: told[0] > 3 and len(answers) > 10)

    def look() -> None:
        rng = np.random.default_rng()
        while span.goes_on() and not problems:
            asked = rng.choice(keys, 25)
            least = told[0]
            rows = cache.lookup_arrays(asked)
            stamps = np.log2(rows[:, 0] / rows_of(asked, DIM)[:, 0])
            whole = all((row == rows_of(key, DIM, int(s))).all() for key, row, s in zip(asked, rows, stamps, strict=True))
            if not whole or (stamps < least).any():
                problems.append(f"{stamps} after {least}, whole: {whole}")
            answers.append(len(asked))

    def write() -> None:
        stamp = 0
        while span.goes_on() and stamp < 100:
            stamp += 1
            store.upsert(keys, rows_of(keys, DIM, stamp))
            cache.update(keys)
            told[0] = stamp
            if stamp % 7 == 0:
                cache.refresh()

    threads = [threading.Thread(target=look) for _ in range(3)] + [threading.Thread(target=write)]
    for thread in threads:
        thread.start()
    join_all(*threads)
    assert problems == []
    assert told[0] > 3 and len(answers) > 10
    assert_same_bits(cache.lookup_arrays(keys), rows_of(keys, DIM, told[0]))


def test_threads_share_one_workspace(cpu_bench: Bench) -> None:
    keys = np.arange(2000)
    cache = cpu_bench.cache(cpu_bench.store(keys), 1000, buffers=1)
    answers: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: answers.append(cache.lookup_arrays(keys))) for _ in range(6)]
    for thread in threads:
        thread.start()
    join_all(*threads)
    assert len(answers) == 6
    for answer in answers:
        assert_same_bits(answer, rows_of(keys, DIM))
    assert len(cache.parts.workspaces.pool.workspaces) == 1


# -- the guard of host memory ---------------------------------------------------------------------


class Linked:
    """A link as a device has it, over memory of the process, whose warps are played by the test."""

    def __init__(self, store: HostStore) -> None:
        backend = CpuBackend()
        self.memory = backend.allocate(STATE_BYTES, "state")
        self.link = StoreLink(backend, self.memory.address, store)
        self.store = store
        store.epochs.add_guard(self.link)

    def enter(self, stripe: int) -> None:
        ctypes.c_uint32.from_address(self.memory.address + GUARD_ENTERED + 4 * stripe).value += 1

    def leave(self, stripe: int) -> None:
        ctypes.c_uint32.from_address(self.memory.address + GUARD_LEFT + 4 * stripe).value += 1

    def is_free(self, tag: int) -> bool:
        """Now or a moment later."""
        return self.store.epochs.wait(tag, HANG_SECONDS)

    def is_kept(self, tag: int) -> bool:
        """For some time."""
        return not self.store.epochs.wait(tag, 0.02)


def test_memory_is_kept_while_a_warp_may_read_it(cpu_bench: Bench) -> None:
    store = cpu_bench.store(range(4))
    linked = Linked(store)
    assert linked.is_free(store.epochs.advance())
    linked.enter(3)
    linked.enter(9)
    tag = store.epochs.advance()
    assert linked.is_kept(tag)
    linked.leave(3)
    assert linked.is_kept(tag)
    linked.leave(9)
    assert linked.is_free(tag)
    linked.link.close()


def test_memory_is_freed_after_each_stripe_was_empty_once(cpu_bench: Bench) -> None:
    store = cpu_bench.store(range(4))
    linked = Linked(store)
    linked.enter(1)
    tag = store.epochs.advance()
    assert linked.is_kept(tag)
    linked.enter(2)
    linked.leave(1)
    assert linked.is_free(tag)  # stripe 2 was seen empty in this round before it was entered
    linked.leave(2)
    linked.link.close()


def test_closed_link_keeps_no_memory(cpu_bench: Bench) -> None:
    store = cpu_bench.store(range(4))
    linked = Linked(store)
    linked.enter(1)
    assert linked.is_kept(store.epochs.advance())
    linked.link.close()
    assert linked.is_free(store.epochs.advance())


def test_a_link_that_closes_while_a_writer_asks_it_is_not_polled(cpu_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    linked = Linked(cpu_bench.store(range(4)))
    link, lock = linked.link, linked.link._polling

    class ClosedMeanwhile:
        def acquire(self, blocking: bool) -> bool:
            link._polling = lock
            link.close()
            return lock.acquire(blocking)

        def release(self) -> None:
            lock.release()

    link._polling = ClosedMeanwhile()  # type: ignore[assignment]
    monkeypatch.setattr(link, "_poll", lambda now: pytest.fail("polled a device whose memory may be gone"))
    assert link.oldest(7) == 7


def test_state_points_to_the_index_in_force(cpu_bench: Bench) -> None:
    store = cpu_bench.store(range(4))
    linked = Linked(store)
    at = linked.memory.address + STATE_HOST

    def block() -> int:
        descriptor = ctypes.c_int64.from_address(at).value
        return ctypes.c_int64.from_address(descriptor).value if descriptor else 0

    first = block()
    assert first == store.block
    store.upsert(np.arange(500), rows_of(np.arange(500), DIM))
    assert block() == store.block != first
    store.close()
    assert block() == 0


def test_an_index_that_is_published_while_a_hold_ends_is_followed(cpu_bench: Bench) -> None:
    store = cpu_bench.store(range(4))
    linked = Linked(store)  # it holds the memory that the link writes to
    link = linked.link
    link.hold()
    keys = np.arange(500)
    writer = threading.Thread(target=lambda: store.upsert(keys, rows_of(keys, DIM)))
    point_to = link.point_to

    def slow_to_point(block: int) -> bool:
        link.point_to = point_to  # type: ignore[method-assign]
        told = point_to(block)
        writer.start()
        enough = time.perf_counter() + 0.1
        wait_until(lambda: store.block != block and (not writer.is_alive() or time.perf_counter() > enough))
        return told

    link.point_to = slow_to_point  # type: ignore[assignment, method-assign]
    assert link.release()
    join_all(writer)
    assert link.block == store.block
    link.close()


# -- where keys are that do not fit into their primary set ----------------------------------------------------------------


@pytest.mark.parametrize(("sets", "n"), [(2, 20), (3, 27), (100, 950), (1000, 9000), (1000, 9700)])
def test_bulk_load_places_each_key_in_its_primary_or_alternate_set(sets: int, n: int) -> None:
    keys = np.random.default_rng(sets).choice(1 << 62, n, replace=False) - (1 << 61)
    lines = np.zeros(sets * SET_BYTES, np.uint8)
    placed = place_keys(lines.ctypes.data, sets, keys.ctypes.data, n, 0, True, True)
    assert placed == n
    words = lines.view(np.int64).reshape(sets, 2, 8)
    scores = lines.view(np.uint32).reshape(sets, 2, 16)[:, :, 10:15]
    meta = lines.view(np.uint32).reshape(sets, 2, 16)[:, :, 15]
    found = {}
    for at, line, way in np.argwhere((meta[:, :, None] >> np.arange(5)) & 1):
        key = int(words[at, line, way])
        assert key not in found
        found[key] = int(scores[at, line, way])
        primary, alternate = _set_of(0, sets, key) // SET_BYTES, _alternate_set_of(0, sets, key) // SET_BYTES
        assert at in (primary, alternate) and primary != alternate
        if at != primary:
            assert (meta[primary] & OVERFLOW).all()
    assert found == {int(key): number for number, key in enumerate(keys)}  # each with its own score


def test_bulk_load_leaves_out_keys_that_find_no_way() -> None:
    lines, keys = np.zeros(2 * SET_BYTES, np.uint8), np.arange(30)
    assert place_keys(lines.ctypes.data, 2, keys.ctypes.data, 30, 0, True, True) == 20
    alone = np.zeros(2 * SET_BYTES, np.uint8)
    assert place_keys(alone.ctypes.data, 2, keys.ctypes.data, 20, 0, True, False) < 20  # primary sets only, of 20 keys
    assert not (alone.view(np.uint32).reshape(-1, 16)[:, 15] & OVERFLOW).any()


def test_overflowed_rows_of_a_whole_table_are_found(bench: Bench) -> None:
    cache = bench.cache(bench.store(range(15_900)), 16_000, whole=True, set_count=1600)  # nearly every set overflows
    assert cache.warm() == 15_900
    keys = np.random.default_rng(0).permutation(16_000)
    for part in (keys[:9], keys[:3000], keys):
        rows = cache.lookup_arrays(part)
        assert_same_bits(rows[part < 15_900], rows_of(part[part < 15_900], DIM))
        assert (rows[part >= 15_900] == np.float32(DEFAULT)).all()
    assert cache.counters().misses == sum(int((part >= 15_900).sum()) for part in (keys[:9], keys[:3000], keys))
    some = ints(range(0, 15_900, 7))
    cache.update(some, rows_of(some, DIM, 3))
    assert_same_bits(cache.query(some)[0], rows_of(some, DIM, 3))
    assert cache.erase(some) == len(some)
    assert len(cache.query(some)[1]) == len(some)
