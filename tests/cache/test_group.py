"""Caches that are looked up together, against the same caches looked up one by one: on the CPU and on a device."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from support.cache_bench import DEFAULT, DIM, Bench, ints
from support.oracles import assert_same_bits, rows_of
from support.waiting import join_all

from hps_numba.cache.cache import EmbeddingCache
from hps_numba.cache.group import CacheGroup
from hps_numba.cache.workspace import Workspace
from hps_numba.errors import CapacityError, ClosedError, ConfigError, KeyDtypeError
from hps_numba.kernels.layouts.cache import MAX_BATCH, MAX_TABLES


class Pair:
    """Tables whose caches are looked up together, and the same tables looked up one by one."""

    def __init__(self, bench: Bench, tables: int = 4, *, dim: int = DIM, **options: Any) -> None:
        self.known = [ints(range(table, 300 + table, 2)) for table in range(tables)]
        self.stores = [bench.store(known, dim, stamp) for stamp, known in enumerate(self.known)]
        self.together = [bench.cache(store, **options) for store in self.stores]
        self.alone = [bench.cache(store, **options) for store in self.stores]
        self.group = CacheGroup(self.together, buffers=2)
        bench._opened.append(self.group)
        self.dim = dim

    def look(self, *keys: np.ndarray) -> list[np.ndarray]:
        rows = self.group.lookup_arrays(keys)
        for answer, cache, some in zip(rows, self.alone, keys, strict=True):
            assert_same_bits(answer, cache.lookup_arrays(some))
        return rows

    def check(self) -> None:
        for one, other in zip(self.together, self.alone, strict=True):
            assert one.entries() == other.entries()
            assert one.counters() == other.counters()


def some_keys(random: np.random.Generator, tables: int, most: int) -> list[np.ndarray]:
    return [random.integers(0, 320, int(random.integers(0, most + 1))) for _ in range(tables)]


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "lru", "set_count": 3},
        {"policy": "lfu", "set_count": 3},
        {"policy": "fifo", "rows": 400, "whole": True},
        {"policy": "lru", "set_count": 3, "row_type": "int8"},
        {"policy": "lru", "rows": 150, "kind": "static"},
        {"policy": "lru", "rows": 60, "kind": "uvm"},
        {"policy": "lru", "set_count": 3, "dim": 128},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_group_equals_caches_looked_up_one_by_one(bench: Bench, options: dict[str, Any]) -> None:
    pair = Pair(bench, **options)
    if options.get("kind"):
        for cache in (*pair.together, *pair.alone):
            cache.warm()
    random = np.random.default_rng(1)
    for most in (5, 40, 300, 3000, 40):
        for _ in range(4):
            pair.look(*some_keys(random, 4, most))
    pair.check()


def test_each_table_answers_its_own_rows_and_default(bench: Bench) -> None:
    pair = Pair(bench, tables=3, rows=400)
    rows = pair.look(*[ints([2, 3, 2, 10_000])] * 3)
    for table, answer in enumerate(rows):
        inside, outside = (0, 1) if table % 2 == 0 else (1, 0)
        assert_same_bits(answer[inside], rows_of(ints([2 + inside]), DIM, table)[0])
        # key 3 is not in an even table, key 2 not in an odd one
        assert (answer[outside] == np.float32(DEFAULT)).all()
        assert (answer[3] == np.float32(DEFAULT)).all()


def test_table_without_keys_is_untouched(bench: Bench) -> None:
    pair = Pair(bench, rows=400)
    for _ in range(3):
        pair.look(ints(range(20)), ints([]), ints([7]), ints([]))
    pair.look(*[ints([])] * 4)
    assert [cache.counters().calls for cache in pair.together] == [3, 0, 3, 0]
    pair.check()


def test_group_takes_at_most_the_tables_of_a_launch(bench: Bench) -> None:
    pair = Pair(bench, tables=MAX_TABLES, rows=40)
    random = np.random.default_rng(2)
    for most in (10, 100):
        pair.look(*some_keys(random, MAX_TABLES, most))
    pair.check()
    with pytest.raises(ConfigError, match="expected 1 to 32 different ones, got 33"):
        CacheGroup([*pair.together, pair.alone[0]])


def test_changes_of_one_table_are_seen(bench: Bench) -> None:
    pair = Pair(bench, tables=2, rows=400)
    pair.look(ints(range(50)), ints(range(50)))
    new = rows_of(ints([4]), DIM, 99)
    pair.stores[0].upsert(ints([4]), new)
    pair.together[0].update(ints([4]))
    pair.alone[0].update(ints([4]))
    first, second = pair.look(ints([4, 5]), ints([4, 5]))
    assert_same_bits(first[0], new[0])
    assert_same_bits(second[1], rows_of(ints([5]), DIM, 1)[0])


def test_caches_of_different_fusion_keys_are_refused(bench: Bench) -> None:
    store = bench.store(range(10))
    caches = [bench.cache(store, 40), bench.cache(store, 40, policy="lfu"), bench.cache(bench.store((), 3), 40)]
    for other in caches[1:]:
        with pytest.raises(ConfigError, match="expected caches of one fusion_key"):
            CacheGroup([caches[0], other])
    for wrong in ([], [caches[0], caches[0]]):
        with pytest.raises(ConfigError, match="expected 1 to 32 different ones"):
            CacheGroup(wrong)


def test_too_many_or_wrong_keys_are_refused(bench: Bench) -> None:
    pair = Pair(bench, tables=2, rows=40)
    with pytest.raises(
        CapacityError, match=f"lookup of several tables: expected at most {MAX_BATCH} keys each, got {MAX_BATCH + 1}"
    ):
        pair.group.lookup([0, 0], [1, MAX_BATCH + 1], [0, 0], 0)
    with pytest.raises(KeyDtypeError, match="int64"):
        pair.group.lookup_arrays([np.zeros(3, np.int32), ints([1])])


def test_lookup_of_a_closed_group_or_cache_raises(bench: Bench) -> None:
    pair = Pair(bench, tables=2, rows=40)
    pair.look(ints([1]), ints([2]))
    pair.group.close()
    with pytest.raises(ClosedError):
        pair.group.lookup_arrays([ints([1]), ints([2])])
    bench._opened.remove(pair.group)
    other = CacheGroup(pair.together)
    bench._opened.append(other)
    pair.together[1].close()
    with pytest.raises(ClosedError, match="closed"):
        other.lookup_arrays([ints([1]), ints([2])])


def test_retire_waits_for_a_lookup_that_compiles(cpu_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy changes after ``retire``: a kernel compiled for the policy before must not be kept for the one after."""
    pair = Pair(cpu_bench, tables=2, rows=40)
    kernel, retired = pair.group._backend.kernel, threading.Event()
    seen: list[bool] = []

    def retire() -> None:
        pair.group.retire()
        retired.set()

    thread = threading.Thread(target=retire)

    def compile_slowly(spec: Any) -> Any:
        if not seen:
            thread.start()
            seen.append(retired.wait(0.5))
        return kernel(spec)

    monkeypatch.setattr(pair.group._backend, "kernel", compile_slowly)
    with suppress(ClosedError):
        pair.group.lookup_arrays([ints([1]), ints([2])])
    join_all(thread)
    assert seen == [False] and retired.is_set()


