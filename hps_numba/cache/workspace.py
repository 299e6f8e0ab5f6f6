"""What a batch needs besides the cache: the list of its newcomers and their rows, in memory that is lent from call to call.

On a device the calls of a stream follow each other, so a stream keeps its workspace; another stream takes a free one, or the
one that was not used for longest, and then waits on the device, never on the host, until the call that had it is done.
Threads wait for each other only while one is starting its kernels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hps_numba.cache.backends import Backend, Memory
from hps_numba.errors import ClosedError
from hps_numba.kernels.layouts.cache import (
    BUCKET_BYTES,
    FIRST_BATCH,
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
from hps_numba.runtime.fork import register_fork_reset

__all__ = ["Workspace", "WorkspacePool", "WorkspaceShape"]

_ALIGNMENT = 256
_MIN_BATCH = 256
_PER_THREAD = 2  # the handle of a stream that is another one in each thread
_Stream = tuple[int, int]


@dataclass(frozen=True)
class WorkspaceShape:
    """What a workspace depends on: ``lists`` newcomers (not in fixed caches), ``counts`` keys for the policy.

    ``lists_missed_from``: keys of the smallest batch that lists what it misses.   ``words``: more of its header, from where the
    memory of the policy is.
    """

    dim: int
    sets: int
    lists: bool
    counts: bool
    lists_missed_from: int
    words: Mapping[int, int] = field(default_factory=dict)

    def parts(self, n: int, absent: bool) -> dict[int, int]:
        """Bytes by the word of the header that leads to them, for batches of ``n`` keys."""
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


def _power_of_two(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()


class Workspace:
    """The workspace of one batch at a time.   **Threads:** one at a time."""

    def __init__(self, backend: Backend, shape: WorkspaceShape, name: str) -> None:
        self._backend, self._shape, self._name = backend, shape, name
        self._memory: Memory | None = None
        self._left: list[tuple[int, Memory]] = []  # memory that was outgrown, until its event has passed
        self.limit = 0
        self._event: int | None = None
        self.user: _Stream | None = None  # the stream that had it last
        self.lists_absent = False
        self.prepared: dict[Any, Any] = {}  # what was made for this memory, this event and the stream of ``user``
        self.address = self.stage = self.absent_list = self.own_list = self.bytes = 0

    def reserve(self, n: int, absent: bool, stream: int) -> None:
        """Have room for ``n`` keys, and for a list of those found nowhere if ``absent``; ``stream`` is free to be waited for.

        Raises:
            CapacityError: there is no memory; the workspace is as it was.
        """
        if n <= self.limit and (self.lists_absent or not absent):
            return
        self._drop_left()
        limit = max(self.limit, _power_of_two(max(n, _MIN_BATCH)))
        absent = absent or self.lists_absent
        parts = self._shape.parts(limit, absent)
        size = _up(WORKSPACE_BYTES) + sum(_up(part) for part in parts.values())
        memory = self._backend.allocate(size, f"{self._name}: buffers of a batch of {limit}")
        header = self._header(memory.address, parts)
        if WORKSPACE_BUCKETS in parts:
            start, size_of = int(header[WORKSPACE_BUCKETS // 8]), parts[WORKSPACE_BUCKETS]
            self._backend.fill(start, UNUSED_BUCKET, size_of, stream)
        own_list = int(header[WORKSPACE_OWN_LIST // 8])
        if own_list:
            self._backend.store_word(own_list + MISSED_SORTED, own_list + MISSED_BYTES + 16 * limit, stream)
        self._backend.from_host(memory.address, header, stream)  # waits for the filling too
        self.invalidate()
        self._memory, self.limit, self.lists_absent, self.bytes = memory, limit, absent, size
        self.address, self.stage = memory.address, int(header[WORKSPACE_STAGE // 8])
        self.absent_list, self.own_list = int(header[WORKSPACE_ABSENT_LIST // 8]), own_list

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
        """Begin anew with the next ``reserve``: the memory was outgrown, or a batch stopped in its midst."""
        if self._memory is not None:
            event, self._event = self._event, None
            self._left.append((event or 0, self._memory))
        self._memory, self.limit, self.bytes = None, 0, 0
        self.prepared.clear()

    def _drop_left(self) -> None:
        for entry in [entry for entry in self._left if entry[0] == 0 or self._backend.event_done(entry[0])]:
            self._left.remove(entry)
            if entry[0]:
                self._backend.destroy_event(entry[0])
            entry[1].release()

    @property
    def event(self) -> int:
        """What stands for the end of the last batch; ``user`` has one."""
        return self._event or 0

    def begin(self, stream: int, user: _Stream) -> None:
        """Let the stream wait for the one that had the workspace last."""
        if self._event and self.user != user:
            self._backend.wait(stream, self._event)

    def end(self, stream: int, user: _Stream) -> None:
        """The stream has all its work for this batch."""
        if self._event is None:
            self._event = self._backend.new_event()
        self._backend.record(self._event, stream)
        if self.user != user:
            self.user = user
            self.prepared.clear()

    def release(self, stream: int) -> None:
        """Give the memory back after all work with it; ``stream`` is used for the wait."""
        for event in [self._event, *(event for event, _ in self._left)]:
            if event:
                self._backend.wait(stream, event)
        self._backend.synchronize(stream)
        self.invalidate()
        self._drop_left()


def _up(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class WorkspacePool:
    """At most ``limit`` workspaces, made as they are needed (spec 6.5).   **Threads:** all methods."""

    def __init__(self, backend: Backend, make: Callable[[], Workspace], limit: int, name: str) -> None:
        #: makes a workspace
        self.make = make
        self._backend, self._limit, self._name = backend, limit, name
        self._closed = False
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Begin with none, as a forked child has to: another thread may have been at work with one."""
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._shut = self._closed  # nothing is lent: closed, or held
        self._waiting = 0
        self._all: list[Workspace] = []
        self._idle: list[Workspace] = []  # that which was not used for longest comes first

    def acquire(self, stream: int) -> Workspace:
        """A workspace for work on a stream; sleeps while other threads are starting work with all of them.

        Raises:
            ClosedError: the pool was closed.
        """
        user = _user_of(stream)
        with self._lock:
            workspace = self._choose(user)
            while workspace is None:
                self._wait()
                workspace = self._choose(user)
        if workspace.user != user:
            try:
                workspace.begin(stream, user)
            except BaseException:
                self._put(workspace)
                raise
        return workspace

    def reuse(self, stream: int, n: int, start: Callable[..., bool], *args: Any) -> bool:
        """Nearly every lookup on a device: as one before on this stream, no larger, and started in one step.

        ``start(workspace, *args)`` also records the event of the workspace, or returns False: the stream is being captured.
        False if it is not like one before, or captured; nothing was done then.
        """
        workspace = self._acquire_same(stream, n)
        if workspace is None:
            return False
        done = False
        try:
            started = start(workspace, *args)
            done = True
        finally:
            if done:
                self._put(workspace)
            else:
                self.release(workspace, stream, invalid=True)
        return started

    def _acquire_same(self, stream: int, n: int) -> Workspace | None:
        """The workspace that this stream had last, if it is there and has room for ``n`` keys."""
        user = _user_of(stream)
        with self._lock:
            idle = [] if self._shut else self._idle
            for i in range(len(idle) - 1, -1, -1):
                workspace = idle[i]
                if workspace.user == user and n <= workspace.limit and not workspace.lists_absent:
                    return idle.pop(i)
        return None

    def _wait(self) -> None:
        self._waiting += 1
        try:
            self._changed.wait()
        finally:
            self._waiting -= 1

    def _choose(self, user: _Stream) -> Workspace | None:
        if self._shut:
            if not self._closed:
                return None
            raise ClosedError(f"{self._name}: the cache is closed")
        if self._idle and self._idle[-1].user == user:
            return self._idle.pop()
        for i, workspace in enumerate(self._idle):
            if workspace.user == user:
                return self._idle.pop(i)
        if len(self._all) < self._limit:
            self._all.append(self.make())
            return self._all[-1]
        return self._idle.pop(0) if self._idle else None

    def release(self, workspace: Workspace, stream: int, *, invalid: bool = False) -> None:
        """Take a workspace back when all work with it is on the stream; ``invalid``: only a part of it."""
        try:
            workspace.end(stream, _user_of(stream))
            if invalid:
                workspace.invalidate()
        finally:
            self._put(workspace)

    def _put(self, workspace: Workspace) -> None:
        with self._lock:
            self._idle.append(workspace)
            if self._waiting:
                self._changed.notify_all()

    @contextmanager
    def emptied(self, stream: int) -> Iterator[WorkspacePool]:
        """A block in which nobody has a workspace and all work with them is done; who wants one sleeps until it ends.

        Workspaces made before give their memory back, ``stream`` is used for the wait. By one thread at a time, not beside
        ``close``.
        """
        with self._changed:
            self._shut = True
        try:
            with self._changed:
                while len(self._idle) < len(self._all):
                    self._wait()
                workspaces, self._all, self._idle = self._all, [], []
            for workspace in workspaces:
                workspace.release(stream)
            yield self
        finally:
            with self._changed:
                self._shut = self._closed
                self._changed.notify_all()

    @property
    def bytes(self) -> int:
        """Bytes of all workspaces."""
        with self._changed:
            return sum(workspace.bytes for workspace in self._all)

    def close(self, stream: int) -> None:
        """Lend no more, wait for those that are lent and for their work, and give the memory back."""
        with self._changed:
            self._closed = self._shut = True
            self._changed.notify_all()
            while len(self._idle) < len(self._all):
                self._wait()
        for workspace in self._all:
            workspace.release(stream)


def _user_of(stream: int) -> _Stream:
    return stream, threading.get_ident() if stream == _PER_THREAD else 0
