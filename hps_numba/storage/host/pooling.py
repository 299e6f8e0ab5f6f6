"""Bags of keys, and the pooled row of each: read from host memory and combined in one pass, over idle threads if many.

Not a lookup and then a sum: rows of a bag go from the table to the sum of the bag, and nowhere in between.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import numpy as np

from hps_numba.errors import ArrayError, ConfigError
from hps_numba.kernels.cache.pooling import COMBINERS
from hps_numba.kernels.host.pooling import bag_starts, host_pool
from hps_numba.runtime.threads import ranges_of, run_ranges
from hps_numba.storage.host.content import address_of
from hps_numba.storage.host.epochs import Epochs

__all__ = ["Bags", "Missing", "offsets_of", "pool_bags", "without_padding"]


@dataclass(frozen=True)
class Bags:
    """Keys in bags, and how their rows become one (spec 2.3).

    Args:
        keys: int64 ``[n]``, contiguous.
        offsets: int64 ``[bags + 1]``, contiguous: where each bag begins, and the end of the last; ascending from 0 to ``n``.
        weights: float32 ``[n]``, contiguous, or None: all are 1.
        combiner: ``sum``; ``mean``, over the sum of weights; ``sqrtn``, over the root of the sum of their squares (0 where the
            divisor is 0); ``max``, whatever the weights.
        max_norm: each row is clipped to this Euclidean norm before it is weighted, or None.

    Raises:
        ConfigError (a ValueError): one of them does not fit.
    """

    keys: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray | None = None
    combiner: str = "sum"
    max_norm: float | None = None

    def __post_init__(self) -> None:
        n = len(self.keys)
        if self.combiner not in COMBINERS:
            raise ConfigError(f"combiner: {self.combiner!r} came, one of {', '.join(COMBINERS)} is wanted")
        if self.offsets.dtype != np.int64 or self.offsets.ndim != 1 or not len(self.offsets):
            raise ConfigError(f"offsets: {self.offsets.dtype}{list(self.offsets.shape)} came, int64[bags + 1] is wanted")
        if self.offsets[0] != 0 or self.offsets[-1] != n:
            raise ConfigError(f"offsets: from {self.offsets[0]} to {self.offsets[-1]}, wanted from 0 to {n}, as many as keys")
        falls = np.flatnonzero(self.offsets[1:] < self.offsets[:-1])
        if len(falls):
            raise ConfigError(f"offsets[{falls[0] + 1}]: less than the one before, ascending ones are wanted")
        if self.weights is not None and (self.weights.dtype != np.float32 or self.weights.shape != (n,)):
            raise ConfigError(f"weights: {self.weights.dtype}{list(self.weights.shape)} came, float32[{n}] is wanted")
        if self.max_norm is not None and not self.max_norm >= 0:
            raise ConfigError(f"max_norm: {self.max_norm} came, None or a number from 0 on is wanted")

    def __len__(self) -> int:
        return len(self.offsets) - 1


def offsets_of(numbers: np.ndarray, bags: int) -> np.ndarray:
    """int64 ``[bags + 1]``: where each bag begins, from the number of the bag of each key: int64 ``[n]``, ascending.

    Raises:
        ConfigError: numbers are not ascending, or not of 0 to ``bags - 1``.
    """
    offsets = np.empty(bags + 1, np.int64)
    wrong = bag_starts(numbers, len(numbers), offsets)
    if wrong >= 0:
        raise ConfigError(f"row of id {wrong}: {numbers[wrong]} came, ascending numbers of 0 to {bags - 1} are wanted")
    return offsets


def without_padding(
    keys: np.ndarray, offsets: np.ndarray, weights: np.ndarray | None, padding: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Keys, offsets and weights of bags without the keys that equal ``padding``: as given, int64 ``[n]`` and ``[bags + 1]``.

    Raises:
        ConfigError: an offset is not of 0 to ``n``.
    """
    kept = keys != padding
    if len(offsets) and not (offsets.min() >= 0 and offsets.max() <= len(keys)):
        raise ConfigError(f"offsets: from {offsets.min()} to {offsets.max()}, wanted from 0 to {len(keys)}, as many as keys")
    starts = np.concatenate(([0], np.cumsum(kept)))[offsets]
    return keys[kept], starts, None if weights is None else weights[kept]


class Missing:
    """What host memory lacks for some bags: positions of keys, and rows that were found for them elsewhere."""

    def __init__(self, n: int) -> None:
        self._listed = np.empty(n, np.int64)
        self.positions = self._listed[:0]
        self._side: np.ndarray | None = None
        self._rows = np.empty((0, 0), np.float32)

    def addresses(self) -> tuple[int, int, int]:
        """Of the list of positions, of the row numbers and of the rows; 0 where there are none."""
        side, rows = (0, 0) if self._side is None else (address_of(self._side), address_of(self._rows))
        return address_of(self._listed), side, rows

    def take(self, parts: list[tuple[int, int]]) -> None:
        """Positions were listed in these parts, (start, number), of the list."""
        self.positions = np.concatenate([self._listed[start : start + number] for start, number in parts])

    def answer(self, rows: np.ndarray, numbers: np.ndarray) -> None:
        """Have row ``rows[numbers[i]]`` for the key at ``positions[i]``: float32 ``[m, dim]`` and int64."""
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
        header: address of a word with the address of the store's index block, which stays, and the store's ``epochs``; or 0 and
            None: every key is missing.
        out: float32 ``[bags, dim]``, contiguous.
        default: fills the row of a key that is nowhere.   counters: address of the ``COUNTER_*`` words to add to, or 0.
        missing: takes positions of keys that the store lacks, and gives rows for them if it has any.

    Returns the number of keys that the store lacks, or -1 if it is closed.
    """
    if out.dtype != np.float32 or out.ndim != 2 or len(out) != len(bags) or not out.flags.c_contiguous:
        raise ArrayError(f"out: {out.dtype}{list(out.shape)} came, contiguous float32[{len(bags)}, dim] is wanted")
    if not len(bags):
        return 0
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
    cuts = np.unique(np.concatenate(([0], np.searchsorted(bags.offsets[1:-1], ends[:-1], "right"), [len(bags)])))
    ranges = list(itertools.pairwise(cuts.tolist()))
    found = run_ranges(pool_range, ranges)
    if min(found) < 0:
        return -1
    if missing is not None:
        missing.take([(int(bags.offsets[first]), missed) for (first, _), missed in zip(ranges, found)])
    return sum(found)
