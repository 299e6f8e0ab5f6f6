"""Missed rows of large batches that threads of the host gather while the device reads others in place.

``kernels.cache.miss_gathered`` says what the device does, ``cache.host_threads`` who the threads are. Here is the memory that
both work with, one for each workspace, and how the missed rows are shared out.

*How they are shared out* is learned from how long batches took: ``cache.shares``.

*The caller never waits.* Copies are put on a stream of their own, each behind a wait of the stream for the mark of its group.
As their number and size must be known before the batch has run, they are made for somewhat more rows than the last one had. If
too many batches are still on their way, the device reads all rows.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import weakref
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hps_numba.cache.backends import Backend, Kernel, Memory
from hps_numba.cache.host_threads import host_threads
from hps_numba.cache.kept_rates import kept_rates, rate_key, span_of
from hps_numba.cache.shares import ALONE, FULL_SHARE, LEAST_ROWS, Learned, Shares
from hps_numba.cache.workspace import Workspace
from hps_numba.device.identity import device_identity
from hps_numba.errors import CapacityError, HpsError
from hps_numba.kernels.host.epoch import count
from hps_numba.kernels.layouts.cache import MISSED_GATHERING
from hps_numba.kernels.layouts.gathering import (
    ADDRESSES,
    BATCHES_DONE,
    BATCHES_STARTED,
    CHUNK,
    DEVICE_BYTES,
    DIRECT_NS,
    DIRECT_ROWS,
    FLIGHTS,
    FOUND,
    GROUP_CHUNKS,
    HOST_NS,
    HOST_ROWS,
    LANDING,
    LISTED,
    MAX_GROUPS,
    READY,
    RESOLVED,
    ROW_BYTES,
    ROWS,
    SHARED,
    SHARED_BYTES,
    STRIDE,
)
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.threads import works_alone
from hps_numba.storage.host.epochs import Epochs
from hps_numba.storage.host.store import HostStore

__all__ = [
    "GATHERED_FROM",
    "Asked",
    "GatheredMisses",
    "Gathering",
    "gathering_bytes",
    "listed_from",
]

log = logging.getLogger(__name__)

#: keys of a batch: of a smaller one the device has read the missed rows before threads could begin
GATHERED_FROM = 65_536
CHUNK_BYTES = 16 << 10  # that a thread claims at a time
GROUP_BYTES = 1 << 20  # that are copied at a time, at least: a copy costs some microseconds
GROUPS = 12  # of a batch, about
ROOM_BYTES = 128 << 20  # of gathered rows, at most
_SPARE = 1.25  # rows for which copies are made, to those that the last batch would have had


def listed_from(lists_from: int, mirrors: bool) -> int:
    """Keys of the smallest batch for which a workspace has room for a list of missed keys.

    Args:
        lists_from: keys of the smallest batch that the device serves by such a list.   mirrors: threads may help with some.
    """
    return min(lists_from, GATHERED_FROM) if mirrors else lists_from


class Asked(NamedTuple):
    """A batch: its number, the most rows that it asks for, the groups that are copied, and rows of each."""

    batch: int
    most: int
    groups: int
    group_rows: int


def _shape(dim: int, limit: int) -> tuple[int, int, int]:
    """Bytes from row to row, rows of a chunk, and rows that there is room for."""
    stride = _up(4 * dim)
    chunk = max(1, CHUNK_BYTES // stride)
    return stride, chunk, min(limit, max(chunk, ROOM_BYTES // stride))


def gathering_bytes(dim: int, limit: int) -> tuple[int, int]:
    """Bytes that a workspace for ``limit`` keys takes beside it: on the device, and of pinned memory of the host."""
    stride, _, room = _shape(dim, limit)
    return DEVICE_BYTES + 48 * limit + room * stride, _up(SHARED_BYTES) + _up(8 * limit) + room * stride + 64


class _Taken:
    """What a gathering takes.   It outlives one that is dropped: threads read its words until they are told not to.

    Attributes:
        memories: on the device, and pinned.   copying, listed, copied: a stream and two events, or 0.
        shared: address of the words that the threads know of, or 0.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend, self._process = backend, os.getpid()
        self.memories: list[Memory] = []
        self.copying = self.listed = self.copied = self.shared = 0

    def take(self, memory: Memory) -> int:
        """Keep memory; returns its address."""
        self.memories.append(memory)
        return memory.address

    def release(self, at_rest: Callable[[], object] = lambda: None) -> None:
        """Give everything back, when no batch copies any more; again does nothing.

        ``at_rest`` is called when nobody reads rows for it any more, before its memory is given back.

        Raises:
            DeviceError: the device is lost.
        """
        backend = self._backend
        if os.getpid() != self._process:  # in a forked child all of it is the parent's
            self.copying = self.listed = self.copied = self.shared = 0
        try:
            if self.copying:
                backend.synchronize(self.copying)  # a batch may be on its way, or have failed halfway
        finally:
            if self.shared:
                host_threads.remove(self.shared)
                self.shared = 0
            at_rest()
        stream, events = self.copying, (self.listed, self.copied)
        self.copying = self.listed = self.copied = 0
        if stream:
            backend.destroy_stream(stream)
        for event in filter(None, events):
            backend.destroy_event(event)
        while self.memories:
            self.memories.pop().release()

    def release_dropped(self) -> None:
        """``release`` for a gathering that nobody can close any more."""
        if os.getpid() != self._process:
            return
        try:
            with self._backend.current():
                self.release()
        except HpsError as problem:  # there is no caller to raise it to
            log.warning("memory for gathered rows was not freed: %s", problem)


