"""Lookups that are started in one step leave what lookups leave whose kernels are started one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.cache_bench import DIM, Bench, ints
from support.cache_one_step import OneStepBackend
from support.oracles import assert_same_bits, rows_of

from hps_numba.cache import parts as cache_parts
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.cache.group import CacheGroup
from hps_numba.cache.launch_plan import LaunchPlan
from hps_numba.errors import DeviceError
from hps_numba.kernels.policies._load import load_policy


class Both:
    """A cache whose lookups are started in one step, and its like of the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bench: Bench, rows: int = 60, **options: Any) -> None:
        self.bench = bench
        self.backend = OneStepBackend()
        self.store = bench.store(range(800))
        with monkeypatch.context() as patch:
            patch.setattr(cache_parts, "backend_for", lambda device: self.backend)
            self.one_step = bench.cache(self.store, rows, **options)
        self.plain = bench.cache(self.store, rows, **options)
        self.caches = (self.one_step, self.plain)
        self.random = np.random.default_rng(3)

    def lookup(self, n: int) -> None:
        keys = self.random.zipf(1.2, n) % 1000  # many duplicates, some in no tier
        assert_same_bits(*(cache.lookup_arrays(keys) for cache in self.caches))
        self.check()

    def check(self) -> None:
        assert self.one_step.entries() == self.plain.entries()
        assert self.one_step.counters() == self.plain.counters()


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch, cpu_bench: Bench) -> Iterator[Any]:
    yield lambda *args, **options: Both(monkeypatch, cpu_bench, *args, **options)


@pytest.mark.parametrize(
    ("policy", "in_one_step"), [("lru", True), ("lfu", True), ("fifo", True), ("sieve", True), ("tinylfu", False)]
)
def test_lookups_in_one_step_equal_direct_ones(both: Any, policy: str, in_one_step: bool) -> None:
    pair = both(policy=policy)
    for n in (100, 1, 40, 256, 100, 7):
        pair.lookup(n)
    assert pair.backend.prepared == (5 if in_one_step else 0)
    pair.lookup(2500)  # larger than the workspace: started one after the other
    assert pair.backend.prepared == (5 if in_one_step else 0)
    pair.lookup(2500)
    assert pair.backend.prepared == (6 if in_one_step else 0)
    assert pair.plain.counters().evicted > 0


def test_fixed_cache_needs_one_kernel(both: Any) -> None:
    pair = both(300, kind="uvm")
    for cache in pair.caches:
        cache.warm()
    for _ in range(3):
        pair.lookup(200)
    assert pair.backend.prepared == 2


def test_fixed_cache_without_rows_serves_lookups(both: Any) -> None:
    pair = both(0, kind="uvm")
    for _ in range(3):
        pair.lookup(20)
        keys, offsets = np.arange(790, 810), np.arange(0, 21, 4)
        assert_same_bits(*(cache.pool_arrays(keys, offsets) for cache in pair.caches))
    assert (pair.backend.prepared, pair.backend.chained) == (2, 2)


