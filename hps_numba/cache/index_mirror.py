"""A copy of the host store's index in the memory of a device: a miss costs one read over the bus, of the row, and not two.

*Why.* What limits reads of host memory from a device is not their bytes but how many addresses it can translate: the line of
the index and the row are one each, and the second waits for the first. On an H200 a lookup that only misses brings 54 million
rows of a table of 1 GiB (D=32) a second with the index in host memory, 98 million with the copy; a gather that knows the rows
brings 117 million (``benchmarks/device/misses.py --paths``).

*How it stays correct.* The copy is a snapshot and never changed. Before the writer of the store changes anything, the cache is
pointed to the host's own index again, and the writer goes on when the device sees that: kernels that still read the copy are
inside the guard of the store's epochs, so that no slot which the copy names is reused before they have left. Some time after
the last change the index is copied again; a store that is written all the time has no copy, which costs nothing but time.

*In which order missed rows are read.* In a table larger than the memory whose addresses a device remembers, rows are read
faster in the order of their addresses (``kernels.cache.miss_sorted``), unless they are so wide that the bus is the limit. The
copy tells where each row is, and ``scattered`` says when the order pays.

*What it costs.* As many bytes of the device as the index has, 21 to 32 a row of the table: for all caches together at most 1/16
of the device, and only while as much again stays free beside what the plan promises to caches (``cache.promised``).
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack

from hps_numba.cache.backends import Backend, Memory
from hps_numba.cache.promised import promised_bytes
from hps_numba.cache.store_link import StoreLink
from hps_numba.device import driver
from hps_numba.device import memory as device_memory
from hps_numba.device.host_memory import human_bytes
from hps_numba.errors import CapacityError
from hps_numba.kernels.layouts.cache import REGIONS
from hps_numba.kernels.layouts.host_store import META_LINES, index_bytes
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.timer import Timer
from hps_numba.runtime.weak import members
from hps_numba.storage.host.store import HostStore

__all__ = ["IndexMirror", "is_scattered", "is_translated", "max_bytes", "may_mirror", "taken_bytes", "with_room"]

log = logging.getLogger(__name__)
_SHARE = 16  # copies take at most one part in so many of a device's memory, and leave one free
_QUIET_SECONDS = 0.1  # without a change, before the index is copied again
_OF_THE_TIME = 20  # copying takes at most one part of the time
_SOON_SECONDS = 1e-3
_READERS_SECONDS = 1.0
_AGAIN_SECONDS = 5.0  # after a copy that could not be made
# From rates of random rows of 128 and 512 bytes in tables of 0.25, 1 and 4 GiB, on an H200 (docs/performance.md, "Misses").
_REMEMBERED_BYTES = 700 << 20  # of host memory whose addresses a device remembers
_TRANSLATIONS = 40e6  # a second, of others
_BUS = 50e9  # bytes a second

_timer = Timer("copying")
atexit.register(_timer.close)
_mirrors: weakref.WeakSet[IndexMirror] = weakref.WeakSet()  # one that was dropped without ``close`` has no memory any more
_taking = threading.RLock()
_numbers = itertools.count()


def may_mirror(kind: str, whole: bool, miss_path: str) -> bool:
    """Whether a cache of this kind, over a host store, has a copy; one that holds all rows from the start misses none."""
    return miss_path == "auto" and kind != "static" and not whole


def max_bytes(total: int) -> int:
    """Bytes that copies of indexes take at most on a device with so many."""
    return total // _SHARE


def with_room(sizes: Iterable[int], total: int, free: int) -> int:
    """Bytes of those copies, of such sizes, that a device with so many bytes has room for; they are made in this order."""
    limit, taken = max_bytes(total), 0
    for size in sizes:
        if taken + size <= limit and free - taken - size >= limit:
            taken += size
    return taken


def is_translated(slots: int, row_bytes: int) -> bool:
    """A device has to translate the addresses of most random rows of such a table."""
    return slots * row_bytes > _REMEMBERED_BYTES


def is_scattered(slots: int, row_bytes: int) -> bool:
    """Random rows of such a table are limited by the translation of their addresses, not by the bus."""
    others = 1 - _REMEMBERED_BYTES / max(1, slots * row_bytes)  # share of rows whose address is not remembered
    return others > 0 and _TRANSLATIONS / others * row_bytes < _BUS


def taken_bytes(ordinal: int | None) -> int:
    """Bytes of the copies on a device, or of None in host memory."""
    while True:
        try:
            return sum(mirror.bytes for mirror in members(_mirrors) if mirror.device == ordinal)
        except RuntimeError:  # another thread has made one meanwhile
            continue


def _shift_of(slots: int) -> int:
    """Bits by which a slot is shifted to give one of at most ``REGIONS`` regions of the rows."""
    return max(0, (slots - 1).bit_length() - (REGIONS - 1).bit_length())


class IndexMirror:
    """The copy for one cache, and when it is made: on a device automatically, on the CPU only when ``make`` is called.

    Args:
        backend: of the cache.   link: of the cache to the store.   name: of the table.
        needed: the cache may miss rows; asked before a copy is made automatically.

    Thread safety: all methods.
    """

    def __init__(self, backend: Backend, link: StoreLink, store: HostStore, name: str, needed: Callable[[], bool]) -> None:
        self._backend, self._link, self._store, self._needed = backend, link, store, needed
        self.name = f"{name}, copy {next(_numbers)} of the index"
        self._memory: Memory | None = None
        self._size = 0  # of the memory
        self._lent = False  # kernels may have been pointed to the copy
        self._scattered = False
        self._tag = 0  # epoch until which they were
        self._seconds = 0.0  # that the last copy took
        self._refused = 0  # bytes of the largest copy without room that was logged
        self._closed = self._due = False
        self._changed = time.monotonic()  # when the store last changed
        self._automatic = backend.ordinal is not None
        self._stream = backend.new_stream()
        self._making = threading.RLock()
        _mirrors.add(self)
        register_fork_reset(self)
        store.watch_writes(self.invalidate)
        self.make_later()

    def reset_after_fork(self) -> None:
        """In a forked child: the device is the parent's, and so is a copy there; one in host memory is the child's too."""
        self._making = threading.RLock()
        self._due = False
        if self._backend.ordinal is not None:
            self._lent = self._automatic = False

    @property
    def bytes(self) -> int:
        """Bytes of memory that the copy takes."""
        return self._size

    @property
    def device(self) -> int | None:
        """Number of the device, or None."""
        return self._backend.ordinal

    @property
    def is_used(self) -> bool:
        """Lookups read the copy; false from a change of the table until the next copy."""
        return self._lent

    @property
    def scattered(self) -> bool:
        """There is a copy, and rows that it names are better read in the order of their addresses."""
        return self._lent and self._scattered

    @property
    def translated(self) -> bool:
        """There is a copy, and a device has to translate the addresses of most rows that it names."""
        return self._lent and is_translated(self._store.slots, 4 * self._store.dim)

    def invalidate(self) -> None:
        """Point the cache to the index in host memory; the device sees that when this returns. Called by the store's writer."""
        if self._lent and self._link.point_to(self._store.block):
            self._tag = self._store.epochs.advance()
            self._lent = False  # last: a writer interrupted before, or one that could not tell the device, does it again
        self._changed = time.monotonic()
        if not self._due:  # once for all turns of a writer
            self.make_later()

    def make_later(self) -> None:
        """Copy the index when nothing has changed for a while."""
        if self._automatic and not self._closed:
            self._due = True
            self._call_in(self._changed + self._pause() - time.monotonic())

    def _pause(self) -> float:
        """Seconds for which nothing is to change before the index is copied."""
        return max(_QUIET_SECONDS, _OF_THE_TIME * self._seconds)

    def _call_in(self, seconds: float) -> None:
        """Let the timer call after so many seconds; it does not keep a mirror alive that was dropped without ``close``."""
        mine = weakref.WeakMethod(self._make_if_quiet)

        def call() -> None:
            make = mine()
            if make is not None:
                make()

        try:
            _timer.add(self.name, call, delay=max(seconds, _SOON_SECONDS))
        except CapacityError as problem:  # lookups go on without a copy
            self._due = False
            log.warning("%s: %s", self.name, problem)

    def _make_if_quiet(self) -> None:
        self._due = False
        if time.monotonic() - self._changed < self._pause():
            self.make_later()
        elif self._needed() and not self.make() and not self._due and not self._closed:
            self._due = True
            self._call_in(_AGAIN_SECONDS)

    def make(self) -> bool:
        """Copy the index now and point the cache to the copy, unless it is there already; returns whether it is now.

        False: the store was changed meanwhile or is closed, or the device has no room; the cache works without a copy.
        """
        with self._making:
            if self._closed or self._link.held or self._link.problem is not None:
                return False
            if self._lent:
                return True
            with self._store.at_rest() as (turn, block):
                size = 0 if block == 0 else index_bytes(ctypes.c_int64.from_address(block + META_LINES).value)
            return size > 0 and self._has_room(size) and self._copy(turn, size)

    def _has_room(self, size: int) -> bool:
        """Whether there is memory for a copy, which no kernel reads any more."""
        if self._memory is not None and not self._store.epochs.wait(self._tag, _READERS_SECONDS):
            return False
        if self._size >= size:
            return True
        with self._backend.current():
            self._release()
            try:
                self._take(size)
            except CapacityError as problem:
                if size > self._refused:
                    log.info("%s", problem)
                self._refused = max(size, self._refused)
                return False
        return True

    def _take(self, size: int) -> None:
        if self._backend.ordinal is not None:
            limit, free = (
                max_bytes(driver.device_info(self._backend.ordinal).total_bytes),
                device_memory.free_bytes(self._backend.ordinal) - promised_bytes(self._backend.ordinal),
            )
            with _taking:
                taken = taken_bytes(self._backend.ordinal)
                if taken + size > limit or free - size < limit:
                    raise CapacityError(
                        f"{self.name}: device {self._backend.ordinal}: expected room for {human_bytes(size)}, got "
                        f"{human_bytes(free)} free, and {human_bytes(taken)} taken of {human_bytes(limit)} for copies"
                    )
                self._size = size  # counts from now on
        self._size = size
        try:
            self._memory = self._backend.allocate(size, self.name)
        except BaseException:
            self._release()
            raise

    def _release(self) -> None:
        memory, self._memory, self._size = self._memory, None, 0
        if memory is not None:
            memory.release()

    def _copy(self, turn: int, size: int) -> bool:
        """Copy the index of a turn, of so many bytes; False if another has begun."""
        memory = self._memory
        assert memory is not None
        started = time.monotonic()
        with self._backend.current(), self._backend.relaxed(), ExitStack() as held:
            with self._store.at_rest() as (now, block):
                if block == 0 or now != turn:
                    return False
                held.enter_context(self._store.reading())  # keeps what is in force now in memory
            self._backend.copy(memory.address, block, size, self._stream)
            self._backend.synchronize(self._stream)
        with self._store.at_rest() as (now, still):  # and, in the same turn, is in force
            if still != block or now != turn or self._link.held:
                return False
            self._scattered = is_scattered(self._store.slots, 4 * self._store.dim)
            self._lent = True  # first: if this is interrupted, the next writer still takes it back
            if not self._link.point_to(block, memory.address, _shift_of(self._store.slots)):
                return False
        self._seconds = time.monotonic() - started
        log.debug("%s: %s in %.3g s", self.name, human_bytes(size), self._seconds)
        return True

    def close(self) -> None:
        """Free the memory; when no kernel of the cache runs."""
        self._closed = True
        _timer.remove(self.name)
        self._store.unwatch_writes(self.invalidate)
        with self._making, self._backend.current():
            self._lent = False
            self._release()
            self._backend.destroy_stream(self._stream)
