"""Caches that hold their whole table: when a lookup of theirs is one kernel, and what it does with keys that come later."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from support.cache_bench import DEFAULT, DIM, Bench, ints
from support.cache_pairs import primary_in
from support.oracles import assert_same_bits, rows_of

from hps_numba.cache.cache import EmbeddingCache
from hps_numba.cache.group import CacheGroup
from hps_numba.errors import PolicyError
from hps_numba.kernels.layouts.cache import BUSY, STATE_NOW
from hps_numba.kernels.policies._load import as_policy, load_policy, policy_with
from hps_numba.kernels.policies.fifo import FIFO
from hps_numba.kernels.policies.lru import LRU

KNOWN = ints(range(0, 900, 3))
LATER = ints([1, 2, 4])


def now_of(cache: EmbeddingCache) -> int:
    with cache.parts.lifecycle.controlled():
        return cache.parts.state.word(STATE_NOW)


def warm_cache(bench: Bench, **options: Any) -> EmbeddingCache:
    cache = bench.cache(bench.store(KNOWN), len(KNOWN), whole=True, **options)
    assert cache.warm() == len(KNOWN)
    return cache


def rows_with(keys: np.ndarray) -> np.ndarray:
    rows = rows_of(keys, DIM)
    rows[~np.isin(keys, KNOWN)] = DEFAULT
    return rows


# -- the clock ----------------------------------------------------------------------------------


def test_clock_of_insertions_advances_with_insertions_only(bench: Bench) -> None:
    cache = bench.cache(bench.store(range(200)), set_count=6)
    seen = []
    for batch in (ints(range(30)), ints(range(10)), ints(range(30)), ints(range(40))):
        cache.lookup_arrays(batch)
        seen.append(now_of(cache))
    assert seen == [64 * 30 // 60] * 3 + [64 * cache.counters().inserted // 60]
    assert seen[3] > seen[2]


def test_clock_of_calls_advances_with_every_call(bench: Bench) -> None:
    cache = bench.cache(bench.store(range(200)), set_count=6, policy="fifo")
    for number in range(1, 4):
        cache.lookup_arrays(ints(range(10)))
        assert now_of(cache) == number


def test_scores_are_ticks_of_inserted_rows(bench: Bench) -> None:
    cache = bench.cache(bench.store(range(400)), set_count=40)
    cache.lookup_arrays(ints(range(100)))  # 100 of 400 ways: 16 ticks
    cache.lookup_arrays(ints(range(100, 125)))  # 4 more
    cache.lookup_arrays(ints([0, 110]))
    scores = {entry.key: entry.score for entry in cache.entries()}
    assert (scores[0], scores[1], scores[110]) == (20, 0, 16 + 4)


@pytest.mark.parametrize("clock", ["hours", None, 3])
def test_unknown_clock_is_refused(clock: Any) -> None:
    with pytest.raises(PolicyError, match=r"expected clock to be 'calls' or 'insertions', got"):
        as_policy(policy_with(FIFO, clock=clock))


def test_policies_with_different_clocks_have_different_digests() -> None:
    assert load_policy("lru").clock == "insertions" and load_policy("lfu").clock == "calls"
    assert as_policy(LRU).digest != as_policy(policy_with(LRU, clock="calls")).digest


# -- complete or not -------------------------------------------------------------------------


def test_lookup_of_a_complete_cache_is_a_single_kernel(bench: Bench) -> None:
    assert warm_cache(bench).single_kernel
    for policy in ("lfu", "tinylfu", "fifo"):  # which count hits or requests, or whose clock goes on
        assert not warm_cache(bench, policy=policy).single_kernel
    part = bench.cache(bench.store(KNOWN), 100)
    part.warm()
    assert not part.single_kernel


def test_new_key_ends_completeness_and_known_keys_do_not(bench: Bench) -> None:
    cache = warm_cache(bench)
    store = cache.parts.store
    assert store is not None
    store.upsert(KNOWN[:5], rows_of(KNOWN[:5], DIM, 1))
    cache.update(KNOWN[:5])
    store.erase(KNOWN[5:9])
    cache.update(KNOWN[5:9])
    assert cache.single_kernel
    store.upsert(LATER[:1], rows_of(LATER[:1], DIM))  # as many rows as before the erasure, and fewer
    cache.update(LATER[:1])
    assert not cache.single_kernel
    cache.lookup_arrays(LATER[:1])  # comes in
    assert cache.check_fully_resident() == len(store) and cache.single_kernel


def test_replaced_key_ends_completeness(bench: Bench) -> None:
    cache = warm_cache(bench)
    store = cache.parts.store
    assert store is not None
    store.erase(KNOWN[:1])
    store.upsert(LATER[:1], rows_of(LATER[:1], DIM))
    cache.update(np.append(KNOWN[:1], LATER[:1]))
    assert not cache.single_kernel


def busy(cache: EmbeddingCache, entries: list[Any], bit: int) -> None:
    """Let a writer be at work on the lines of these entries, or (0) let it end."""
    lines = cache.parts.state.read_lines()
    metas = lines.view(np.uint32).reshape(-1, 16)[:, 15]
    for entry in entries:
        metas[2 * entry.set + entry.line] = metas[2 * entry.set + entry.line] & ~np.uint32(BUSY) | np.uint32(bit)
    cache.backend.from_host(cache.parts.state.lines, lines, cache.parts.state.stream)
    cache.backend.synchronize(cache.parts.state.stream)


def test_cache_with_a_duplicate_key_is_not_complete(cpu_bench: Bench) -> None:
    known = ints(range(3000))
    cache = cpu_bench.cache(cpu_bench.store(known), 3000, whole=True, set_count=375)
    assert cache.warm() == 3000 and cache.single_kernel
    primary = primary_in(375)
    away = [entry for entry in cache.entries() if primary(entry.key)[0] != entry.set][:20]
    assert len(away) == 20
    cache.parts.residency.set_complete(False)  # as after a change that brought no new key
    busy(cache, away, BUSY)
    cache.lookup_arrays(ints(entry.key for entry in away))  # missed, for a writer is at work there
    busy(cache, away, 0)
    assert cache.counters().evicted > 0
    cache.parts.residency.set_complete(True)
    cache.update(known[:1])  # any change of the table
    assert not cache.single_kernel
    assert cache.check_fully_resident() == 3000 and not cache.single_kernel  # as many rows, not as many keys


def _by_one(cache: EmbeddingCache, keys: np.ndarray, stream: int) -> np.ndarray:
    out = np.empty((len(keys), DIM), np.float32)
    with cache.backend.current(), cache.parts.state.copies(keys) as (address,), cache.parts.state.buffer(out.nbytes) as room:
        cache.lookup(address, len(keys), room, stream)
        cache.backend.to_host(out, room, stream)
    return out


def _pooled(cache: EmbeddingCache, keys: np.ndarray, stream: int) -> np.ndarray:
    ends = ints(range(len(keys) + 1))
    out = np.empty((len(keys), DIM), np.float32)
    state = cache.parts.state
    with cache.backend.current(), state.copies(keys, ends) as (address, offsets), state.buffer(out.nbytes) as room:
        cache.pool(address, len(keys), offsets, len(keys), room, stream)
        cache.backend.to_host(out, room, stream)
    return out


def _of_tables(cache: EmbeddingCache, keys: np.ndarray, stream: int) -> np.ndarray:
    group = CacheGroup([cache])
    try:
        group.lookup_arrays([keys])
        return group.lookup_arrays([keys])[0]
    finally:
        group.close()


@pytest.mark.parametrize("look_up", [_by_one, _pooled, _of_tables])
def test_lookups_that_meet_a_writer_leave_a_complete_cache_complete(bench: Bench, look_up: Any) -> None:
    known = ints(range(3000))
    cache = bench.cache(bench.store(known), 3000, whole=True, set_count=375)
    assert cache.warm() == 3000 and cache.single_kernel
    primary = primary_in(375)
    away = [entry for entry in cache.entries() if primary(entry.key)[0] != entry.set][:20]
    assert len(away) == 20
    keys = ints(entry.key for entry in away)
    streams = [cache.backend.new_stream() for _ in range(2)]  # which take the only workspace from each other
    busy(cache, away, BUSY)
    for stream in streams * 3:
        assert_same_bits(look_up(cache, keys, stream), rows_of(keys, DIM))
    busy(cache, away, 0)
    counts = cache.counters()
    assert (counts.inserted, counts.evicted) == (0, 0) and counts.misses > 0
    cache.update(known[:1])
    assert cache.single_kernel and cache.check_fully_resident() == 3000 and cache.single_kernel
    for stream in streams:
        cache.backend.destroy_stream(stream)


@pytest.mark.parametrize("change", ["erase", "insert", "clear"])
def test_direct_changes_of_the_cache_end_completeness(bench: Bench, change: str) -> None:
    cache = warm_cache(bench)
    if change == "erase":
        cache.erase(KNOWN[:1])
    elif change == "insert":
        cache.insert(LATER, rows_of(LATER, DIM))
    else:
        cache.clear()
    assert not cache.single_kernel


def test_cache_over_a_bounded_store_is_never_complete(bench: Bench) -> None:
    cache = bench.cache(bench.store(KNOWN, max_rows=1000), len(KNOWN), whole=True)
    assert cache.warm() == len(KNOWN)
    assert not cache.single_kernel


def test_policy_decides_whether_a_complete_cache_needs_a_single_kernel(bench: Bench) -> None:
    cache = warm_cache(bench)
    cache.set_policy(load_policy("lfu"))
    assert not cache.single_kernel
    cache.set_policy(load_policy("lru"))
    assert cache.single_kernel


def test_kernel_without_lists_serves_missing_rows_and_inserts_none(cpu_bench: Bench) -> None:
    cache = cpu_bench.cache(cpu_bench.store(KNOWN), 400)
    keys, out = ints([0, 3, 1, 3]), np.empty((4, DIM), np.float32)
    with cache.parts.reading():
        form, lists = ("int64", "float32", False), cache.parts.state.no_lists
        cache.parts.plan.start_answer("lookup_kernel", form, keys.ctypes.data, 4, out.ctypes.data, lists, 0)
    assert_same_bits(out, rows_with(keys))
    assert cache.counters().misses == 4 and cache.resident() == 0
    assert_same_bits(cache.lookup_arrays(keys), rows_with(keys))
    assert cache.resident() == 2


# -- lookups that are one kernel ---------------------------------------------------------------


@pytest.fixture
def gpu_bench() -> Any:
    made = Bench(0)
    yield made
    made.close()


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 300, 40_000])
def test_gpu_lookups_of_a_complete_cache(gpu_bench: Bench, n: int) -> None:
    cache = warm_cache(gpu_bench)
    store = cache.parts.store
    assert store is not None
    random = np.random.default_rng(n)
    for _ in range(3):
        keys = random.integers(-5, 910, n)
        assert_same_bits(cache.lookup_arrays(keys), rows_with(keys))
    assert cache.single_kernel and cache.counters().inserted == 0
    cache.lookup_arrays(KNOWN[: len(LATER)])  # the first lookup of a kind has all its kernels
    store.upsert(LATER, rows_of(LATER, DIM))  # nobody tells the cache
    for _ in range(2):
        assert_same_bits(cache.lookup_arrays(LATER), rows_of(LATER, DIM))
    assert cache.counters().inserted == 0
    cache.update(LATER)  # now somebody does
    assert not cache.single_kernel
    assert_same_bits(cache.lookup_arrays(LATER), rows_of(LATER, DIM))
    assert cache.counters().inserted == len(LATER)
    counts = cache.counters()
    assert_same_bits(cache.lookup_arrays(LATER), rows_of(LATER, DIM))
    assert cache.counters().misses == counts.misses


@pytest.mark.gpu
def test_gpu_graph_of_a_complete_cache_inserts_later_keys(gpu_bench: Bench) -> None:
    torch = pytest.importorskip("torch")
    cache = warm_cache(gpu_bench)
    store = cache.parts.store
    assert store is not None
    keys = torch.from_numpy(KNOWN[: len(LATER)].copy()).to("cuda")
    out = torch.empty((len(LATER), DIM), device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        cache.lookup(keys.data_ptr(), len(keys), out.data_ptr(), stream.cuda_stream)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        cache.lookup(keys.data_ptr(), len(keys), out.data_ptr(), stream.cuda_stream)
    store.upsert(LATER, rows_of(LATER, DIM))
    cache.update(LATER)
    keys.copy_(torch.from_numpy(LATER))
    torch.cuda.synchronize()
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(out.cpu().numpy(), rows_of(LATER, DIM))
    assert cache.counters().inserted == len(LATER)


@pytest.mark.gpu
@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn", "max"])
def test_gpu_pooled_lookups_of_a_complete_cache(gpu_bench: Bench, combiner: str) -> None:
    cache, other = warm_cache(gpu_bench), Bench(None)
    try:
        on_cpu = warm_cache(other)
        random = np.random.default_rng(5)
        for _ in range(3):
            keys = random.integers(0, 910, 500)
            offsets = np.append(np.sort(random.integers(0, 500, 60)), 500)
            offsets[0] = 0
            weights = random.random(500, np.float32)
            for given in (None, weights):
                want = on_cpu.pool_arrays(keys, offsets, given, combiner)
                assert_same_bits(cache.pool_arrays(keys, offsets, given, combiner), want)
        assert cache.single_kernel and cache.counters().inserted == 0
    finally:
        other.close()


@pytest.mark.gpu
def test_gpu_fused_lookup_of_complete_caches(gpu_bench: Bench) -> None:
    caches = [warm_cache(gpu_bench) for _ in range(3)]
    group = CacheGroup(caches)
    gpu_bench._opened.append(group)
    random = np.random.default_rng(6)
    for turn in range(4):
        if turn == 2:  # one is complete no more: all are asked with their insertions
            store = caches[1].parts.store
            assert store is not None
            store.upsert(LATER, rows_of(LATER, DIM))
            caches[1].update(LATER)
        keys = [random.integers(0, 910, 50) for _ in caches]
        for rows, cache, some in zip(group.lookup_arrays(keys), caches, keys, strict=True):
            want = rows_with(some)
            if turn >= 2 and cache is caches[1]:
                want[np.isin(some, LATER)] = rows_of(some[np.isin(some, LATER)], DIM)
            assert_same_bits(rows, want)
    group.lookup_arrays([LATER] * 3)
    assert [cache.counters().inserted for cache in caches] == [0, len(LATER), 0]


@pytest.mark.gpu
def test_gpu_threads_on_a_complete_cache_with_a_concurrent_writer(gpu_bench: Bench) -> None:
    cache = warm_cache(gpu_bench, buffers=3)
    store = cache.parts.store
    assert store is not None
    problems: list[str] = []
    told, ended = [0], threading.Event()

    def read(seed: int) -> None:
        random = np.random.default_rng(seed)
        while not ended.is_set():
            least = told[0]
            keys = KNOWN[random.integers(0, len(KNOWN), 200)]
            stamps = {version: rows_of(keys, DIM, version) for version in range(least, told[0] + 2)}
            rows = cache.lookup_arrays(keys)
            stamps |= {version: rows_of(keys, DIM, version) for version in range(least, told[0] + 2)}
            for i in range(len(keys)):
                if not any(np.array_equal(rows[i], stamp[i]) for stamp in stamps.values()):
                    problems.append(f"key {keys[i]}: a row of no version from {least} to {told[0] + 1}")
                    return

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for version in range(1, 40):
        store.upsert(KNOWN, rows_of(KNOWN, DIM, version))
        cache.update(KNOWN)
        told[0] = version
    ended.set()
    for thread in threads:
        thread.join()
    assert not problems
    assert cache.single_kernel


def test_stream_reuses_its_workspace(cpu_bench: Bench) -> None:
    pool = cpu_bench.cache(cpu_bench.store(KNOWN), 400).parts.workspaces.pool
    seen: list[Any] = []

    def start(workspace: Any, answer: Any) -> bool:
        seen.append(workspace)
        if isinstance(answer, Exception):
            raise answer
        return bool(answer)

    assert not pool.reuse(0, 10, start, True)  # none was lent before

    def reserve(lent: Any) -> None:
        lent.reserve(300, False, 0)
        assert not pool.reuse(0, 10, start, True)  # it is lent

    pool.lend(0, reserve)
    (workspace,) = pool.workspaces
    assert not seen
    assert pool.reuse(0, workspace.limit, start, True)
    assert not pool.reuse(0, workspace.limit, start, False)  # captured
    assert not pool.reuse(0, workspace.limit + 1, start, True)  # too small
    assert not pool.reuse(8, 10, start, True)  # another stream
    assert seen == [workspace, workspace]
    with pytest.raises(OSError, match="refused"):
        pool.reuse(0, 10, start, OSError("refused"))
    assert workspace.limit == 0  # invalidated, and put back
    pool.lend(0, seen.append)
    assert seen.pop() is workspace
