"""Small lookups of one host store, from and to arrays that are as kernels take them: one call of compiled code for each.

``StoreReader.lookup`` takes any number of keys and says what is wrong with an array; that costs more than to look up a few
keys. Here a call that is not plain is left to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hps_numba.kernels.host.lookup import PLAIN_WORDS, host_lookup_plain
from hps_numba.runtime.threads import SPLIT_BYTES
from hps_numba.storage.host.content import address_of
from hps_numba.storage.host.epochs import Epochs
from hps_numba.storage.host.header import StoreHeader

__all__ = ["PlainLookups"]

_INT64, _FLOAT32 = np.dtype(np.int64), np.dtype(np.float32)


class PlainLookups:
    """Lookups of a store that no slower tier follows.

    Args:
        dim: elements of a row.   timed: recency words hold times.
        default: element of the rows of absent keys.   counters: address of the ``COUNTER_*`` words to add to, or 0.

    Thread safety: call it from any thread, beside one writer.
    """

    __slots__ = ("_address", "_at", "_clock", "_dim", "_epochs", "_header", "_words")

    def __init__(self, header: StoreHeader, epochs: Epochs, dim: int, *, timed: bool, default: float, counters: int) -> None:
        bits = int(np.float32(default).view(np.int32))
        limit = (SPLIT_BYTES - 1) // (4 * dim + 64)  # of what one thread does (``runtime.threads.ranges_of``)
        words = {"header": header.address, "epoch": epochs.address, "counters": counters}
        words |= {"dim": dim, "limit": limit, "default": bits}
        self._words = np.array([words[name] for name in PLAIN_WORDS], np.int64)
        self._address = address_of(self._words)
        self._header, self._at, self._epochs, self._dim = header, header.address, epochs, dim
        self._clock: Callable[[], int] = time.monotonic_ns if timed else int

    def __call__(self, keys: np.ndarray, out: Any, stream: Any = None) -> np.ndarray | None:
        """Write the row of each key to ``out``, or to a new array, and return it; count the lookup.

        Args:
            keys: of no subclass.   out: to write to, of any kind, or None.   stream: does not count for host memory.

        Returns:
            None, with nothing done: keys are not a writable, contiguous int64 ``[n]`` of NumPy, ``out`` is not such a float32
            ``[n, dim]``, they share memory, ``n`` is 0 or more than a thread takes, or the store is closed.
        """
        if self._header.address != self._at:  # a table in shared memory that this process has left
            return None
        if keys.dtype is not _INT64 or keys.ndim != 1 or not keys.flags.carray:
            return None
        if out is None:
            out = np.empty((len(keys), self._dim), _FLOAT32)
        elif type(out) is not np.ndarray or out.dtype is not _FLOAT32 or out.ndim != 2 or not out.flags.carray:
            return None
        record = self._epochs.acquire()
        try:
            missing = host_lookup_plain(keys, out, self._address, record, self._clock())
        finally:
            self._epochs.release(record)
        return out if missing >= 0 else None
