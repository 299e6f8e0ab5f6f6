"""Missed rows that threads of the host help to bring: the same answers and the same cache as by direct reads, bit for bit.

On the CPU, where the kernels wait for the same threads, and (marker gpu) on a device; every batch counts as large.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.cache_bench import DIM, Bench, Versions, ints
from support.cache_pairs import OPERATIONS, Pair
from support.factories import ON_BOTH
from support.gathering import gather_small_batches, users_of_threads
from support.oracles import EXTREME_64, assert_same_bits, rows_of
from support.processes import environment
from support.staging import TYPES, ask_both, assert_same_content
from support.waiting import HANG_SECONDS, join_all

from hps_numba.cache import parts, shares
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.cache.host_threads import host_threads
from hps_numba.cache.launch_plan import LaunchPlan
from hps_numba.cache.shares import FULL_SHARE, Shares
from hps_numba.cache.store_link import StoreLink
from hps_numba.errors import CapacityError
from hps_numba.storage.host.store import HostStore

FORCED = 2 / 3


@pytest.fixture(autouse=True)
def every_batch_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    gather_small_batches(monkeypatch)


def gathering_cache(bench: Bench, store: HostStore, rows: int = 0, **options: Any) -> EmbeddingCache:
    cache = bench.cache(store, rows, miss_path="auto", **options)
    gathered = cache.parts.gathered
    assert gathered is not None
    gathered.shares = Shares(FORCED)
    cache.mirror_index()
    return cache


def both(bench: Bench, store: HostStore, rows: int = 0, **options: Any) -> tuple[EmbeddingCache, EmbeddingCache]:
    """A cache whose rows are gathered, and its like that reads them itself."""
    return gathering_cache(bench, store, rows, **options), bench.cache(store, rows, miss_path="direct", **options)


def batches(cache: EmbeddingCache) -> int:
    assert cache.parts.gathered is not None
    return cache.parts.gathered.batches


def assert_alike(gathered: EmbeddingCache, direct: EmbeddingCache) -> None:
    assert_same_content(gathered, direct)
    mine, theirs = gathered.counters(), direct.counters()
    assert mine.helped == batches(gathered) > 0 == theirs.helped
    assert replace(mine, helped=0) == theirs
    for workspace in gathered.parts.workspaces.pool.workspaces:
        if workspace.gathering is not None:
            assert workspace.gathering.started == workspace.gathering.done


class GatheringBench(Bench):
    def cache(self, store: HostStore | None, rows: int = 0, **options: Any) -> EmbeddingCache:
        cache = super().cache(store, rows, **{"miss_path": "auto"} | options)
        if cache.parts.gathered is not None:
            cache.parts.gathered.shares = Shares(FORCED)
        return cache


@pytest.mark.parametrize("device", ON_BOTH)
@pytest.mark.parametrize(("policy", "dim"), [("lru", 17), ("lfu", 32)])
def test_any_sequence_of_operations_equals_the_oracle(device: int | None, policy: str, dim: int) -> None:
    bench = GatheringBench(device)
    pair = Pair(bench, policy, dim, seed=dim)
    for _ in range(120):
        getattr(pair, pair.rng.choice(OPERATIONS))()
        pair.cache.mirror_index()
        pair.check()
    assert batches(pair.cache) > 10
    bench.close()


@pytest.mark.parametrize("policy", ["lru", "lfu", "tinylfu"])
def test_gathered_and_direct_batches_are_alike(bench: Bench, policy: str) -> None:
    rng = np.random.default_rng(3)
    caches = both(bench, bench.store(range(800)), 120, policy=policy)
    for n in (1, 3, 40, 700, 700, 20, 2500, 1):
        keys = rng.zipf(1.2, n) % 1000  # many duplicates, some in no tier
        assert ask_both(caches, keys) == np.flatnonzero(keys >= 800).tolist()
        assert_alike(*caches)
    assert caches[0].counters().evicted > 0


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_every_share_gives_the_same_rows(bench: Bench, share: float) -> None:
    caches = both(bench, bench.store(range(2000)), 120)
    assert caches[0].parts.gathered is not None
    caches[0].parts.gathered.shares = Shares(share)
    rng = np.random.default_rng(4)
    for _ in range(5):
        ask_both(caches, rng.integers(0, 2100, 1500))
    assert_same_content(*caches)
    assert replace(caches[0].counters(), helped=0) == caches[1].counters()
    assert batches(caches[0]) == (5 if share else 0)
    for workspace in caches[0].parts.workspaces.pool.workspaces:
        assert workspace.gathering is None or workspace.gathering.started == workspace.gathering.done


def test_a_share_from_the_environment_is_that_of_tables_of_any_size(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LaunchPlan, "needs_host", property(lambda plan: False))
    store, keys = bench.store(range(2000)), np.arange(1500)
    for share, helped in (("1", 3), ("0", 0), ("", 0)):
        monkeypatch.setenv("HPS_NUMBA_HOST_SHARE", share)
        cache = bench.cache(store, 120, miss_path="auto")
        cache.mirror_index()
        for _ in range(3):
            assert_same_bits(cache.lookup_arrays(keys), rows_of(keys, DIM))
        assert cache.counters().helped == helped


def test_a_store_knows_nothing_of_a_cache_that_could_not_be_made(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would write the address of its index to memory that was freed."""
    store, told = bench.store(range(300)), []

    def fail(*args: object) -> None:
        raise CapacityError("no memory")

    monkeypatch.setattr(parts, "GatheredMisses", fail)
    with pytest.raises(CapacityError, match="no memory"):
        bench.cache(store, 40, miss_path="auto")
    monkeypatch.setattr(StoreLink, "point_to", lambda link, *to: bool(told.append(to)) or True)
    store.upsert(np.arange(5000), rows_of(np.arange(5000), DIM, 1))  # a larger index
    store.close()
    assert told == []