def test_complete_cache_needs_one_kernel_until_a_key_is_added(both: Any) -> None:
    pair = both(800, whole=True)
    for cache in pair.caches:
        cache.warm()
    for _ in range(3):
        pair.lookup(200)
    assert pair.one_step.single_kernel and pair.backend.prepared == 2
    pair.store.upsert(ints([900]), rows_of([900], DIM))
    for cache in pair.caches:
        cache.update(ints([900]))
    for _ in range(3):
        assert_same_bits(*(cache.lookup_arrays(ints([900, 901])) for cache in pair.caches))
    pair.check()
    assert pair.one_step.counters().inserted == 1


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_listed_keys_are_served_in_one_step(both: Any, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    monkeypatch.setattr(cache_parts, "listing_from", lambda device, mirrors: 50)
    monkeypatch.setattr(LaunchPlan, "reads_in_order", property(lambda plan: True))
    pair = both(policy=policy, miss_path="auto")
    for n in (200, 200, 49, 50, 200):
        pair.lookup(n)
    assert pair.backend.prepared == 4
    keys = {key[0] for key in pair.one_step.parts.kernels.made}
    assert {"list_kernel", "locate_missed_kernel", "sort_missed_kernel", "serve_missed_kernel", "lookup_kernel"} <= keys


def test_policy_change_prepares_other_kernels(both: Any) -> None:
    pair = both()
    for policy in ("lfu", "tinylfu", "lru", "sieve"):
        for _ in range(3):
            pair.lookup(100)
        for cache in pair.caches:
            cache.set_policy(load_policy(policy))
        pair.check()
    pair.lookup(100)
    pair.lookup(100)
    assert pair.backend.prepared == 2 + 2 + 0 + 2 + 1


def test_lookup_on_a_captured_stream_is_not_started_in_one_step(both: Any) -> None:
    pair = both()
    keys, out = np.arange(50), np.empty((50, DIM), np.float32)
    for capturing in (False, False, True, False):
        pair.backend.capturing = capturing
        pair.one_step.lookup(keys.ctypes.data, 50, out.ctypes.data, 0)
        pair.plain.lookup(keys.ctypes.data, 50, out.ctypes.data, 0)
    pair.check()
    assert pair.backend.prepared == 2 and len(pair.one_step.parts.workspaces.captured) == 1


def test_kernel_that_fails_under_capture_leaves_the_workspaces_of_streams_alone(
    both: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its event recorded on the captured stream would belong to the graph, and fail every later query."""
    pair = both()
    pair.lookup(100)
    pair.lookup(100)
    keys, out, recorded = np.arange(50), np.empty((50, DIM), np.float16), []

    def refuse(spec: Any) -> Any:
        raise DeviceError("refused")

    with monkeypatch.context() as patch:
        patch.setattr(pair.backend, "capturing", True)
        patch.setattr(pair.backend, "kernel", refuse, raising=False)
        patch.setattr(pair.backend, "record", lambda event, stream: recorded.append(stream), raising=False)
        with pytest.raises(DeviceError, match="refused"):
            pair.one_step.lookup(keys.ctypes.data, 50, out.ctypes.data, 0, out_type="float16")
    assert not recorded
    pair.lookup(100)
    assert pair.backend.prepared == 2


@pytest.mark.parametrize("policy", ["lru", "lfu", "tinylfu"])
@pytest.mark.parametrize("combiner", ["sum", "mean"])
def test_pooled_lookups_in_one_step_equal_direct_ones(both: Any, policy: str, combiner: str) -> None:
    pair = both(policy=policy)
    for n in (100, 200, 3, 256):
        keys = pair.random.zipf(1.2, n) % 1000
        offsets = np.append(np.sort(pair.random.integers(0, n, 20)), n)
        offsets[0] = 0
        weights = pair.random.random(n, np.float32)
        assert_same_bits(*(cache.pool_arrays(keys, offsets, weights, combiner) for cache in pair.caches))
        pair.check()
    assert pair.backend.chained == (0 if policy == "tinylfu" else 3)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_fused_lookups_in_one_step_equal_separate_ones(monkeypatch: pytest.MonkeyPatch, cpu_bench: Bench, policy: str) -> None:
    backend = OneStepBackend()
    stores = [cpu_bench.store(range(800)) for _ in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(cache_parts, "backend_for", lambda device: backend)
        together = [cpu_bench.cache(store, 60, policy=policy) for store in stores]
    separate: list[EmbeddingCache] = [cpu_bench.cache(store, 60, policy=policy) for store in stores]
    group = CacheGroup(together)
    random = np.random.default_rng(7)
    for n in (100, 40, 256, 7):
        keys = [random.zipf(1.2, n) % 1000 for _ in stores]
        for rows, cache, some in zip(group.lookup_arrays(keys), separate, keys):
            assert_same_bits(rows, cache.lookup_arrays(some))
    for first, second in zip(together, separate):
        assert first.entries() == second.entries() and first.counters() == second.counters()
    assert backend.chained == 3
    for n in (90, 10, 200):
        stacked = random.zipf(1.2, (3, n)) % 1000
        rows = np.empty((3, n, DIM), np.float32)
        step, out_step = stacked.strides[0], rows.strides[0]
        group.lookup_stacked(stacked.ctypes.data, step, n, rows.ctypes.data, out_step, 0)
        for answer, cache, some in zip(rows, separate, stacked):
            assert_same_bits(answer, cache.lookup_arrays(some))
    for first, second in zip(together, separate):
        assert first.entries() == second.entries() and first.counters() == second.counters()
    assert backend.chained == (
        5 if group._built.keys() == {("int64", "float32", aligned, True) for aligned in (True, False)} else 6
    )
    group.lookup_stacked(0, 0, 0, 0, 0, 0)  # no key
    group.close()
