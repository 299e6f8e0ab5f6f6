"""``multi_process_hash_map``: host stores in a named segment of shared memory, one copy of rows for all processes of a host.

* A segment is mapped at the same address in every process, so kernels, lookups and GPUs read it as they read private memory.
* Readers take no lock. Their epochs are in the segment; a reader that died is forgotten by the next writer that it holds up.
* Writers of all processes take turns by a lock on the file, which the kernel drops when its holder dies. The next writer of the
  table repairs what was left half-written; a row is acknowledged once readers can find it, and then no death takes it away.
* The next writer goes on where the last one stopped: free slots, counts and marks are in the segment.
* Caches of a process follow what other processes publish within milliseconds: other indexes and versions. Rows that another
  process changed reach a cache with its next refresh (``refresh_interval``); host memory has them at once.
* The first process loads a model; the others find the mark of the same files and use its rows.
* A device reads the segment in place: it is pinned once in each process, all of it.
* What the main thread asks for is changed by a thread where no interrupt arrives (``runtime.shielded``): Ctrl-C never keeps the
  writers' turn, for which all processes wait. Of a server, this is so for its writes and changes of models anyway.
* The last process removes the segment, unless ``shared_memory_auto_remove`` is false; if all were killed, the next one that
  starts creates it again.

Parts: ``storage.shared`` (``tables`` says which).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import numpy as np

from hps_numba.config import VolatileDatabaseConfig
from hps_numba.device import memory
from hps_numba.device.host_memory import HostAllocator, PinnedHostAllocator
from hps_numba.runtime.shielded import shielded
from hps_numba.storage.host.memory import StoreMemory
from hps_numba.storage.host.store import HostStore
from hps_numba.storage.shared.table import SharedVersions
from hps_numba.storage.shared.tables import Bounds, SharedMemory, attach_tables
from hps_numba.storage.tiers._host_tables import HostTablesTier

__all__ = ["PLUGIN", "MultiProcessHashMapTier"]


class MultiProcessHashMapTier(HostTablesTier):
    """One host store per table, in the segment ``shared_memory_name``.

    The first process gives the segment its size, and each table its bound. ``allocation_rate`` has no effect: a table that is
    full grows by half. ``erase`` of a whole table drops it for all processes; ``close`` only ends this one's use of it.

    Raises (when it is opened):
        TierUnavailable: the segment belongs to another user, is open to others, is of another layout version or none, or its
            address is taken in this process.
        CapacityError: there is no memory for it.   ConfigError: its creator gave another ``shared_memory_auto_remove``.
    """

    shared = True

    def __init__(
        self, section: VolatileDatabaseConfig, *, wide_keys: bool = True, allocator: HostAllocator | None = None
    ) -> None:
        super().__init__(section, wide_keys=wide_keys, allocator=allocator)
        self._leaving = False  # a thread waits to close it: those that wait for another process end
        self._tables = attach_tables(
            section.shared_memory_name, section.shared_memory_size, auto_remove=section.shared_memory_auto_remove
        )
        self._bounds = Bounds(self._max_rows, section.overflow_policy, section.overflow_resolution_target)
        if isinstance(allocator, PinnedHostAllocator):
            try:
                self._tables.segment.pin(memory.register, memory.unregister)
            except BaseException:
                self._tables.segment.leave()
                raise

    def insert(self, table: str, keys: np.ndarray, rows: np.ndarray) -> int:
        return shielded(lambda ask: self._insert(table, keys, rows), owner=self, place=table)

    def _insert(self, table: str, keys: np.ndarray, rows: np.ndarray) -> int:
        return super().insert(table, keys, rows)

    def erase(self, table: str, keys: np.ndarray | None = None) -> int:
        return shielded(lambda ask: self._erase(table, keys), owner=self, place=table)

    def _erase(self, table: str, keys: np.ndarray | None) -> int:
        return super().erase(table, keys)

    def _new_store(self, table: str, dim: int, memory: StoreMemory | None = None) -> HostStore:
        # of another owner: a signal handler may read a table while its thread waits for a write
        return shielded(lambda ask: self._opened(table, dim, memory), owner=self._tables, place=table)

    def _opened(self, table: str, dim: int, memory: StoreMemory | None) -> HostStore:
        entry = self._tables.open(table, dim, self._bounds, self._check_stays)
        return super()._new_store(table, dim, memory or SharedMemory(self._tables, entry, table, self._check_stays))

    def _check_stays(self) -> None:
        if self._leaving:
            raise self.closed_error()

    def store(self, table: str, dim: int) -> HostStore:
        self._forget_erased(table)
        return super().store(table, dim)

    def known(self, table: str) -> HostStore | None:
        if self._closed:
            return None
        self._forget_erased(table)
        store = self._stores.get(table)
        if store is None and (entry := self._tables.find(table)) is not None:
            store = super().store(table, self._tables.dim(entry))
        return store

    def _forget_erased(self, table: str) -> None:
        """Another process may have dropped the table."""
        store = self._stores.get(table)
        if store is not None and isinstance(store.memory, SharedMemory) and store.memory.is_erased:
            with self._lock.held():
                self._stores.pop(table, None)
            store.close()

    def _erase_table(self, table: str) -> int:
        store = self.known(table)
        if store is None:
            return 0
        with store.write_lock.writing() as content:
            rows = content.live
            assert isinstance(store.versions, SharedVersions)
            store.versions.erase()
        with self._lock.held():  # not before: whoever closes this tier meanwhile has to find it
            if self._stores.get(table) is store:
                del self._stores[table]
        store.close()
        return rows

    def leave(self, table: str) -> None:
        with self._lock.held():
            store = self._stores.pop(table, None)
        if store is not None:
            store.close()

    def loading(self, check: Callable[[], object]) -> AbstractContextManager[None]:
        return self._tables.segment.loading(check)

    def tables(self) -> list[str]:
        return [] if self._closed else self._tables.tags()

    def close(self) -> None:
        if self._closed:
            return
        self._leaving = True
        with ExitStack() as closing:
            closing.callback(self._tables.segment.leave)
            super().close()


PLUGIN = MultiProcessHashMapTier
