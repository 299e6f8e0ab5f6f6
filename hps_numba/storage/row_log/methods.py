"""Ways to read rows at their locations: ``io_uring``, threads that ``pread``, or a mapping of the files.

*What is read past the page cache.* With ``io_uring`` and ``threads`` each row is read from the disk, in blocks of 512 bytes:
for tables larger than memory, where pages of 4 KB would evict what is of more use. With ``mmap`` rows are copied from the page
cache; a batch of which a sample is not there is read through it by the ring or the threads, so that no page fault waits for the
disk and a disk that fails is an error, not a signal that ends the process.
"""

from __future__ import annotations

import errno
import logging
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from hps_numba.device.machine_memory import available_bytes
from hps_numba.errors import TierUnavailable
from hps_numba.kernels.host.disk_reads import disk_mapped, disk_pread, disk_resident, disk_ring
from hps_numba.kernels.layouts.row_log import SEGMENT_FIELDS
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.immortal import keep_forever
from hps_numba.runtime.threads import Pool, ranges_of, run_ranges
from hps_numba.storage.row_log.ring import Ring
from hps_numba.storage.row_log.segment import Segment, aligned

__all__ = ["METHODS", "ReadMethods", "View"]

log = logging.getLogger(__name__)
METHODS = ("auto", "io_uring", "threads", "mmap")
_UNIT = 8  # what offsets are a multiple of anyway
_READS_A_THREAD = 8  # fewer are not worth a further thread
_MEMORY_SHARE = 2  # a table up to this part of the free memory is mapped by ``auto``
_pool = Pool(1)  # threads that wait for disks, of all tiers of the process


@dataclass(frozen=True)
class View:
    """The segments of a table at one moment; it keeps their files open and their mappings in place.

    Attributes:
        first: number of the first.   buffered, direct: what kernels read of them, for the two kinds of reads.
        mapped: rows are copied from mappings.   block: of direct reads; 0: reads go through the page cache.
    """

    segments: dict[int, Segment]
    first: int
    buffered: np.ndarray
    direct: np.ndarray
    mapped: bool
    block: int
    kept: tuple[object, ...]


