"""``host_pool``: sums in the documented order, bit for bit, and maxima."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from support.tensorflow_sums import LENGTHS, clipped_row, odd_rows, pooled_row, same_bits

from hps_numba.device.host_memory import PlainHostAllocator
from hps_numba.runtime import threads
from hps_numba.storage.host.pooling import Bags
from hps_numba.storage.host.store import HostStore

KEYS = 300
DIMS = (1, 2, 3, 7, 8, 9, 16, 31, 32, 33, 40, 65, 100, 128, 300)


@pytest.fixture
def open_store() -> Iterator[Callable[[int], HostStore]]:
    stores: list[HostStore] = []

    def open_one(dim: int) -> HostStore:
        stores.append(HostStore(dim, allocator=PlainHostAllocator()))
        stores[-1].upsert(np.arange(KEYS), odd_rows(KEYS, dim))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


def bags_of(seed: int, weighted: bool, lengths: Any = LENGTHS, **how: Any) -> Bags:
    """Keys that come again, of which some rows are odd and some absent."""
    random = np.random.default_rng(seed)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    keys = random.integers(0 if seed % 3 == 0 else 8, KEYS + 5, offsets[-1])
    weights = random.normal(size=len(keys)).astype(np.float32) if weighted else None
    if weights is not None and seed % 2:
        weights[random.random(len(keys)) < 0.3] = 0.0
    return Bags(keys, offsets, weights, **how)


def expected(bags: Bags, rows: np.ndarray, default: float) -> np.ndarray:
    """By the oracle, one bag after the other."""
    table = np.concatenate((rows, np.full((5, rows.shape[1]), default, np.float32)))
    pooled = np.empty((len(bags), rows.shape[1]), np.float32)
    for bag, (start, stop) in enumerate(itertools.pairwise(bags.offsets)):
        some = table[bags.keys[start:stop]]
        if bags.max_norm is not None and len(some):
            some = np.stack([clipped_row(row, bags.max_norm) for row in some])
        pooled[bag] = pooled_row(some, None if bags.weights is None else bags.weights[start:stop], bags.combiner)
    return pooled


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow", "ignore:divide by zero")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
@pytest.mark.parametrize("dim", DIMS)
def test_sums_are_bit_for_bit_those_of_tensorflow(open_store: Any, dim: int, combiner: str, weighted: bool) -> None:
    store = open_store(dim)
    for seed, max_norm in enumerate((None, 0.0, 0.5, 3.0, None)):
        for lengths in (LENGTHS, (1,), (0, 0, 5, 0)):
            bags = bags_of(seed, weighted, lengths, combiner=combiner, max_norm=max_norm)
            out = np.full((len(bags), dim), 99, np.float32)
            store.pool(bags, out, 0.75)
            assert same_bits(out, expected(bags, odd_rows(KEYS, dim), 0.75)), (max_norm, lengths)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
@pytest.mark.parametrize("weighted", [False, True])
def test_the_order_is_that_of_the_bag_wherever_threads_cut(
    open_store: Any, monkeypatch: pytest.MonkeyPatch, weighted: bool
) -> None:
    store = open_store(33)
    bags = bags_of(0, weighted, list(range(201)))
    whole, cut = (np.full((len(bags), 33), 99, np.float32) for _ in range(2))
    store.pool(bags, whole, 0.0)
    ranges = threads.ranges_of(len(bags.keys), 1, 7, least=1000)
    monkeypatch.setattr("hps_numba.storage.host.pooling.ranges_of", lambda n, size: ranges)
    store.pool(bags, cut, 0.0)
    assert len(ranges) > 5 and same_bits(whole, cut)
    assert same_bits(whole, expected(bags, odd_rows(KEYS, 33), 0.0))


@pytest.mark.parametrize("dim", [1, 8, 33])
def test_a_maximum_is_nan_where_a_row_is(open_store: Any, dim: int) -> None:
    store, rows = open_store(dim), odd_rows(KEYS, dim)
    bags = bags_of(0, True, combiner="max")
    out = np.full((len(bags), dim), 99, np.float32)
    store.pool(bags, out, 0.0)
    table = np.concatenate((rows, np.zeros((5, dim), np.float32)))
    for bag, (start, stop) in enumerate(itertools.pairwise(bags.offsets)):
        some = table[bags.keys[start:stop]]
        assert np.array_equal(out[bag], some.max(0) if len(some) else np.zeros(dim), equal_nan=True)
    assert np.isnan(out).any()
