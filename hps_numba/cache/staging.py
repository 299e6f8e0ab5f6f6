"""How missed rows come from host memory: read in place by the device, or gathered first by host threads.

*direct*: the kernel of the lookup finds the row in the index of the host store and reads it. Nothing waits. With a copy of the
index on the device (``cache.index_mirror``, ``auto``) only the row comes over the bus, and large batches read rows in the order
of their addresses (``kernels.cache.miss_sorted``).

*staged*: the kernel lists the keys that it misses, the host waits for their number (the only wait), and its threads gather rows
into pinned memory, a piece at a time; a kernel writes each piece to its positions in the answer while the next one is gathered.
Then rows are inserted as usual. For hosts with idle cores and devices without room for a copy of the index: in tables of
several GiB cores find rows faster than a device that has to translate every address. ``auto`` does not stage: reads by a copied
index were faster in every case, from tables of 1 and 4 GiB, on a host of 32 idle cores (docs/performance.md, "Misses").

*Why the pieces are not copied to the device first.* A kernel has to write each row to its position anyway, and reads
consecutive rows in pinned memory as fast as a copy does; so nothing is written to device memory only to be read again.

*What is inserted is what the host store has*, as for direct reads. Insertion looks whether a change of the table was announced
(``STATE_CHANGES``) since before the rows were read, and only then over the bus whether the index word is still that of the
gathering. So a batch does not cost a read over the bus for each row that it inserts.

Pooled lookups and lookups of several tables in one launch are direct, and so is all that a graph captures: a graph cannot wait.
"""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from hps_numba.cache.backends import Backend, Kernel, Memory
from hps_numba.cache.kernel_set import KernelSet
from hps_numba.cache.sizing import CacheGeometry
from hps_numba.cache.state import CacheState
from hps_numba.cache.workspace import Workspace
from hps_numba.kernels.host.epoch import count
from hps_numba.kernels.layouts.cache import (
    MISSED_BYTES,
    MISSED_COUNT,
    MISSED_KEYS,
    MISSED_SELF,
    STATE_CHANGES,
    WORKSPACE_CHANGES,
    WORKSPACE_MISSED,
    WORKSPACE_OWN_LIST,
)
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.storage.host.store import HostStore

__all__ = ["MISS_PATHS", "NEVER", "StagedMisses"]

MISS_PATHS = ("direct", "staged", "auto")
NEVER = sys.maxsize

#: bytes of rows that are gathered at a time: few enough to stay in the cache of the host, and to begin soon
PIECE_BYTES = 16 << 20
MIN_PIECE_BYTES = 4 << 20
_PIECES = 3  # that a batch is cut into at least, if they are not too small
_BUFFERS = 3  # one is being gathered, one read; a third, as the two do not take equally long
_MIN_LIMIT = 256