def test_fixed_caches_gather_what_they_miss(bench: Bench) -> None:
    store = bench.store(range(100))
    caches = bench.cache(store, 100, kind="uvm", miss_path="auto"), bench.cache(store, 100, kind="uvm", miss_path="direct")
    for cache in caches:
        cache.warm()
    store.upsert(np.arange(100, 400), rows_of(np.arange(100, 400), DIM))
    for cache in caches:
        cache.check_fully_resident()
    caches[0].mirror_index()
    keys = np.random.default_rng(1).integers(0, 450, 900)
    for _ in range(2):
        assert ask_both(caches, keys) == np.flatnonzero(keys >= 400).tolist()
    assert_alike(*caches)
    assert bench.cache(store, 100, kind="static", miss_path="auto").parts.gathered is None


@pytest.mark.parametrize(("device", "row_type", "form", "out_type", "shift"), TYPES)
def test_every_type_of_rows_keys_and_answers_is_served(
    device: int | None, row_type: str, form: str, out_type: str, shift: int
) -> None:
    bench = Bench(device)
    rng = np.random.default_rng(5)
    keys = {"int32": [-1, -(2**31)], "uint32": [2**32 - 1, 2**31], "checked32_in_int64": [2**32 - 1], "int64": EXTREME_64}[form]
    caches = both(bench, bench.store([*keys, *range(300)]), 60, row_type=row_type)
    known = np.array([*keys, *range(330), *([-1, 2**32, -(2**63)] if form == "checked32_in_int64" else [])])
    for n in (4, 300, 300):
        ask_both(caches, rng.choice(known, n), form, out_type, shift=shift)
        assert_alike(*caches)
    bench.close()


@pytest.mark.parametrize("dim", [1, 16, 130, 1100])
def test_rows_of_any_width_are_gathered(bench: Bench, dim: int) -> None:
    cache = gathering_cache(bench, bench.store(range(300), dim), 40)
    for seed in range(3):
        keys = np.random.default_rng(seed).integers(0, 300, 500)
        assert_same_bits(cache.lookup_arrays(keys), rows_of(keys, dim))
    assert batches(cache) == 3


def test_rows_are_read_in_place_while_there_is_no_copy_of_the_index(bench: Bench) -> None:
    store = bench.store(range(300))
    cache = gathering_cache(bench, store, 40)
    cache.lookup_arrays(np.arange(300))
    store.upsert(ints([5]), rows_of([5], DIM, 1))
    cache.update(ints([5]))
    assert_same_bits(cache.lookup_arrays(ints([5, 6, 200])), np.concatenate([rows_of([5], DIM, 1), rows_of([6, 200], DIM)]))
    (workspace,) = (w for w in cache.parts.workspaces.pool.workspaces if w.gathering is not None)
    assert workspace.gathering.started == workspace.gathering.done == 2
    assert workspace.gathering.last[0] == 0


def test_a_larger_batch_gets_larger_memory_and_close_frees_all_of_it(bench: Bench) -> None:
    cache = gathering_cache(bench, bench.store(range(3000)), 40)
    for n in (100, 3000, 200):
        keys = np.arange(n)
        assert_same_bits(cache.lookup_arrays(keys), rows_of(keys, DIM))
    users = np.count_nonzero(host_threads._control)
    cache.close()
    assert np.count_nonzero(host_threads._control) < users


