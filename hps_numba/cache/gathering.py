"""Missed rows of large batches that threads of the host gather while the device reads others in place.

``kernels.cache.miss_gathered`` says what the device does, ``cache.host_threads`` who the threads are. Here is the memory that
both work with, one for each workspace, and how the missed rows are shared out.

*How they are shared out.* Each batch tells how many rows came by either way and how long that took. The next one of its size
gives each way what it would have needed to end at the same time, so that nothing has to be known of the machine.

*The caller never waits.* Copies are put on a stream of their own, each behind a wait of the stream for the mark of its group.
As their number and size must be known before the batch has run, they are made for somewhat more rows than the last one had. If
too many batches are still on their way, the device reads all rows.
"""

from __future__ import annotations

import ctypes
import sys
from typing import NamedTuple

import numpy as np

from hps_numba.cache.backends import Backend, Kernel, Memory
from hps_numba.cache.host_threads import host_threads
from hps_numba.cache.workspace import Workspace
from hps_numba.errors import CapacityError
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
from hps_numba.storage.host.epochs import Epochs

__all__ = ["FULL_SHARE", "GATHERED_FROM", "LEAST_ROWS", "Asked", "GatheredMisses", "Gathering", "Shares", "gathering_bytes"]

#: keys of a batch: of a smaller one the device has read the missed rows before threads could begin
GATHERED_FROM = 65_536
FULL_SHARE = 1 << 16
LEAST_ROWS = 1024  # for which the host is asked: below, the device is done before the threads have begun
CHUNK_BYTES = 16 << 10  # that a thread claims at a time
GROUP_BYTES = 1 << 20  # that are copied at a time, at least: a copy costs some microseconds
GROUPS = 12  # of a batch, about
ROOM_BYTES = 128 << 20  # of gathered rows, at most
_SPARE = 1.25  # rows for which copies are made, to those that the last batch would have had
_LEAST_SHARE, _FIRST_SHARE = 1 / 32, 3 / 4
_PULL = 0.5  # of a new measurement


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
        self._memories: list[Memory] = []
        self._added = False
        self._copying = self._listed = self._copied = 0
        self._stride, self._chunk, self._room = _shape(dim, limit)
        landing = self._room * self._stride
        if not backend.waits_for_host:
            raise CapacityError(
                f"{name}: expected a device whose streams can wait for words of host memory, got one that cannot"
            )
        try:
            self.bytes, self.pinned_bytes = gathering_bytes(dim, limit)
            self.address = self._take(backend.allocate(self.bytes, f"{name}: rows that threads of the host gather"))
            self._shared = _up(self._take(backend.allocate_pinned(self.pinned_bytes, f"{name}: rows for the device")))
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
            self._copying = backend.new_stream()
            self._listed, self._copied = backend.new_event(), backend.new_event()
            epochs.add_guard(self)
            self._added = host_threads.add(self._shared)
            if not self._added:
                raise CapacityError(f"{name}: expected threads that gather rows for the device, got none")
        except BaseException:
            self.release()
            raise

    def _take(self, memory: Memory) -> int:
        self._memories.append(memory)
        return memory.address

    @property
    def started(self) -> int:
        """Batches that were started so far."""
        return int(self._words[BATCHES_STARTED // 8])

    @property
    def done(self) -> int:
        """Batches that the device has finished with."""
        return int(self._words[BATCHES_DONE // 8])

    @property
    def last(self) -> tuple[int, int, int, int]:
        """Of the last batch: rows by way of the host, nanoseconds until all were there; rows that the device read, the same."""
        rows, ns, others, others_ns = (int(self._words[at // 8]) for at in (HOST_ROWS, HOST_NS, DIRECT_ROWS, DIRECT_NS))
        return rows, ns, others, others_ns

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
        backend = self._backend
        backend.record(self._listed, stream)
        backend.wait(self._copying, self._listed)
        backend.copy(self._addresses, self._list, 8 * asked.most, self._copying)
        asking.launch(1, self._copying, self.address, asked.batch, asked.groups, asked.group_rows, threads=32)

    def copy(self, asked: Asked, timing: Kernel, stream: int) -> None:
        """Let the stream wait until the rows that a batch has asked for are on the device. ``timing``: notes when that is."""
        backend, size, total = self._backend, asked.group_rows * self._stride, asked.most * self._stride
        mark = self._shared + READY
        backend.copy_when_marked(self._copying, mark, asked.batch, asked.groups, self._landing, self._rows, size, total)
        timing.launch(1, self._copying, self.address, threads=32)
        backend.record(self._copied, self._copying)
        backend.wait(stream, self._copied)

    def oldest(self, now: int) -> int:
        """The oldest epoch that a batch may still be in (``epochs.Guard``)."""
        done, started = self.done, self.started
        return min((self._begun[batch % FLIGHTS] for batch in range(done, started)), default=now)

    def release(self) -> None:
        """Free the memory; the device has ended all its batches."""
        if self._copying:
            self._backend.synchronize(self._copying)  # of a batch that failed halfway it may still copy
            self._backend.destroy_stream(self._copying)
            self._copying = 0
        for event in filter(None, (self._listed, self._copied)):
            self._backend.destroy_event(event)
        self._listed = self._copied = 0
        if self._added:
            host_threads.remove(self._shared)
            self._added = False
        self._epochs.remove_guard(self)
        while self._memories:
            self._memories.pop().release()


class Shares:
    """How many of the missed rows the host gathers, by size of the batch.   Thread safety: all methods."""

    def __init__(self, forced: float | None) -> None:
        self._forced = forced
        self._shares: dict[int, float] = {}
        self._rates: dict[int, tuple[float, float]] = {}

    def of(self, n: int) -> int:
        """For a batch of ``n`` keys, in 1/65,536."""
        share = self._shares.get(n.bit_length(), _FIRST_SHARE) if self._forced is None else self._forced
        return round(share * FULL_SHARE)

    def learn(self, n: int, last: tuple[int, int, int, int]) -> None:
        """Look at the last batch of a workspace, one of about ``n`` keys."""
        rows, ns, others, others_ns = last
        if self._forced is not None or min(rows, others) < LEAST_ROWS // 4 or ns <= 0 or others_ns <= 0:
            return
        host, direct = rows / ns, others / others_ns
        size = n.bit_length()
        before = self._shares.get(size, _FIRST_SHARE)
        share = before + _PULL * (host / (host + direct) - before)
        self._shares[size] = min(max(share, _LEAST_SHARE), 1 - _LEAST_SHARE)
        self._rates[size] = host * 1e9, direct * 1e9

    @property
    def rates(self) -> dict[int, tuple[float, float]]:
        """Rows a second by way of the host and read by the device at the same time, by bits of the number of keys."""
        return dict(self._rates)


class GatheredMisses:
    """Batches of one cache whose missed rows threads of the host help to bring.

    Args:
        epochs: of the host store.   forced: the share of the host, else it is measured.

    Thread safety: all methods; a workspace in one call at a time.
    """

    def __init__(self, backend: Backend, dim: int, epochs: Epochs, name: str, forced: float | None = None) -> None:
        self._backend, self._dim, self._epochs, self._name = backend, dim, epochs, name
        self.shares = Shares(forced)
        self._counts = np.zeros(2, np.int64)
        self._refused_from = sys.maxsize  # keys of the smallest workspace for which there was no memory
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """In a forked child there are no threads, and no device."""
        self._refused_from = 0

    @property
    def batches(self) -> int:
        """Batches that were started so."""
        return int(self._counts[0])

    @property
    def declined(self) -> int:
        """Batches whose rows the device read alone, as there was no memory or too many were on their way."""
        return int(self._counts[1])

    def begin(self, workspace: Workspace, n: int, stream: int) -> int:
        """Begin a batch of ``n`` keys with a workspace that has room for it; returns the share of the host, 0: do without."""
        share = self.shares.of(n)
        if not share:
            return 0
        gathering = workspace.gathering or self._made_for(workspace, stream)
        if gathering is None or gathering.is_full:
            count(self._counts.ctypes.data + 8, 1)
            return 0
        self.shares.learn(workspace.gathered, gathering.last)
        workspace.gathered = n
        count(self._counts.ctypes.data, 1)
        return share

    def _made_for(self, workspace: Workspace, stream: int) -> Gathering | None:
        if workspace.limit >= self._refused_from:
            return None
        try:
            gathering = Gathering(self._backend, self._dim, workspace.limit, self._epochs, self._name, stream)
        except CapacityError:
            self._refused_from = workspace.limit
            return None
        workspace.adopt_gathering(gathering)
        self._backend.store_word(workspace.own_list + MISSED_GATHERING, gathering.address, stream)
        return gathering


def _up(size: int) -> int:
    return -(-size // 64) * 64


def _words(address: int, length: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_int64 * length).from_address(address))
