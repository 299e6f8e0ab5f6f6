"""A cache over a store, and the oracle of the cache that is given the same calls."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from support.cache_bench import DEFAULT, Bench, ints
from support.cache_oracle import CacheOracle
from support.oracles import EXTREME_64, assert_same_bits, rows_of

from hps_numba.kernels.cache.probe import alternate_set_of, primary_line_of, set_of
from hps_numba.kernels.cache.sketch import sketch_places
from hps_numba.kernels.compiler.njit import host_function
from hps_numba.kernels.layouts.cache import SET_BYTES
from hps_numba.kernels.policies._policy import Policy

_set_of, _primary_line_of, _alternate_set_of = map(host_function, (set_of, primary_line_of, alternate_set_of))


def primary_in(sets: int) -> Callable[[int], tuple[int, int]]:
    def primary(key: int) -> tuple[int, int]:
        return _set_of(0, sets, key) // SET_BYTES, _primary_line_of(key) // 64

    return primary


def entries_in(oracle: CacheOracle, sets: int) -> list[tuple[int, ...]]:
    return [(entry.key, entry.score, entry.set, entry.line, entry.way) for entry in oracle.dump(0, sets)]


class Pair:
    """A cache over a store, and the oracle that is told the same."""

    def __init__(self, bench: Bench, policy: str | Policy, dim: int, seed: int, sets: int = 3) -> None:
        self.rng = np.random.default_rng(seed)
        self.sets, self.dim = sets, dim
        self.universe = ints([*range(70), *EXTREME_64[1:]])
        known = self.rng.permutation(self.universe)[:55]
        self.store = bench.store(known, dim)
        self.cache = bench.cache(self.store, policy=policy, set_count=sets)
        host = {int(key): rows_of(key, dim) for key in known}
        self.oracle = CacheOracle(
            sets, self.cache.policy, dim, DEFAULT, primary_in(sets), host, counters_of=host_function(sketch_places)
        )
        self.host = host
        self.now = 0

    def some(self, most: int) -> np.ndarray:
        return self.rng.choice(self.universe, int(self.rng.integers(0, most + 1)))

    def advance(self, n: int) -> None:
        self.now = self.oracle.time_after(self.now, n)

    def lookup(self) -> None:
        keys = self.some(60)
        assert_same_bits(self.cache.lookup_arrays(keys), self.oracle.lookup(keys, self.now))
        self.advance(len(keys))

    def insert(self) -> None:
        keys = self.some(20)
        rows = self.rng.random((len(keys), self.dim), np.float32)
        self.cache.insert(keys, rows)
        self.oracle.insert(keys, rows, self.now)
        self.advance(len(keys))

    def query(self) -> None:
        keys = self.some(40)
        rows, missing = self.cache.query(keys)
        expected, absent = self.oracle.query(keys, self.now)
        expected[absent] = 0
        assert_same_bits(rows, expected)
        assert missing.tolist() == absent

    def update_from_store(self) -> None:
        keys = self.some(20)
        rows = self.rng.random((len(keys), self.dim), np.float32)
        self.store.upsert(keys, rows)
        self.host |= {int(key): row for key, row in zip(keys, rows, strict=True)}
        self.cache.update(keys)
        self.oracle.update(keys)

    def update_given(self) -> None:
        keys = self.some(20)
        rows = self.rng.random((len(keys), self.dim), np.float32)
        self.cache.update(keys, rows)
        self.oracle.update(keys, rows)

    def erase(self) -> None:
        keys = self.some(6)
        self.store.erase(keys)
        for key in keys:
            self.host.pop(int(key), None)
        assert self.cache.erase(keys) == self.oracle.erase(keys)

    def refresh(self) -> None:
        keys = self.some(8)
        self.store.erase(keys)
        for key in keys:
            self.host.pop(int(key), None)
        first, stop = sorted(self.rng.integers(0, self.sets + 1, 2).tolist())
        drop = bool(self.rng.integers(2))
        self.cache.refresh(first, stop, drop)
        self.oracle.refresh(first, stop, drop)

    def dump(self) -> None:
        first, stop = sorted(self.rng.integers(0, self.sets + 1, 2).tolist())
        assert sorted(self.cache.dump(first, stop).tolist()) == sorted(e.key for e in self.oracle.dump(first, stop))

    def check(self) -> None:
        assert [tuple(entry) for entry in self.cache.entries()] == entries_in(self.oracle, self.sets)
        counts = self.cache.counters()
        assert (counts.evicted, counts.refused) == (self.oracle.evictions, self.oracle.refused)


OPERATIONS = ("lookup", "lookup", "lookup", "insert", "query", "update_from_store", "update_given", "erase", "refresh", "dump")
