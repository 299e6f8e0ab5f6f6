"""Every policy in a cache: the kernels on the CPU and (marker gpu) on a device do what plain Python does, to the last score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.backends import PlainBackend
from support.cache_bench import DEFAULT, Bench, ints
from support.cache_oracle import CacheOracle
from support.cache_pairs import OPERATIONS, Pair, entries_in, primary_in
from support.docs import block_with
from support.oracles import assert_same_bits, rows_of
from support.policies import PINS, own_policy, policy_for

from hps_numba import plugins
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.cache.policy_memory import policy_bytes
from hps_numba.kernels.cache.sketch import MAX_COUNT, estimate, sketch_places
from hps_numba.kernels.compiler.njit import host_function
from hps_numba.kernels.layouts.cache import (
    SET_BYTES,
    STATE_BYTES,
    WORKSPACE_BYTES,
    WORKSPACE_SKETCH,
    WORKSPACE_SKETCH_SHIFT,
    WORKSPACE_SKETCH_WORDS,
)
from hps_numba.kernels.layouts.pooling import PADDED
from hps_numba.kernels.policies._load import load_policy
from hps_numba.kernels.policies._policy import Policy
from hps_numba.storage.host.store import HostStore

FOLDER = "hps_numba.kernels.policies"
NAMES = plugins.names(FOLDER)
#: these are tried with more operations and widths in test_cache.py
SIMPLE = ("fifo", "lfu", "lru")


@pytest.mark.parametrize("name", [*(name for name in NAMES if name not in SIMPLE), "SecondChance"])
def test_any_sequence_of_operations_equals_plain_python(bench: Bench, name: str) -> None:
    pair = Pair(bench, policy_for(name), 1, seed=len(name))
    for _ in range(120):
        getattr(pair, pair.rng.choice(OPERATIONS))()
        pair.check()
    assert pair.oracle.evictions > 20
    assert pair.oracle.refused > 5 or pair.cache.policy.admit is None
    if pair.oracle.sketch is not None:
        assert pair.oracle.sketch.requests > 3 * pair.oracle.sketch.period  # it has forgotten


# -- one trace ----------------------------------------------------------------------------------

SETS, BATCH = 40, 50


def zipf_trace(requests: int, keys: int, seed: int = 7) -> np.ndarray:
    """Keys by a power law of exponent 1, with a scan over rare ones now and then."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, keys + 1)
    trace = rng.choice(keys, requests, p=shares / shares.sum())
    for start in range(requests // 10, requests, requests // 4):
        trace[start : start + requests // 40] = keys + np.arange(requests // 40)
    return trace.astype(np.int64) * 7919 - keys


@pytest.mark.parametrize("name", [*NAMES, "SecondChance"])
def test_hits_misses_and_evictions_of_a_trace_are_those_of_plain_python(bench: Bench, name: str) -> None:
    trace = zipf_trace(10_000, 3000)
    store = bench.store(np.unique(trace), 1)
    cache = bench.cache(store, policy=policy_for(name), set_count=SETS)
    host = {int(key): row for key, row in zip(np.unique(trace), rows_of(np.unique(trace), 1), strict=True)}
    oracle = CacheOracle(SETS, cache.policy, 1, DEFAULT, primary_in(SETS), host, counters_of=host_function(sketch_places))
    now = 0
    for start in range(0, len(trace), BATCH):
        batch = trace[start : start + BATCH]
        assert_same_bits(cache.lookup_arrays(batch), oracle.lookup(batch, now))
        now = oracle.time_after(now, len(batch))
    counts = cache.counters()
    assert (counts.keys, counts.misses) == (len(trace), oracle.misses)
    assert (counts.evicted, counts.refused) == (oracle.evictions, oracle.refused)
    assert [tuple(entry) for entry in cache.entries()] == entries_in(oracle, SETS)
    assert 0.2 < oracle.hits / len(trace) < 0.8


def test_a_policy_from_a_file_acts_in_the_cache_as_in_plain_python(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "my_policy.py").write_text(block_with("policies.md", "# my_policy.py"))
    policy = load_policy("my_policy.py:Decay", allow_code=True, folder=tmp_path)
    assert policy.digest == own_policy("Decay").digest
    pair = Pair(bench, policy, 1, seed=3)
    for _ in range(60):
        pair.lookup()
        pair.check()
    assert pair.oracle.evictions > 20


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*NAMES, "Decay", "SecondChance"])
def test_a_million_requests_on_a_device_are_those_on_the_cpu(name: str) -> None:
    """The cache of the CPU equals plain Python, as the tests above show on shorter traces."""
    policy = own_policy(name) if name == "Decay" else policy_for(name)
    trace = zipf_trace(1_000_000, 200_000)
    keys = np.unique(trace)
    both: list[tuple[Any, ...]] = []
    for device in (0, None):
        made = Bench(device)
        store = made.store(keys, 4)
        cache = EmbeddingCache(4, 20_000, device=device, policy=policy, store=store, default=DEFAULT)
        answers = [cache.lookup_arrays(trace[first : first + 5000]) for first in range(0, len(trace), 5000)]
        assert_same_bits(np.concatenate(answers), rows_of(trace, 4))
        both.append((cache.counters(), cache.entries()))
        cache.close()
        made.close()
    assert both[0] == both[1]
    counts = both[0][0]
    assert counts.keys == 1_000_000 and counts.evicted > 10_000


# -- what is counted ------------------------------------------------------------------------------


