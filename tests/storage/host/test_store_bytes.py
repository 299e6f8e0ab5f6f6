"""What a table takes of host memory against what was planned, in pinned memory too."""

from __future__ import annotations

import numpy as np
import pytest
from support.cache_bench import ints

from hps_numba.device.host_memory import PinnedHostAllocator, PlainHostAllocator
from hps_numba.kernels.layouts.host_store import RECENCY_COUNT, RECENCY_NONE
from hps_numba.storage.host.content import TableContent
from hps_numba.storage.host.store import HostStore
from hps_numba.storage.host.store_bytes import StoreBytes, plan_store


def pinning() -> PinnedHostAllocator:
    """A pinned allocator on a machine that pins nothing."""
    return PinnedHostAllocator(lambda address, size: None, lambda address: None)


@pytest.mark.parametrize("recency", [RECENCY_NONE, RECENCY_COUNT])
@pytest.mark.parametrize("rows", [0, 1, 500, 40_000, 300_000])
@pytest.mark.parametrize("pinned", [False, True])
def test_a_loaded_table_takes_what_is_planned(rows: int, recency: int, pinned: bool) -> None:
    allocator = pinning() if pinned else PlainHostAllocator()
    content = TableContent(8, rows, allocator=allocator, recency=recency)
    content.fill(np.arange(rows), 0)
    planned = plan_store(rows, 8, recency, pinned=pinned)
    assert content.sizes == planned
    assert allocator.in_use == planned.bytes
    content.release()
    assert content.sizes == StoreBytes()


def test_sizes_follow_growth_and_versions_that_readers_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hps_numba.storage.host.store._GRACE_SECONDS", 0.0)
    allocator = PlainHostAllocator()
    store = HostStore(4, allocator=allocator, growth_bytes=16 * 1000)
    header = allocator.in_use - store.sizes.bytes
    for keys in (10, 1500, 4000):
        store.upsert(ints(range(keys)), np.ones((keys, 4), np.float32))
        assert allocator.in_use == store.sizes.bytes + header
    assert store.sizes.rows == 16 * store.slots
    before = store.sizes
    with store.reading():
        store.replace(store.new_content(2000))
        assert store.sizes == before + StoreBytes(index=plan_store(2000, 4).index, spare=16 * 2000)
        assert allocator.in_use == store.sizes.bytes + header
    store.upsert(ints([1]), np.ones((1, 4), np.float32))  # releases what readers have left
    assert allocator.in_use == store.sizes.bytes + header < before.bytes
    store.close()
