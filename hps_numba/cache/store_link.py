"""How a cache follows its host store, and what keeps the store from freeing what a device reads.

*Which index is in force.* A word in the state of the cache points to a descriptor (index block or a copy of it, its lines,
the rows). When the store puts another index in force, the next descriptor of a ring is filled and then the word is set to it,
so a kernel sees one of the two and never half of each.

*When memory may be freed.* Warps count themselves in and out, in many stripes, so that counting costs no contention. If the
count of exits of a stripe, read first, equals its count of entries, read second, nobody was inside in between. Once every
stripe was seen so since an epoch was current, all that was out of force before that epoch is free. Turned down: an event for
each call (a replay of a captured graph records none) and waiting for streams (the writer would wait for the device).
"""

from __future__ import annotations

import ctypes
import logging
import sys
import threading
import time

import numpy as np

from hps_numba.cache.backends import Backend
from hps_numba.errors import HpsError
from hps_numba.kernels.layouts.cache import (
    DESC_BLOCK,
    DESC_BYTES,
    DESC_GENERATION,
    DESC_LINES,
    DESC_ROWS,
    DESC_SHIFT,
    GUARD_ENTERED,
    GUARD_LEFT,
    GUARD_STRIPES,
    HOST_RING,
    RING_ENTRIES,
    STATE_HOST,
)
from hps_numba.kernels.layouts.host_store import META_GENERATION, META_LINES, META_ROWS
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.storage.host.store import HostStore

__all__ = ["StoreLink"]

log = logging.getLogger(__name__)
_POLL_SECONDS = 1e-3


class StoreLink:
    """The link of one cache to its store; on a device also the guard of the store's epochs.

    Attributes:
        problem: why the device could not be told of a new index: its cache must not be read any more.
        block: address of the index in force for the cache; that of the store, except while it is held.
        held: the cache stays at an index that the store may have replaced.

    Thread safety: all methods.
    """

    def __init__(self, backend: Backend, state: int, store: HostStore) -> None:
        self._backend, self._state, self._store = backend, state, store
        self._stream = backend.new_stream()
        self._entry = 0
        self.problem: HpsError | None = None
        self.block = 0
        self.held = self._closed = False
        self._free = 0  # epochs below this one are over
        self._round = 0
        self._inside = np.zeros(0, np.intp)  # stripes that were not seen empty in this round
        self._polled = 0.0
        self.reset_after_fork()
        register_fork_reset(self)
        if backend.ordinal is not None:
            store.epochs.add_guard(self)
        store.watch(self.follow)

    def reset_after_fork(self) -> None:
        """Use new locks: in the parent another thread may have held it. Devices are the parent's."""
        self._polling = threading.Lock()
        self._following = threading.RLock()
        if self.held and self._backend.ordinal is None:  # the thread that would release it is the parent's
            self.held = False
            self.point_to(self._store.block)

    # -- the index in force -----------------------------------------------------------------------------------------------

    def follow(self, block: int) -> None:
        """Let the cache read the index at ``block``; 0: none. Done when this returns. Called by the store's writer.

        While the cache is held, ``release`` catches up.
        """
        with self._following:
            if not self.held:
                self.point_to(block)

    def hold(self) -> None:
        """Keep the cache at the index in force now, whatever the store does, and keep the store from freeing any memory."""
        if self._backend.ordinal is None:
            self._store.epochs.add_guard(self)
        with self._following:
            self.held = True

    def in_force(self, block: int) -> int:
        """The index that the cache reads, for a ``block`` that was just read from the header of the store."""
        return self.block if self.held else block

    def release(self) -> bool:
        """Undo ``hold``: let the cache read the index that the store has in force; False: the device could not be told."""
        if not self.held:
            return self.problem is None
        with self._following:  # what is published from here on is followed when the cache is held no more
            told = self.point_to(self._store.block)
            self.held = False
        if self._backend.ordinal is None:
            self._store.epochs.remove_guard(self)
        return told

    def point_to(self, block: int, copy: int = 0, shift: int = -1) -> bool:
        """``follow``, to a ``copy`` of the index where the cache lives if there is one; False: the device could not be told.

        ``shift``: of slots, to their regions of the rows (``kernels.layouts.cache.REGIONS``). By one thread at a time.
        """
        try:
            with self._backend.current():
                described = self._describe(block, copy, shift) if block else 0
                self._backend.store_word(self._state + STATE_HOST, described, self._stream)
        except HpsError as problem:
            self.problem = problem
            log.error("%s: the cache cannot follow its host store: %s", self._store.name, problem)
            return False
        self.block = block
        return True

    def _describe(self, block: int, copy: int, shift: int) -> int:
        """Fill the next descriptor of the ring; returns its address."""
        descriptor = np.zeros(DESC_BYTES // 8, np.int64)
        descriptor[DESC_BLOCK // 8] = copy or block
        descriptor[DESC_LINES // 8] = ctypes.c_int64.from_address(block + META_LINES).value
        descriptor[DESC_ROWS // 8] = ctypes.c_int64.from_address(block + META_ROWS).value
        descriptor[DESC_SHIFT // 8] = shift
        descriptor[DESC_GENERATION // 8] = ctypes.c_int64.from_address(block + META_GENERATION).value
        address = self._state + HOST_RING + DESC_BYTES * self._entry
        self._entry = (self._entry + 1) % RING_ENTRIES
        self._backend.from_host(address, descriptor, self._stream)
        return address

    # -- readers on the device ------------------------------------------------------------------------------------------------

    def oldest(self, now: int) -> int:
        """The oldest epoch that kernels may still be in (``epochs.Guard``); looks at the device once a millisecond at most."""
        if self._closed or sys.is_finalizing():
            return now
        if self.held:
            return 0
        if self._polling.acquire(blocking=False):
            try:
                if self._closed:  # since it was asked above: there is no stream any more
                    return now
                if time.monotonic() - self._polled >= _POLL_SECONDS:
                    self._poll(now)
                    self._polled = time.monotonic()
            finally:
                self._polling.release()
        return self._free

    def _poll(self, now: int) -> None:
        if not len(self._inside):  # a new round
            self._round, self._inside = now, np.arange(GUARD_STRIPES)
        left, entered = np.empty(GUARD_STRIPES, np.uint32), np.empty(GUARD_STRIPES, np.uint32)
        try:
            with self._backend.current():
                self._backend.to_host(left, self._state + GUARD_LEFT, self._stream)
                self._backend.to_host(entered, self._state + GUARD_ENTERED, self._stream)
        except HpsError as problem:  # no kernel runs on a device that failed
            log.warning("%s: the device is no longer polled for readers: %s", self._store.name, problem)
            self.problem, self._closed = problem, True
            self._free = now
            return
        self._inside = self._inside[left[self._inside] != entered[self._inside]]
        if not len(self._inside):
            self._free = self._round

    def close(self) -> None:
        """Stop following the store, and keep nothing of it; when no kernel of the cache runs."""
        self._store.unwatch(self.follow)
        self._closed = True
        self._store.epochs.remove_guard(self)
        with self._polling:
            stream, self._stream = self._stream, 0
            if stream:  # again: an interrupted close is called once more
                self._backend.destroy_stream(stream)
