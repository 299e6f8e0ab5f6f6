"""The keys of a batch that neither a cache nor host memory has, on their way to the slower tiers."""

from __future__ import annotations

import numpy as np

from hps_numba.arrays.cuda import DeviceKeys
from hps_numba.cache.cache import EmbeddingCache

__all__ = ["MissList"]

_DTYPES = {"int64": np.int64, "checked32_in_int64": np.int64, "int32": np.int32, "uint32": np.uint32}


class MissList:
    """A list in the memory of a cache that its lookup fills, for one batch.

    Args:
        keys: the batch.   stream: of the lookup.
        later: the list is read after the call, when the caller may have overwritten the keys: keep a copy.

    **Threads:** one at a time; ``release`` after the lookup has ended.
    """

    def __init__(self, cache: EmbeddingCache, keys: DeviceKeys, stream: int, *, later: bool) -> None:
        self._place, self._keys, self._stream = cache.backend, keys, stream
        size = keys.n * np.dtype(_DTYPES[keys.form]).itemsize if later else 0
        list_bytes = 8 * (1 + keys.n)
        with self._place.current():
            self._memory = self._place.allocate(list_bytes + size, f"{cache.name}: keys for slower tiers")
            self.address = self._memory.address
            self._source = keys.address
            if later:
                self._source = self.address + list_bytes
                self._place.copy(self._source, keys.address, size, stream)
            self._event = self._place.new_event()

    def record(self) -> None:
        """The lookup is on the stream."""
        with self._place.current():
            self._place.record(self._event, self._stream)

    def count(self) -> int:
        """How many keys are on the list: the one wait of a lookup."""
        with self._place.current():
            stream = self._place.new_stream()
            try:
                self._place.wait(stream, self._event)
                word = np.empty(1, np.int64)
                self._place.to_host(word, self.address, stream)
            finally:
                self._place.destroy_stream(stream)
        return int(word[0])

    def read(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """``(positions, keys)`` of the list, both int64 ``[count]``, by position; after ``count``."""
        positions = np.empty(count, np.int64)
        keys = np.empty(self._keys.n, _DTYPES[self._keys.form])
        with self._place.current():
            stream = self._place.new_stream()
            try:
                self._place.to_host(positions, self.address + 8, stream)
                self._place.to_host(keys, self._source, stream)
            finally:
                self._place.destroy_stream(stream)
        positions.sort()
        return positions, keys[positions].astype(np.int64)

    def release(self) -> None:
        """Give the list back."""
        with self._place.current():
            self._place.destroy_event(self._event)
            self._memory.release()