def test_threads_share_a_group(bench: Bench) -> None:
    pair = Pair(bench, rows=100)
    wrong: list[Any] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(20):
            keys = some_keys(random, 4, 500)
            try:
                for table, (some, rows) in enumerate(zip(keys, pair.group.lookup_arrays(keys))):
                    has = (some >= table) & (some < 300 + table) & ((some - table) % 2 == 0)
                    assert_same_bits(rows[has], rows_of(some[has], DIM, table))
                    assert (rows[~has] == np.float32(DEFAULT)).all()
            except BaseException as problem:
                wrong.append(problem)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    join_all(*threads)
    assert not wrong


@pytest.mark.gpu
def test_a_graph_replays_a_lookup_of_a_group() -> None:
    torch = pytest.importorskip("torch")
    bench = Bench(0)
    try:
        pair = Pair(bench, tables=3, rows=200, dim=32)
        n, random = 500, np.random.default_rng(3)
        keys = [torch.zeros(n, dtype=torch.int64, device="cuda") for _ in range(3)]
        outs = [torch.empty((n, 32), device="cuda") for _ in range(3)]
        stream = torch.cuda.Stream()

        def look() -> None:
            pair.group.lookup([some.data_ptr() for some in keys], [n] * 3, [out.data_ptr() for out in outs], stream.cuda_stream)

        with torch.cuda.stream(stream):
            look()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            look()
        for _ in range(200):
            given = [random.integers(0, 320, n) for _ in range(3)]
            for tensor, some in zip(keys, given):
                tensor.copy_(torch.from_numpy(some))
            graph.replay()
            torch.cuda.synchronize()
            for table, (some, out) in enumerate(zip(given, outs)):
                has = (some >= table) & (some < 300 + table) & ((some - table) % 2 == 0)
                assert_same_bits(out.cpu().numpy()[has], rows_of(some[has], 32, table))
                assert bool((out.cpu()[torch.from_numpy(~has)] == DEFAULT).all())
    finally:
        bench.close()


