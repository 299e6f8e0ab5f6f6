"""Oracle of the embedding cache of one table: slow and obvious, but the same in every way, line and score.

A set has ``lines`` lines of ``ways`` ways. The search for a key begins in its primary line and goes on in the following ones,
ways in order: its probe order. One batch acts as follows, whatever the order in which a device runs it.

1. Answers come from what the cache holds when the batch begins.
2. Resident keys are touched, once a key.
3. New keys are inserted. In each set, only the first positions of the batch that missed count, as many as the set has ways; of
   these each distinct key enters once, in the order of positions: into the first empty way in its probe order, else
   instead of the row with the smallest score, the first in its probe order of equals; or of that which the policy's victim
   names. Rows that entered in the same batch are not replaced: at most as many enter as there are ways, so another one is
   always left; if victim names such a row, the next way without one is taken. Before a row is replaced, the policy's admit is
   asked, with what the sketch has counted of both keys; if it refuses, the row stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from hps_numba.kernels.policies._policy import Policy

Way = tuple[int, int, int]  # set, line, way


class SketchOracle:
    """The frequency sketch: ``counters_of`` a key are incremented by its requests up to 15, and halved all together.

    Args:
        capacity: ways of the cache.   counters_of: (words, key) -> (word, four bits where counters begin).
    """

    def __init__(self, capacity: int, counters_of: Callable[[int, int], tuple[int, ...]]) -> None:
        self.words = 1
        while self.words < capacity:
            self.words *= 2
        self.period = 8 * self.words  # requests between halvings
        self.counters_of = counters_of
        self.counts: Counter[tuple[int, int]] = Counter()
        self.requests = 0

    def _counters(self, key: int) -> list[tuple[int, int]]:
        word, *bits = map(int, self.counters_of(self.words, key))
        return [(word, bit) for bit in bits]

    def count(self, batch: Sequence[int]) -> None:
        """The requests of a lookup; halvings that they bring come first."""
        for _ in range((self.requests + len(batch)) // self.period - self.requests // self.period):
            self.counts = Counter({counter: count // 2 for counter, count in self.counts.items()})
        self.requests += len(batch)
        for key in batch:
            for counter in self._counters(key):
                self.counts[counter] = min(15, self.counts[counter] + 1)

    def __call__(self, key: int) -> int:
        """The estimate."""
        return min(self.counts[counter] for counter in self._counters(key))


class Entry(NamedTuple):
    """A cached row and its position."""

    key: int
    row: np.ndarray
    score: int
    set: int
    line: int
    way: int


class CacheOracle:
    """The cache of one table.

    Args:
        sets: number of sets.
        primary: (set, primary line) of a key.
        host: the rows of the host store, by key; None if there is no store.
        counters_of: of a key in the sketch, for policies that admit.
    """

    def __init__(
        self,
        sets: int,
        policy: Policy,
        dim: int,
        default: float,
        primary: Callable[[int], tuple[int, int]],
        host: dict[int, np.ndarray] | None = None,
        *,
        lines: int = 2,
        ways: int = 5,
        counters_of: Callable[[int, int], tuple[int, ...]] | None = None,
    ) -> None:
        self.policy = policy
        self.default = np.float32(default)
        self.primary = primary
        self.host = host
        self.lines, self.ways = lines, ways
        self.occupied = np.zeros((sets, lines, ways), bool)
        self.keys = np.zeros((sets, lines, ways), np.int64)
        self.scores = np.zeros((sets, lines, ways), np.uint32)
        self.rows = np.zeros((sets, lines, ways, dim), np.float32)
        self.states = [[0] * policy.state for _ in range(sets)]
        self.sketch = None if policy.admit is None or counters_of is None else SketchOracle(sets * lines * ways, counters_of)
        self.hits = self.misses = self.evictions = self.refused = 0
        self.inserted = self.told = 0

    # -- batches -----------------------------------------------------------------------------

    def lookup(self, keys: Iterable[int], now: int) -> np.ndarray:
        """The row of each key ``[n, dim]``: from the cache, else the host, else the default; then touches and insertions."""
        host = self.host or {}
        batch = [int(key) for key in keys]
        rows, missing = self._cached(batch)
        for position in missing:
            rows[position] = host.get(batch[position], self.default)
        self.hits += len(batch) - len(missing)
        self.misses += len(missing)
        if self.sketch is not None:
            self.sketch.count(batch)
        self._touch(batch, now)
        self._admit(batch, [position for position in missing if batch[position] in host], rows, now)
        return rows

    def query(self, keys: Iterable[int], now: int) -> tuple[np.ndarray, list[int]]:
        """Rows ``[n, dim]`` and the missing positions, whose rows are the default; touches what is there, adds nothing."""
        batch = [int(key) for key in keys]
        rows, missing = self._cached(batch)
        self._touch(batch, now)
        return rows, missing

    def insert(self, keys: Iterable[int], rows: Any, now: int) -> None:
        """Keys that are present are touched and keep their row; others enter, with the row at their first position."""
        batch = [int(key) for key in keys]
        missing = [position for position, key in enumerate(batch) if self.find(key) is None]
        self._touch(batch, now)
        self._admit(batch, missing, np.asarray(rows, np.float32), now)

    def time_after(self, now: int, n: int) -> int:
        """The time after a batch of ``n`` keys that began at ``now``, by the clock of the policy."""
        capacity = self.occupied.size
        if self.policy.clock == "calls":
            return now + (max(1, 4 * n // capacity) if n else 0)
        ticks = (64 * self.inserted - self.told) // capacity
        self.told += ticks * capacity
        return now + ticks

    def _cached(self, batch: Sequence[int]) -> tuple[np.ndarray, list[int]]:
        rows = np.full((len(batch), self.rows.shape[-1]), self.default, np.float32)
        missing = []
        for position, key in enumerate(batch):
            at = self.find(key)
            if at is None:
                missing.append(position)
            else:
                rows[position] = self.rows[at]
        return rows, missing

    def _touch(self, batch: Sequence[int], now: int) -> None:
        for key, count in Counter(batch).items():
            at = self.find(key)
            if at is not None:
                self.scores[at] = self._stored(self.policy.touch(int(self.scores[at]), now, self._told(count)))

    def _admit(self, batch: Sequence[int], missing: Sequence[int], rows: np.ndarray, now: int) -> None:
        considered: Counter[int] = Counter()  # positions by set
        entered: set[Way] = set()
        counts = Counter(batch)
        for position in missing:
            key = batch[position]
            number = self.primary(key)[0]
            considered[number] += 1
            if considered[number] <= self.lines * self.ways and self.find(key) is None:
                at = self._way_for(key, entered, now)
                if self.occupied[at]:
                    if not self._is_admitted(key, counts[key], int(self.keys[at]), int(self.scores[at])):
                        self.refused += 1
                        continue
                    self.evictions += 1
                self.inserted += 1
                self.occupied[at] = True
                self.keys[at] = key
                self.rows[at] = rows[position]
                asked = (now, self._told(counts[key]), key) if self.policy.takes_key else (now, self._told(counts[key]))
                self.scores[at] = self._stored(self.policy.first(*asked))
                entered.add(at)

    def _is_admitted(self, key: int, count: int, leaves: int, score: int) -> bool:
        if self.policy.takes_key and score == 2**32 - 1:
            return False
        if self.policy.admit is None:
            return True
        assert self.sketch is not None
        return self.policy.admit(key, self._told(count), (self.sketch(key), self.sketch(leaves)))

    def _named_way(self, number: int, entered: set[Way], now: int) -> Way:
        """The way of a full set that victim names, or the next one that is none of ``entered``."""
        assert self.policy.victim is not None
        ways = [(number, line, way) for line in range(self.lines) for way in range(self.ways)]
        scores, state = [int(self.scores[at]) for at in ways], self.states[number]
        chosen = self.policy.victim(scores, state, now) if self.policy.takes_now else self.policy.victim(scores, state)
        for at, score in zip(ways, scores, strict=True):
            self.scores[at] = self._stored(score)
        state[:] = map(self._stored, state)
        while ways[chosen] in entered:
            chosen = (chosen + 1) % len(ways)
        return ways[chosen]

    def _way_for(self, key: int, entered: set[Way], now: int) -> Way:
        order = self.probe_order(key)
        for at in order:
            if not self.occupied[at]:
                return at
        if self.policy.victim is not None:
            return self._named_way(order[0][0], entered, now)
        return min((at for at in order if at not in entered), key=lambda at: (self.scores[at], order.index(at)))

    def _told(self, count: int) -> int:
        return count if self.policy.needs_count else 1

    @staticmethod
    def _stored(score: int) -> int:
        return score % 2**32

    # -- positions ------------------------------------------------------------------------------

    def probe_order(self, key: int) -> list[Way]:
        """All ways where a key may be, primary line first."""
        number, first = self.primary(key)
        return [(number, (first + step) % self.lines, way) for step in range(self.lines) for way in range(self.ways)]

    def find(self, key: int) -> Way | None:
        """Where a key is."""
        for at in self.probe_order(key):
            if self.occupied[at] and self.keys[at] == key:
                return at
        return None

    # -- writes ------------------------------------------------------------------------------

    def update(self, keys: Iterable[int], rows: Any = None) -> None:
        """Overwrite the rows of keys that are present, scores stay.

        With ``rows``: the last of equal keys wins. Without: from the host; what it no longer has is dropped.
        """
        for position, key in enumerate(map(int, keys)):
            at = self.find(key)
            if at is not None and rows is not None:
                self.rows[at] = rows[position]
            elif at is not None:
                self._reread(at, drop=True)

    def refresh(self, start_set: int, end_set: int, drop: bool = True) -> None:
        """Read the rows of the sets ``start_set <= set < end_set`` again; ``drop`` those that the host no longer has."""
        for entry in self.dump(start_set, end_set):
            self._reread((entry.set, entry.line, entry.way), drop)

    def _reread(self, at: Way, drop: bool) -> None:
        row = (self.host or {}).get(int(self.keys[at]))
        if row is not None:
            self.rows[at] = row
        elif drop:
            self.occupied[at] = False

    def erase(self, keys: Iterable[int]) -> int:
        """Remove; returns how many there were. Their ways are empty then."""
        found = {at for key in keys if (at := self.find(int(key))) is not None}
        for at in found:
            self.occupied[at] = False
        return len(found)

    def clear(self) -> None:
        """Remove all."""
        self.occupied[:] = False

    # -- content -----------------------------------------------------------------------------

    def dump(self, start_set: int, end_set: int) -> list[Entry]:
        """What is in the sets ``start_set <= set < end_set``, in the order of set, line and way."""
        ways = [(int(s), int(line), int(way)) for s, line, way in np.argwhere(self.occupied) if start_set <= s < end_set]
        return [Entry(int(self.keys[at]), self.rows[at].copy(), int(self.scores[at]), *at) for at in ways]
