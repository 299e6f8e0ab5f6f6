"""Histograms: which bucket a value is in, quantiles, sums of snapshots."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hps_numba.metrics.histogram import (
    BUCKETS,
    Histogram,
    HistogramSnapshot,
    bucket_of,
    edges_between,
    upper_edge,
)


def recorded(values: np.ndarray) -> HistogramSnapshot:
    histogram = Histogram()
    for value in values.tolist():
        histogram.record(value)
    return histogram.snapshot()


def test_edges_ascend_and_each_is_the_largest_value_of_its_bucket() -> None:
    edges = [upper_edge(bucket) for bucket in range(BUCKETS)]
    assert edges == sorted(set(edges))
    for bucket, edge in enumerate(edges[:-1]):
        assert (bucket_of(edge), bucket_of(edge + 1)) == (bucket, bucket + 1)


def test_a_bucket_is_at_most_a_quarter_as_wide_as_its_values() -> None:
    for bucket in range(4, BUCKETS - 1):
        low, high = upper_edge(bucket - 1), upper_edge(bucket)
        assert high - low <= low / 4


@pytest.mark.parametrize("value", [0, -1, -(2**62)])
def test_the_first_bucket_has_all_that_is_below_one(value: int) -> None:
    assert bucket_of(value) == 0


@pytest.mark.parametrize("value", [2**43 + 1, 2**50, 2**63 - 1])
def test_the_last_bucket_has_all_that_is_too_large(value: int) -> None:
    assert (bucket_of(2**43), bucket_of(value)) == (BUCKETS - 2, BUCKETS - 1)


@pytest.mark.parametrize("seed", range(4))
def test_quantiles_are_near_those_of_numpy(seed: int) -> None:
    values = np.random.default_rng(seed).lognormal(8, 2, 5000).astype(np.int64)
    snapshot = recorded(values)
    assert (snapshot.count, snapshot.sum) == (len(values), int(values.sum()))
    assert snapshot.mean == pytest.approx(values.mean())
    for share in (0.0, 0.01, 0.5, 0.9, 0.99, 0.999, 1.0):
        exact = float(np.quantile(values, share, method="inverted_cdf"))
        assert snapshot.quantile(share) == pytest.approx(exact, rel=0.26, abs=1)


def test_an_empty_histogram_has_no_quantile() -> None:
    empty = Histogram().snapshot()
    assert math.isnan(empty.quantile(0.5))
    assert math.isnan(empty.mean)


def test_snapshots_are_added_and_subtracted() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 10**6, 300), rng.integers(0, 10**9, 200)
    both = HistogramSnapshot.merged([recorded(one), recorded(other)])
    whole = recorded(np.concatenate([one, other]))
    assert (both.counts == whole.counts).all()
    assert both.sum == whole.sum
    assert ((both - recorded(one)).counts == recorded(other).counts).all()


def test_counts_up_to_an_edge_are_exact() -> None:
    values = np.random.default_rng(1).integers(0, 5000, 2000)
    edges = edges_between(16, 4096, 4)
    assert recorded(values).at_most(edges) == [int((values <= edge).sum()) for edge in edges]


@pytest.mark.parametrize(("an_octave", "expected"), [(1, (16, 32, 64)), (2, (16, 24, 32, 48, 64))])
def test_edges_between_powers_of_two(an_octave: int, expected: tuple[int, ...]) -> None:
    assert edges_between(16, 64, an_octave) == expected
    assert edges_between(1, 8, 1) == (1, 2, 4, 8)


def test_a_snapshot_stays_as_it_was() -> None:
    histogram = Histogram()
    histogram.record(7)
    before = histogram.snapshot()
    histogram.record(9)
    assert (before.count, before.sum) == (1, 7)
