"""A trace with dense numbers for keys: read once and hashed once, then any number of caches is simulated on it.

*Memory.* 4 bytes a request and 12 a distinct key; 8 more a request for Belady's optimum. For traces of more than
``_IN_MEMORY`` requests, arrays with an element a request are mapped from temporary files instead.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hps_numba.errors import CapacityError
from hps_numba.kernels.host.numbering import (
    count_batches,
    count_keys,
    look_ahead,
    number_keys,
    number_small_keys,
    sample_keys,
)
from hps_numba.simulate.algorithms._algorithm import FOREVER
from hps_numba.traces.formats._format import BLOCK
from hps_numba.traces.trace import Trace

__all__ = ["HASH_BITS", "DenseTrace", "OnRequests", "densify", "ignore_requests"]

HASH_BITS = 24  # of a key's hash, by which a sample is taken
_SMALL_KEYS = 1 << 25  # keys below are numbered by indexing, without a hash
_IN_MEMORY = 1 << 28  # requests
_MAX_KEYS = (1 << 31) - 16
OnRequests = Callable[[int], object]


def ignore_requests(n: int) -> None:
    """The callback of callers that do not follow the progress."""


class DenseTrace:
    """A trace with dense numbers for keys.

    Attributes:
        name: of the trace.   ids: int32 ``[n]``, the number of each requested key.
        keys: int64 ``[distinct]``, the key of each number, in the order of their first requests.
        counts: int64 ``[distinct]``, requests for each.   max_count: the largest of them.
        requests: of the whole trace; more than ``len(ids)`` if this is a sample of its keys.
        rate: sampled share of all possible keys; 1.0: all.
    """

    def __init__(self, name: str, ids: np.ndarray, keys: np.ndarray, requests: int, rate: float = 1.0) -> None:
        self.name, self.ids, self.keys, self.requests, self.rate = name, ids, keys, requests, rate
        self.counts = np.zeros(len(keys), np.int64)
        for _, piece in self.pieces():
            count_keys(piece, self.counts)
        self.max_count = int(self.counts.max(initial=0))
        self._future: np.ndarray | None = None
        self._firsts: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def distinct(self) -> int:
        """Distinct keys, of the sample if this is one."""
        return len(self.keys)

    def pieces(self, batch: int = 1, cut: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """``(position, ids)`` of pieces of whole batches, in order; one begins at ``cut``, a multiple of ``batch``."""
        step = max(1, BLOCK // batch) * batch
        for begin, end in ((0, min(cut, len(self.ids))), (cut, len(self.ids))):
            for start in range(begin, end, step):
                yield start, self.ids[start : min(start + step, end)]

    def future(self) -> np.ndarray:
        """int64 ``[n]``: position of the next request for the same key, FOREVER for the last one."""
        if self._future is None:
            future = _by_request(len(self.ids), np.int64)
            next_use = np.full(self.distinct, FOREVER, np.int64)
            for start, ids in reversed(list(self.pieces())):
                look_ahead(ids, future[start : start + len(ids)], next_use, start)
            self._future = future
        return self._future

    def firsts(self, batch: int) -> np.ndarray:
        """uint8 ``[n]``: 1 where a request is the first of its batch for its key."""
        if self._firsts is None or self._firsts[0] != batch:
            firsts = _by_request(len(self.ids), np.uint8)
            latest = np.full(self.distinct, -1, np.int64)
            for start, ids in self.pieces():
                count_batches(ids, firsts[start : start + len(ids)], batch, latest, start)
            self._firsts = batch, firsts
        return self._firsts[1]

    def select(self, chosen: np.ndarray, rate: float) -> DenseTrace:
        """The requests for some of the keys; ``chosen``: bool ``[distinct]``, ``rate``: their share of all possible keys."""
        old = self.ids[chosen[self.ids]]
        ids = np.empty(len(old), np.int32)
        table = np.zeros(max(1, self.distinct), np.int32)
        known = number_small_keys(old.astype(np.int64), ids, table, 0)
        numbers = np.empty(known, np.int64)
        present = np.flatnonzero(table)
        numbers[table[present] - 1] = present
        return DenseTrace(self.name, ids, self.keys[numbers], self.requests, rate)


def densify(trace: Trace, *, rate: float = 1.0, on_requests: OnRequests = ignore_requests) -> DenseTrace:
    """Read a trace and number its keys.

    Args:
        rate: share of the keys to keep, chosen by a hash, with all their requests.
        on_requests: called with numbers of requests as they are read.

    Raises:
        TraceError: as ``Trace.blocks``.   CapacityError: more distinct keys than 31 bits can number.
    """
    rate *= trace.rate  # the same hash: a sample of a sample
    numbering = _Numbering()
    ids = _GrowingIds(trace.requests if rate == trace.rate else None)
    threshold, requests = round(rate * (1 << HASH_BITS)), 0
    for block in trace.blocks():
        requests += len(block)
        if rate < trace.rate:
            kept = np.empty(len(block), np.int64)
            kept = kept[: sample_keys(block, kept, 0, threshold)]
        else:
            kept = block
        numbering.number(kept, ids.extend(len(kept)))
        on_requests(len(block))
    return DenseTrace(trace.name, ids.joined(), numbering.keys(), trace.whole or requests, rate)


class _GrowingIds:
    """An array of the numbers of requested keys that grows if the number of requests is not known in advance."""

    def __init__(self, requests: int | None) -> None:
        self._whole = None if requests is None else _by_request(requests, np.int32)
        self._parts: list[np.ndarray] = []
        self._used = 0

    def extend(self, n: int) -> np.ndarray:
        """The next ``n`` elements, to be written."""
        self._used += n
        if self._whole is not None and self._used <= len(self._whole):
            return self._whole[self._used - n : self._used]
        self._parts.append(np.empty(n, np.int32))
        return self._parts[-1]

    def joined(self) -> np.ndarray:
        """All elements, int32 ``[n]``."""
        if not self._parts and self._whole is not None:
            return self._whole[: self._used]
        ids = _by_request(self._used, np.int32)
        at = self._used - sum(map(len, self._parts))
        if self._whole is not None:
            ids[:at] = self._whole[:at]
        while self._parts:
            part = self._parts.pop(0)
            ids[at : at + len(part)] = part
            at += len(part)
        return ids


class _Numbering:
    """Maps keys to numbers: by a table over all small keys; from the first large or negative key on, by a hash table."""

    def __init__(self) -> None:
        self._known = 0
        self._small: np.ndarray | None = np.zeros(1 << 16, np.int32)
        self._table = np.empty(0, np.int64)
        self._numbers = np.empty(0, np.int32)

    def number(self, keys: np.ndarray, ids: np.ndarray) -> None:
        """Write the numbers of a block of keys to ``ids``."""
        if not len(keys):
            return
        if self._known + len(keys) > _MAX_KEYS:
            raise CapacityError(f"trace: expected at most {_MAX_KEYS:,} distinct keys, got {self._known:,} or more")
        if self._small is not None:
            largest = int(keys.max())
            if largest < _SMALL_KEYS and int(keys.min()) >= 0:
                if largest >= len(self._small):
                    self._small = np.pad(self._small, (0, (1 << largest.bit_length()) - len(self._small)))
                self._known = number_small_keys(keys, ids, self._small, self._known)
                return
            known, self._small = self.keys(), None
            self._rebuild(known, 2 * len(known) + 2 * len(keys))
        start = 0
        while start < len(keys):
            start, self._known = number_keys(keys, ids, self._table, self._numbers, self._known, start)
            if start < len(keys):
                self._rebuild(self.keys(), 2 * len(self._table))

    def _rebuild(self, known: np.ndarray, slots: int) -> None:
        slots = 1 << max(16, (slots - 1).bit_length())
        self._table, self._numbers = np.zeros(slots, np.int64), np.zeros(slots, np.int32)
        number_keys(known, np.empty(len(known), np.int32), self._table, self._numbers, 0, 0)

    def keys(self) -> np.ndarray:
        """The key of each number, int64."""
        keys = np.empty(self._known, np.int64)
        if self._small is not None:
            present = np.flatnonzero(self._small)
            keys[self._small[present] - 1] = present
        else:
            present = np.flatnonzero(self._numbers)
            keys[self._numbers[present] - 1] = self._table[present]
        return keys


def _by_request(n: int, dtype: Any) -> np.ndarray:
    """An array with an element a request, mapped from a temporary file if it is large.

    Raises:
        CapacityError: the disk has no room for it.
    """
    if n <= _IN_MEMORY:
        return np.empty(n, dtype)
    size = n * np.dtype(dtype).itemsize
    try:
        with tempfile.TemporaryFile() as file:
            if hasattr(os, "posix_fallocate"):  # else a full disk would end the process with SIGBUS, at some page
                os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, dtype, "w+", shape=(n,))
    except OSError as problem:
        where = f"in {tempfile.gettempdir()} (TMPDIR)"
        raise CapacityError(f"trace: no room for a file of {size:,} bytes {where}: {problem.strerror}") from problem
