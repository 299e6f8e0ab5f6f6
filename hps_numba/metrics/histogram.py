"""Log-linear histograms of whole numbers, such as nanoseconds or keys: arrays of int64 that kernels and Python add to.

Every octave has four buckets of one width, so a bucket is at most a quarter as wide as its values: a quantile is off by 25 %
at the very most, from 1 ns to more than two hours. A value is counted where ``value <= upper edge``, as Prometheus counts, and
the edges that are published are edges of buckets: the published numbers are exact.

Turned down: buckets with given edges, which take a search; sketches with a bound on the error (DDSketch, HDR), whose logarithm
or size a kernel would pay for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

__all__ = ["BUCKETS", "SUM", "WORDS", "Histogram", "HistogramSnapshot", "bucket_of", "edges_between", "upper_edge"]

#: buckets; the last takes everything above 2**43. The same numbers are in ``kernels.layouts.histogram``.
BUCKETS = 169
#: word with the sum of all values; the words before it are the buckets
SUM = BUCKETS
WORDS = BUCKETS + 1


def bucket_of(value: int) -> int:
    """Number of the bucket of a value; what is below 1 is in bucket 0."""
    below = value - 1
    if below < 4:
        return max(0, below)
    octave = below.bit_length() - 1
    return min(4 * (octave - 1) + (below >> (octave - 2) & 3), BUCKETS - 1)


def upper_edge(bucket: int) -> int:
    """The largest value of a bucket; that of the last bucket is as if it had one."""
    if bucket < 4:
        return bucket + 1
    octave, part = divmod(bucket, 4)
    return (5 + part) << (octave - 1)


def edges_between(low: int, high: int, an_octave: int = 2) -> tuple[int, ...]:
    """Upper edges of buckets from a power of two to another, ``an_octave`` (1, 2 or 4) of them in each octave."""
    starts = [1 << power for power in range(low.bit_length() - 1, high.bit_length() - 1)]
    parts = [(start, start * part) for start in starts for part in range(an_octave)]
    return (*(start + part // an_octave for start, part in parts if part % an_octave == 0), high)


@functools.lru_cache(256)
def _buckets_of(edges: tuple[int, ...]) -> np.ndarray:
    return np.array([bucket_of(edge) for edge in edges], np.int64)


@dataclass(frozen=True, eq=False)
class HistogramSnapshot:
    """What a histogram has counted.

    Attributes:
        counts: int64 ``[BUCKETS]``.   sum: of all values.
    """

    counts: np.ndarray
    sum: int

    @staticmethod
    def of_words(words: np.ndarray) -> HistogramSnapshot:
        """A copy of int64 ``[WORDS]`` as kernels write them. A value that is just being added may be in the sum only."""
        copied = words.copy()
        return HistogramSnapshot(copied[:BUCKETS], int(copied[SUM]))

    @staticmethod
    def merged(some: Iterable[HistogramSnapshot]) -> HistogramSnapshot:
        """All of them together."""
        return sum(some, HistogramSnapshot(np.zeros(BUCKETS, np.int64), 0))

    def __add__(self, other: HistogramSnapshot) -> HistogramSnapshot:
        return HistogramSnapshot(self.counts + other.counts, self.sum + other.sum)

    def __sub__(self, before: HistogramSnapshot) -> HistogramSnapshot:
        """What was counted since a snapshot before."""
        return HistogramSnapshot(self.counts - before.counts, self.sum - before.sum)

    @property
    def count(self) -> int:
        """How many values."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Mean of the values; NaN if there is none."""
        return self.sum / self.count if self.count else math.nan

    def quantile(self, share: float) -> float:
        """The value that ``share`` (0 to 1) of all values do not exceed, linear within a bucket; NaN if there is none."""
        ends = np.cumsum(self.counts)
        if not ends[-1]:
            return math.nan
        rank = min(max(share, 0.0), 1.0) * int(ends[-1])
        bucket = min(int(np.searchsorted(ends, max(rank, 1.0))), BUCKETS - 1)
        low, high = (upper_edge(bucket - 1) if bucket else 0), upper_edge(bucket)
        here = int(self.counts[bucket])
        return low + (high - low) * (max(rank, 1.0) - (int(ends[bucket]) - here)) / here

    def at_most(self, edges: Iterable[int]) -> list[int]:
        """For each upper edge of a bucket: how many values do not exceed it."""
        counts: list[int] = np.cumsum(self.counts)[_buckets_of(tuple(edges))].tolist()
        return counts


class ListHistogram:
    """A histogram that only Python records to: elements of a list are faster to change than those of an array.

    Thread safety: one thread at a time.
    """

    __slots__ = ("_words",)

    def __init__(self) -> None:
        self._words = [0] * WORDS

    def record(self, value: int) -> None:
        """Count one value, a whole number of at least 0."""
        words = self._words
        words[bucket_of(value)] += 1
        words[SUM] += value

    def snapshot(self) -> HistogramSnapshot:
        """What it has counted."""
        return HistogramSnapshot(np.array(self._words[:SUM], np.int64), self._words[SUM])


class Histogram:
    """A histogram that Python records to; kernels add to its words by ``kernels.host.histogram``.

    Attributes:
        words: int64 ``[WORDS]``.

    Thread safety: ``record`` by one thread at a time, the rest by any.
    """

    __slots__ = ("words",)

    def __init__(self) -> None:
        self.words = np.zeros(WORDS, np.int64)

    @property
    def address(self) -> int:
        """Address of the words, which lasts as long as the object."""
        return int(self.words.__array_interface__["data"][0])

    def record(self, value: int) -> None:
        """Count one value, a whole number of at least 0."""
        self.words[bucket_of(value)] += 1
        self.words[SUM] += value

    def snapshot(self) -> HistogramSnapshot:
        """What it has counted."""
        return HistogramSnapshot.of_words(self.words)
