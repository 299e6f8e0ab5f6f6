"""What a cache takes against what was planned for it: lookups, graphs, lookups of several tables, and promises."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import numpy as np
import pytest
from support.cache_bench import DIM, Bench, ints
from support.factories import ON_BOTH
from support.oracles import rows_of

from hps_numba.cache import state
from hps_numba.cache.backends import CpuBackend
from hps_numba.cache.group import CacheGroup
from hps_numba.cache.index_mirror import with_room
from hps_numba.cache.memory_use import CacheMemory, CacheUse, MemoryPlan, plan_memory
from hps_numba.cache.promised import promise, promised_bytes, withdraw
from hps_numba.cache.sizing import CacheGeometry, staging_bytes
from hps_numba.cache.workspace import Workspace, WorkspaceShape
from hps_numba.kernels.policies._load import load_policy

KEYS = 3000


@dataclass(eq=False)
class Owner:
    needed_bytes: int


def plan_for(bench: Bench, rows: int, *, policy: str = "lru", **use: object) -> MemoryPlan:
    geometry = CacheGeometry("table", DIM, rows, "dynamic", False, "float32", np.float32(0), None)
    given = {"on_device": bench.device is not None, "keys": KEYS, "buffers": 1, "miss_path": "direct", "has_store": True, **use}
    return plan_memory(geometry, load_policy(policy), CacheUse(**given))  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_lookups_groups_and_graphs_take_what_is_planned(bench: Bench, policy: str) -> None:
    planned = plan_for(bench, 500, policy=policy)
    stores = [bench.store(range(700)) for _ in range(2)]
    caches = [bench.cache(store, 500, keys=KEYS, policy=policy) for store in stores]
    group = CacheGroup(caches)
    caches[0].lookup_arrays(ints(range(10)))
    assert caches[0].memory == planned.memory
    group.lookup_arrays([ints(range(10)), ints(range(20))])
    assert [group.bytes_for(cache) for cache in caches] == [(planned.group_bytes, 0)] * 2
    assert group.bytes == 2 * planned.group_bytes
    group.close()


def test_each_captured_lookup_takes_what_is_planned(cpu_bench: Bench) -> None:
    planned = plan_for(cpu_bench, 500)
    cache = cpu_bench.cache(cpu_bench.store(range(700)), 500, keys=KEYS)
    keys, out = ints(range(KEYS)), np.empty((KEYS, DIM), np.float32)
    addresses = [array.__array_interface__["data"][0] for array in (keys, out)]
    for captured in (1, 2):
        cache.lookup(addresses[0], KEYS, addresses[1], 0, capturing=True)
        assert cache.memory.graphs == captured * planned.graph_bytes
    cache.lookup(addresses[0], 300, addresses[1], 0, capturing=True)  # takes no more than it needs
    assert cache.memory.graphs < 2 * planned.graph_bytes + planned.graph_bytes // 4
    assert cache.memory.workspaces == 0


def test_large_batches_on_a_device_list_what_they_miss(cpu_bench: Bench) -> None:
    """On a device with a copy of the store's index, from 131,072 keys on; here with memory of the process."""
    geometry = CacheGeometry("table", DIM, 500, "dynamic", False, "float32", np.float32(0), None)
    use = CacheUse(on_device=True, keys=140_000, buffers=3, miss_path="auto", has_store=True, index=10_000)
    planned = plan_memory(geometry, load_policy("lru"), use)
    assert planned.memory.index_mirror == 10_000
    shape = WorkspaceShape.of(geometry, 131_072, inserts=True, counts=False, keys=140_000)
    workspace = Workspace(CpuBackend(), shape, "table")
    workspace.reserve(1, False, 0)
    assert workspace.own_list and 3 * workspace.bytes == planned.memory.workspaces
    workspace.release(0)
    assert workspace.bytes == 0