class Gathering:
    """The memory for the batches of one workspace, at most ``limit`` keys each.   Freed like memory, by ``release``.

    Attributes:
        address: of its words on the device.   bytes, pinned_bytes: on the device, and of pinned memory of the host.

    Raises:
        CapacityError: there is no memory, or no thread.

    Thread safety: ``oldest`` from any thread, the others one at a time.
    """

    def __init__(self, backend: Backend, dim: int, limit: int, epochs: Epochs, name: str, stream: int) -> None:
        self._backend, self._epochs = backend, epochs
        self._begun = [0] * FLIGHTS  # the epochs in which the last batches began
        self._words = memoryview(b"")  # a view, as any thread may ask for epochs: once released, it refuses to read
        self._seen = 0
        self._taken = taken = _Taken(backend)
        self._drop = weakref.finalize(self, taken.release_dropped)  # before any of its memory is collected with it
        self._drop.atexit = False
        self._stride, self._chunk, self._room = _shape(dim, limit)
        landing = self._room * self._stride
        if not backend.waits_for_host:
            raise CapacityError(
                f"{name}: expected a device whose streams can wait for words of host memory, got one that cannot"
            )
        try:
            self.bytes, self.pinned_bytes = gathering_bytes(dim, limit)
            self.address = taken.take(backend.allocate(self.bytes, f"{name}: rows that threads of the host gather"))
            self._shared = _up(taken.take(backend.allocate_pinned(self.pinned_bytes, f"{name}: rows for the device")))
            self._addresses = self._shared + _up(SHARED_BYTES)
            self._rows = self._addresses + _up(8 * limit)
            self._landing = self.address + DEVICE_BYTES
            self._list = self._landing + landing
            found, resolved = self._list + 8 * limit, self._list + 24 * limit
            ctypes.memset(self._shared, 0, SHARED_BYTES)
            self._words = _words(self._shared, SHARED_BYTES // 8)
            constants = {ADDRESSES: self._addresses, ROWS: self._rows, CHUNK: self._chunk, STRIDE: self._stride}
            for word, value in (constants | {ROW_BYTES: 4 * dim}).items():
                self._words[word // 8] = value
            header = np.zeros(DEVICE_BYTES // 8, np.int64)
            places = {SHARED: self._shared, LANDING: self._landing, LISTED: self._list, FOUND: found, RESOLVED: resolved}
            for word, value in places.items():
                header[word // 8] = value
            backend.from_host(self.address, header, stream)
            taken.copying = backend.new_stream()
            taken.listed, taken.copied = backend.new_event(), backend.new_event()
            epochs.add_guard(self)
            taken.shared = self._shared  # first: if an interrupt comes next, the threads are told not to look
            if not host_threads.add(self._shared, taken.memories):
                raise CapacityError(f"{name}: expected threads that gather rows for the device, got none")
        except BaseException:
            self.release()
            raise

    @property
    def started(self) -> int:
        """Batches that were started so far."""
        return self._words[BATCHES_STARTED // 8]

    @property
    def done(self) -> int:
        """Batches that the device has finished with."""
        return self._words[BATCHES_DONE // 8]

    @property
    def last(self) -> tuple[int, int, int, int]:
        """Of the last batch: rows by way of the host, nanoseconds until all were there; rows that the device read, the same."""
        rows, ns, others, others_ns = (self._words[at // 8] for at in (HOST_ROWS, HOST_NS, DIRECT_ROWS, DIRECT_NS))
        return rows, ns, others, others_ns

    def has_news(self) -> bool:
        """Another batch has ended since this was asked."""
        seen, self._seen = self._seen, self.done
        return self._seen != seen

    @property
    def is_full(self) -> bool:
        """Too many batches are on their way."""
        return self.started - self.done >= FLIGHTS

    def begin(self, n: int, share: int) -> Asked:
        """Begin a batch of ``n`` keys, of whose missed rows the host gathers a share in 1/65,536; it is to be started now."""
        started = self.started
        rows, _, others, _ = self.last
        expected = n if not started else int(_SPARE * (rows + others)) + LEAST_ROWS
        most = min(-(-min(n, expected) * share // FULL_SHARE), self._room)
        group = max(1, max(GROUP_BYTES // self._stride, -(-most // GROUPS)) // self._chunk)  # chunks
        groups = min(MAX_GROUPS, max(1, -(-most // (group * self._chunk))))
        self._begun[started % FLIGHTS] = self._epochs.now
        self._words[GROUP_CHUNKS // 8 + (started + 1) % FLIGHTS] = group
        host_threads.begin(self._shared)
        return Asked(started + 1, min(most, groups * group * self._chunk), groups, group * self._chunk)

    def ask(self, asked: Asked, asking: Kernel, stream: int) -> None:
        """After the work that is on the stream now, ask the host for the rows of a batch: with ``ask_host_kernel``."""
        backend, taken = self._backend, self._taken
        backend.record(taken.listed, stream)
        backend.wait(taken.copying, taken.listed)
        backend.copy(self._addresses, self._list, 8 * asked.most, taken.copying)
        asking.launch(1, taken.copying, self.address, asked.batch, asked.groups, asked.group_rows, threads=32)

    def copy(self, asked: Asked, timing: Kernel, stream: int) -> None:
        """Let the stream wait until the rows that a batch has asked for are on the device. ``timing``: notes when that is."""
        backend, taken = self._backend, self._taken
        size, total, mark = asked.group_rows * self._stride, asked.most * self._stride, self._shared + READY
        backend.copy_when_marked(taken.copying, mark, asked.batch, asked.groups, self._landing, self._rows, size, total)
        timing.launch(1, taken.copying, self.address, threads=32)
        backend.record(taken.copied, taken.copying)
        backend.wait(stream, taken.copied)

    def oldest(self, now: int) -> int:
        """The oldest epoch that a batch may still be in (``epochs.Guard``)."""
        try:
            done, started = self.done, self.started
        except ValueError:  # the view was released since the caller found this guard
            return now
        return min((self._begun[batch % FLIGHTS] for batch in range(done, started)), default=now)

    def release(self) -> None:
        """Free the memory; the device has ended all its batches."""
        self._taken.release(self._end_epochs)
        self._drop.detach()  # not before: an interrupt may come at any time

    def _end_epochs(self) -> None:
        self._epochs.remove_guard(self)
        self._words.release()


class GatheredMisses:
    """Batches of one cache whose missed rows threads of the host help to bring.

    Args:
        store: the host store.   forced: the share of the host, else it is measured.

    Attributes:
        shares: what was learned; the same for all caches of such rows, on this device and in tables of about one size.

    Thread safety: all methods; a workspace in one call at a time.
    """

    def __init__(self, backend: Backend, store: HostStore, name: str, forced: float | None = None) -> None:
        self._backend, self._store, self._name = backend, store, name
        self._device = None if forced is not None else device_identity(backend.ordinal)
        self._span = self._span_now()
        self.shares = Shares(forced, self._known)
        if self._device is not None:
            kept_rates.open()
        self._counts = np.zeros(2, np.int64)
        self._refused_from = sys.maxsize  # keys of the smallest workspace for which there was no memory
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """In a forked child there are no threads, and no device."""
        self._refused_from = 0

    @property
    def batches(self) -> int:
        """Batches of which the host was asked for a part."""
        return int(self._counts[0])

    @property
    def declined(self) -> int:
        """Batches whose rows the device read alone, as there was no memory or too many were on their way."""
        return int(self._counts[1])

    def skips(self, n: int) -> bool:
        """Whether the device reads the missed rows of a batch of ``n`` keys, and nothing is measured, as they are few."""
        return self.shares.skips(n)

    def begin(self, workspace: Workspace, n: int, stream: int) -> int:
        """Begin a batch of ``n`` keys with a workspace that has room for it; returns the share of the host, or ALONE."""
        if self._device is not None and self._span != self._span_now():
            self._span = self._span_now()
            self.shares.ask_again()
        share = self.shares.of(n)
        if share == ALONE:
            return ALONE
        gathering = workspace.gathering
        if gathering is None and not works_alone():  # else threads that may have to compile would be waited for
            gathering = self._made_for(workspace, stream)
        if gathering is None or gathering.is_full or not host_threads.at_work:
            count(self._counts.ctypes.data + 8, 1)
            return ALONE
        if gathering.has_news():
            self.shares.learn(workspace.gathered, gathering.last)
        workspace.gathered = 0 if self.shares.skips_next(n) else n  # else it is news when batches are looked at again
        if share:
            count(self._counts.ctypes.data, 1)
        return share

    def _span_now(self) -> int:
        return span_of(4 * self._store.dim * self._store.slots)

    def _known(self, bits: int) -> Learned:
        """What is known of batches of so many keys, in bits."""
        if self._device is None:
            return Learned()
        return kept_rates.of(rate_key(self._device, 4 * self._store.dim, bits, self._span))

    def close(self) -> None:
        """Keep what was learned for the next process."""
        if self._device is not None:
            kept_rates.keep()

    def _made_for(self, workspace: Workspace, stream: int) -> Gathering | None:
        if workspace.limit >= self._refused_from:
            return None
        try:
            gathering = Gathering(self._backend, self._store.dim, workspace.limit, self._store.epochs, self._name, stream)
        except CapacityError:
            self._refused_from = workspace.limit
            return None
        workspace.adopt_gathering(gathering)
        self._backend.store_word(workspace.own_list + MISSED_GATHERING, gathering.address, stream)
        return gathering


def _up(size: int) -> int:
    return -(-size // 64) * 64


def _words(address: int, length: int) -> memoryview:
    return memoryview((ctypes.c_int64 * length).from_address(address)).cast("B").cast("q")
