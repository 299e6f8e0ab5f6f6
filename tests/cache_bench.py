"""Caches and host stores for tests, on the CPU twin or on a device, and closed at the end."""

from __future__ import annotations

from typing import Any

import numpy as np
from naive import rows_of

from hps_numba.cache import EmbeddingCache
from hps_numba.kernels.policies._policy import Policy, load_policy
from hps_numba.memory import PinnedHostAllocator, PlainHostAllocator
from hps_numba.storage.host_store import HostStore

__all__ = ["DEFAULT", "DIM", "Bench", "ints"]

DEFAULT = -7.5
DIM = 17


class Bench:
    """Makes caches and stores on one place, and closes them."""

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


def ints(keys: Any) -> np.ndarray:
    return np.asarray(list(keys), np.int64)
