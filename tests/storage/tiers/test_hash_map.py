"""Tables in the memory of the process: how they grow, how they are bounded, and which rows are evicted first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from support.oracles import rows_of
from support.tiers import DIM, IN_MEMORY, PACKAGE, TAG, content_of, fetch, ints

from hps_numba import plugins
from hps_numba.config import VolatileDatabaseConfig, read_config
from hps_numba.device.host_memory import PlainHostAllocator
from hps_numba.errors import CapacityError, ClosedError, ConfigError, TierError
from hps_numba.storage.host.content import TableContent
from hps_numba.storage.host.epochs import Epochs
from hps_numba.storage.tiers.hash_map import HashMapTier


@pytest.fixture(params=IN_MEMORY)
def in_memory(request: pytest.FixtureRequest) -> Iterator[Callable[..., HashMapTier]]:
    made: list[HashMapTier] = []

    def one(**options: Any) -> HashMapTier:
        kind = plugins.load(PACKAGE, request.param)
        made.append(kind(VolatileDatabaseConfig(**options), allocator=PlainHostAllocator()))
        return made[-1]

    yield one
    for tier in made:
        tier.close()


def test_closed_hash_maps_release_memory_and_refuse_calls(in_memory: Callable[..., HashMapTier]) -> None:  # D09
    tier = in_memory()
    tier.insert(TAG, ints(1), rows_of([1], DIM))
    tier.close()
    assert tier.allocator.in_use <= 64
    with pytest.raises(ClosedError, match="closed"):
        tier.insert(TAG, ints(1), rows_of([1], DIM))


def test_fetch_expects_rows_of_the_tables_width(in_memory: Callable[..., HashMapTier]) -> None:  # D06
    tier = in_memory()
    tier.insert(TAG, ints(1), rows_of([1], DIM))
    for shape in [(1, DIM + 1), (2, DIM), (1,)]:
        with pytest.raises(TierError, match="rows: expected shape"):
            tier.fetch(TAG, ints(1), np.empty(shape, np.float32))


def test_memory_grows_in_steps_of_allocation_rate(in_memory: Callable[..., HashMapTier]) -> None:  # D10
    step_rows = 10
    tier = in_memory(allocation_rate=step_rows * 4 * DIM, max_batch_size=1)
    sizes = []
    for key in range(3 * step_rows):
        tier.insert(TAG, ints(key), rows_of([key], DIM))
        store = tier.store(TAG, DIM)
        sizes.append(tier.allocator.in_use - store.versions.current.index.committed)
    steps = [after - before for before, after in pairwise(sizes)]
    assert [key + 1 for key, step in enumerate(steps) if step] == [10, 20]
    assert {step for step in steps if step} == {step_rows * 4 * DIM}


def test_an_allocation_rate_below_one_row_is_refused(in_memory: Callable[..., HashMapTier]) -> None:  # D10
    tier = in_memory(allocation_rate=4 * DIM - 1)
    with pytest.raises(CapacityError, match="allocation_rate: 11 bytes do not hold one row of 12 bytes"):
        tier.insert(TAG, ints(1), rows_of([1], DIM))
    config = {
        "supportlonglong": True,
        "models": [
            {
                "model": "m",
                "sparse_files": ["x"],
                "embedding_vecsize_per_table": [DIM],
                "maxnum_catfeature_query_per_table_per_sample": [1],
                "default_value_for_each_table": [0],
                "deployed_device_list": [],
            }
        ],
        "volatile_db": {"type": "hash_map", "allocation_rate": 4 * DIM - 1},
    }
    with pytest.raises(ConfigError, match=r"volatile_db\.allocation_rate"):
        read_config(config)


BOUND = {"overflow_margin": 10, "num_partitions": 2}  # 20 rows in all
POLICIES = ["evict_random", "evict_least_used", "evict_oldest"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_the_bound_is_exceeded_by_at_most_a_batch(
    in_memory: Callable[..., HashMapTier], policy: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # D11
    tier = in_memory(**BOUND, overflow_policy=policy, max_batch_size=batch)
    store = tier.store(TAG, DIM)
    before_trim = []
    trim = store.bound.trim

    def noted(content: TableContent, epochs: Epochs) -> None:
        before_trim.append(content.live)
        trim(content, epochs)

    monkeypatch.setattr(store.bound, "trim", noted)
    for start in range(0, 120, 24):
        tier.insert(TAG, np.arange(start, start + 24), rows_of(np.arange(start, start + 24), DIM))
        assert tier.size(TAG) <= tier.capacity(TAG) == 20
    assert 20 < max(before_trim) <= 20 + batch


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("target", "left"), [(0.5, 10), (0.8, 16), (0.83, 17), (1.0, 20), (0.001, 0)])
def test_an_eviction_leaves_exactly_the_target(
    in_memory: Callable[..., HashMapTier], policy: str, target: float, left: int
) -> None:  # D12
    tier = in_memory(**BOUND, overflow_policy=policy, overflow_resolution_target=target, max_batch_size=65536)
    tier.insert(TAG, np.arange(20), rows_of(np.arange(20), DIM))
    assert tier.size(TAG) == 20
    tier.insert(TAG, ints(100), rows_of([100], DIM))
    assert tier.size(TAG) == left == round(20 * target)
    for key, row in content_of(tier, TAG).items():
        assert row == rows_of([key], DIM)[0].tobytes()


def test_least_used_rows_are_evicted_first(in_memory: Callable[..., HashMapTier]) -> None:  # D13
    tier = in_memory(**BOUND, overflow_policy="evict_least_used", overflow_resolution_target=0.5)
    tier.insert(TAG, np.arange(20), rows_of(np.arange(20), DIM))
    for _ in range(3):
        fetch(tier, TAG, ints(0, 3, 5, 7))
    for _ in range(2):
        fetch(tier, TAG, ints(11, 12, 13, 14))
    tier.insert(TAG, ints(0, 11), rows_of([0, 11], DIM, 1))  # an update is no loss of what was counted
    fetch(tier, TAG, ints(18, 19))
    tier.insert(TAG, ints(100), rows_of([100], DIM))
    assert set(content_of(tier, TAG)) == {0, 3, 5, 7, 11, 12, 13, 14, 18, 19}


def test_oldest_rows_are_evicted_first(in_memory: Callable[..., HashMapTier]) -> None:  # D13
    tier = in_memory(**BOUND, overflow_policy="evict_oldest", overflow_resolution_target=0.4)
    for keys in (range(10), range(10, 20)):
        tier.insert(TAG, ints(*keys), rows_of(keys, DIM))
    fetch(tier, TAG, ints(1, 2))
    tier.insert(TAG, ints(3, 4), rows_of([3, 4], DIM, 1))
    fetch(tier, TAG, ints(15, 16, 17))
    tier.insert(TAG, ints(100), rows_of([100], DIM))
    assert set(content_of(tier, TAG)) == {1, 2, 3, 4, 15, 16, 17, 100}


def test_random_eviction_ignores_use(in_memory: Callable[..., HashMapTier]) -> None:  # D13
    tier = in_memory(overflow_margin=1000, num_partitions=1, overflow_policy="evict_random", overflow_resolution_target=0.5)
    tier.insert(TAG, np.arange(1000), rows_of(np.arange(1000), DIM))
    for _ in range(5):
        fetch(tier, TAG, np.arange(500))
    tier.insert(TAG, ints(5000), rows_of([5000], DIM))
    left = set(content_of(tier, TAG))
    assert len(left) == 500
    used = sum(key < 500 for key in left)
    assert 200 <= used <= 300  # 250 +- 11 at random; 499 or 1 if use mattered
