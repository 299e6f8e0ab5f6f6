"""Host memory: reserved address ranges, and how much of them is in use.

*Why reserve and commit.* Rows of a table must never move (a kernel may be reading them) and yet the table grows. A region
reserves addresses for all it may ever hold, which costs nothing, and takes memory page by page as rows are written; so the
address of a row is always ``base + slot * row_bytes``. A pinned or shared allocator does its work in ``commit``.
Regions of 4 MiB and more ask for 2 MB pages: random reads of a large table are bound by address translation otherwise.

*Memory that was promised.* A commit takes no page: pages come as rows are written. So several tables that grow at once could
each find the same memory free. A commit therefore subtracts what other regions committed last and have not written yet.

*Pinned memory and forks.* A pinned region is private memory like any other, registered piece by piece. When the process
forks, Linux (5.10 and later) gives the child copies of registered pages at once instead of on the first write: devices and
parent go on sharing the same pages, and the child reads its own copy from the CPU. So a fork takes as much memory again as is
pinned; older kernels may give the parent the copy, so fork there before a server is opened, or use spawn. Turned down: leaving
the pages out of the child (``MADV_DONTFORK``: its lookups would crash), shared memory (its writes would change the parent's
tables). ``subprocess`` does not copy pages.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from hps_numba.device import memory
from hps_numba.device.machine_memory import address_space_left, available_bytes
from hps_numba.errors import CapacityError, ClosedError, DeviceError, HpsError
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.immortal import keep_forever

__all__ = [
    "HostAllocator",
    "HostRegion",
    "PinnedHostAllocator",
    "PlainHostAllocator",
    "human_bytes",
    "pinned_size",
]

logger = logging.getLogger(__name__)

_HUGE = 4 << 20
_PINNED_STEP = 2 << 20  # pinned memory grows by this, and by a 32nd of what is committed: about a hundred registrations at most
_ADDRESSES = 64 << 40  # of the 128 TiB that a process has on current processors
_GREED = 16  # under a limit on addresses, a region takes this part of what is left beyond what it needs
_libc = ctypes.CDLL(None) if os.name == "posix" else None
_NO_RESERVE = {"linux": 0x4000, "darwin": 0x40}.get(sys.platform, 0)


class HostRegion:
    """A range of host addresses that never moves; ``committed`` bytes from its start may be used.

    Thread safety: call ``commit`` and ``release`` from one thread at a time.
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
        """Make the first ``size`` bytes usable, or more if the allocator rounds up; they read as zero until written.

        Raises:
            CapacityError: more than is reserved, than the machine has free, or than can be pinned; what was committed stays.
            DeviceError: the memory is pinned and there is no device.
        """
        if size <= self.committed:
            return
        memory = self._memory()
        if size > self.limit:
            raise CapacityError(
                f"{self.purpose}: expected at most the reserved {human_bytes(self.limit)}, got {human_bytes(size)}"
            )
        size = self._allocator.commit_end(self, size)
        more = size - self.committed
        if size // _HUGE > self.committed // _HUGE:  # small steps add up
            _promises.make(self, self.committed, size)
        if size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
            start = self.committed - self.committed % mmap.PAGESIZE
            _advise(memory, mmap.MADV_HUGEPAGE, start, size - start)
        try:
            self._allocator.on_commit(self, size)
        except BaseException:
            _promises.withdraw(self)
            raise
        self._allocator.add(more)
        self.committed = size

    def view(self, dtype: Any, shape: tuple[int, ...], offset: int = 0) -> np.ndarray:
        """The memory from byte ``offset`` on as an array; it keeps the memory alive, so drop it soon."""
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(self._memory(), dtype, count, offset).reshape(shape)

    def _memory(self) -> mmap.mmap:
        if self._map is None:
            raise ClosedError(f"{self.purpose}: the memory has been released")
        return self._map

    def release(self) -> None:
        """Release the memory. No address in the region may be used any more."""
        if self._map is not None:
            self._allocator.on_release(self)
            if hasattr(mmap, "MADV_DONTNEED") and self.committed:  # at once, even if there still is a view
                _advise(self._map, mmap.MADV_DONTNEED, 0, min(_page_up(self.committed), len(self._map)))
            self._allocator.add(-self.committed, -self.limit)
            self.committed = 0
        self._map = self._bytes = None
        self.address = 0

    def __del__(self, ends: Callable[[], bool] = sys.is_finalizing, keep: Callable[[object], None] = keep_forever) -> None:
        if getattr(self, "_map", None) is None:
            return
        if ends():  # with the process the memory goes too, but native threads may read it until then
            keep(self._map)
            return
        self._allocator.on_release(self)
        self._allocator.add(-self.committed, -self.limit)


