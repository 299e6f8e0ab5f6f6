"""Rows of slower tiers brought up ahead of lookups: into host memory and caches, in the background.

One thread a model does it, some thousand keys at a time, so that lookups can join what is fetched and wait for little of it.
Problem: callers may ask for more than the slower tiers deliver. Choice: what waits is bounded, by calls and by keys, and
``request`` says when it is too much. Turned down: the threads that keep rows of lookups, which a long prefetch would hold up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np

from hps_numba.cache.cache import EmbeddingCache
from hps_numba.runtime.background import BackgroundJobs
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.server.table import ServedTable
from hps_numba.storage.distinct import distinct_keys

__all__ = ["Prefetches"]

_ATTEMPTS = 3


class Prefetches:
    """The prefetches of one model.

    Attributes:
        jobs: the thread that does them.

    Thread safety: every method.
    """

    #: keys fetched at a time
    STEP = 8192
    #: keys that may wait, besides those of one call
    MAX_KEYS = 1 << 24

    def __init__(self) -> None:
        self.jobs = BackgroundJobs(1)
        self._closed = False
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Forget what waits: a forked child does not have the thread."""
        self._waiting: dict[object, int] = {}

    @property
    def works_here(self) -> bool:
        """Whether this is the thread that prefetches, for which ``close`` waits."""
        return self.jobs.works_here

    @property
    def waiting_keys(self) -> int:
        """Keys of the calls that wait or are at work."""
        return sum(list(self._waiting.values()))

    def request(self, table: ServedTable, keys: np.ndarray, caches: Iterable[EmbeddingCache]) -> bool:
        """Bring up the rows of int64 ``keys``, which belong to this object from now on, soon; false if too much waits."""
        if self._waiting and sum(self._waiting.values()) + len(keys) > self.MAX_KEYS:
            return False
        ticket = object()
        self._waiting[ticket] = len(keys)
        accepted = self.jobs.submit(partial(self._work, ticket, table, keys, tuple(caches)))
        if not accepted:
            self._waiting.pop(ticket, None)
        return accepted

    def _work(self, ticket: object, table: ServedTable, keys: np.ndarray, caches: tuple[EmbeddingCache, ...]) -> None:
        try:
            for step in self._steps(keys):
                _bring_up_whole(table, step, caches)
        finally:
            self._waiting.pop(ticket, None)

    def run(self, table: ServedTable, keys: np.ndarray, caches: Iterable[EmbeddingCache]) -> None:
        """Bring up the rows of int64 ``keys`` now, on this thread: another one might wait for a lookup that this call is in.

        Raises:
            TierError: a slower tier broke its contract.   CapacityError: no memory for the rows.
        """
        some = tuple(caches)
        for step in self._steps(keys):
            _bring_up_whole(table, step, some)

    def _steps(self, keys: np.ndarray) -> Iterator[np.ndarray]:
        distinct = distinct_keys(keys)
        for start in range(0, len(distinct), self.STEP):
            if self._closed:
                return
            yield distinct[start : start + self.STEP]

    def close(self) -> None:
        """End after the step in progress; what waits is dropped."""
        self._closed = True
        self.jobs.close()


def _bring_up_whole(table: ServedTable, keys: np.ndarray, caches: tuple[EmbeddingCache, ...]) -> None:
    """Bring up rows of distinct keys; again if the table was written meanwhile, as fetched rows are then left out."""
    for _ in range(_ATTEMPTS):
        since = table.writes.count
        _bring_up(table, keys, caches, since)
        if table.writes.count == since:
            return


def _bring_up(table: ServedTable, keys: np.ndarray, caches: tuple[EmbeddingCache, ...], since: int) -> None:
    """Bring rows of distinct keys into host memory and caches, those of which there was no write ``since``."""
    here = np.zeros(len(keys), bool) if table.store is None else table.store.contains(keys)
    if table.slow_path is not None and not here.all():
        found, rows = table.slow_path.prefetch(keys[~here], since)
        table.writes.keep(found, rows, since)
        for cache in caches:
            table.writes.keep_in_cache(cache, found, rows, since)
    if table.store is not None and caches and here.any():
        rows = np.empty((int(here.sum()), table.spec.dim), np.float32)
        misses = np.empty(len(rows), np.int64)
        gone = table.store.lookup(keys[here], rows, table.spec.default_value, misses)
        present = np.ones(len(rows), bool)
        present[misses[:gone]] = False
        for cache in caches:
            table.writes.keep_in_cache(cache, keys[here][present], rows[present], since)
