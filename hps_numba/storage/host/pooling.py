"""Bags of keys and their pooled rows: rows are read and combined in one pass, without a copy in between.

Many bags are split over threads.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace

import numpy as np

from hps_numba.errors import ArrayError, ConfigError
from hps_numba.kernels.host.histogram import begin_timed, end_timed
from hps_numba.kernels.host.pooling import bag_starts, host_pool
from hps_numba.kernels.layouts.pooling import COMBINERS
from hps_numba.runtime.threads import ranges_of, run_ranges
from hps_numba.storage.distinct import distinct_keys
from hps_numba.storage.host.content import address_of, apart
from hps_numba.storage.host.epochs import Epochs

__all__ = ["Bags", "Missing", "offsets_of", "pool_bags", "without_padding"]


@dataclass(frozen=True)
class Bags:
    """Keys in bags, and how the rows of a bag are combined.

    Args:
        keys: int64 ``[n]``, contiguous.
        offsets: int64 ``[bags + 1]``: where each bag begins, then the end of the last; ascending from 0 to ``n``. Copied.
        weights: float32 ``[n]``, contiguous, or None: all are 1.
        combiner: ``sum``; ``mean``, over the sum of weights; ``sqrtn``, over the root of the sum of their squares (0 where the
            divisor is 0); ``max``, whatever the weights.
        max_norm: each row is clipped to this Euclidean norm before it is weighted, or None.

    Raises:
        ConfigError (a ValueError): an argument is not as above.
    """

    keys: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray | None = None
    combiner: str = "sum"
    max_norm: float | None = None

    def __post_init__(self) -> None:
        n = len(self.keys)
        # what was checked must be what kernels read: the caller may change the array meanwhile
        object.__setattr__(self, "offsets", self.offsets.copy())
        if self.combiner not in COMBINERS:
            raise ConfigError(f"combiner: expected one of {', '.join(COMBINERS)}, got {self.combiner!r}")
        if self.offsets.dtype != np.int64 or self.offsets.ndim != 1 or not len(self.offsets):
            raise ConfigError(f"offsets: expected int64[bags + 1], got {self.offsets.dtype}{list(self.offsets.shape)}")
        if self.offsets[0] != 0 or self.offsets[-1] != n:
            raise ConfigError(f"offsets: expected 0 to {n}, the number of keys, got {self.offsets[0]} to {self.offsets[-1]}")
        falls = np.flatnonzero(self.offsets[1:] < self.offsets[:-1])
        if len(falls):
            raise ConfigError(f"offsets[{falls[0] + 1}]: expected ascending offsets, got {self.offsets[falls[0] + 1]}")
        if self.weights is not None and (self.weights.dtype != np.float32 or self.weights.shape != (n,)):
            raise ConfigError(f"weights: expected float32[{n}], got {self.weights.dtype}{list(self.weights.shape)}")
        if self.max_norm is not None and not self.max_norm >= 0:
            raise ConfigError(f"max_norm: expected None or a number of at least 0, got {self.max_norm}")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def apart_from(self, out: np.ndarray) -> Bags:
        """The same bags, in copies of what has memory in common with an array that is written while they are read."""
        keys = apart(self.keys, out)
        weights = None if self.weights is None else apart(self.weights, out)
        return self if keys is self.keys and weights is self.weights else replace(self, keys=keys, weights=weights)


def offsets_of(numbers: np.ndarray, bags: int) -> np.ndarray:
    """int64 ``[bags + 1]``: where each bag begins, from the number of the bag of each key: int64 ``[n]``, ascending.

    Raises:
        ConfigError: numbers are not ascending, or not in 0 to ``bags - 1``.
    """
    offsets = np.empty(bags + 1, np.int64)
    wrong = bag_starts(numbers, len(numbers), offsets)
    if wrong >= 0:
        raise ConfigError(f"row of id {wrong}: expected ascending numbers in 0..{bags - 1}, got {numbers[wrong]}")
    return offsets


def without_padding(
    keys: np.ndarray, offsets: np.ndarray, weights: np.ndarray | None, padding: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Drop the keys that equal ``padding``: keys int64 ``[n]``, offsets ``[bags + 1]`` and weights without them.

    Raises:
        ConfigError: an offset is not in 0 to ``n``.
    """
    kept = keys != padding
    offsets = offsets.copy()  # what is checked must be what is read
    if len(offsets) and not (offsets.min() >= 0 and offsets.max() <= len(keys)):
        raise ConfigError(f"offsets: expected 0 to {len(keys)}, the number of keys, got {offsets.min()} to {offsets.max()}")
    starts = np.concatenate(([0], np.cumsum(kept)))[offsets]
    return keys[kept], starts, None if weights is None else weights[kept]


