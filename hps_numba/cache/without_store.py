"""What one cache holds, as if there were no host store: query its rows, and insert rows that the caller has."""

from __future__ import annotations

import numpy as np

from hps_numba.cache.backends import Backend
from hps_numba.cache.host_arrays import contiguous_keys, contiguous_rows
from hps_numba.cache.launch_plan import LaunchPlan
from hps_numba.cache.lifecycle import Lifecycle
from hps_numba.cache.residency import Residency
from hps_numba.cache.sizing import CacheGeometry
from hps_numba.cache.state import CacheState
from hps_numba.cache.workspace_set import WorkspaceSet
from hps_numba.errors import ConfigError
from hps_numba.kernels.layouts.cache import MAX_BATCH, WORKSPACE_ABSENT, WORKSPACE_ASSUME

__all__ = ["WithoutStore"]


class WithoutStore:
    """Queries and insertions, batch by batch with the workspace of calls that wait.   Thread safety: all methods."""

    def __init__(
        self,
        geometry: CacheGeometry,
        state: CacheState,
        lifecycle: Lifecycle,
        residency: Residency,
        plan: LaunchPlan,
        workspaces: WorkspaceSet,
        backend: Backend,
    ) -> None:
        self._geometry, self._state, self._lifecycle = geometry, state, lifecycle
        self._residency, self._plan, self._workspaces, self._backend = residency, plan, workspaces, backend

    def query(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``EmbeddingCache.query``."""
        state, dim = self._state, self._geometry.dim
        keys = contiguous_keys(self._geometry.name, keys)
        rows, missing = np.zeros((len(keys), dim), np.float32), []
        with self._lifecycle.controlled(), state.copies(keys) as (address,), state.buffer(rows.nbytes) as room:
            for start in range(0, len(keys), MAX_BATCH):
                n = min(MAX_BATCH, len(keys) - start)
                missing.append(start + self._query_batch(address + 8 * start, n, room + 4 * dim * start))
            self._backend.to_host(rows, room, state.stream)
        return rows, np.concatenate(missing) if missing else np.empty(0, np.int64)

    def _query_batch(self, keys: int, n: int, out: int) -> np.ndarray:
        state, own = self._state, self._workspaces.own
        self._answer(keys, n, out, assume=0)
        if not self._geometry.fixed:
            self._plan.finish(own, n, 0, 0, 0, state.stream)
        missing = np.empty(int(state.read_words(own.address + WORKSPACE_ABSENT, 1)[0]), np.int64)
        self._backend.to_host(missing, own.absent_list, state.stream)
        return np.sort(missing)

    def insert(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """``EmbeddingCache.insert``."""
        geometry, state = self._geometry, self._state
        if geometry.fixed:
            raise ConfigError(f"{geometry.name}: insert: expected a dynamic cache, got a {geometry.kind} one")
        keys, rows = contiguous_keys(geometry.name, keys), contiguous_rows(geometry.name, rows, len(keys), geometry.dim)
        stride = 4 * geometry.dim
        with self._lifecycle.controlled(), state.copies(keys, rows) as (key_address, row_address):
            self._lifecycle.in_use = True
            self._residency.set_complete(False)  # a row may be evicted
            for start in range(0, len(keys), MAX_BATCH):
                n = min(MAX_BATCH, len(keys) - start)
                self._answer(key_address + 8 * start, n, 0, assume=1)
                source, ticks = row_address + stride * start, self._plan.ticks(n)
                self._plan.finish(self._workspaces.own, n, source, stride, ticks, state.stream)
            self._backend.synchronize(state.stream)

    def _answer(self, keys: int, n: int, out: int, *, assume: int) -> None:
        """Answer a batch from the cache; ``assume`` 1: what is missing is listed to be inserted."""
        own, stream = self._workspaces.own, self._state.stream
        own.reserve(n, True, stream)
        self._state.copy_for_queries()
        self._backend.fill(own.address + WORKSPACE_ABSENT, 0, 8, stream)
        self._backend.store_word(own.address + WORKSPACE_ASSUME, assume, stream)
        self._plan.start_query(keys, n, out, own.address, stream)
