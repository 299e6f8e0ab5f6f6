"""The memory of one cache, where the cache lives: lines of the index, rows, words of state, counts of hits.

``kernels.layouts.cache`` says what is in the words. There are two copies of them: one with the address of the host store, and
one without, for calls on what the cache itself holds (``cache.without_store``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np

from hps_numba.cache.backends import Backend, Memory, OwnStream
from hps_numba.cache.sizing import CacheGeometry
from hps_numba.cache.workspace import Workspace
from hps_numba.errors import ClosedError
from hps_numba.kernels.layouts.cache import (
    NO_LISTS,
    SET_BYTES,
    STATE_BYTES,
    STATE_CAPACITY,
    STATE_CHANGES,
    STATE_HOST,
    STATE_PENDING,
)
from hps_numba.runtime.fork import register_fork_reset

__all__ = ["STATE_WORDS", "CacheState"]

STATE_WORDS = 13
_ALIGNMENT = 128
_MAX_KEPT_BYTES = 32 << 20


class CacheState:
    """The memory of one cache, and the stream on which it is read and written by calls that wait.

    Args:
        geometry: of the cache.   pinned: rows are in pinned host memory.

    Attributes:
        pinned_bytes: of the rows, if they are in pinned host memory.   kept_bytes: of ``kept_copies``.
        keeps: copies of arrays take memory that is worth keeping.
        address: of the state words.   no_lists: of the workspace header of a batch that lists nothing.
        kernel_args: what most kernels take first: addresses of lines and rows, number of sets, address of the state.
        query_args: the same with the state that has no host store.

    Raises:
        CapacityError: the memory is not there.

    Thread safety: calls on ``stream`` one at a time, but for ``held_stream`` and ``copies_on``.
    """

    def __init__(self, backend: Backend, geometry: CacheGeometry, *, pinned: bool) -> None:
        self._backend, self._geometry = backend, geometry
        self._memories: list[Memory] = []
        self._hits = 0
        self._kept: Memory | None = None
        self.kept_bytes = 0
        self.keeps = backend.ordinal is not None
        self.stream = backend.new_stream()
        self._own_stream: OwnStream | None = OwnStream(self.stream, backend.destroy_stream, backend.current)
        try:
            self.lines = self._allocate(geometry.sets * SET_BYTES, "index")
            self.rows = self._allocate(geometry.row_bytes, "rows", pinned=pinned)
            self.pinned_bytes = backend.pinned_bytes
            self.address = self._allocate(STATE_BYTES, "state")
            self.set_word(STATE_CHANGES, 1)
            self._query_address = self._allocate(STATE_BYTES, "state of queries")
            self.set_word(STATE_CAPACITY, max(1, geometry.capacity))
        except BaseException:
            self.release()
            raise
        self.kernel_args = self.lines, self.rows, geometry.sets, self.address
        self.query_args = self.lines, self.rows, geometry.sets, self._query_address
        self.no_lists = self.address + NO_LISTS
        register_fork_reset(self)

    def _allocate(self, size: int, what: str, *, pinned: bool = False) -> int:
        allocate = self._backend.allocate_pinned if pinned else self._backend.allocate
        self._memories.append(allocate(max(1, size), f"{self._geometry.name}: cache: {what}"))
        return self._memories[-1].address

    def allocate_hits(self) -> None:
        """Have memory for the counts of hits, for policies that need them. Raises ``CapacityError`` if there is none."""
        if not self._hits:
            hits = self._allocate(4 * self._geometry.capacity, "hits")
            self.set_word(STATE_PENDING, hits)
            self._hits = hits

    @property
    def hits_bytes(self) -> int:
        """Bytes of the counts of hits."""
        return 4 * self._geometry.capacity if self._hits else 0

    @property
    def bytes(self) -> int:
        """Bytes of all of it."""
        return self._geometry.sets * SET_BYTES + self._geometry.row_bytes + 2 * STATE_BYTES + self.hits_bytes

    def reset_after_fork(self) -> None:
        """In a forked child, empty the cache of the CPU: another thread may have been changing it."""
        if self._backend.ordinal is None and self._memories:
            self._backend.fill(self.lines, 0, self._geometry.sets * SET_BYTES, 0)
            if self._hits:
                self._backend.fill(self._hits, 0, self.hits_bytes, 0)

    def release(self) -> None:
        """Free the memory and, when no call holds it any more, the stream; again does nothing."""
        for memory in self._memories:
            memory.release()
        self._memories.clear()
        self._release_kept()
        self.stream, self._own_stream = 0, None

    def held_stream(self) -> OwnStream:
        """``stream``, for a call that may still use it when the cache is closed meanwhile; from any thread.

        Raises:
            ClosedError: the cache is closed.
        """
        held = self._own_stream
        if held is None:
            raise ClosedError(f"{self._geometry.name}: the cache is closed")
        return held

    # -- reading and writing ----------------------------------------------------------------------------------------------

    def read_words(self, address: int, count: int) -> np.ndarray:
        """int64 ``[count]`` at an address where the cache lives."""
        words = np.empty(count, np.int64)
        self._backend.to_host(words, address, self.stream)
        return words

    def word(self, offset: int) -> int:
        """A word of the state, by its offset."""
        return int(self.read_words(self.address + offset, 1)[0])

    def set_word(self, offset: int, value: int) -> None:
        """Store a word of the state for readers on the device; waits until they see it."""
        self._backend.store_word(self.address + offset, value, self.stream)

    def zero_word(self, offset: int) -> None:
        """Set a word of the state to 0, in the order of the stream."""
        self._backend.fill(self.address + offset, 0, 8, self.stream)

    def read_lines(self) -> np.ndarray:
        """All lines of the index, uint8."""
        lines = np.empty(self._geometry.sets * SET_BYTES, np.uint8)
        self._backend.to_host(lines, self.lines, self.stream)
        return lines

    def write_lines(self, lines: np.ndarray) -> None:
        """Store all lines of the index."""
        self._backend.from_host(self.lines, lines, self.stream)

    def copy_for_queries(self) -> None:
        """Let the state without a host store have the words of now."""
        self._backend.copy(self._query_address, self.address, 8 * STATE_WORDS, self.stream)
        self._backend.fill(self._query_address + STATE_HOST, 0, 8, self.stream)

    def table_words(self, workspace: Workspace | None) -> list[int]:
        """How kernels for several tables are told of this cache (``TABLE_...`` of ``kernels.layouts.cache``).

        None: with the workspace header of a batch that lists nothing.
        """
        geometry = self._geometry
        lists, stage = (self.no_lists, 0) if workspace is None else (workspace.address, workspace.stage)
        default = int(geometry.default.view(np.uint32))
        return [*self.kernel_args, default, lists, stage, 4 * geometry.dim, max(1, geometry.capacity)]

    # -- arrays of the caller ---------------------------------------------------------------------------------------------

    def copies(self, *arrays: np.ndarray) -> AbstractContextManager[list[int]]:
        """A block with copies of arrays where the cache lives; gives their addresses."""
        return self.copies_on(self.stream, *arrays)

    @contextmanager
    def copies_on(self, stream: int, *arrays: np.ndarray) -> Iterator[list[int]]:
        """``copies``, made on another stream."""
        memories = [self._backend.copy_of(array, stream) for array in arrays]
        try:
            yield [memory.address for memory in memories]
        finally:
            for memory in memories:
                memory.release()

    @contextmanager
    def kept_copies(self, *arrays: np.ndarray) -> Iterator[list[int]]:
        """``copies`` in memory that stays for the next time, if it is little and on a device; one block at a time.

        A device takes longer to give memory and to take it back than for the copies of a training step of 16,384 keys, and
        while it takes it back no thread can start anything on it.
        """
        places, size = [], 0
        for array in arrays:
            places.append(size)
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        if not size or size > _MAX_KEPT_BYTES or not self.keeps:
            with self.copies(*arrays) as addresses:
                yield addresses
            return
        if size > self.kept_bytes:
            self._release_kept()
            enough = min(_MAX_KEPT_BYTES, size + size // 4)  # the next step has somewhat more keys, or fewer
            self._kept = self._backend.allocate(enough, f"{self._geometry.name}: rows that were written")
            self.kept_bytes = enough
        assert self._kept is not None
        addresses = [self._kept.address + place for place in places]
        for address, array in zip(addresses, arrays):
            self._backend.from_host(address, array, self.stream)
        yield addresses

    def _release_kept(self) -> None:
        memory, self._kept, self.kept_bytes = self._kept, None, 0
        if memory is not None:
            memory.release()

    @contextmanager
    def buffer(self, size: int) -> Iterator[int]:
        """A block with ``size`` bytes for the results of a call; gives their address."""
        memory = self._backend.allocate(size, f"{self._geometry.name}: results of a call")
        try:
            yield memory.address
        finally:
            memory.release()
