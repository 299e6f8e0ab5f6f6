"""Caches and host stores for tests, on the CPU or on a device, closed at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from support.oracles import rows_of
from support.waiting import Span, join_all

from hps_numba.cache.cache import EmbeddingCache
from hps_numba.device.host_memory import PinnedHostAllocator, PlainHostAllocator
from hps_numba.kernels.policies._load import load_policy
from hps_numba.kernels.policies._policy import Policy
from hps_numba.storage.host.store import HostStore

__all__ = ["DEFAULT", "DIM", "Bench", "Versions", "ints"]

DEFAULT = -7.5
DIM = 17


class Bench:
    """Makes caches and stores on one backend, and closes them."""

    def __init__(self, device: int | None) -> None:
        self.device = device
        self._opened: list[Any] = []

    def store(self, keys: Any = (), dim: int = DIM, stamp: int = 0, **options: Any) -> HostStore:
        allocator = PlainHostAllocator() if self.device is None else PinnedHostAllocator()
        store = HostStore(dim, allocator=allocator, **options)
        self._opened.append(store)
        store.upsert(ints(keys), rows_of(ints(keys), dim, stamp))
        return store

    def cache(self, store: HostStore | None, rows: int = 0, *, policy: str | Policy = "lru", **options: Any) -> EmbeddingCache:
        dim = options.pop("dim", DIM) if store is None else store.dim
        chosen = load_policy(policy) if isinstance(policy, str) else policy
        cache = EmbeddingCache(dim, rows, device=self.device, policy=chosen, default=DEFAULT, store=store, **options)
        self._opened.append(cache)
        return cache

    def close(self) -> None:
        for thing in reversed(self._opened):
            thing.close()


class Versions:
    """A store whose rows tell their keys and how often they were written; readers of a cache over it beside a writer."""

    def __init__(self, bench: Bench) -> None:
        self.keys = np.arange(400)
        self.store = bench.store(self.keys)
        self.written = np.zeros(len(self.keys), np.int64)  # by updates that have returned
        self.store.upsert(self.keys, self.rows(self.keys, self.written).astype(np.float32))

    def rows(self, keys: np.ndarray, versions: np.ndarray) -> np.ndarray:
        """float64, of numbers that a float32 has."""
        return (keys * 1000.0 + versions)[:, None] + np.arange(DIM) / 32

    def race(
        self,
        cache: EmbeddingCache,
        *,
        readers: int,
        after_write: Callable[[np.random.Generator], object],
        beside: Sequence[Callable[[], object]] = (),
        enough: Callable[[], bool] = lambda: True,
    ) -> int:
        """Three seconds of it, and on a busy machine until there was something to see; returns the number of lookups.

        Every row was whole and as new as the last update that had returned, and those in the cache are at the end.
        ``after_write``: called with random numbers after each update.   ``beside``: called again and again by more threads.
        ``enough``: what else is to be seen.
        """
        problems: list[object] = []
        batches: list[int] = []
        span = Span(3, lambda: len(batches) > 50 and self.written.sum() > 500 and enough())

        def goes_on() -> bool:
            return not problems and span.goes_on()

        def read(rng: np.random.Generator) -> None:
            some = rng.integers(0, len(self.keys), int(rng.integers(1, 300)))
            least = self.written[some].copy()
            got = cache.lookup_arrays(some).astype(np.float64)
            version = got[:, 0] - some * 1000.0
            if not np.array_equal(got, self.rows(some, version)) or (version < least).any():
                problems.append((some[version < least], got[version < least]))
            batches.append(len(some))

        def write(rng: np.random.Generator) -> None:
            some = np.unique(rng.integers(0, len(self.keys), 20))
            self.store.upsert(some, self.rows(some, self.written[some] + 1).astype(np.float32))
            cache.update(some)
            self.written[some] += 1
            after_write(rng)

        def again(what: Callable[[np.random.Generator], object], seed: int) -> None:
            rng = np.random.default_rng(seed)
            try:
                while goes_on():
                    what(rng)
            except BaseException as problem:
                problems.append(problem)

        work = [read] * readers + [write] + [lambda _, call=call: call() for call in beside]
        threads = [threading.Thread(target=again, args=(what, seed)) for seed, what in enumerate(work)]
        for thread in threads:
            thread.start()
        join_all(*threads)
        assert not problems, problems[:2]
        assert len(batches) > 50 and self.written.sum() > 500 and enough()
        got, missing = cache.query(self.keys)
        here = np.setdiff1d(self.keys, missing)
        assert np.array_equal(got[here].astype(np.float64), self.rows(here, self.written[here]))  # no old row was left
        return len(batches)


def ints(keys: Any) -> np.ndarray:
    return np.asarray(list(keys), np.int64)
