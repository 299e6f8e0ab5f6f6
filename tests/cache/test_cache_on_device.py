"""The cache on a real device: against the cache of the CPU at full size, in graphs, and under many threads and streams at once.

The cache of the CPU equals the naive oracle (``test_cache.py``); here the device equals the CPU, where the oracle would take
days.
``HPS_NUMBA_STRESS_SECONDS`` (5) and ``HPS_NUMBA_RANDOM_OPERATIONS`` (600) make the last two tests longer.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
import pytest
from support.waiting import HANG_SECONDS, Span

from hps_numba.cache.cache import EmbeddingCache
from hps_numba.device.host_memory import PinnedHostAllocator
from hps_numba.kernels.layouts.cache import LINE_BYTES, META_AT, OCCUPIED, SCORES_AT, WAYS_PER_LINE
from hps_numba.kernels.policies._load import load_policy
from hps_numba.storage.host.store import HostStore

pytestmark = pytest.mark.gpu
STRESS_SECONDS = float(os.environ.get("HPS_NUMBA_STRESS_SECONDS", "5"))
OPERATIONS = int(os.environ.get("HPS_NUMBA_RANDOM_OPERATIONS", "600"))
EXTREME = np.array([0, -1, 1, 2**63 - 1, -(2**63), 2**32 - 1, 2**31, -(2**31)], np.int64)


def rows_of(keys: np.ndarray, dim: int, version: int = 0) -> np.ndarray:
    """A row that no other key and version has: any bits, as float32."""
    seed = keys.astype(np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15) + np.uint64(version)
    bits = (seed + np.arange(dim, dtype=np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
    return ((bits >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - 1).astype(np.float32)


def pinned_store(dim: int, keys: np.ndarray, **options: Any) -> HostStore:
    store = HostStore(dim, allocator=PinnedHostAllocator(), rows=len(keys), **options)
    store.upsert(keys, rows_of(keys, dim))
    return store


def contents(cache: EmbeddingCache) -> tuple[np.ndarray, ...]:
    """Keys, scores and occupied ways of all lines; the content of an empty way does not count."""
    lines = cache.parts.state.read_lines().reshape(-1, LINE_BYTES)
    taken = (lines[:, META_AT:].copy().view(np.uint32) >> np.arange(WAYS_PER_LINE)) & 1 == 1
    assert ((lines[:, META_AT:].copy().view(np.uint32) & OCCUPIED).astype(bool) == taken.any(axis=1, keepdims=True)).all()
    keys = lines[:, :SCORES_AT].copy().view(np.int64)
    scores = lines[:, SCORES_AT:META_AT].copy().view(np.uint32)
    return np.where(taken, keys, 0), np.where(taken, scores, 0), taken


class Pair:
    """One store, a cache on the device and one on the CPU, which get the same calls."""

    def __init__(self, random: np.random.Generator, policy: str, dim: int) -> None:
        self.random, self.dim = random, dim
        self.universe = np.unique(np.concatenate([EXTREME, random.integers(-(2**62), 2**62, 60_000)]))
        self.version = 0
        self.store = pinned_store(dim, self.universe[: len(self.universe) // 2])
        options: dict[str, Any] = {"policy": load_policy(policy), "store": self.store, "default": 0.25, "miss_path": "auto"}
        rows = int(random.choice([64, 1000, 20_000]))
        self.caches = [EmbeddingCache(dim, rows, device=device, **options) for device in (0, None)]

    def keys(self, most: int) -> np.ndarray:
        n = int(np.exp(self.random.uniform(0, np.log(most + 1)))) - int(self.random.random() < 0.02)
        if self.random.random() < 0.5:
            return self.random.choice(self.universe, n)
        return self.universe[(self.random.zipf(1.2, n) - 1) % len(self.universe)]  # many duplicates

    def step(self) -> None:
        what = self.random.choice(
            ["lookup", "lookup", "lookup", "query", "insert", "update", "erase", "refresh", "dump", "copy"]
        )
        keys = self.keys(min(1_000_000, 1 << 24 // self.dim if self.dim > 128 else 1_000_000 * 16 // max(16, self.dim)))
        device, cpu = self.caches
        if what == "lookup":
            answers = [cache.lookup_arrays(keys) for cache in self.caches]
            assert np.array_equal(answers[0].view(np.uint32), answers[1].view(np.uint32))
            expected = np.empty_like(answers[0])
            self.store.lookup(keys, expected, 0.25)
            assert np.array_equal(answers[0].view(np.uint32), expected.view(np.uint32))
        elif what == "query":
            some = keys[:50_000]
            (rows, missing), (other_rows, other_missing) = (cache.query(some) for cache in self.caches)
            assert np.array_equal(missing, other_missing) and np.array_equal(rows, other_rows)
        elif what == "insert":
            some = np.unique(keys[:50_000])
            some = some[self.store.contains(some)]
            rows = np.empty((len(some), self.dim), np.float32)
            self.store.lookup(some, rows)
            for cache in self.caches:
                cache.insert(some, rows)
        elif what == "update":
            some, self.version = np.unique(keys[:20_000]), self.version + 1
            self.store.upsert(some, rows_of(some, self.dim, self.version))
            for cache in self.caches:
                cache.update(some)
        elif what == "erase":
            some = keys[:5_000]
            self.store.erase(some)
            assert device.erase(some) == cpu.erase(some)
        elif what == "refresh":
            for cache in self.caches:
                cache.refresh()
        elif what == "copy":
            for cache in self.caches:
                assert cache.mirror_index()
        else:
            first = int(self.random.integers(0, device.sets))
            dumps = [np.sort(cache.dump(first, device.sets)) for cache in self.caches]
            assert np.array_equal(*dumps)

    def check(self) -> None:
        for mine, other in zip(contents(self.caches[0]), contents(self.caches[1]), strict=True):
            assert np.array_equal(mine, other)

    def close(self) -> None:
        for cache in self.caches:
            cache.close()
        self.store.close()


CASES = [("lru", 16), ("fifo", 32), ("lfu", 17), ("lru", 1), ("lru", 3), ("fifo", 100), ("lfu", 128), ("lru", 384)]


@pytest.mark.parametrize(("policy", "dim"), CASES)
def test_random_operations_leave_device_and_cpu_alike(policy: str, dim: int) -> None:
    random = np.random.default_rng(dim)
    done = 0
    while done < OPERATIONS // len(CASES):
        pair = Pair(random, policy, dim)
        for _ in range(min(50, OPERATIONS // len(CASES))):
            pair.step()
            done += 1
        pair.check()
        pair.close()


@pytest.mark.parametrize("miss_path", ["direct", "auto"])
def test_a_captured_lookup_with_misses_is_replayed_while_the_table_changes(miss_path: str) -> None:
    torch = pytest.importorskip("torch")
    dim, n = 32, 2048
    random = np.random.default_rng(5)
    universe = random.choice(1 << 40, 50_000, replace=False).astype(np.int64)
    store = pinned_store(dim, universe[:20_000], growth_bytes=1 << 20)
    options: dict[str, Any] = {"policy": load_policy("lru"), "store": store, "default": -1.0, "miss_path": miss_path}
    cache = EmbeddingCache(dim, 4096, device=0, **options)
    keys = torch.zeros(n, dtype=torch.int64, device="cuda")
    out = torch.empty((n, dim), device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        cache.lookup(keys.data_ptr(), n, out.data_ptr(), stream.cuda_stream)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        cache.lookup(keys.data_ptr(), n, out.data_ptr(), stream.cuda_stream, capturing=True)
    version = 0
    for replay in range(1000):
        if replay % 50 == 25:  # growth of the index and of the rows
            some = universe[20_000 + replay * 25 : 20_000 + (replay + 50) * 25]
            store.upsert(some, rows_of(some, dim, version))
            cache.update(some)
        if replay % 250 == 200:  # other content altogether
            version += 1
            content = store.sibling()
            content.upsert(universe[:30_000], rows_of(universe[:30_000], dim, version))
            store.adopt(content)
            cache.warm()
        if replay % 50 == 30:
            assert cache.mirror_index() == (miss_path == "auto")
        batch = random.choice(universe, n)
        expected = np.empty((n, dim), np.float32)
        store.lookup(batch, expected, -1.0)
        keys.copy_(torch.from_numpy(batch))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert np.array_equal(out.cpu().numpy(), expected), replay
    counts = cache.counters()
    assert counts.misses > 100_000 and counts.keys - counts.misses > 50_000
    del graph
    cache.close()
    store.close()


def test_stale_row_in_flight_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    dim, keys = 32, np.arange(1000, dtype=np.int64)
    store = pinned_store(dim, keys)
    cache = EmbeddingCache(dim, 4096, device=0, policy=load_policy("lru"), store=store)
    finish = cache.parts.plan.finish_lookup

    def update_before(*args: Any) -> None:
        store.upsert(keys[:500], rows_of(keys[:500], dim, 7))
        cache.update(keys[:500])
        finish(*args)

    with monkeypatch.context() as patch:
        patch.setattr(cache.parts.plan, "finish_lookup", update_before)
        assert np.array_equal(cache.lookup_arrays(keys), rows_of(keys, dim))  # read before the update
    assert cache.counters().stale_dropped == 500
    _, missing = cache.query(keys)
    assert np.array_equal(missing, keys[:500])
    assert np.array_equal(cache.lookup_arrays(keys[:500]), rows_of(keys[:500], dim, 7))
    cache.close()
    store.close()


class Stress:
    """Readers on many streams beside writers; rows tell their key, version and sum."""

    DIM, ROWS = 16, 4000

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.keys = np.arange(self.ROWS, dtype=np.int64) * 7919 - 10_000
        self.committed = np.zeros(self.ROWS, np.int64)  # versions whose update has returned
        self.store = HostStore(self.DIM, allocator=PinnedHostAllocator(), rows=0, growth_bytes=1 << 16)
        self.store.upsert(self.keys, self.rows(np.arange(self.ROWS), np.zeros(self.ROWS, np.int64)))
        options: dict[str, Any] = {"policy": load_policy("lru"), "store": self.store, "buffers": 8, "miss_path": "auto"}
        self.cache = EmbeddingCache(self.DIM, 1000, device=0, **options)
        self.problems: list[str] = []
        self.batches = self.copies = 0
        self.span = Span(STRESS_SECONDS, lambda: self.batches > 100 and self.committed.sum() > 1000)

    def rows(self, numbers: np.ndarray, versions: np.ndarray) -> np.ndarray:
        words = np.empty((len(numbers), self.DIM), np.int32)
        words[:, :] = (numbers * 31 + versions * 17)[:, None] + np.arange(self.DIM)
        words[:, 0], words[:, 1] = numbers, versions
        words[:, 2] = words[:, 3:].sum(1, dtype=np.int64).astype(np.int32) ^ numbers.astype(np.int32)
        return words.view(np.float32)

    def goes_on(self) -> bool:
        return not self.problems and self.span.goes_on()

    def read(self, seed: int) -> None:
        random, torch = np.random.default_rng(seed), self.torch
        streams = [torch.cuda.Stream() for _ in range(8)]
        while self.goes_on():
            started = []
            for stream in streams:
                n = int(np.exp(random.uniform(0, np.log(60_000))))
                numbers = np.minimum(random.zipf(1.1, n) - 1, self.ROWS - 1)
                with torch.cuda.stream(stream):
                    keys = torch.from_numpy(self.keys[numbers]).pin_memory().to("cuda", non_blocking=True)
                    out = torch.empty((n, self.DIM), device="cuda")
                    least = self.committed[numbers].copy()
                    self.cache.lookup(keys.data_ptr(), n, out.data_ptr(), stream.cuda_stream)
                    started.append((numbers, least, keys, out, stream))
            for numbers, least, _keys, out, stream in started:
                with torch.cuda.stream(stream):
                    words = out.cpu().numpy().view(np.int32)
                self.batches += 1
                versions = words[:, 1].astype(np.int64)
                right = (words == self.rows(numbers, versions).view(np.int32)).all(1)
                if not right.all():
                    self.problems.append(f"torn or foreign: {numbers[~right][:3]} {words[~right][:1]}")
                if (versions < least).any():
                    self.problems.append(f"old: {numbers[versions < least][:5]}")

    def write(self, seed: int, share: np.ndarray) -> None:
        random = np.random.default_rng(seed)
        while self.goes_on():
            some = np.unique(random.choice(share, 200))
            versions = self.committed[some] + 1
            self.store.upsert(self.keys[some], self.rows(some, versions))
            self.cache.update(self.keys[some])
            self.committed[some] = versions
            if random.random() < 0.1:
                self.cache.refresh(0, int(random.integers(1, self.cache.sets)))
            if random.random() < 0.05:
                self.cache.dump()
            if random.random() < 0.02:
                self.cache.erase(self.keys[random.choice(share, 50)])
            if random.random() < 0.01:
                self.cache.clear()
            if random.random() < 0.2:
                self.copies += self.cache.mirror_index()


@pytest.mark.timeout(HANG_SECONDS + STRESS_SECONDS)
def test_threads_and_streams_with_concurrent_writers_see_whole_fresh_rows() -> None:
    pytest.importorskip("torch")
    stress = Stress()
    shares = np.array_split(np.arange(Stress.ROWS), 2)
    threads = [threading.Thread(target=stress.read, args=(i,)) for i in range(8)]
    threads += [threading.Thread(target=stress.write, args=(100 + i, share)) for i, share in enumerate(shares)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()  # for as long as was asked for
    assert not stress.problems, stress.problems[:3]
    assert stress.batches > 100 and stress.committed.sum() > 1000
    counts = stress.cache.counters()
    assert counts.inserted > 1000 and counts.evicted > 0
    assert stress.copies > 10
    stress.cache.close()
    stress.store.close()