def test_memory_that_is_not_there_leaves_direct_reads(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = gathering_cache(bench, bench.store(range(300)), 40)
    monkeypatch.setattr(host_threads, "add", lambda shared, memory: False)
    keys = np.arange(300)
    for _ in range(2):
        assert_same_bits(cache.lookup_arrays(keys), rows_of(keys, DIM))
    assert cache.parts.gathered is not None
    assert (cache.parts.gathered.batches, cache.parts.gathered.declined) == (0, 2)


def follow(shares: Shares, n: int, batches: int, cost: Callable[[float], tuple[float, float]]) -> list[float]:
    """Batches of ``n`` keys, 40,000 rows missed each: ``cost`` gives nanoseconds for a share of them; the shares chosen."""
    chosen: list[float] = []
    for _ in range(batches):
        share = shares.of(n) / FULL_SHARE
        chosen.append(share)
        if share >= 0:
            host_ns, direct_ns = cost(share)
            rows = round(40_000 * share)
            shares.learn(n, (rows, round(host_ns), 40_000 - rows, round(direct_ns)))
    return chosen


def test_both_ways_end_at_the_same_time() -> None:
    """The host brings 3 rows while the device reads 1, and they do not get in each other's way."""
    chosen = follow(shares := Shares(None), 100_000, 60, lambda share: (share * 1e5, (1 - share) * 3e5))
    assert chosen[-10:] == pytest.approx([0.75] * 10, abs=0.01)
    assert shares.rates[(100_000).bit_length()] == pytest.approx((4e8, 4e8 / 3), rel=0.05)
    assert set(shares.costs[(100_000).bit_length()]) == {"host", "both", "device"}
    assert shares.of(10) == 3 * FULL_SHARE // 4  # nothing is known of batches of another size


@pytest.mark.parametrize(("best", "cost"), [
    (1.0, lambda share: (share * 1e5, (1 - share) * 9e5 if share < 1 else 0)),
    (-1 / FULL_SHARE, lambda share: (share * 9e5, (1 - share) * 1e5 * (1 + 5 * (share > 0)))),
])  # fmt: skip
def test_one_way_alone_is_kept_if_it_takes_less_time(best: float, cost: Callable[[float], tuple[float, float]]) -> None:
    """As where the device's reads wait for what the host has gathered, or need no help."""
    chosen = follow(Shares(None), 100_000, 200, cost)
    assert chosen[20:60] == [best] * 40 if best < 0 else chosen[20:60].count(best) > 30
    others = [share for share in chosen[60:] if share != best]
    assert 1 <= len(others) <= 5  # another way is tried now and then


def test_a_batch_that_missed_little_teaches_nothing() -> None:
    sizes = Shares(None)
    sizes.learn(100_000, (10, 1, 20, 1))
    assert sizes.costs == {} and sizes.rates == {}


@pytest.mark.parametrize("forced", [None, 0.5])
def test_the_host_is_asked_for_no_part_of_few_rows(forced: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, n = Shares(forced), 100_000
    monkeypatch.setattr(shares, "_FEW_MISSED", 1024)
    first = sizes.of(n)
    assert first > 0 and not sizes.skips(n)
    for _ in range(2):
        sizes.learn(n, (0, 0, 1000, 90_000))
        looks = [n for _ in range(100) if not sizes.skips(n)]
        assert len(looks) == (36 if forced is None else 100)  # of batches until one was learned from
        assert sizes.of(n) == (0 if forced is None else first)  # the device reads all, and the rows are counted
    assert not sizes.skips(2 * n) and sizes.of(2 * n) > 0  # another size
    sizes.learn(n, (0, 0, 1024, 90_000))
    assert not sizes.skips(n) and sizes.of(n) > 0 and set(sizes.costs.get(n.bit_length(), {})) <= {"device"}


def test_a_cache_that_misses_little_reads_in_place_and_looks_again_now_and_then(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = gathering_cache(bench, bench.store(range(3000)), 1000)
    gathered, begun = cache.parts.gathered, []
    assert gathered is not None
    begin = gathered.begin
    gathered.shares = Shares(None)
    monkeypatch.setattr(shares, "_FEW_MISSED", 100)
    monkeypatch.setattr(gathered, "begin", lambda *args: begun.append(begin(*args)) or begun[-1])

    def shares_of(parts: Sequence[int]) -> list[int]:
        """Of batches of 300 keys, that are looked at."""
        begun.clear()
        for part in parts:
            keys = np.arange(300 * part, 300 * part + 300)
            assert_same_bits(cache.lookup_arrays(keys), rows_of(keys, DIM))
        return list(begun)

    assert len(shares_of([0] * 3)) == 3  # the first missed all; that the second missed few is known when the third begins
    assert shares_of([0] * 64) == []
    assert shares_of([0] * 66) == [0, 0]  # one to be looked at, one to learn of it
    many = list(range(10)) * 8  # of which the cache holds three
    assert len(shares_of(many)) < 20
    assert len(shares_of(many)) == 80


@pytest.mark.parametrize("readers", [4])
def test_no_torn_and_no_old_row_beside_writers(bench: Bench, readers: int) -> None:
    versions = Versions(bench)
    cache = gathering_cache(bench, versions.store, 100)
    versions.race(cache, readers=readers, after_write=lambda rng: cache.mirror_index(), enough=lambda: batches(cache) > 50)


def test_a_store_keeps_the_rows_that_a_batch_may_read(bench: Bench) -> None:
    store = bench.store(range(300))
    cache = gathering_cache(bench, store, 40)
    cache.lookup_arrays(np.arange(300))
    (workspace,) = (w for w in cache.parts.workspaces.pool.workspaces if w.gathering is not None)
    before = store.epochs.now
    assert workspace.gathering.oldest(before) == before
    workspace.gathering.begin(300, FULL_SHARE)  # as if a device had not ended it
    assert workspace.gathering.oldest(before + 5) == before
    store.upsert(np.arange(300), rows_of(np.arange(300), DIM, 1))
    assert store.epochs.oldest() == before
    workspace.gathering._words[8] += 1  # BATCHES_DONE
    assert store.epochs.oldest() > before


def test_a_writer_that_found_a_batch_s_memory_before_it_was_freed_reads_none_of_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = bench.store(range(300))
    cache = gathering_cache(bench, store, 40)
    cache.lookup_arrays(np.arange(300))
    (workspace,) = (w for w in cache.parts.workspaces.pool.workspaces if w.gathering is not None)
    found, oldest = workspace.gathering, type(workspace.gathering).oldest
    asked: list[int] = []

    def freed_meanwhile(gathering: Any, now: int) -> int:  # as if another thread had run just before
        if gathering is found and not asked:
            asked.append(now)
            gathering.release()
            with pytest.raises(ValueError, match="released"):
                _ = gathering.started
        return oldest(gathering, now)

    monkeypatch.setattr(type(found), "oldest", freed_meanwhile)
    assert store.epochs.oldest() == store.epochs.now
    assert asked
    cache.close()


@pytest.mark.parametrize("device", ON_BOTH)
def test_threads_look_no_more_at_a_cache_that_was_dropped(device: int | None) -> None:
    kept = Bench(device)
    other = gathering_cache(kept, kept.store(range(300)), 40)  # its batches keep the threads looking
    for _ in range(3):
        dropped = Bench(device)
        cache = gathering_cache(dropped, dropped.store(range(5000)), 40)
        cache.lookup_arrays(np.arange(5000))
        (workspace,) = (w for w in cache.parts.workspaces.pool.workspaces if w.gathering is not None)
        shared = workspace.gathering._shared
        assert shared in users_of_threads()
        del dropped, cache, workspace
        gc.collect()
        assert shared not in users_of_threads()
        for _ in range(5):
            assert_same_bits(other.lookup_arrays(np.arange(300)), rows_of(np.arange(300), DIM))
    kept.close()


_ENDS_WITH_A_BATCH_ON_ITS_WAY = """
from cache.test_gathering import batches, gathering_cache, host_threads
import numpy as np
from support.cache_bench import Bench
from support.gathering import small_batches_are_gathered

small_batches_are_gathered()
bench = Bench(None)
cache = gathering_cache(bench, bench.store(range(5000)), 40)
cache.lookup_arrays(np.arange(5000))
(workspace,) = (w for w in cache.parts.workspaces.pool.workspaces if w.gathering is not None)
host_threads.begin(workspace.gathering._shared)  # its device never ends it, so the threads look on
print(batches(cache))
"""


def test_threads_may_look_until_the_process_is_gone() -> None:
    command = [sys.executable, "-c", _ENDS_WITH_A_BATCH_ON_ITS_WAY]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=HANG_SECONDS, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "1\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_looks_up_without_threads(cpu_bench: Bench) -> None:
    cache = gathering_cache(cpu_bench, cpu_bench.store(range(300)), 40)
    cache.lookup_arrays(np.arange(300))
    child = os.fork()
    if not child:
        good = np.array_equal(cache.lookup_arrays(np.arange(300)), rows_of(np.arange(300), DIM))
        os._exit(0 if good and not host_threads._started else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert_same_bits(cache.lookup_arrays(np.arange(300)), rows_of(np.arange(300), DIM))


def test_many_caches_share_the_threads(bench: Bench) -> None:
    store = bench.store(range(2000))
    caches = [gathering_cache(bench, store, 40) for _ in range(4)]
    problems: list[object] = []

    def read(number: int) -> None:
        rng = np.random.default_rng(number)
        for _ in range(20):
            keys = rng.integers(0, 2000, 700)
            if not np.array_equal(caches[number].lookup_arrays(keys), rows_of(keys, DIM)):
                problems.append(keys)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    join_all(*threads)
    assert not problems and min(map(batches, caches)) >= 20
