"""The cache as a GPU has it, for the simulator: the CPU twin of ``EmbeddingCache`` itself, with rows of one float.

Sets, ways, batches, admission and victims are those of the kernels, and so is every hit: nothing is modelled.
"""

from __future__ import annotations

import numpy as np

from hps_numba.cache import EmbeddingCache
from hps_numba.cache_layout import MAX_BATCH, SCRATCH_ASSUME, WAYS
from hps_numba.cache_memory import LARGE_BATCH
from hps_numba.cache_place import LOOKUP_THREADS
from hps_numba.errors import ConfigError
from hps_numba.kernels.policies._policy import Policy

__all__ = ["WAYS", "GpuGeometry"]

_MISSED = np.float32(1)


class GpuGeometry(EmbeddingCache):
    """A cache that has no rows to speak of: a batch of keys goes in, and it says which were there.

    Args:
        rows: to hold; the cache rounds up to whole sets, as a GPU's does (``capacity``).
        policy: who leaves a full set.
        batch: keys of a call, at most; 1 to ``cache_layout.MAX_BATCH``.
    """

    def __init__(self, rows: int, policy: Policy, batch: int) -> None:
        if not 1 <= batch <= MAX_BATCH:
            raise ConfigError(f"batch: {batch} keys in a call, wanted 1 to {MAX_BATCH}")
        super().__init__(1, rows, device=None, policy=policy, default=float(_MISSED), name="simulation")
        self._own.reserve(batch, False, 0)
        self._place.store_word(self._own.address + SCRATCH_ASSUME, 1, 0)  # every key has a row behind the cache
        self._answers = np.empty(batch, np.float32)
        self._zero = np.zeros(4, np.float32)

    def replay(self, keys: np.ndarray, hits: np.ndarray, batch: int) -> None:
        """Ask for int64 ``[n]`` keys in batches, and write which were there when their batch began: uint8 ``[n]``."""
        address = keys.__array_interface__["data"][0]
        out = self._answers.__array_interface__["data"][0]
        zero = self._zero.__array_interface__["data"][0]
        for start in range(0, len(keys), batch):
            n = min(batch, len(keys) - start)
            kernel, group = self._lookup_kernel("int64", "float32", True, n < LARGE_BATCH)
            args = (*self._parts, address + 8 * start, n, out, self._default, self._own.address)
            kernel.launch(self._place.lookup_blocks(n, group), 0, *args, threads=LOOKUP_THREADS)
            np.not_equal(self._answers[:n], _MISSED, out=hits[start : start + n], casting="unsafe")
            self._finish(self._own, n, zero, 0, self._ticks(n), 0)