def test_growing_frees_what_was_there(cpu_bench: Bench) -> None:
    cache = cpu_bench.cache(cpu_bench.store(range(700)), 500, keys=KEYS)
    cache.lookup_arrays(ints(range(10)))
    small = cache.memory.workspaces
    cache.lookup_arrays(ints(range(2 * KEYS)))
    large = cache.memory.workspaces
    again = cpu_bench.cache(cpu_bench.store(range(700)), 500, keys=8192)  # a power of two, to which workspaces grow
    again.lookup_arrays(ints(range(10)))
    assert small < large == again.memory.workspaces


@pytest.mark.parametrize("keys", [1, 256, 257, 5000, 300_000])
def test_staging_takes_what_is_planned(cpu_bench: Bench, keys: int) -> None:
    cache = cpu_bench.cache(cpu_bench.store(range(300)), 200, miss_path="staged", kind="uvm")
    cache.lookup_arrays(np.arange(keys) % 300)
    planned = staging_bytes(DIM, keys)
    assert cache.memory.staging == sum(planned)  # on the CPU both are memory of the process
    assert cache.backend.pinned_bytes == planned.pinned
    cache.close()
    assert cache.backend.pinned_bytes == 0


@pytest.mark.parametrize("device", ON_BOTH)
def test_memory_for_written_rows_is_kept_if_it_is_little(device: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(device)
    monkeypatch.setattr(state, "_MAX_KEPT_BYTES", 128 * 80)
    store = bench.store(range(300), DIM)
    cache = bench.cache(store, 3000)
    cache.parts.state.keeps = True  # as on a device
    cache.lookup_arrays(np.arange(300))
    cache.update(np.empty(0, np.int64))
    assert cache.parts.state.kept_bytes == 0
    for stamp, (n, kept) in enumerate([(1, 320), (40, 4000), (10, 4000), (100, 9760), (300, 9760), (2, 9760)], 1):
        keys, rows = np.arange(n), rows_of(np.arange(n), DIM, stamp)
        store.upsert(keys, rows)
        cache.take_written(keys, rows)
        assert cache.parts.state.kept_bytes == kept == cache.memory.workspaces - cache.parts.workspaces.bytes
        found, missing = cache.query(np.arange(300))
        assert not len(missing) and np.array_equal(found[:n], rows)
    bench.close()
    assert cache.parts.state.kept_bytes == 0


def test_bytes_are_those_where_the_cache_lives() -> None:
    memory = CacheMemory(
        index=1, rows=2, policy=4, index_mirror=8, workspaces=16, staging=32, pinned_rows=64, pinned_staging=128
    )
    assert (memory.bytes, memory.pinned_bytes, memory.needed_bytes) == (63, 192, 55)


def test_promises_are_what_was_not_taken_yet() -> None:
    device = 1000  # of no other test
    first, second = Owner(30), Owner(120)
    promise(device, first, 100)
    promise(device, second, 100)
    promise(device + 1, second, 1000)
    assert promised_bytes(device + 1) == 880
    promise(device, second, 100)  # the last one counts
    assert (promised_bytes(device), promised_bytes(device + 1)) == (70, 0)
    first.needed_bytes = 90
    assert promised_bytes(device) == 10
    withdraw(first)
    withdraw(first)
    assert promised_bytes(device) == 0
    third = Owner(0)
    promise(device, third, 5)
    assert promised_bytes(device) == 5
    del third
    gc.collect()
    assert promised_bytes(device) == 0


@pytest.mark.parametrize(
    ("sizes", "total", "free", "expected"),
    [
        ([10, 20, 5], 1600, 1600, 35),
        ([60, 50, 40], 1600, 1600, 100),
        ([10], 1600, 109, 0),
        ([10], 1600, 110, 10),
        ([], 16, 16, 0),
    ],
)
def test_copies_of_indexes_have_a_sixteenth_and_leave_one(sizes: list[int], total: int, free: int, expected: int) -> None:
    assert with_room(sizes, total, free) == expected