@pytest.mark.gpu
def test_streams_share_the_buffers_of_a_group() -> None:
    torch = pytest.importorskip("torch")
    bench = Bench(0)
    try:
        pair = Pair(bench, tables=3, rows=200, dim=32)
        n, random = 400, np.random.default_rng(4)
        streams = [torch.cuda.Stream() for _ in range(5)]  # more than buffers
        waiting = []
        for turn in range(60):
            stream = streams[turn % 5]
            given = [random.integers(0, 320, n) for _ in range(3)]
            with torch.cuda.stream(stream):
                keys = [torch.from_numpy(some).cuda() for some in given]
                outs = [torch.empty((n, 32), device="cuda") for _ in range(3)]
            pair.group.lookup([some.data_ptr() for some in keys], [n] * 3, [out.data_ptr() for out in outs], stream.cuda_stream)
            waiting.append((given, keys, outs))
        torch.cuda.synchronize()
        for given, _, outs in waiting:
            for table, (some, out) in enumerate(zip(given, outs)):
                has = (some >= table) & (some < 300 + table) & ((some - table) % 2 == 0)
                assert_same_bits(out.cpu().numpy()[has], rows_of(some[has], 32, table))
    finally:
        bench.close()


def test_memory_of_batches_is_counted_and_reused(bench: Bench) -> None:
    pair = Pair(bench, tables=2, rows=40)
    before = pair.group.bytes
    pair.look(ints(range(100)), ints(range(1000)))
    grown = pair.group.bytes
    assert grown > before
    pair.look(ints(range(100)), ints(range(1000)))
    assert pair.group.bytes == grown
    cache: EmbeddingCache = pair.together[0]
    assert cache.bytes <= pair.alone[0].bytes  # buffers of the group are not the cache's


def test_group_serves_after_a_batch_without_memory(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(bench, tables=3, rows=400)
    pair.look(*[ints(range(100))] * 3)
    calls = 0
    reserve = Workspace.reserve

    def fail_at_the_third(workspace: Workspace, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise CapacityError("on purpose")
        reserve(workspace, *args)

    with monkeypatch.context() as broken:
        broken.setattr(Workspace, "reserve", fail_at_the_third)
        with pytest.raises(CapacityError, match="on purpose"):
            pair.group.lookup_arrays([ints(range(2000))] * 3)
    for n in (50, 100, 2000, 50):
        pair.look(*[ints(range(n))] * 3)
