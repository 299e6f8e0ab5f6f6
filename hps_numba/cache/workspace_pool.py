"""Workspaces that are lent from call to call.

On a device the calls of a stream follow each other, so a stream keeps its workspace; another stream takes an idle one, the one
idle for longest, and waits on the device, never on the host, until the call that had it is done. Threads wait for each other
only while one is starting its kernels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from hps_numba.cache.workspace import StreamMemory, StreamUser
from hps_numba.errors import ClosedError
from hps_numba.runtime.fork import register_fork_reset

__all__ = ["WorkspacePool"]

_PER_THREAD = 2  # the handle of a stream that is another one in each thread
W = TypeVar("W", bound=StreamMemory)


class WorkspacePool(Generic[W]):
    """At most ``limit`` workspaces, made on demand.

    Attributes:
        make: makes a workspace.

    Thread safety: all methods.
    """

    def __init__(self, make: Callable[[], W], limit: int, name: str) -> None:
        self.make = make
        self._limit, self._name = limit, name
        self._closed = False
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Start empty: in the parent another thread may have been using a workspace."""
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._shut = self._closed  # nothing is lent: closed, or ``emptied``
        self._waiting = 0
        self._all: list[W] = []
        self._idle: list[W] = []  # the one idle for longest comes first

    def acquire(self, stream: int) -> W:
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
        """The fast path of lookups on a device: with the workspace that this stream had last, started in one step.

        ``start(workspace, *args)`` also records the event of the workspace, or returns False: nothing was started, as the
        stream is being captured. False if it did, or if the stream has no idle workspace with room for ``n`` keys.
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

    def _acquire_same(self, stream: int, n: int) -> W | None:
        """The workspace that this stream had last, if it is idle and has room for ``n`` keys."""
        user = stream, threading.get_ident() if stream == _PER_THREAD else 0
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

    def _choose(self, user: StreamUser) -> W | None:
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

    def release(self, workspace: W, stream: int, *, invalid: bool = False) -> None:
        """Take a workspace back when all work with it is on the stream; ``invalid``: only a part of it is."""
        try:
            workspace.end(stream, _user_of(stream))
            if invalid:
                workspace.invalidate()
        finally:
            self._put(workspace)

    def _put(self, workspace: W) -> None:
        with self._lock:
            self._idle.append(workspace)
            if self._waiting:
                self._changed.notify_all()

    @contextmanager
    def emptied(self, stream: int) -> Iterator[None]:
        """A block in which nothing is lent and all work with workspaces is done; ``acquire`` sleeps until it ends.

        All workspaces are freed, ``stream`` is used for the wait. By one thread at a time, not while one closes the pool.
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
            yield
        finally:
            with self._changed:
                self._shut = self._closed
                self._changed.notify_all()

    @property
    def workspaces(self) -> tuple[W, ...]:
        """All workspaces, lent or idle."""
        with self._changed:
            return tuple(self._all)

    @property
    def bytes(self) -> int:
        """Bytes of all workspaces."""
        return sum(workspace.bytes for workspace in self.workspaces)

    def close(self, stream: int) -> None:
        """Lend no more, wait for lent workspaces and for the work with them, and free the memory."""
        with self._changed:
            self._closed = self._shut = True
            self._changed.notify_all()
            while len(self._idle) < len(self._all):
                self._wait()
        for workspace in self._all:
            workspace.release(stream)


def _user_of(stream: int) -> StreamUser:
    return stream, threading.get_ident() if stream == _PER_THREAD else 0