class ReadMethods:
    """How the tables of a tier are read.

    Args:
        method: one of METHODS.   depth: reads at a time of a ring.   threads: that ``pread``.

    Attributes:
        rings: io_uring is used; it may be chosen and yet be refused by the system.

    Raises:
        TierUnavailable: ``io_uring`` was asked for, and the system does not let this process use it.

    Thread safety: every method.
    """

    def __init__(self, method: str, *, depth: int, threads: int) -> None:
        self.method = method
        self._depth = depth
        self._threads = threads
        self.reset_after_fork()
        register_fork_reset(self)
        _pool.threads = max(_pool.threads, threads)
        self.rings = method != "threads" and self._probe()

    def reset_after_fork(self) -> None:
        """Forget the rings: they are the parent's."""
        self._idle: dict[tuple[int, int], list[Ring]] = {}

    def _probe(self) -> bool:
        try:
            Ring(1, 4096, 512).close()
        except OSError as problem:
            if self.method == "io_uring":
                raise TierUnavailable(
                    f"reads: expected a system that allows io_uring, got {problem}: with auto, threads read"
                ) from problem
            log.debug("row_log: reads by threads: %s", problem)
            return False
        return True

    def maps(self, size: int) -> bool:
        """Whether a table of ``size`` bytes is mapped."""
        return self.method == "mmap" or (self.method == "auto" and size <= available_bytes() // _MEMORY_SHARE)

    def view(self, segments: dict[int, Segment], block: int, *, mapped: bool) -> View:
        """What ``read`` reads from: these segments, by number."""
        first, last = min(segments, default=1), max(segments, default=0)
        buffered = np.full((last - first + 1, SEGMENT_FIELDS), -1, np.int64)
        kept: list[object] = []
        for number, segment in segments.items():
            if mapped:
                segment.map_rows(final=number != last)
                kept.append(segment.mapping)
            buffered[number - first] = segment.rows_fd, segment.map_address, segment.map_bytes, segment.seed
        direct = buffered.copy()
        for number, segment in segments.items():
            direct[number - first, 0] = segment.direct_fd if segment.direct_fd >= 0 else segment.rows_fd
        return View(dict(segments), first, buffered, direct, mapped, 0 if mapped else block, tuple(kept))

    def read(self, view: View, keys: np.ndarray, locations: np.ndarray, rows: np.ndarray, slot_size: int) -> np.ndarray:
        """Copy the rows at ``locations`` (0: none) to ``rows``; returns the positions of those that could not be read.

        Args:
            keys: int64 ``[n]``.   locations: int64 ``[n]``.   rows: float32 ``[n, dim]``, contiguous.
        """
        unserved = np.zeros(len(keys), np.uint8)
        if view.mapped and disk_resident(locations, view.first, view.buffered, slot_size):
            self._copy(view, keys, locations, rows, slot_size, unserved)
            left = np.flatnonzero(unserved)
            if not len(left):
                return left
            some = np.empty((len(left), rows.shape[1]), np.float32)
            missing = self._read_disk(view, keys[left], locations[left], some, slot_size)
            whole = np.ones(len(left), bool)
            whole[missing] = False
            rows[left[whole]] = some[whole]
            return left[missing]
        return self._read_disk(view, keys, locations, rows, slot_size)

    def _copy(
        self, view: View, keys: np.ndarray, locations: np.ndarray, rows: np.ndarray, slot_size: int, unserved: np.ndarray
    ) -> None:
        row_bytes, out = 4 * rows.shape[1], rows.ctypes.data
        fixed = (view.first, view.buffered, slot_size, row_bytes, out, unserved)
        ranges = ranges_of(len(keys), slot_size + row_bytes)
        run_ranges(lambda start, stop: int(disk_mapped(keys, locations, start, stop, *fixed)), ranges)

    def _read_disk(self, view: View, keys: np.ndarray, locations: np.ndarray, rows: np.ndarray, slot_size: int) -> np.ndarray:
        """By a ring or threads, past the page cache or through it as the view says."""
        unserved = np.zeros(len(keys), np.uint8)
        block = view.block or _UNIT
        fixed = (
            view.first,
            view.direct if view.block else view.buffered,
            slot_size,
            4 * rows.shape[1],
            rows.ctypes.data,
            unserved,
        )
        ring = self._ring(aligned(slot_size, block) + block, block) if self.rings else None
        if ring is not None:
            _, idle = disk_ring(keys, locations, 0, len(keys), *fixed, ring.fields)
            self._give_back(ring, idle)
        else:
            self._by_threads(keys, locations, fixed, block)
        return np.flatnonzero(unserved)

    def _by_threads(self, keys: np.ndarray, locations: np.ndarray, fixed: tuple[object, ...], block: int) -> None:
        slot_size = int(fixed[2])  # type: ignore[call-overload]
        room = aligned(slot_size + 2 * block, block)

        def read(start: int, stop: int) -> int:
            memory = np.empty(room + block, np.uint8)
            buffer = aligned(memory.ctypes.data, block)
            left: int = disk_pread(keys, locations, start, stop, *fixed, buffer, block)
            return left

        parts = max(1, min(self._threads, len(keys) // _READS_A_THREAD))
        step = max(1, -(-len(keys) // parts))
        run_ranges(read, [(start, min(start + step, len(keys))) for start in range(0, max(1, len(keys)), step)], pool=_pool)

    def _ring(self, size: int, block: int) -> Ring | None:
        """An idle ring with buffers of ``size`` bytes; None if the system gives no more."""
        with suppress(IndexError):
            return self._idle.setdefault((size, block), []).pop()
        try:
            return Ring(self._depth, size, block)
        except OSError as problem:
            if problem.errno not in (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN):
                log.warning("row_log: reads by threads from now on: %s", problem)
                self.rings = False
            return None

    def _give_back(self, ring: Ring, idle: bool) -> None:
        if not idle:  # the system may still write to its buffers, also when the tier is long gone
            keep_forever(ring)
            return
        self._idle.setdefault(ring.key, []).append(ring)

    def close(self) -> None:
        """Close the idle rings."""
        self._idle = {}
