"""The memory of one batch besides the cache: the list of rows to insert, counts of hits, the list of missed keys.

On a device one stream after the other works with it: ``StreamMemory`` keeps the stream that had it last and an event at the end
of that stream's work, so that the next stream waits on the device and the host never does.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import numpy as np

from hps_numba.cache.backends import Backend, Memory
from hps_numba.cache.sizing import CacheGeometry
from hps_numba.kernels.layouts.cache import (
    BUCKET_BYTES,
    FIRST_BATCH,
    MAX_BATCH,
    MISSED_BYTES,
    MISSED_SORTED,
    UNUSED_BUCKET,
    WORKSPACE_ABSENT_LIST,
    WORKSPACE_BATCH,
    WORKSPACE_BUCKETS,
    WORKSPACE_BYTES,
    WORKSPACE_COUNTS,
    WORKSPACE_COUNTS_MASK,
    WORKSPACE_KEYS,
    WORKSPACE_LIST,
    WORKSPACE_MASK,
    WORKSPACE_MISSED,
    WORKSPACE_OWN_LIST,
    WORKSPACE_STAGE,
    WORKSPACE_STAGE_STRIDE,
    WORKSPACE_TOUCHED_LIST,
    WORKSPACE_WORDS,
)

__all__ = ["PER_THREAD", "StreamMemory", "StreamUser", "Workspace", "WorkspaceShape", "user_of"]

_ALIGNMENT = 256
_MIN_BATCH = 256
#: a stream, and the thread if the handle means another stream in each thread
StreamUser = tuple[int, int]
PER_THREAD = 2  # the handle of a stream that is another one in each thread


def user_of(stream: int) -> StreamUser:
    """Who this thread is when it works on a stream."""
    return stream, threading.get_ident() if stream == PER_THREAD else 0


@dataclass(frozen=True)
class WorkspaceShape:
    """What the size and the header of a workspace depend on.

    Attributes:
        dim, sets: of the cache.
        lists: batches list rows to insert (not in fixed caches).   counts: they count hits for the policy.
        lists_missed_from: keys of the smallest batch that lists the keys it misses.
        words: further words of the header, which lead to the memory of the policy.
        keys: that a workspace has room for from its first batch on, so that it does not grow afterwards.
    """

    @classmethod
    def of(
        cls, geometry: CacheGeometry, lists_missed_from: int, *, inserts: bool, counts: bool, keys: int = 0
    ) -> WorkspaceShape:
        """The shape of the workspaces of a cache.

        Args:
            inserts: the cache may insert rows.   counts: its policy counts hits.
        """
        lists = inserts and not geometry.fixed
        return cls(geometry.dim, geometry.sets, lists, lists and counts, lists_missed_from, keys=min(keys, MAX_BATCH))

    def limit(self, n: int) -> int:
        """Keys that a new workspace for a batch of ``n`` has room for."""
        return _up(self.keys) if n <= self.keys else _power_of_two(max(n, _MIN_BATCH))

    def captured(self) -> WorkspaceShape:
        """The shape of a workspace that a graph keeps: it never has another batch, and has room for that one only."""
        return replace(self, keys=0)

    def bytes(self, n: int, absent: bool) -> int:
        """Bytes of a workspace with room for batches of ``n`` keys and, if ``absent``, a list of absent ones."""
        return _up(WORKSPACE_BYTES) + sum(map(_up, self.parts(n, absent).values()))

    dim: int
    sets: int
    lists: bool
    counts: bool
    lists_missed_from: int
    words: Mapping[int, int] = field(default_factory=dict)
    keys: int = 0

    def parts(self, n: int, absent: bool) -> dict[int, int]:
        """Bytes of each part for batches of ``n`` keys, by the word of the header that holds its address."""
        parts: dict[int, int] = {}
        if self.lists:
            buckets = _power_of_two(min(2 * n, 2 * self.sets))
            parts |= {WORKSPACE_BUCKETS: BUCKET_BYTES * buckets, WORKSPACE_LIST: 8 * buckets}
            parts |= {WORKSPACE_KEYS: 8 * n, WORKSPACE_WORDS: 16 * n, WORKSPACE_STAGE: 4 * self.dim * n}
        if self.counts:
            parts |= {WORKSPACE_COUNTS: 16 * _power_of_two(2 * n), WORKSPACE_TOUCHED_LIST: 8 * n}
        if absent:
            parts[WORKSPACE_ABSENT_LIST] = 8 * n
        if n >= self.lists_missed_from:
            parts[WORKSPACE_OWN_LIST] = MISSED_BYTES + 32 * n
        return parts


class StreamMemory(ABC):
    """Memory that one stream after the other works with.

    Attributes:
        user: the stream that had it last.   event: recorded at the end of that stream's work; 0: there was none yet.
        limit: keys of the largest batch that it has room for.   lists_absent: it has a list of absent keys.
        address: of what the kernels read first.   bytes: of its memory.
        prepared: lookups prepared for this address, this event and the stream of ``user``.
        lent_to: who works with it now, or did last.   claims: goes up before each attempt to have it.
        claimants: frames of the calls that have it or try to; whoever has it is among them.

    Thread safety: one thread at a time.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.user: StreamUser | None = None
        self.lent_to: StreamUser | None = None
        self.claims = 0
        self.claimants: list[FrameType] = []
        self.event = self.limit = self.address = self.bytes = 0
        self.lists_absent = False
        self.prepared: dict[Any, Any] = {}

    def begin(self, stream: int, user: StreamUser) -> None:
        """Let the stream wait for the one that had the memory last."""
        if self.event and self.user != user:
            self.backend.wait(stream, self.event)

    def end(self, stream: int, user: StreamUser) -> None:
        """The stream has all its work for this batch."""
        if not self.event:
            self.event = self.backend.new_event()
        self.backend.record(self.event, stream)
        if self.user != user:
            self.user = user
            self.prepared.clear()

    @abstractmethod
    def reserve(self, n: int, absent: bool, stream: int) -> None:
        """Have room for ``n`` keys, and for a list of absent keys if ``absent``; ``stream`` may be waited for."""

    @abstractmethod
    def invalidate(self) -> None:
        """Use other memory from the next ``reserve`` on: what is there is too small, or a batch failed halfway."""

    @abstractmethod
    def release(self, stream: int) -> None:
        """Free the memory after all work with it; ``stream`` is used for the wait."""


