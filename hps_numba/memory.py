"""Where bytes live: reserved address ranges of host memory, how much is in use, how much the machine has.

*Why reserve and commit.* Rows of a table must never move (a kernel may be reading them) and yet the table grows. A region
reserves addresses for all it may ever hold, which costs nothing, and takes memory page by page as rows are written; so the
address of a row is ``base + slot * row_bytes`` for ever. A pinned or shared allocator does its work in ``commit``.
Regions of 4 MiB and more ask for 2 MB pages: random reads of a large table are bound by address translation otherwise.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hps_numba.errors import CapacityError, ClosedError
from hps_numba.forks import renew_after_fork

__all__ = ["HostAllocator", "HostRegion", "PlainHostAllocator", "available_bytes", "human_bytes", "total_bytes"]

_HUGE = 4 << 20
_ADDRESSES = 64 << 40  # of the 128 TiB that a process has on the processors of today
_NO_RESERVE = {"linux": 0x4000, "darwin": 0x40}.get(sys.platform, 0)


class HostRegion:
    """A range of host addresses that never moves; ``committed`` bytes from its start may be used.

    **Threads:** ``commit`` and ``release`` by one thread at a time.
    """

    def __init__(self, allocator: PlainHostAllocator, limit: int, purpose: str) -> None:
        self._allocator = allocator
        self._map: mmap.mmap | None = _reserve(limit, purpose)
        self._bytes: np.ndarray | None = np.frombuffer(self._map, np.uint8)
        self.purpose = purpose
        self.limit = limit
        self.committed = 0
        self.address: int = self._bytes.__array_interface__["data"][0]

    def commit(self, size: int) -> None:
        """Make the first ``size`` bytes usable; they read as zero until written.

        Raises:
            CapacityError: more than was reserved, or more than the machine has free.
        """
        more = size - self.committed
        if more <= 0:
            return
        memory = self._memory()
        if size > self.limit:
            raise CapacityError(f"{self.purpose}: {human_bytes(size)} wanted, {human_bytes(self.limit)} were reserved")
        crosses = size // _HUGE > self.committed // _HUGE  # small steps add up
        if crosses and more > (free := available_bytes()):
            raise CapacityError(f"{self.purpose}: {human_bytes(more)} more wanted, the machine has {human_bytes(free)} free")
        if size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
            start = self.committed - self.committed % mmap.PAGESIZE
            _advise(memory, mmap.MADV_HUGEPAGE, start, size - start)
        self._allocator.add(more)
        self.committed = size

    def view(self, dtype: Any, shape: tuple[int, ...], offset: int = 0) -> np.ndarray:
        """The memory from byte ``offset`` on as an array; it keeps the memory alive, so let go of it soon."""
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(self._memory(), dtype, count, offset).reshape(shape)

    def _memory(self) -> mmap.mmap:
        if self._map is None:
            raise ClosedError(f"{self.purpose}: the memory was given back")
        return self._map

    def release(self) -> None:
        """Give the memory back. No address in the region may be used any more."""
        if self._map is not None:
            if hasattr(mmap, "MADV_DONTNEED") and self.committed:  # at once, even if a view is still about
                _advise(self._map, mmap.MADV_DONTNEED, 0, min(_page_up(self.committed), len(self._map)))
            self._allocator.add(-self.committed, -self.limit)
            self.committed = 0
        self._map = self._bytes = None
        self.address = 0

    def __del__(self) -> None:
        if getattr(self, "_map", None) is not None:
            self._allocator.add(-self.committed, -self.limit)


class HostAllocator(Protocol):
    """Hands out host memory; injected, so that pinned and shared memory need no import here."""

    def reserve(self, limit: int, purpose: str, *, least: int | None = None) -> HostRegion:
        """Reserve ``limit`` bytes of addresses, or fewer down to ``least``; nothing is committed."""

    @property
    def in_use(self) -> int:
        """Bytes committed and not released."""


class PlainHostAllocator:
    """Anonymous private memory of the process.   **Threads:** all methods."""

    def __init__(self) -> None:
        self._in_use = 0
        self._reserved = 0
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Make the lock anew, as a forked child has to."""
        self._lock = threading.Lock()

    def reserve(self, limit: int, purpose: str, *, least: int | None = None) -> HostRegion:
        """Reserve ``limit`` bytes of addresses, or as many of them as the machine lets, down to ``least``.

        Raises:
            CapacityError: the addresses cannot be had.
        """
        least = limit if least is None else least
        limit = max(least, min(limit, (_ADDRESSES - self._reserved) // 64))  # leaves room for many tables
        while True:
            try:
                region = HostRegion(self, limit, purpose)
                self.add(0, limit)
                return region
            except CapacityError:
                if limit <= least:
                    raise
                limit = max(least, limit // 2)

    def add(self, committed: int, reserved: int = 0) -> None:
        """Account for bytes that a region took or, if negative, gave back."""
        with self._lock:
            self._in_use += committed
            self._reserved += reserved

    @property
    def in_use(self) -> int:
        """Bytes committed and not released."""
        return self._in_use


def _page_up(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _reserve(limit: int, purpose: str) -> mmap.mmap:
    size = max(_page_up(limit), mmap.PAGESIZE)
    try:
        if os.name == "nt":
            return mmap.mmap(-1, size)
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    except (OSError, ValueError, OverflowError) as problem:
        raise CapacityError(f"{purpose}: cannot reserve {human_bytes(limit)} of addresses: {problem}") from problem


def _advise(memory: mmap.mmap, advice: int, start: int, size: int) -> None:
    try:
        memory.madvise(advice, start, size)
    except OSError:  # advice only: a kernel built without it serves as well
        return


def _read_number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def total_bytes() -> int:
    """Physical memory of the machine, or of the control group if that is less."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 36
    limits = (_read_number("/sys/fs/cgroup/memory.max"), _read_number("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    return min([machine, *(limit for limit in limits if limit)])


def available_bytes() -> int:
    """Memory that can be taken without pushing anything out (an estimate of the system; at most ``total_bytes``)."""
    free = total_bytes()
    limit, used = _read_number("/sys/fs/cgroup/memory.max"), _read_number("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used + _cgroup_page_cache()))
    try:
        with Path("/proc/meminfo").open() as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return min(free, int(line.split()[1]) * 1024)
    except OSError:  # not Linux
        return free
    return free


def _cgroup_page_cache() -> int:
    try:
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def human_bytes(size: float) -> str:
    """``1536`` -> ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
