"""``HPS.lookup_pooled``: bags of keys, their rows combined in the pass that reads them, against float64 and the CPU cache."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from support.internals import served_table
from support.oracles import rows_of

import hps_numba
from hps_numba.errors import ArrayError, ConfigError
from hps_numba.storage.host.pooling import offsets_of

DEFAULT = -7.5
COMBINERS = ("sum", "mean", "sqrtn", "max")


def pooled(rows: np.ndarray, offsets: np.ndarray, weights: np.ndarray | None, combiner: str, max_norm: float | None) -> Any:
    """``(answer, sum of the absolute terms)`` of unpooled rows, in float64."""
    rows = rows.astype(np.float64)
    if max_norm is not None:
        rows = rows * max_norm / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), max_norm)
    answer = np.zeros((len(offsets) - 1, rows.shape[1]))
    scale = np.zeros_like(answer)
    for bag, (start, stop) in enumerate(itertools.pairwise(offsets)):
        some = rows[start:stop]
        w = np.ones(len(some)) if weights is None else weights[start:stop].astype(np.float64)
        if not len(some):
            continue
        if combiner == "max":
            answer[bag], scale[bag] = some.max(0), np.abs(some).max(0)
            continue
        divisor = {"sum": 1.0, "mean": w.sum(), "sqrtn": np.sqrt((w * w).sum())}[combiner]
        if divisor != 0:
            answer[bag] = (w[:, None] * some).sum(0) / divisor
            scale[bag] = np.abs(w[:, None] * some).sum(0) / abs(divisor)
    return answer, scale


def bags_of(random: np.random.Generator, bags: int, longest: int) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(random.integers(0, longest + 1, bags)))).astype(np.int64)


@pytest.mark.parametrize("max_norm", [None, 0.1, 10.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("combiner", COMBINERS)
@pytest.mark.parametrize("dim", [1, 3, 16, 100])
def test_pooled_rows_equal_those_computed_in_float64(
    workshop: Any, dim: int, combiner: str, weighted: bool, max_norm: float | None
) -> None:
    random = np.random.default_rng(dim)
    server = workshop.open(workshop.model((range(500), dim)))
    for bags, longest in ((1, 1), (7, 3), (300, 20), (2, 3000)):
        offsets = bags_of(random, bags, longest)
        n = offsets[-1]
        keys = random.integers(-5, 505, n)
        weights = random.uniform(0.1, 2, n).astype(np.float32) if weighted else None
        answer = server.lookup_pooled(keys, offsets, "m", 0, weights=weights, combiner=combiner, max_norm=max_norm)
        expected, scale = pooled(server.lookup(keys, "m", 0), offsets, weights, combiner, max_norm)
        assert answer.dtype == np.float32 and answer.shape == (bags, dim)
        assert (np.abs(answer - expected) <= 6e-8 * (longest + 20) * scale).all()  # half a ulp for each addition


def test_bags_are_split_over_threads(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hps_numba.runtime import threads

    monkeypatch.setattr(threads, "SPLIT_BYTES", 4096)
    random = np.random.default_rng(0)
    server = workshop.open_cold(volatile={"type": "hash_map"})[0]
    server.insert(np.arange(1000), rows_of(np.arange(1000), 3), "m", 0)
    offsets = bags_of(random, 2000, 4)
    keys = random.integers(0, 1100, offsets[-1])
    answer = server.lookup_pooled(keys, offsets, "m", 0)
    expected, scale = pooled(server.lookup(keys, "m", 0), offsets, None, "sum", None)
    assert (np.abs(answer - expected) <= 1e-6 * scale).all()
    empty = np.zeros(2001, np.int64)
    empty[1:] = 5000
    keys = np.arange(5000) % 1000
    whole = server.lookup_pooled(keys, empty, "m", 0, combiner="mean")
    assert not whole[1:].any()
    assert np.allclose(whole[0], server.lookup(keys, "m", 0).astype(np.float64).mean(0), rtol=1e-4)


@pytest.mark.parametrize("combiner", COMBINERS)
def test_the_cpu_cache_pools_bit_for_bit_as_host_memory(workshop: Any, combiner: str) -> None:
    server = workshop.open(workshop.model((range(50), 16), gpucacheper=1.0), cache_on_cpu=True)
    cache = served_table(server).cache_on(None)
    assert cache is not None
    random = np.random.default_rng(1)
    offsets = bags_of(random, 40, 6)
    keys = random.integers(0, 60, offsets[-1])
    weights = random.uniform(-1, 1, len(keys)).astype(np.float32)
    answer = server.lookup_pooled(keys, offsets, "m", 0, weights=weights, combiner=combiner)
    assert answer.tobytes() == cache.pool_arrays(keys, offsets, weights, combiner).tobytes()


def test_zero_divisors_and_empty_bags_give_zero(workshop: Any) -> None:
    server = workshop.open(workshop.model((range(9), 3)))
    for combiner in ("mean", "sqrtn"):
        answer = server.lookup_pooled([1, 2], [0, 2, 2], "m", 0, weights=np.zeros(2), combiner=combiner)
        assert not answer.any()
    assert not server.lookup_pooled([1, 2], [0, 0, 2, 2], "m", 0, combiner="max")[[0, 2]].any()
    assert server.lookup_pooled([], [0], "m", 0).shape == (0, 3)
    assert not server.lookup_pooled([], [0, 0, 0], "m", 0).any()


def test_max_norm_0_gives_nan_for_a_row_of_zeros_as_in_tensorflow(workshop: Any) -> None:
    server = workshop.open(workshop.model((range(9), 3)))
    server.insert([100], np.zeros((1, 3)), "m", 0)
    answer = server.lookup_pooled([1, 100], [0, 1, 2], "m", 0, max_norm=0)
    assert not answer[0].any() and np.isnan(answer[1]).all()


@pytest.mark.parametrize("volatile", [{"type": "hash_map", "initialize_after_startup": False}, {"type": "disabled"}])
def test_pooling_fetches_keys_from_slower_tiers(workshop: Any, volatile: Any) -> None:
    server, _ = workshop.open_cold(volatile=volatile)
    keys = np.array([3, 3, 8, 77, 1])
    offsets = np.array([0, 2, 2, 4, 5])
    answer = server.lookup_pooled(keys, offsets, "m", 0, weights=np.arange(5))
    rows = np.concatenate((rows_of(np.array([3, 3, 8]), 3), np.full((1, 3), DEFAULT), rows_of(np.array([1]), 3)))
    expected, scale = pooled(rows.astype(np.float32), offsets, np.arange(5, dtype=np.float32), "sum", None)
    assert (np.abs(answer - expected) <= 1e-6 * scale).all()
    stats = server.stats()["m"]["sparse_embedding0"]
    assert (stats.keys, stats.host_hits, stats.tier_hits, stats.absent) == (5, 0, 4, 1)


def test_invalid_arguments_are_refused(workshop: Any) -> None:
    server = workshop.open(workshop.model((range(9), 3)))
    for offsets, match in (
        ([0, 2], "expected 0 to 3, the number of keys, got 0 to 2"),
        ([1, 3], "got 1 to 3"),
        ([0, 2, 1, 3], r"offsets\[2\]"),
        ([], "bags"),
    ):
        with pytest.raises(ConfigError, match=match):
            server.lookup_pooled([1, 2, 3], np.array(offsets, np.int64), "m", 0)
    with pytest.raises(ConfigError, match=r"combiner: expected .*, got 'average'"):
        server.lookup_pooled([1], [0, 1], "m", 0, combiner="average")
    with pytest.raises(ConfigError, match=r"max_norm: expected .*, got -1"):
        server.lookup_pooled([1], [0, 1], "m", 0, max_norm=-1)
    with pytest.raises(ArrayError, match="weights"):
        server.lookup_pooled([1], [0, 1], "m", 0, weights=[1, 2])
    with pytest.raises(ArrayError, match=r"float32\[1, 3\]"):
        server.lookup_pooled([1], [0, 1], "m", 0, out=np.empty((1, 4), np.float32))
    server.close()
    with pytest.raises(hps_numba.ClosedError):
        server.lookup_pooled([1], [0, 1], "m", 0)


def test_offsets_of_ascending_row_numbers() -> None:
    numbers = np.array([[0, 9], [2, 9], [2, 9]])
    assert offsets_of(numbers[:, 0], 5).tolist() == [0, 1, 1, 3, 3, 3]
    assert offsets_of(np.array([], np.int64), 2).tolist() == [0, 0, 0]
    for wrong, match in (
        ([0, 2, 1], "row of id 2: expected .*, got 1"),
        ([0, 5], "row of id 1: expected .*, got 5"),
        ([-1], "row of id 0: expected .*, got -1"),
    ):
        with pytest.raises(ConfigError, match=match):
            offsets_of(np.array(wrong), 4)
