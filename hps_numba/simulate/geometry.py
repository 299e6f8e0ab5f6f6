"""The cache as a GPU has it, for the simulator: the CPU twin of ``EmbeddingCache`` itself, with rows of one float.

Sets, ways, batches, admission and victims are those of the kernels, and so is every hit: nothing is modelled.
"""

from __future__ import annotations

import numpy as np

from hps_numba.cache.cache import EmbeddingCache
from hps_numba.errors import ConfigError
from hps_numba.kernels.layouts.cache import MAX_BATCH, SET_BYTES, STATE_BYTES, WAYS, WORKSPACE_ASSUME
from hps_numba.kernels.policies._policy import Policy

__all__ = ["WAYS", "GpuGeometry"]

_MISSED = np.float32(1)


class GpuGeometry(EmbeddingCache):
    """A cache that has no rows to speak of: a batch of keys goes in, and it says which were there.

    Args:
        rows: to hold; the cache rounds up to whole sets, as a GPU's does (``capacity``).
        policy: who leaves a full set.
        batch: keys of a call, at most; 1 to ``kernels.layouts.cache.MAX_BATCH``.
    """

    def __init__(self, rows: int, policy: Policy, batch: int) -> None:
        if not 1 <= batch <= MAX_BATCH:
            raise ConfigError(f"batch: {batch} keys in a call, wanted 1 to {MAX_BATCH}")
        super().__init__(1, rows, device=None, policy=policy, default=float(_MISSED), name="simulation")
        self._own.reserve(batch, False, 0)
        self._backend.store_word(self._own.address + WORKSPACE_ASSUME, 1, 0)  # every key has a row behind the cache
        self._answers = np.empty(batch, np.float32)

    @property
    def policy_bytes(self) -> int:
        """Bytes that the policy needs beside index, rows and state."""
        buffers = self._own.bytes + self._pool.bytes
        return self.bytes - self.sets * SET_BYTES - self.bytes_of_rows - 2 * STATE_BYTES - buffers

    def replay(self, keys: np.ndarray, hits: np.ndarray, batch: int) -> None:
        """Ask for int64 ``[n]`` keys in batches, and write which were there when their batch began: uint8 ``[n]``.

        Newcomers get the rows that the workspace of the batch has for them, which nobody wrote: they are 0.
        """
        address = keys.__array_interface__["data"][0]
        out = self._answers.__array_interface__["data"][0]
        for start in range(0, len(keys), batch):
            n = min(batch, len(keys) - start)
            self._batch(self._own, address + 8 * start, n, out, 0, ("int64", "float32", True))
            np.not_equal(self._answers[:n], _MISSED, out=hits[start : start + n], casting="unsafe")