class _Promises:
    """What the regions of this process committed last, which may not be written yet.   Thread safety: all methods."""

    def __init__(self) -> None:
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        self._lock = threading.RLock()  # a signal handler may write to another table
        self._last: weakref.WeakKeyDictionary[HostRegion, tuple[int, int]] = weakref.WeakKeyDictionary()

    def make(self, region: HostRegion, start: int, end: int) -> None:
        """Note that the region commits bytes ``start`` to ``end``.

        Raises:
            CapacityError: that is more than is free, less what other regions were promised.
        """
        more, free = end - start, available_bytes()
        with self._lock:
            others = [
                (other, self._last.get(other, (0, 0)))
                for reference in self._last.keyrefs()  # a list: a handler or a release may change the dictionary meanwhile
                if (other := reference()) is not None and other is not region
            ]
            if more > free - sum(stop - begin for _, (begin, stop) in others):
                promised = sum(_unwritten_bytes(other, *span) for other, span in others)
                if more > free - promised:
                    less = f", of which other tables were promised {human_bytes(promised)}" if promised else ""
                    raise CapacityError(
                        f"{region.purpose}: expected {human_bytes(more)} more of free memory, got {human_bytes(free)}{less}"
                    )
            self._last[region] = (start, end)

    def withdraw(self, region: HostRegion) -> None:
        """The region did not commit what it noted last."""
        with self._lock:
            self._last.pop(region, None)


_promises = _Promises()


