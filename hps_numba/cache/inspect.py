"""What one cache holds and what it did so far."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import NamedTuple

import numpy as np

from hps_numba.cache.changes import range_of_sets
from hps_numba.cache.gathering import GatheredMisses
from hps_numba.cache.kernel_set import KernelSet
from hps_numba.cache.lifecycle import Lifecycle
from hps_numba.cache.residency import line_metas, resident_rows
from hps_numba.cache.sizing import CacheGeometry
from hps_numba.cache.staging import StagedMisses
from hps_numba.cache.state import STATE_WORDS, CacheState
from hps_numba.kernels.layouts.cache import (
    LINE_BYTES,
    LINES_PER_SET,
    META_AT,
    SCORES_AT,
    STATE_CALLS,
    STATE_COUNT,
    STATE_EVICTED,
    STATE_INSERTED,
    STATE_KEYS,
    STATE_REFUSED,
    STATE_STALE_DROPPED,
    STRIPE_BYTES,
    STRIPES,
    STRIPES_AT,
    WAYS,
    WAYS_PER_LINE,
)

__all__ = ["CacheCounters", "CacheEntry", "Inspection"]

_COUNTED = (STATE_KEYS, STATE_CALLS, STATE_INSERTED, STATE_EVICTED, STATE_STALE_DROPPED, STATE_REFUSED)


@dataclass(frozen=True)
class CacheCounters:
    """Counts since the cache was made.

    Attributes:
        keys, calls: of lookups.   misses: keys not in the cache.   absent: of these, not in the host store either.
        inserted, evicted: rows.   stale_dropped: rows not inserted, as the host store had changed them meanwhile.
        refused: rows that the policy did not admit.   staged: batches whose missed rows host threads gathered.
        helped: batches of which they gathered a part, or all if that is faster (``cache.gathering``).
    """

    keys: int
    calls: int
    misses: int
    absent: int
    inserted: int
    evicted: int
    stale_dropped: int
    refused: int
    staged: int
    helped: int = 0

    def __add__(self, other: CacheCounters) -> CacheCounters:
        return CacheCounters(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


class CacheEntry(NamedTuple):
    """A cached key and its position. ``score``: in a fixed cache the number of its row."""

    key: int
    score: int
    set: int
    line: int
    way: int


class Inspection:
    """Reads one cache.   Thread safety: all methods; they wait for changes of the cache."""

    def __init__(
        self,
        geometry: CacheGeometry,
        state: CacheState,
        lifecycle: Lifecycle,
        kernels: KernelSet,
        misses: StagedMisses | None,
        gathered: GatheredMisses | None = None,
    ) -> None:
        self._gathered = gathered
        self._geometry, self._state, self._lifecycle = geometry, state, lifecycle
        self._kernels, self._misses = kernels, misses
        self._of_stand_ins = CacheCounters(0, 0, 0, 0, 0, 0, 0, 0, 0)

    def carry(self, counters: CacheCounters) -> None:
        """Count what a stand-in of this cache has done, which ends, as done by this cache."""
        self._of_stand_ins += counters

    def resident(self) -> int:
        """``EmbeddingCache.resident``."""
        with self._lifecycle.controlled():
            return resident_rows(self._state.read_lines())

    def entries(self) -> list[CacheEntry]:
        """``EmbeddingCache.entries``."""
        sets = self._geometry.sets
        with self._lifecycle.controlled():
            lines = self._state.read_lines().reshape(sets, LINES_PER_SET, LINE_BYTES)
        keys = lines[:, :, :SCORES_AT].copy().view(np.int64)
        scores = lines[:, :, SCORES_AT:META_AT].copy().view(np.uint32)
        taken = (line_metas(lines).reshape(sets, LINES_PER_SET, 1) >> np.arange(WAYS_PER_LINE)) & 1
        positions = [tuple(map(int, position)) for position in np.argwhere(taken)]
        return [CacheEntry(int(keys[at]), int(scores[at]), *at) for at in positions]

    def counters(self) -> CacheCounters:
        """``EmbeddingCache.counters``."""
        with self._lifecycle.controlled():
            return self.last_counters()

    def last_counters(self) -> CacheCounters:
        """``counters`` of a cache that nobody uses any more."""
        state = self._state
        words = state.read_words(state.address, STATE_WORDS)
        stripes = state.read_words(state.address + STRIPES_AT, STRIPES * STRIPE_BYTES // 8).reshape(STRIPES, -1).sum(0)
        keys, calls, inserted, evicted, stale_dropped, refused = (int(words[at // 8]) for at in _COUNTED)
        staged = 0 if self._misses is None else self._misses.batches
        helped = 0 if self._gathered is None else self._gathered.batches
        misses, absent = int(stripes[0]), int(stripes[1])
        mine = CacheCounters(keys, calls, misses, absent, inserted, evicted, stale_dropped, refused, staged, helped)
        return mine + self._of_stand_ins

    def dump(self, first_set: int, stop_set: int | None) -> np.ndarray:
        """``EmbeddingCache.dump``."""
        state = self._state
        first, stop = range_of_sets(self._geometry, first_set, stop_set)
        with self._lifecycle.controlled(), state.buffer(8 * WAYS * (stop - first)) as room:
            if first == stop:
                return np.empty(0, np.int64)
            state.zero_word(STATE_COUNT)
            self._kernels.run("dump_kernel", stop - first, state.stream, state.lines, state.address, first, stop, room)
            return state.read_words(room, state.word(STATE_COUNT))
