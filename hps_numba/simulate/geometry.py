"""The GPU cache for the simulator: an ``EmbeddingCache`` on the CPU backend, with rows of one float.

Sets, ways, batches, admission and victims come from the kernels, and so does every hit: nothing is modelled.
"""

from __future__ import annotations

import numpy as np

from hps_numba.cache.cache import EmbeddingCache
from hps_numba.cache.inspect import CacheCounters, CacheEntry
from hps_numba.errors import ConfigError
from hps_numba.kernels.layouts.cache import MAX_BATCH, WAYS, WORKSPACE_ASSUME
from hps_numba.kernels.policies._policy import Policy

__all__ = ["WAYS", "GpuGeometry"]

_MISSED = np.float32(1)


class GpuGeometry:
    """A cache with dummy rows: takes batches of keys, and reports which of them hit.

    Args:
        rows: capacity; the cache rounds it up to whole sets, as a GPU cache does.
        policy: decides which entry of a full set is evicted.
        batch: largest number of keys in a call, 1 to ``kernels.layouts.cache.MAX_BATCH``.
    """

    def __init__(self, rows: int, policy: Policy, batch: int) -> None:
        if not 1 <= batch <= MAX_BATCH:
            raise ConfigError(f"batch: expected 1 to {MAX_BATCH} keys in a call, got {batch}")
        self._cache = EmbeddingCache(1, rows, device=None, policy=policy, default=float(_MISSED), name="simulation")
        parts = self._cache.parts
        self._lookups, self._workspace = parts.lookups, parts.workspaces.own
        self._workspace.reserve(batch, False, 0)
        parts.backend.store_word(self._workspace.address + WORKSPACE_ASSUME, 1, 0)  # every key has a row in the store
        self._answers = np.empty(batch, np.float32)
        shape = ("lookup_kernel", "int64", "float32", True, True)
        # policies that admit also count the requests of each batch
        self._prepared = parts.plan.prepare(self._workspace, shape, False, 0) if parts.kernels.one_step else None

    @property
    def policy_bytes(self) -> int:
        """Bytes that the policy needs in addition to index, rows and state."""
        return self._cache.parts.state.hits_bytes + self._cache.parts.workspaces.policy_memory.bytes

    def replay(self, keys: np.ndarray, hits: np.ndarray, batch: int) -> None:
        """Look up int64 ``[n]`` keys in batches, and write which were resident when their batch began: uint8 ``[n]``.

        Inserted rows are copied from the workspace of the batch, where nothing was written: they are 0.
        """
        address = keys.__array_interface__["data"][0]
        out = self._answers.__array_interface__["data"][0]
        for start in range(0, len(keys), batch):
            n = min(batch, len(keys) - start)
            if self._prepared is not None:
                self._prepared.start(address + 8 * start, n, out)
            else:
                self._lookups.batch(self._workspace, address + 8 * start, n, out, 0, ("int64", "float32", True))
            np.not_equal(self._answers[:n], _MISSED, out=hits[start : start + n], casting="unsafe")

    def counters(self) -> CacheCounters:
        """Counters since the creation of the cache."""
        return self._cache.counters()

    def entries(self) -> list[CacheEntry]:
        """All entries of the cache, in the order of sets, lines and ways; for tests."""
        return self._cache.entries()

    def resident(self) -> int:
        """Number of resident keys."""
        return self._cache.resident()