def plain_cache(policy: str) -> EmbeddingCache:
    """Of 20 ways, over keys 0 to 59; its kernels run as plain Python."""
    store = HostStore(1)
    store.upsert(np.arange(60), rows_of(np.arange(60), 1))
    cache = EmbeddingCache(1, 20, device=None, policy=load_policy(policy), store=store)
    cache.parts.kernels.backend = PlainBackend()
    return cache


def sketch_of(cache: EmbeddingCache) -> list[int]:
    words = cache.parts.workspaces.policy_memory.words
    return cache.parts.state.read_words(words[WORKSPACE_SKETCH], words[WORKSPACE_SKETCH_WORDS]).tolist()


def test_pooled_lookups_count_requests_as_lookups_do() -> None:
    looked, pooled = plain_cache("tinylfu"), plain_cache("tinylfu")
    rng = np.random.default_rng(8)
    for _ in range(8):
        keys = rng.zipf(1.3, 30) % 64
        looked.lookup_arrays(keys)
        pooled.pool_arrays(keys, np.array([0, 7, 7, 30]))
        assert sketch_of(looked) == sketch_of(pooled) != [0] * 32
    assert looked.entries() == pooled.entries()
    assert looked.counters().refused == pooled.counters().refused > 0


def test_padding_queries_and_insertions_are_not_requests() -> None:
    looked, pooled = plain_cache("tinylfu"), plain_cache("tinylfu")
    keys, offsets, out = np.array([3, 5, 5, 7, 5, 9]), np.array([0, 4, 6]), np.empty((2, 1), np.float32)
    pooled.pool(*(keys.ctypes.data, 6, offsets.ctypes.data, 2, out.ctypes.data, 0), combiner="sum", options=PADDED, padding=5)
    looked.lookup_arrays(keys[keys != 5])
    assert sketch_of(looked) == sketch_of(pooled) != [0] * 32
    before = sketch_of(looked)
    looked.query(keys)
    looked.insert(np.array([11]), np.ones((1, 1), np.float32))
    assert sketch_of(looked) == before


def test_sketch_never_underestimates_and_ages() -> None:
    cache = plain_cache("tinylfu")
    keys = np.random.default_rng(1).integers(0, 60, 100)
    cache.lookup_arrays(keys)
    words = {
        name: cache.parts.workspaces.policy_memory.words[name]
        for name in (WORKSPACE_SKETCH, WORKSPACE_SKETCH_WORDS, WORKSPACE_SKETCH_SHIFT)
    }
    workspace = np.zeros(WORKSPACE_BYTES // 8, np.int64)
    for name, value in words.items():
        workspace[name // 8] = value
    with np.errstate(over="ignore"):
        counted = [estimate(cache.parts.state.address, workspace.ctypes.data, key) for key in range(60)]
        exact = [int((keys == key).sum()) for key in range(60)]
        assert all(many >= few for many, few in zip(counted, exact, strict=True))
        assert sum(many == few for many, few in zip(counted, exact, strict=True)) > 50
        for _ in range(6):
            cache.lookup_arrays(np.full(256, 7))
        counted = [estimate(cache.parts.state.address, workspace.ctypes.data, key) for key in range(60)]
    assert counted[7] == MAX_COUNT and sum(counted) <= 3 * MAX_COUNT


# -- what they are for ----------------------------------------------------------------------------


def missed(made: Bench, policy: Policy, trace: np.ndarray) -> int:
    cache = made.cache(made.store(np.unique(trace), 1), policy=policy, set_count=SETS)
    for start in range(0, len(trace), BATCH):
        cache.lookup_arrays(trace[start : start + BATCH])
    return cache.counters().misses


def test_scan_resistant_policies_miss_less_than_lru(cpu_bench: Bench) -> None:
    trace = zipf_trace(10_000, 3000)
    misses = {name: missed(cpu_bench, load_policy(name), trace) for name in ("lru", "tinylfu", "sieve", "s3fifo", "random")}
    assert misses["tinylfu"] < misses["lru"] and misses["sieve"] < misses["lru"] and misses["s3fifo"] < misses["lru"]
    assert misses["lru"] < misses["random"]


def test_pinned_keys_stay_and_are_scored_by_warming(bench: Bench) -> None:
    keys = ints([*range(4000), -1, 2**63 - 1])
    policy = policy_for("pinned")
    cache = bench.cache(bench.store(keys, 1), policy=policy, set_count=20)
    cache.lookup_arrays(ints(PINS))
    for start in range(0, len(keys), 100):
        cache.lookup_arrays(keys[start : start + 100])
    assert {entry.key for entry in cache.entries() if entry.score == 2**32 - 1} == set(PINS)
    warm = bench.cache(bench.store(keys[:100], 1), 200, policy=policy, whole=True)
    assert warm.warm() == 100
    assert {entry.key for entry in warm.entries() if entry.score == 2**32 - 1} == set(PINS[:6])


def test_memory_of_the_policy_counts_in_bytes(cpu_bench: Bench) -> None:
    for name in NAMES:
        cache = cpu_bench.cache(None, 1000, policy=name)
        plain = cache.sets * SET_BYTES + cache.parts.geometry.row_bytes + 2 * STATE_BYTES
        assert cache.bytes == plain + policy_bytes(cache.policy, cache.sets)
    sizes = {name: cpu_bench.cache(None, 1000, policy=name).bytes for name in ("lru", "lfu", "sieve", "tinylfu")}
    assert sizes["sieve"] - sizes["lru"] == 4 * 2 * 100
    assert sizes["tinylfu"] - sizes["lru"] == 8 * 1024
    assert sizes["lfu"] - sizes["lru"] == 4 * 1000
