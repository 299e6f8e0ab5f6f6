"""The buffers of one batch of lookups in several caches at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hps_numba.cache.backends import Backend, Memory
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.cache.staging import NEVER
from hps_numba.cache.workspace import StreamMemory, Workspace
from hps_numba.kernels.layouts.cache import TABLE_BYTES

__all__ = ["GroupWorkspace"]


class GroupWorkspace(StreamMemory):
    """A workspace of each cache, and at ``address`` the description of all tables; at ``without_lists`` one whose workspaces
    list nothing.

    Thread safety: one thread at a time.
    """

    def __init__(self, backend: Backend, caches: Sequence[EmbeddingCache], name: str, *, captured: bool = False) -> None:
        super().__init__(backend)
        self._caches, self._name = caches, name
        # launches of several tables do not list the keys they miss
        shapes = [replace(cache.parts.workspaces.shape, lists_missed_from=NEVER) for cache in caches]
        if captured:
            shapes = [shape.captured() for shape in shapes]
        self._workspaces = [Workspace(backend, shape, cache.name) for cache, shape in zip(caches, shapes)]
        self._tables: Memory | None = None
        self.without_lists = 0

    def reserve(self, n: int, absent: bool, stream: int) -> None:
        """Have room for ``n`` keys of each table; ``stream`` may be waited for."""
        if n <= self.limit:
            return
        self._settle(stream)
        self.prepared.clear()
        target, self.limit = max(n, self.limit), 0  # until all have it: the workspaces described may be gone by then
        for workspace in self._workspaces:
            workspace.reserve(target, absent, stream)
        size = 2 * TABLE_BYTES * len(self._workspaces)
        if self._tables is None:
            self._tables = self.backend.allocate(size, f"{self._name}: tables of a group")
        descriptions = np.zeros((2, len(self._workspaces), TABLE_BYTES // 8), np.int64)
        for i, (cache, workspace) in enumerate(zip(self._caches, self._workspaces)):
            for description, described in zip(descriptions, (workspace, None)):
                words = cache.parts.state.table_words(described)
                description[i, : len(words)] = words
        self.backend.from_host(self._tables.address, descriptions.reshape(-1), stream)
        self.address, self.limit = self._tables.address, min(workspace.limit for workspace in self._workspaces)
        self.without_lists = self.address + TABLE_BYTES * len(self._workspaces)
        self.bytes = size + sum(workspace.bytes for workspace in self._workspaces)

    def bytes_of(self, i: int) -> int:
        """Of ``bytes``, those for the cache of a number."""
        return (2 * TABLE_BYTES if self._tables is not None else 0) + self._workspaces[i].bytes

    def _settle(self, stream: int) -> None:
        """Wait for the work that was done with it: growing is rare, and what it had is freed at once."""
        if self.event:
            self.backend.wait(stream, self.event)
            self.backend.synchronize(stream)

    def invalidate(self) -> None:
        """Use other memory from the next ``reserve`` on: a batch failed halfway."""
        self.limit = self.bytes = 0
        self.prepared.clear()
        for workspace in self._workspaces:
            workspace.invalidate()

    def release(self, stream: int) -> None:
        """Free the memory after all work with it; ``stream`` is used for the wait."""
        self._settle(stream)
        self.backend.synchronize(stream)
        for workspace in self._workspaces:
            workspace.release(stream)
        if self._tables is not None:
            self._tables.release()
            self._tables = None
        if self.event:
            self.backend.destroy_event(self.event)
            self.event = 0
        self.limit = self.bytes = 0
