"""Replay of a trace through one cache: a policy, a geometry and a size give a ``Run``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from hps_numba.cache.sizing import CacheShape, index_sets
from hps_numba.kernels.dtypes import row_stride
from hps_numba.kernels.host.numbering import tally
from hps_numba.simulate.algorithms._algorithm import ADMITTED, EVICTED, RESIDENT
from hps_numba.simulate.candidates import Candidate
from hps_numba.simulate.dense_trace import DenseTrace, OnRequests, ignore_requests
from hps_numba.simulate.geometry import WAYS, GpuGeometry
from hps_numba.simulate.results import Run
from hps_numba.simulate.settings import Settings

__all__ = ["replay", "whole_sets"]


class _Cache(Protocol):
    """A cache under simulation."""

    rows: int
    policy_bytes: int

    def step(self, at: int, ids: np.ndarray, hits: np.ndarray) -> None:
        """Replay the requests ``ids`` from position ``at`` on, and write which hit, uint8 ``[n]``."""

    def counts(self) -> np.ndarray:
        """int64 ``[3]``: rows that are resident now; admitted and evicted so far."""


class _Associative:
    """One order of all rows, one request after the other."""

    policy_bytes = 0

    def __init__(self, candidate: Candidate, rows: int, batch: int, trace: DenseTrace) -> None:
        self.rows = rows
        self._algorithm = algorithm = candidate.associative(batch, max(1, 4 * batch // rows))
        shares_its_size = candidate.algorithm is not None and not algorithm.bound  # e.g. into a small and a main queue
        # any other behaves the same in a cache larger than all keys
        self._capacity = rows if shares_its_size else min(rows, max(1, trace.distinct))
        self._state = algorithm.state(self._capacity, trace.distinct, trace.max_count)
        self._counters = algorithm.new_counters()
        self._future = trace.future() if algorithm.looks_ahead else None

    def step(self, at: int, ids: np.ndarray, hits: np.ndarray) -> None:
        ahead = () if self._future is None else (self._future[at : at + len(ids)],)
        self._algorithm(ids, hits, self._counters, self._capacity, *ahead, *self._state)

    def counts(self) -> np.ndarray:
        return self._counters[[RESIDENT, ADMITTED, EVICTED]]


class _InSets:
    """The sets and batches of the GPU cache."""

    def __init__(self, candidate: Candidate, rows: int, batch: int, trace: DenseTrace) -> None:
        assert candidate.policy is not None
        self.rows = whole_sets(rows)
        self._cache = GpuGeometry(rows, candidate.policy, batch)
        self._batch, self._keys = batch, trace.keys
        self.policy_bytes = round(self._cache.policy_bytes / trace.rate)

    def step(self, at: int, ids: np.ndarray, hits: np.ndarray) -> None:
        self._cache.replay(self._keys[ids], hits, self._batch)

    def counts(self) -> np.ndarray:
        found = self._cache.counters()
        return np.array([found.inserted - found.evicted, found.inserted, found.evicted])


def whole_sets(rows: int) -> int:
    """``rows`` rounded up to whole sets of the GPU cache."""
    return index_sets(rows, fixed=False, whole=False) * WAYS


def replay(
    candidate: Candidate,
    geometry: str,
    rows: int,
    trace: DenseTrace,
    settings: Settings,
    on_requests: OnRequests = ignore_requests,
) -> Run:
    """Simulate one policy in a cache of one size, over a trace or over a sample of one.

    Args:
        geometry: ``gpu`` or ``associative``.   rows: of the cache, for the whole trace.
        on_requests: called with numbers of requests as they are simulated.
    """
    start = time.perf_counter()
    batch = max(1, round(settings.batch * trace.rate))
    kind: Callable[..., _Cache] = _InSets if geometry == "gpu" else _Associative
    cache = kind(candidate, max(1, round(rows * trace.rate)), batch, trace)
    skip = round(settings.warmup * len(trace) / trace.requests) // batch * batch
    hits_by_window, totals, before = _count(cache, trace, settings.window, batch, skip, on_requests)
    resident, admitted, evicted = (int(value) for value in cache.counts())
    requests = len(trace) - skip
    expected = trace.rate * (trace.requests - settings.warmup)
    whole = cache.rows if trace.rate == 1 else rows
    index_and_rows = CacheShape("dynamic", whole, False).bytes(settings.dim, row_type=settings.row_dtype)
    return Run(
        policy=candidate.name,
        geometry=geometry,
        bound=candidate.is_bound,
        rows=round(resident / trace.rate) if candidate.name == "infinite" else whole,
        requests=requests,
        hits=int(totals[0]),
        batch_keys=int(totals[1]),
        batch_key_hits=int(totals[2]),
        admissions=admitted - int(before[1]),
        evictions=evicted - int(before[2]),
        resident=resident,
        hit_rate=1 - (requests - int(totals[0])) / expected if expected else 0.0,
        error=0.0,
        row_bytes=row_stride(settings.dim, settings.row_dtype),
        gpu_bytes=index_and_rows + cache.policy_bytes if geometry == "gpu" else 0,
        seconds=time.perf_counter() - start,
        by_window=hits_by_window,
    )


def _count(
    cache: _Cache, trace: DenseTrace, window: int, batch: int, skip: int, on_requests: OnRequests
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Replay the whole trace.

    Returns:
        Hits by window; after the first ``skip`` requests: hits, distinct keys of batches, and how many of these hit; the
        cache's counts when these requests were done.
    """
    by_window = np.zeros(-(-len(trace) // window) or 1, np.int64)
    totals, before = np.zeros(3, np.int64), np.zeros(3, np.int64)
    firsts = trace.firsts(batch)
    for at, ids in trace.pieces(batch, skip):
        if at == skip:
            before = cache.counts()
        hits = np.empty(len(ids), np.uint8)
        cache.step(at, ids, hits)
        tally(hits, firsts[at : at + len(ids)], at, window, skip, by_window, totals)
        on_requests(len(ids))
    return by_window, totals, before
