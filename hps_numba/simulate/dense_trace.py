"""A trace whose keys have dense numbers: read once, hashed once, then as many caches as one likes are simulated on it.

*Memory.* 4 bytes a request and 12 a distinct key, 8 a request more for Belady's optimum. Of traces with more than
``_IN_MEMORY`` requests the arrays by request are mapped from temporary files instead.
"""

from __future__ import annotations

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

__all__ = ["HASH_BITS", "NumberedTrace", "OnRequests", "number_trace"]

HASH_BITS = 24  # of a key's hash, by which a sample is taken
_SMALL_KEYS = 1 << 25  # keys below are numbered by indexing, without a hash
_IN_MEMORY = 1 << 28  # requests
_MOST_KEYS = (1 << 31) - 16
OnRequests = Callable[[int], object]


class NumberedTrace:
    """A trace with dense numbers for keys.

    Attributes:
        name: of the trace.   ids: int32 ``[n]``, the number of each key asked for.
        keys: int64 ``[distinct]``, the key of each number, in the order in which they first come.
        counts: int64 ``[distinct]``, requests for each.
        requests: of the whole trace; more than ``len(ids)`` if this is a sample of its keys.
        rate: share of all possible keys that the sample has; 1.0: all.
    """

    def __init__(self, name: str, ids: np.ndarray, keys: np.ndarray, requests: int, rate: float = 1.0) -> None:
        self.name, self.ids, self.keys, self.requests, self.rate = name, ids, keys, requests, rate
        self.counts = np.zeros(len(keys), np.int64)
        for _, piece in self.pieces():
            count_keys(piece, self.counts)
        self.most = int(self.counts.max(initial=0))
        self._future: np.ndarray | None = None
        self._firsts: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def distinct(self) -> int:
        """Distinct keys, of the sample if this is one."""
        return len(self.keys)

    def pieces(self, batch: int = 1, cut: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """``(position, ids)`` of pieces of whole batches, in order; ``cut``, a multiple of ``batch``, is where one begins."""
        step = max(1, BLOCK // batch) * batch
        for begin, end in ((0, min(cut, len(self.ids))), (cut, len(self.ids))):
            for start in range(begin, end, step):
                yield start, self.ids[start : min(start + step, end)]

    def future(self) -> np.ndarray:
        """int64 ``[n]``: position of the next request for the same key, FOREVER for the last one."""
        if self._future is None:
            future = _array(len(self.ids), np.int64)
            next_use = np.full(self.distinct, FOREVER, np.int64)
            for start, ids in reversed(list(self.pieces())):
                look_ahead(ids, future[start : start + len(ids)], next_use, start)
            self._future = future
        return self._future

    def firsts(self, batch: int) -> np.ndarray:
        """uint8 ``[n]``: 1 where a request is the first of its batch for its key."""
        if self._firsts is None or self._firsts[0] != batch:
            firsts = _array(len(self.ids), np.uint8)
            latest = np.full(self.distinct, -1, np.int64)
            for start, ids in self.pieces():
                count_batches(ids, firsts[start : start + len(ids)], batch, latest, start)
            self._firsts = batch, firsts
        return self._firsts[1]

    def only(self, chosen: np.ndarray, rate: float) -> NumberedTrace:
        """The requests for some of the keys; ``chosen``: bool ``[distinct]``, ``rate``: their share of all possible keys."""
        old = self.ids[chosen[self.ids]]
        ids = np.empty(len(old), np.int32)
        table = np.zeros(max(1, self.distinct), np.int32)
        known = number_small_keys(old.astype(np.int64), ids, table, 0)
        numbers = np.empty(known, np.int64)
        present = np.flatnonzero(table)
        numbers[table[present] - 1] = present
        return NumberedTrace(self.name, ids, self.keys[numbers], self.requests, rate)


def number_trace(trace: Trace, *, rate: float = 1.0, on_requests: OnRequests = lambda n: None) -> NumberedTrace:
    """Read a trace and number its keys.

    Args:
        rate: share of the keys to keep, with all their requests, chosen by a hash.
        on_requests: is told of requests as they are read.

    Raises:
        TraceError: as ``Trace.blocks``.   CapacityError: more distinct keys than a number of 31 bits counts.
    """
    rate *= trace.rate  # the same hash: a sample of a sample
    numbering = _Numbering()
    ids = _Requests(trace.requests if rate == trace.rate else None)
    threshold, requests = round(rate * (1 << HASH_BITS)), 0
    for block in trace.blocks():
        requests += len(block)
        if rate < trace.rate:
            kept = np.empty(len(block), np.int64)
            kept = kept[: sample_keys(block, kept, 0, threshold)]
        else:
            kept = block
        numbering.number(kept, ids.room(len(kept)))
        on_requests(len(block))
    return NumberedTrace(trace.name, ids.all(), numbering.keys(), trace.whole or requests, rate)


class _Requests:
    """Room for the numbers of requests, of which it may not be known how many come."""

    def __init__(self, requests: int | None) -> None:
        self._whole = None if requests is None else _array(requests, np.int32)
        self._parts: list[np.ndarray] = []
        self._used = 0

    def room(self, n: int) -> np.ndarray:
        """The next ``n``."""
        self._used += n
        if self._whole is not None and self._used <= len(self._whole):
            return self._whole[self._used - n : self._used]
        self._parts.append(np.empty(n, np.int32))
        return self._parts[-1]

    def all(self) -> np.ndarray:
        """All of them, int32 ``[n]``."""
        if not self._parts and self._whole is not None:
            return self._whole[: self._used]
        ids = _array(self._used, np.int32)
        at = self._used - sum(map(len, self._parts))
        if self._whole is not None:
            ids[:at] = self._whole[:at]
        while self._parts:
            part = self._parts.pop(0)
            ids[at : at + len(part)] = part
            at += len(part)
        return ids


class _Numbering:
    """Which number each key has: by a table over all small keys, from the first large or negative one on by a hash table."""

    def __init__(self) -> None:
        self._known = 0
        self._small: np.ndarray | None = np.zeros(1 << 16, np.int32)
        self._table = np.empty(0, np.int64)
        self._numbers = np.empty(0, np.int32)

    def number(self, keys: np.ndarray, ids: np.ndarray) -> None:
        """Write the numbers of a block of keys to ``ids``."""
        if not len(keys):
            return
        if self._known + len(keys) > _MOST_KEYS:
            raise CapacityError(f"trace: {self._known:,} distinct keys and more, wanted at most {_MOST_KEYS:,}")
        if self._small is not None:
            most = int(keys.max())
            if most < _SMALL_KEYS and int(keys.min()) >= 0:
                if most >= len(self._small):
                    self._small = np.pad(self._small, (0, (1 << most.bit_length()) - len(self._small)))
                self._known = number_small_keys(keys, ids, self._small, self._known)
                return
            known, self._small = self.keys(), None
            self._rebuild(known, 2 * len(known) + 2 * len(keys))
        start = 0
        while start < len(keys):
            start, self._known = number_keys(keys, ids, self._table, self._numbers, self._known, start)
            if start < len(keys):
                self._rebuild(self.keys(), 2 * len(self._table))

    def _rebuild(self, known: np.ndarray, places: int) -> None:
        places = 1 << max(16, (places - 1).bit_length())
        self._table, self._numbers = np.zeros(places, np.int64), np.zeros(places, np.int32)
        number_keys(known, np.empty(len(known), np.int32), self._table, self._numbers, 0, 0)

    def keys(self) -> np.ndarray:
        """The keys by their numbers, int64."""
        keys = np.empty(self._known, np.int64)
        if self._small is not None:
            present = np.flatnonzero(self._small)
            keys[self._small[present] - 1] = present
        else:
            present = np.flatnonzero(self._numbers)
            keys[self._numbers[present] - 1] = self._table[present]
        return keys


def _array(n: int, dtype: Any) -> np.ndarray:
    """An array by request, mapped from a temporary file if it is large."""
    if n <= _IN_MEMORY:
        return np.empty(n, dtype)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype, "w+", shape=(n,))
