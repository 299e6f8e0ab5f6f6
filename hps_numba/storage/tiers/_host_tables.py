"""Tiers whose tables a server reads as they are, each a :class:`~hps_numba.storage.host.store.HostStore`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from hps_numba.config import VolatileDatabaseConfig
from hps_numba.device.host_memory import HostAllocator, PlainHostAllocator
from hps_numba.errors import TierError
from hps_numba.runtime.reentry import ExclusiveLock
from hps_numba.storage.host.memory import StoreMemory
from hps_numba.storage.host.store import HostStore
from hps_numba.storage.tiers._tier import NO_LIMIT, Fetched, Tier

__all__ = ["HostTablesTier"]


class HostTablesTier(Tier):
    """One host store per table. Lookups of a server go to its store directly.

    A table holds at most ``overflow_margin * num_partitions`` rows and is trimmed to the share ``overflow_resolution_target``.
    """

    Options = VolatileDatabaseConfig
    section: VolatileDatabaseConfig

    def __init__(
        self, section: VolatileDatabaseConfig, *, wide_keys: bool = True, allocator: HostAllocator | None = None
    ) -> None:
        super().__init__(section, wide_keys=wide_keys)
        self.allocator: HostAllocator = allocator if allocator is not None else PlainHostAllocator()
        self._stores: dict[str, HostStore] = {}
        self._closed = False
        self._lock = ExclusiveLock("tables in host memory")

    def store(self, table: str, dim: int) -> HostStore:
        """The store of a table, created if needed.

        Raises:
            TierError: the table has another width.
        """
        with self._lock.held():
            if self._closed:
                raise self.closed_error()
            store = self._stores.get(table)
            if store is None:
                store = self._stores[table] = self._new_store(table, dim)
        self.check_width(table, store.dim, dim)
        return store

    def _new_store(self, table: str, dim: int, memory: StoreMemory | None = None) -> HostStore:
        section = self.section
        return HostStore(
            dim,
            name=table,
            allocator=self.allocator,
            memory=memory,
            growth_bytes=section.allocation_rate,
            max_rows=self._max_rows,
            policy=section.overflow_policy,
            target=section.overflow_resolution_target,
            batch_rows=section.max_batch_size,
        )

    @property
    def _max_rows(self) -> int | None:
        """The bound of a table, or None."""
        bound = self.section.overflow_margin * self.section.num_partitions
        return None if bound >= NO_LIMIT else bound

    def known(self, table: str) -> HostStore | None:
        """The store of a table, or None."""
        return self._stores.get(table)

    def leave(self, table: str) -> None:
        """The server needs a table no more: its rows go, unless other processes share them."""
        self.erase(table)

    def loading(self, check: Callable[[], object]) -> AbstractContextManager[None]:
        """A block in which tables are loaded: other processes that share them wait. ``check`` is called meanwhile."""
        return nullcontext()

    def fetch(self, table: str, keys: np.ndarray, rows: np.ndarray, *, deadline: float | None = None) -> Fetched:
        if self._closed:
            raise self.closed_error()
        store = self.known(table)
        found = np.zeros(len(keys), bool)
        if store is None:
            return Fetched(found, len(keys))
        if rows.shape != (len(keys), store.dim):
            raise TierError(f"{table}: rows: expected shape ({len(keys)}, {store.dim}), got {rows.shape}")
        asked = 0
        for part in self.batches(len(keys), deadline):
            some = np.ascontiguousarray(keys[part], np.int64)
            workspace = np.empty((len(some), store.dim), np.float32)
            misses = np.empty(len(some), np.int64)
            missing = store.lookup(some, workspace, 0.0, misses)
            found[part] = True
            if missing:
                found[part][misses[:missing]] = False
                rows[part][found[part]] = workspace[found[part]]
            else:
                rows[part] = workspace
            asked = part.stop
        return Fetched(found, asked)

    def insert(self, table: str, keys: np.ndarray, rows: np.ndarray) -> int:
        return self.store(table, rows.shape[1]).upsert(keys, rows)

    def erase(self, table: str, keys: np.ndarray | None = None) -> int:
        if keys is not None:
            store = self.known(table)
            return 0 if store is None else store.erase(keys)
        return self._erase_table(table)

    def _erase_table(self, table: str) -> int:
        with self._lock.held():
            store = self._stores.pop(table, None)
        if store is None:
            return 0
        rows = len(store)
        store.close()
        return rows

    def size(self, table: str) -> int:
        store = self.known(table)
        return 0 if store is None else len(store)

    def capacity(self, table: str) -> int:
        return NO_LIMIT if self._max_rows is None else self._max_rows

    def contains(self, table: str, keys: np.ndarray) -> np.ndarray:
        store = self.known(table)
        return np.zeros(len(keys), bool) if store is None else store.contains(np.ascontiguousarray(keys, np.int64))

    def tables(self) -> list[str]:
        return sorted(self._stores)

    def scan(self, table: str, chunk_rows: int = 65536) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        store = self.known(table)
        if store is not None:
            yield from store.scan(chunk_rows)

    def close(self) -> None:
        with self._lock.held():
            self._closed = True
            stores, self._stores = self._stores, {}
        for store in stores.values():
            store.close()