class _Staging:
    """Memory of one staged batch at a time: its list of missed keys, and buffers for pieces of rows.

    For ``n`` keys, rounded up: 16 bytes each of the device, 8 bytes each of pinned memory, and there _BUFFERS x PIECE_BYTES.

    Thread safety: one thread at a time.
    """

    def __init__(self, backend: Backend, dim: int, n: int, name: str) -> None:
        self._backend = backend
        self.limit = max(_MIN_LIMIT, 1 << (n - 1).bit_length())
        self.rows = max(1, min(self.limit, PIECE_BYTES // (4 * dim)))  # of a buffer
        self._memories: list[Memory] = []
        self._events: list[int] = []
        self._next = 0
        try:
            entries = self._take(backend.allocate(MISSED_BYTES + 16 * self.limit, f"{name}: list of missed keys"))
            keys = self._take(backend.allocate_pinned(8 * self.limit, f"{name}: missed keys"))
            size = _up(4 * dim * self.rows) + 8 * self.rows
            buffers = [self._take(backend.allocate_pinned(size, f"{name}: rows for the device")) for _ in range(_BUFFERS)]
            self._events += [backend.new_event() for _ in range(_BUFFERS)]
        except BaseException:
            self.release()
            raise
        self.address, self.entries = entries, entries + MISSED_BYTES
        self.bytes = MISSED_BYTES + 16 * self.limit
        self.keys = _array(keys, np.int64, (self.limit,))
        self._buffers = [
            (_array(start, np.float32, (self.rows, dim)), _array(start + _up(4 * dim * self.rows), np.int64, (self.rows,)))
            for start in buffers
        ]
        self._header = np.zeros(MISSED_BYTES // 8, np.int64)
        self._header[[MISSED_KEYS // 8, MISSED_SELF // 8]] = keys, entries
        self._begun = False

    def _take(self, memory: Memory) -> int:
        self._memories.append(memory)
        return memory.address

    def begin(self, stream: int) -> None:
        """Empty the list, after the work on the stream and after that of the batch before."""
        if not self._begun:
            self._backend.from_host(self.address, self._header, stream)
            self._begun = True
            return
        self._backend.wait(stream, self._events[self._next - 1])  # the last that was recorded
        self._backend.fill(self.address + MISSED_COUNT, 0, 8, stream)

    def missed(self, stream: int) -> int:
        """How many keys are on the list: the wait of a staged batch."""
        word = np.empty(1, np.int64)
        self._backend.to_host(word, self.address + MISSED_COUNT, stream)
        return int(word[0])

    def buffer(self) -> tuple[np.ndarray, np.ndarray]:
        """``(rows, words)`` to write to, as soon as the device has read what was there."""
        self._backend.wait_for(self._events[self._next])
        return self._buffers[self._next]

    def sent(self, stream: int) -> None:
        """The stream has the work that reads the buffer."""
        self._backend.record(self._events[self._next], stream)
        self._next = (self._next + 1) % _BUFFERS

    def release(self) -> None:
        """Free everything, after the device has read all."""
        while self._events:
            self._backend.wait_for(self._events[-1])
            self._backend.destroy_event(self._events.pop())
        while self._memories:
            self._memories.pop().release()


class StagedMisses:
    """Rows that one cache misses, gathered from its host store by host threads.

    ``in_force``: from the index of the store to the one that the cache reads, which may be of the version before.

    Thread safety: any number of batches at a time; ``close`` after them.
    """

    def __init__(
        self,
        geometry: CacheGeometry,
        state: CacheState,
        kernels: KernelSet,
        store: HostStore,
        in_force: Callable[[int], int],
    ) -> None:
        self._in_force = in_force
        self._geometry, self._state, self._kernels, self._store = geometry, state, kernels, store
        self._backend = kernels.backend
        self._staged = np.zeros(1, np.int64)
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Own no memory, as at the start and in a forked child."""
        self._all: list[_Staging] = []
        self._idle: deque[_Staging] = deque()

    @property
    def batches(self) -> int:
        """Batches that were staged so far."""
        return int(self._staged[0])

    @property
    def bytes(self) -> int:
        """Bytes that it takes where the cache lives."""
        return sum(staging.bytes for staging in list(self._all))

    def answer(
        self,
        list_misses: Callable[[], None],
        workspace: Workspace,
        n: int,
        out: int,
        stream: int,
        *,
        out_type: str,
        aligned: bool,
    ) -> None:
        """Write the answer of a batch in stream order, and list what is to be inserted.

        Args:
            list_misses: starts ``list_kernel`` with this workspace on the stream, which writes what the cache has to ``out``.
            out_type: of the answer.   aligned: the answer is 16-byte aligned.

        Raises:
            ClosedError: the store was closed.   CapacityError: no memory.   DeviceError: the driver refused.
        """
        backend = self._backend
        staging = self._take(n)
        done = False
        try:
            backend.copy(workspace.address + WORKSPACE_CHANGES, self._state.address + STATE_CHANGES, 8, stream)
            staging.begin(stream)
            backend.copy(workspace.address + WORKSPACE_MISSED, staging.address + MISSED_SELF, 8, stream)
            list_misses()
            kernel, _ = self._kernels.built(("answer_missed_kernel", out_type, aligned))
            missed = staging.missed(stream)
            step = self._step(missed, staging.rows)
            for start in range(0, missed, step):
                self._send(staging, kernel, workspace, start, min(step, missed - start), out, stream)
            done = True
        finally:
            if not done:
                backend.synchronize(stream)  # a kernel may read a buffer for which no event was recorded
            self._idle.append(staging)
        count(self._staged.ctypes.data, 1)

    def _step(self, missed: int, limit: int) -> int:
        """Rows of a piece."""
        row_bytes = 4 * self._store.dim
        return max(1, min(limit, max(-(-missed // _PIECES), MIN_PIECE_BYTES // row_bytes)))

    def _send(self, staging: _Staging, kernel: Kernel, workspace: Workspace, start: int, n: int, out: int, stream: int) -> None:
        """Gather the rows of ``n`` missed keys from ``start`` on, and start the kernel that writes them to their positions."""
        rows, words = staging.buffer()
        default = float(self._geometry.default)
        keys = staging.keys[start : start + n]
        _, generation = self._store.gather(keys, rows[:n], words[:n], default, self._in_force)
        at = (staging.entries + 16 * start, _address(words), _address(rows), generation, n, out)
        cache = self._state.lines, self._geometry.sets, self._state.address
        kernel.launch(self._backend.blocks(n), stream, *cache, workspace.address, *at)
        staging.sent(stream)

    def end(self, workspace: Workspace, stream: int) -> None:
        """The insertion is on the stream: the next batch of the workspace is another one."""
        self._backend.fill(workspace.address + WORKSPACE_CHANGES, 0, 8, stream)
        self._backend.copy(workspace.address + WORKSPACE_MISSED, workspace.address + WORKSPACE_OWN_LIST, 8, stream)

    def _take(self, n: int) -> _Staging:
        """Memory for a batch of ``n`` keys; what is too small is freed."""
        while self._idle:
            try:
                staging = self._idle.pop()
            except IndexError:  # another thread was faster
                break
            if n <= staging.limit:
                return staging
            self._all.remove(staging)
            staging.release()
        staging = _Staging(self._backend, self._store.dim, n, self._geometry.name)
        self._all.append(staging)
        return staging

    def close(self) -> None:
        """Free all memory."""
        for staging in self._all:
            staging.release()
        self.reset_after_fork()


def _up(size: int) -> int:
    return -(-size // 64) * 64


def _address(array: np.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _array(address: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Memory at an address, which outlives the array."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)