def _unwritten_bytes(region: HostRegion, start: int, end: int) -> int:
    """Bytes from ``start`` to ``end`` of a region that have no page yet; 0 where the system does not tell."""
    start, end, address = _page_up(start), _page_up(end), region.address
    if not address or end <= start or _libc is None or not hasattr(_libc, "mincore"):
        return 0
    pages = np.empty((end - start) // mmap.PAGESIZE, np.uint8)
    if _libc.mincore(ctypes.c_void_p(address + start), ctypes.c_size_t(end - start), pages.ctypes.data_as(ctypes.c_void_p)):
        return 0
    return int(np.count_nonzero(pages & 1 == 0)) * mmap.PAGESIZE


class HostAllocator(Protocol):
    """Hands out host memory; injected, so that pinned and shared memory need no import here."""

    def reserve(self, limit: int, purpose: str, *, least: int | None = None) -> HostRegion:
        """Reserve ``limit`` bytes of addresses, or fewer down to ``least``; nothing is committed."""

    @property
    def in_use(self) -> int:
        """Bytes committed and not released."""


class PlainHostAllocator:
    """Anonymous private memory of the process.   Thread safety: all methods."""

    def __init__(self) -> None:
        self._in_use = 0
        self._reserved = 0
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Replace the lock, as a forked child must."""
        self._lock = threading.RLock()  # a signal handler may write to another table

    def reserve(self, limit: int, purpose: str, *, least: int | None = None) -> HostRegion:
        """Reserve ``limit`` bytes of addresses, or as many of them as the machine allows, down to ``least``.

        Raises:
            CapacityError: the addresses cannot be reserved.
        """
        least = limit if least is None else least
        limit = max(least, min(limit, (_ADDRESSES - self._reserved) // 64))  # leaves room for many tables
        left = address_space_left()
        if left is not None:
            limit = max(least, min(limit, least + (left - least) // _GREED))
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
        """Account for bytes that a region took or, if negative, released."""
        with self._lock:
            self._in_use += committed
            self._reserved += reserved

    @property
    def in_use(self) -> int:
        """Bytes committed and not released."""
        return self._in_use

    def commit_end(self, region: HostRegion, size: int) -> int:
        """How far a commit of the first ``size`` bytes goes; not beyond the last page of the region."""
        return size

    def on_commit(self, region: HostRegion, end: int) -> None:
        """Called before the bytes from ``region.committed`` to ``end`` are used; an error leaves them uncommitted."""

    def on_release(self, region: HostRegion) -> None:
        """Called before the memory of a region is released; raises nothing."""


class PinnedHostAllocator(PlainHostAllocator):
    """Host memory that kernels of every device read and write at the same address: what is committed is registered.

    A commit goes to the end of a page and, where the reserve has room, at least 2 MiB beyond the last: all of it is pinned
    and counted as committed. A region is released when no stream uses it any more. In a forked child this hands out plain
    memory, and what was registered is the parent's.   Thread safety: all methods.
    """

    def __init__(
        self,
        register: Callable[[int, int], object] = memory.register,
        unregister: Callable[[int], object] = memory.unregister,
    ) -> None:
        """Pin by ``register(address, size)``, which raises ``CapacityError`` if it cannot, and ``unregister(address)``."""
        self._register, self._unregister = register, unregister
        self._process = os.getpid()
        super().__init__()

    def reset_after_fork(self) -> None:
        """Own no registration, as at the start and in a forked child."""
        super().reset_after_fork()
        self._pins = os.getpid() == self._process
        self._pieces: dict[int, list[tuple[int, int]]] = {}  # address of a region -> (start, end) of what is registered in it

    def commit_end(self, region: HostRegion, size: int) -> int:
        """The end of a page, in steps that keep the number of registrations small."""
        if not self._pins:
            return size
        step = max(_PINNED_STEP, region.committed // 32)
        return min(_page_up(max(size, region.committed + step)), _page_up(region.limit))

    def on_commit(self, region: HostRegion, end: int) -> None:
        """Register one more piece of the region.

        Raises:
            CapacityError: the memory cannot be pinned.
            DeviceError: there is no device.
        """
        if not self._pins:
            return
        pieces = self._pieces.setdefault(region.address, [])
        while pieces and pieces[-1][1] > region.committed:  # a commit that was interrupted
            self._unpin_last(pieces, region)
        start, more = region.committed, human_bytes(end - region.committed)
        pieces.append((start, end))  # first, so that an interrupt leaves no unknown registration
        try:
            self._register(region.address + start, end - start)
        except HpsError as problem:
            pieces.pop()
            kind = CapacityError if isinstance(problem, CapacityError) else DeviceError
            raise kind(f"{region.purpose}: {more} of host memory cannot be pinned: {problem}") from problem

    def on_release(self, region: HostRegion) -> None:
        """Unregister the region, the last piece first."""
        pieces = self._pieces.get(region.address, [])
        while pieces:
            self._unpin_last(pieces, region)
        self._pieces.pop(region.address, None)

    def _unpin_last(self, pieces: list[tuple[int, int]], region: HostRegion) -> None:
        try:
            self._unregister(region.address + pieces[-1][0])
        except HpsError as problem:  # the device is lost; its driver keeps the pages until the process ends
            logger.warning("%s: pinned host memory was not unregistered: %s", region.purpose, problem)
        pieces.pop()


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


def pinned_size(size: int, limit: int | None = None) -> int:
    """Bytes that the first commit of ``size`` bytes takes in a pinned region of ``limit`` bytes, by default a large one."""
    if not size:
        return 0
    step = max(size, _PINNED_STEP)
    return _page_up(step if limit is None else min(step, max(size, limit)))


def human_bytes(size: float) -> str:
    """``1536`` -> ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