class Workspace(StreamMemory):
    """The workspace of one batch at a time.   Thread safety: one thread at a time."""

    def __init__(self, backend: Backend, shape: WorkspaceShape, name: str) -> None:
        super().__init__(backend)
        self._shape, self._name = shape, name
        self._memory: Memory | None = None
        self._size = 0  # of the memory, without that of a gathering
        #: memories that go together, and their size, until their event has passed
        self._outgrown: list[tuple[int, list[Memory], int]] = []
        self.stage = self.absent_list = self.own_list = 0
        self.gathering: Any = None  # ``cache.gathering.Gathering``, made when first needed
        self.gathered = 0  # keys of its last batch

    def reserve(self, n: int, absent: bool, stream: int) -> None:
        """Have room for ``n`` keys, and for a list of absent keys if ``absent``; ``stream`` may be waited for.

        Raises:
            CapacityError: there is no memory; the workspace is as it was.
        """
        if n <= self.limit and (self.lists_absent or not absent):
            return
        self._free_outgrown()
        limit = max(self.limit, self._shape.limit(n))
        absent = absent or self.lists_absent
        parts, size = self._shape.parts(limit, absent), self._shape.bytes(limit, absent)
        memory = self.backend.allocate(size, f"{self._name}: buffers of a batch of {limit}")
        header = self._header(memory.address, parts)
        if WORKSPACE_BUCKETS in parts:
            start, size_of = int(header[WORKSPACE_BUCKETS // 8]), parts[WORKSPACE_BUCKETS]
            self.backend.fill(start, UNUSED_BUCKET, size_of, stream)
        own_list = int(header[WORKSPACE_OWN_LIST // 8])
        if own_list:
            self.backend.store_word(own_list + MISSED_SORTED, own_list + MISSED_BYTES + 16 * limit, stream)
        self.backend.from_host(memory.address, header, stream)  # waits for the filling too
        self.invalidate()
        self._memory, self._size, self.limit, self.lists_absent = memory, size, limit, absent
        self.address, self.stage = memory.address, int(header[WORKSPACE_STAGE // 8])
        self.absent_list, self.own_list = int(header[WORKSPACE_ABSENT_LIST // 8]), own_list
        self._count()
        self._free_outgrown(wait=True)  # growing is rare, and memory for two workspaces is not in the plan

    def adopt_gathering(self, gathering: Any) -> None:
        """Keep the memory of a gathering as long as that of the workspace."""
        self.gathering, self.gathered = gathering, 0

    def _header(self, start: int, parts: dict[int, int]) -> np.ndarray:
        header = np.zeros(WORKSPACE_BYTES // 8, np.int64)
        header[WORKSPACE_BATCH // 8] = FIRST_BATCH
        header[WORKSPACE_STAGE_STRIDE // 8] = 4 * self._shape.dim
        header[WORKSPACE_MASK // 8] = parts.get(WORKSPACE_BUCKETS, BUCKET_BYTES) // BUCKET_BYTES - 1
        header[WORKSPACE_COUNTS_MASK // 8] = parts.get(WORKSPACE_COUNTS, 16) // 16 - 1
        for word, value in self._shape.words.items():
            header[word // 8] = value
        end = start + _up(WORKSPACE_BYTES)
        for word, size in parts.items():
            header[word // 8] = end
            end += _up(size)
        header[WORKSPACE_MISSED // 8] = header[WORKSPACE_OWN_LIST // 8]
        return header

    def invalidate(self) -> None:
        """Use other memory from the next ``reserve`` on: what is there is too small, or a batch failed halfway."""
        if self._memory is not None:
            event, self.event = self.event, 0
            memories = [memory for memory in (self.gathering, self._memory) if memory is not None]
            self._outgrown.append((event, memories, self._size))
        self._memory, self.gathering, self._size, self.limit = None, None, 0, 0
        self.prepared.clear()
        self._count()

    def _count(self) -> None:
        self.bytes = self._size + sum(size for _, _, size in self._outgrown)

    def _free_outgrown(self, *, wait: bool = False) -> None:
        """Free the memory that no work is left with; all that there is, if it may ``wait`` for the work."""
        for entry in list(self._outgrown):
            event, memories, _ = entry
            if event and wait:
                self.backend.wait_for(event)
            if event and not self.backend.event_done(event):
                continue
            self._outgrown.remove(entry)
            if event:
                self.backend.destroy_event(event)
            for memory in memories:
                memory.release()
        self._count()

    def release(self, stream: int) -> None:
        """Free the memory after all work with it; ``stream`` is used for the wait."""
        for event in [self.event, *(event for event, _, _ in self._outgrown)]:
            if event:
                self.backend.wait(stream, event)
        self.backend.synchronize(stream)
        self.invalidate()
        self._free_outgrown()


def _power_of_two(value: int) -> int:
    """The smallest power of two that is not less than ``value``."""
    return 1 << max(0, value - 1).bit_length()


def _up(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
