"""The keys of a batch that neither a cache nor host memory has, on their way to the slower tiers."""

from __future__ import annotations

import numpy as np

from hps_numba.arrays.cuda import DeviceKeys
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.kernels.dtypes import KEY_DTYPES

__all__ = ["MissList"]


class MissList:
    """A list in the memory of a cache's device that a lookup fills, for one batch: their number, then their positions, int64.

    Args:
        cache: the cache that looks up.   keys: the batch.   stream: of the lookup.
        read_later: the list is read after the call returns, when the caller may have overwritten the keys: keep a copy of them.

    Attributes:
        address: of the list, for ``EmbeddingCache.lookup``.

    Thread safety: one thread at a time; ``release`` after the lookup has ended.
    """

    def __init__(self, cache: EmbeddingCache, keys: DeviceKeys, stream: int, *, read_later: bool) -> None:
        self._backend, self._keys, self._stream = cache.backend, keys, stream
        copy_bytes = keys.n * np.dtype(KEY_DTYPES[keys.form]).itemsize if read_later else 0
        list_bytes = 8 * (1 + keys.n)
        with self._backend.current():
            self._memory = self._backend.allocate(list_bytes + copy_bytes, f"{cache.name}: keys for slower tiers")
            self.address = self._memory.address
            self._keys_address = keys.address
            if read_later:
                self._keys_address = self.address + list_bytes
                self._backend.copy(self._keys_address, keys.address, copy_bytes, stream)
            self._event = self._backend.new_event()

    def record(self) -> None:
        """Note that the lookup is on the stream: ``count`` waits for what is there now."""
        with self._backend.current():
            self._backend.record(self._event, self._stream)

    def count(self) -> int:
        """How many keys are on the list: the one wait of a lookup."""
        word = np.empty(1, np.int64)
        self._copy_to_host((word, self.address))
        return int(word[0])

    def read(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """``(positions, keys)`` of the list, both int64 ``[count]``, by position; after ``count``."""
        positions = np.empty(count, np.int64)
        keys = np.empty(self._keys.n, KEY_DTYPES[self._keys.form])
        self._copy_to_host((positions, self.address + 8), (keys, self._keys_address))
        positions.sort()
        return positions, keys[positions].astype(np.int64)

    def _copy_to_host(self, *copies: tuple[np.ndarray, int]) -> None:
        """Fill each array from an address, after the lookup, and wait."""
        with self._backend.current():
            stream = self._backend.new_stream()
            try:
                self._backend.wait(stream, self._event)
                for array, address in copies:
                    self._backend.to_host(array, address, stream)
            finally:
                self._backend.destroy_stream(stream)

    def release(self) -> None:
        """Free the list."""
        with self._backend.current():
            self._backend.destroy_event(self._event)
            self._memory.release()
