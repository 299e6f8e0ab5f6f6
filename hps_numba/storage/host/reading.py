"""Reading a host store: no lock, large batches split over threads.

Every read holds an epoch, so that nothing that it can find is reused before it ends.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator

import numpy as np

from hps_numba.errors import ArrayError, ClosedError, KeyDtypeError
from hps_numba.kernels.host.gather import host_gather
from hps_numba.kernels.host.histogram import begin_timed, end_timed
from hps_numba.kernels.host.lookup import host_addresses, host_contains, host_lookup
from hps_numba.kernels.host.scan import host_keys
from hps_numba.kernels.layouts.host_store import META_GENERATION
from hps_numba.runtime.threads import ranges_of, run_ranges
from hps_numba.storage.host.content import address_of, entries_of
from hps_numba.storage.host.epochs import Epochs
from hps_numba.storage.host.header import StoreHeader
from hps_numba.storage.host.pooling import Bags, Missing, pool_bags

__all__ = ["StoreReader"]

#: answers of at least this size are written past the CPU caches: they would evict everything, themselves included, and a line
#: written through a cache is read from memory first
_STREAM_BYTES = 32 << 20
#: smallest range of ``gather``: a device waits for it, so a second thread pays off sooner
_GATHERED_BYTES = 256 << 10
_NO_TOUCH = -1  # as the time of a lookup: leaves the recency of rows as it is


class StoreReader:
    """Reads of one store.

    Thread safety: every method, from any number of threads, beside one writer.
    """

    def __init__(self, name: str, dim: int, header: StoreHeader, epochs: Epochs) -> None:
        self._name = name
        self._dim = dim
        self._header = header
        self._epochs = epochs

    def lookup(
        self,
        keys: np.ndarray,
        out: np.ndarray,
        default: float,
        misses: np.ndarray | None,
        counters: int,
        threads: int | None,
        now: int | None = None,
    ) -> int:
        """``HostStore.lookup``; ``now`` is the time in ns that rows are touched with, -1 to touch none."""
        if keys.dtype != np.int64 or keys.ndim != 1 or not keys.flags.c_contiguous:
            raise self._wrong_keys(keys)
        if out.dtype != np.float32 or out.shape != (len(keys), self._dim) or not out.flags.c_contiguous:
            raise self._wrong_out(out, len(keys))
        if now is None:
            now = time.monotonic_ns()
        row_bytes = 4 * self._dim
        key_address, out_address, shared = host_addresses(keys, out)
        if shared:
            keys = keys.copy()
            key_address = address_of(keys)
        miss_address = 0 if misses is None else address_of(misses)
        streamed = len(keys) * row_bytes >= _STREAM_BYTES and (row_bytes | out_address) % 64 == 0
        fixed: tuple[int, int, float, int, int, int, bool]
        fixed = (key_address, out_address, default, miss_address, now, counters, streamed)
        ranges = ranges_of(len(keys), row_bytes + 64, threads)
        if len(ranges) == 1:
            return self._lookup_range(self._header.address, 0, len(keys), *fixed, timed=True)
        since = begin_timed(counters)
        with self._epochs.reading():  # all ranges read one version of the table, and it stays until the last has ended
            snapshot = self._header.snapshot()
            header = address_of(snapshot)
            found = run_ranges(lambda start, stop: self._lookup_range(header, start, stop, *fixed), ranges, threads)
        if since:
            end_timed(counters, since)
        if misses is not None:
            end = 0
            for (start, _), missing in zip(ranges, found, strict=True):
                misses[end : end + missing] = misses[start : start + missing]
                end += missing
        return sum(found)

    def _lookup_range(
        self,
        header: int,
        start: int,
        stop: int,
        keys: int,
        out: int,
        default: float,
        misses: int,
        now: int,
        counters: int,
        streamed: bool,
        timed: bool = False,
    ) -> int:
        """``kernels.host.lookup`` in an epoch of its own; returns the number of missing keys."""
        epochs = self._epochs
        record = epochs.acquire()
        try:
            missing: int = host_lookup(
                header,
                keys,
                start,
                stop,
                out,
                default,
                misses and misses + 8 * start,
                epochs.address,
                record,
                now,
                counters,
                timed,
                streamed,
            )
        finally:
            epochs.release(record)
        if missing < 0:
            raise self._closed()
        return missing

    def pool(self, bags: Bags, out: np.ndarray, default: float, counters: int, missing: Missing | None) -> int:
        """``HostStore.pool``."""
        with self._epochs.reading():  # one version of the table, which stays until the last range has ended
            snapshot = self._header.snapshot()
            missed = pool_bags(address_of(snapshot), self._epochs, bags, out, default, counters=counters, missing=missing)
        if missed < 0:
            raise self._closed()
        return missed

    def gather(
        self,
        keys: np.ndarray,
        rows: np.ndarray,
        words: np.ndarray,
        default: float,
        threads: int | None,
        in_force: Callable[[int], int] | None,
    ) -> tuple[int, int]:
        """``HostStore.gather``."""
        if keys.dtype != np.int64 or keys.ndim != 1 or not keys.flags.c_contiguous:
            raise self._wrong_keys(keys)
        with self._epochs.reading():
            block = self._block()
            if in_force is not None:
                block = in_force(block)
            generation = ctypes.c_int64.from_address(block + META_GENERATION).value  # before any word is read
            at = (address_of(keys), address_of(rows), address_of(words))
            now = time.monotonic_ns()

            def gather_range(start: int, stop: int) -> int:
                missing: int = host_gather(block, at[0], start, stop, at[1], default, at[2], now, False)
                return missing

            ranges = ranges_of(len(keys), 4 * self._dim + 64, threads, least=_GATHERED_BYTES)
            return sum(run_ranges(gather_range, ranges, threads)), generation

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """``HostStore.contains``."""
        if keys.dtype != np.int64 or keys.ndim != 1 or not keys.flags.c_contiguous:
            raise self._wrong_keys(keys)
        found = np.empty(len(keys), np.int64)
        epochs = self._epochs
        record = epochs.acquire()
        try:
            header = self._header.address
            done = host_contains(header, address_of(keys), len(keys), address_of(found), epochs.address, record)
        finally:
            epochs.release(record)
        if done < 0:
            raise self._closed()
        return found.astype(bool)

    def keys(self, *, in_order: bool) -> np.ndarray:
        """``HostStore.keys``."""
        with self._epochs.reading():
            block = self._block()
            keys = np.empty(entries_of(block), np.int64)  # the system hands out pages as keys are written
            slots = np.empty(len(keys) if in_order else 0, np.int64)
            count = host_keys(block, address_of(keys), address_of(slots) if in_order else 0)
        return keys[:count][np.argsort(slots[:count])] if in_order else keys[:count]

    def scan(self, chunk_rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """``HostStore.scan``."""
        keys = self.keys(in_order=False)
        for start in range(0, len(keys), max(1, chunk_rows)):
            some = keys[start : start + max(1, chunk_rows)]
            rows, misses = np.empty((len(some), self._dim), np.float32), np.empty(len(some), np.int64)
            missing = self.lookup(some, rows, 0.0, misses, 0, 1, _NO_TOUCH)
            here = np.ones(len(some), bool)
            here[misses[:missing]] = False
            if missing < len(some):
                yield some[here], rows[here] if missing else rows

    def _block(self) -> int:
        block = self._header.block
        if block == 0:
            raise self._closed()
        return block

    def _closed(self) -> ClosedError:
        return ClosedError(f"{self._name}: the store is closed")

    def _wrong_keys(self, keys: np.ndarray) -> KeyDtypeError:
        return KeyDtypeError(f"{self._name}: keys: expected contiguous int64[n], got {keys.dtype}{list(keys.shape)}")

    def _wrong_out(self, out: np.ndarray, n: int) -> ArrayError:
        expected = f"contiguous float32[{n}, {self._dim}]"
        return ArrayError(f"{self._name}: out: expected {expected}, got {out.dtype}{list(out.shape)}")