class Missing:
    """Keys of bags that host memory lacks: their positions, and rows that slower tiers had for them."""

    def __init__(self, n: int) -> None:
        self._listed = np.empty(n, np.int64)
        self.positions = self._listed[:0]
        self._side: np.ndarray | None = None
        self._rows = np.empty((0, 0), np.float32)

    def addresses(self) -> tuple[int, int, int]:
        """Addresses of the list of positions, the row numbers and the rows; 0 where there are none."""
        side, rows = (0, 0) if self._side is None else (address_of(self._side), address_of(self._rows))
        return address_of(self._listed), side, rows

    def take(self, parts: list[tuple[int, int]]) -> None:
        """Keep the positions that kernels listed in these parts, (start, number), of the list."""
        self.positions = np.concatenate([self._listed[start : start + number] for start, number in parts])

    def answer(self, rows: np.ndarray, numbers: np.ndarray) -> None:
        """Provide row ``rows[numbers[i]]`` for the key at ``positions[i]``: float32 ``[m, dim]`` and int64."""
        self._rows = np.ascontiguousarray(rows)
        self._side = np.full(len(self._listed), -1, np.int64)
        self._side[self.positions] = numbers


def pool_bags(
    header: int,
    epochs: Epochs | None,
    bags: Bags,
    out: np.ndarray,
    default: float,
    *,
    counters: int = 0,
    missing: Missing | None = None,
) -> int:
    """Write the pooled row of each bag to ``out``.

    Args:
        header, epochs: address of a word that holds the address of the store's index block, and the store's epochs; or 0 and
            None, if every key is missing.
        out: float32 ``[bags, dim]``, contiguous.
        default: fills the row of a key that no tier has.   counters: address of the ``COUNTER_*`` words to add to, or 0.
        missing: takes positions of keys that the store lacks, and gives rows for them if it has any.

    Returns the number of keys that the store lacks, or -1 if it is closed.
    """
    if out.dtype != np.float32 or out.ndim != 2 or len(out) != len(bags) or not out.flags.c_contiguous:
        raise ArrayError(f"out: expected contiguous float32[{len(bags)}, dim], got {out.dtype}{list(out.shape)}")
    if not len(bags):
        return 0
    bags = bags.apart_from(out)
    n, dim = len(bags.keys), out.shape[1]
    listed, side, rows = (0, 0, 0) if missing is None else missing.addresses()
    bound = np.float32(-1.0 if bags.max_norm is None else bags.max_norm)
    weights = 0 if bags.weights is None else address_of(bags.weights)
    keys, offsets, answer = address_of(bags.keys), address_of(bags.offsets), address_of(out)
    before = (keys, offsets, weights)
    after = (dim, answer, COMBINERS[bags.combiner], np.float32(default), bound, side, rows, listed)

    def pool_range(first: int, stop: int) -> int:
        record = 0 if epochs is None else epochs.acquire()
        try:
            shared = 0 if epochs is None else epochs.address
            missed: int = host_pool(header, *before, first, stop, *after, shared, record, time.monotonic_ns(), counters)
        finally:
            if epochs is not None:
                epochs.release(record)
        return missed

    ends = np.array([stop for _, stop in ranges_of(n, 4 * dim + 64)])
    cuts = distinct_keys(np.concatenate(([0], np.searchsorted(bags.offsets[1:-1], ends[:-1], "right"), [len(bags)])))
    ranges = list(itertools.pairwise(cuts.tolist()))
    since = begin_timed(counters) if counters else 0
    found = run_ranges(pool_range, ranges)
    if min(found) < 0:
        return -1
    if since:
        end_timed(counters, since)
    if missing is not None:
        missing.take([(int(bags.offsets[first]), missed) for (first, _), missed in zip(ranges, found)])
    return sum(found)
