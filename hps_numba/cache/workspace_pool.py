"""Workspaces that are lent from call to call, first come, first served.

On a device the calls of a stream follow each other, so a stream keeps its workspace; another stream takes an idle one, the one
idle for longest, and waits on the device, never on the host, until the call that had it is done. Threads wait for each other
only while one is starting its kernels.

*No lock.* An interrupt (Ctrl-C) may hit between any two bytecodes, also between taking a lock or a workspace and the ``try``
that would give it back, and the traceback that a notebook keeps holds the variables of the interrupted call. So nothing here
depends on code that runs afterwards. A workspace is claimed by removing it from the list of idle ones, which one thread can do,
and only a running call may hold one. Whoever would have to wait looks at the stacks of all threads: a workspace that is not
idle and that no running call of this pool refers to was lost, and is put back. Turned down: leases that return by ``__del__``,
which a kept traceback keeps; the owner's thread as a mark, since a handler may look up inside an interrupted lookup.

*Lists that change meanwhile* are copied by ``list`` and otherwise read at one index. CPython 3.11 may collect garbage, and run
other threads, after it has looked up the length and the memory of a list for a slice or a ``tuple`` and before it copies them:
if one of those shortens the list, it reads what has been freed.

*Fair.* Who finds no workspace queues. While there is a queue, only its head may claim, and nobody takes the fast path.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, Generic, TypeVar

from hps_numba.cache.workspace import PER_THREAD, StreamMemory, StreamUser, user_of
from hps_numba.errors import ClosedError, HpsError, ReentryError
from hps_numba.runtime.blocks import has_ended
from hps_numba.runtime.fork import register_fork_reset

__all__ = ["WorkspacePool"]

log = logging.getLogger(__name__)
#: seconds after which the head of the queue looks for what interrupts left behind, doubled each time up to those of the others
_FIRST_LOOK, _LAST_LOOK = 0.01, 0.5
_LAST_DRAIN_LOOK = 0.01
W = TypeVar("W", bound=StreamMemory)


class _Ticket:
    """A call that waits for a workspace, or has one. What it may claim is noted here before it is claimed.

    Attributes:
        claimed: ``workspace`` is this call's.   extra: it is beside those of the pool, for this call only.
        wakes: gets an entry when it is time to look again.
        frame: of the call; None when it ends, so that frame and ticket are no cycle.
    """

    __slots__ = ("claimed", "extra", "frame", "wakes", "workspace")

    def __init__(self) -> None:
        self.frame: FrameType | None = sys._getframe(1)
        self.workspace: Any = None
        self.claimed = self.extra = False
        self.wakes: SimpleQueue[None] = SimpleQueue()

    def claim(self, workspace: StreamMemory) -> None:
        """Be one of those that try to have the workspace."""
        if self.frame is not None:
            workspace.claimants.append(self.frame)
        workspace.claims += 1

    def leave(self, workspace: StreamMemory) -> None:
        """Be none of those any more."""
        if self.frame is not None:
            workspace.claimants.remove(self.frame)


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
        self._all: list[W] = []
        self._idle: list[W] = []  # the one idle for longest comes first
        self._waiting: list[_Ticket] = []  # the one that waits for longest comes first
        self._emptying: _Ticket | None = None  # held by the call of ``while_empty``
        self._abandoned: list[W] = []  # lost by calls whose stream cannot be waited for; freed at the end

    # -- lending ------------------------------------------------------------------------------------------------------------

    def reuse(self, stream: int, n: int, start: Callable[..., bool], *args: Any) -> bool:
        """The fast path of lookups on a device: with the workspace that this stream had last, started in one step.

        ``start(workspace, *args)`` also records the event of the workspace, or returns False: nothing was started, as the
        stream is being captured. False if it did, or if the stream has no idle workspace with room for ``n`` keys.
        """
        user = stream, threading.get_ident() if stream == PER_THREAD else 0
        idle = self._idle
        for workspace in reversed(idle):
            if workspace.user == user and n <= workspace.limit and not workspace.lists_absent:
                break
        else:
            return False
        workspace.claimants.append(sys._getframe())  # not in a variable: frame and variable would be a cycle
        workspace.claims += 1
        if self._waiting or self._emptying is not None or self._closed:
            workspace.claimants.remove(sys._getframe())
            return False
        try:
            idle.remove(workspace)
        except ValueError:  # another thread was faster
            workspace.claimants.remove(sys._getframe())
            return False
        try:
            if workspace.user != user or n > workspace.limit or workspace.lists_absent:  # and gave it back meanwhile
                started = False
            else:
                started = start(workspace, *args)
        except BaseException:
            try:
                self._end(workspace, stream, invalid=True)
            finally:
                workspace.claimants.remove(sys._getframe())
            raise
        idle.append(workspace)
        workspace.claimants.remove(sys._getframe())
        if self._waiting or self._emptying is not None:
            self._wake()
        return started

    def lend(self, stream: int, work: Callable[..., object], *args: Any) -> None:
        """Call ``work(workspace, *args)``, which puts all its work on the stream; waits for its turn if all are lent.

        Raises:
            ClosedError: the pool was closed.   Otherwise as ``work``; the workspace then gets other memory.
        """
        ticket, user, done = _Ticket(), user_of(stream), False
        try:
            self._wait_for_turn(ticket, user)
            workspace = ticket.workspace
            if workspace.user != user:
                workspace.begin(stream, user)
            workspace.lent_to = user
            work(workspace, *args)
            done = True
        finally:
            self._leave(ticket)
            if ticket.extra:
                self._end_extra(ticket, stream, user)
            elif ticket.claimed:
                ticket.claimed = False  # before it is put back: it must not be put back twice
                try:
                    self._end(ticket.workspace, stream, invalid=not done)
                finally:
                    ticket.leave(ticket.workspace)
            ticket.frame = None

    def _end(self, workspace: W, stream: int, *, invalid: bool) -> None:
        """Take a workspace back; ``invalid``: only a part of the work with it is on the stream."""
        try:
            workspace.end(stream, user_of(stream))
            if invalid:
                workspace.invalidate()
        finally:
            self._put(workspace)

    def _end_extra(self, ticket: _Ticket, stream: int, user: StreamUser) -> None:
        """Free a workspace that was beside those of the pool."""
        try:
            ticket.workspace.end(stream, user)
            ticket.workspace.release(stream)
        finally:
            self._all.remove(ticket.workspace)
            ticket.leave(ticket.workspace)
            self._wake()

    def _put(self, workspace: W) -> None:
        self._idle.append(workspace)
        self._wake()

    # -- taking turns -------------------------------------------------------------------------------------------------------

    def _wait_for_turn(self, ticket: _Ticket, user: StreamUser) -> None:
        """Wait until the ticket has claimed a workspace."""
        self._waiting.append(ticket)
        pause = _FIRST_LOOK
        while True:
            if self._closed:
                raise ClosedError(f"{self._name}: the cache is closed")
            first = self._first_waiting() is ticket
            if first and self._emptying is None and self._claim(ticket, user):
                break
            if pause == _FIRST_LOOK and self._is_nested():
                if self._emptying is not None:
                    raise ReentryError(
                        f"{self._name}: lookup inside a change of the same cache, which the thread has interrupted"
                    )
                ticket.extra = self._add(ticket, sys.maxsize)
                if ticket.extra:
                    break
            if not self._sleep(ticket, pause):
                self._recover_lost()
                pause = min(2 * pause, _LAST_LOOK)
        self._leave(ticket)

    def _is_nested(self) -> bool:
        """Whether this thread is inside another call of this pool too, as in a signal handler: it must not wait for that."""
        frame, calls = sys._getframe(), 0
        while frame is not None:
            calls += frame.f_code in _OUTER_CALLS and frame.f_locals.get("self") is self
            frame = frame.f_back  # type: ignore[assignment]
        return calls > 1

    def _leave(self, ticket: _Ticket) -> None:
        """Leave the queue, and let the next one look."""
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            self._wake()

    def _first_waiting(self) -> _Ticket | None:
        try:
            return self._waiting[0]
        except IndexError:
            return None

    def _wake(self) -> None:
        first = self._first_waiting()
        if first is not None:
            first.wakes.put(None)
        emptying = self._emptying
        if emptying is not None:
            emptying.wakes.put(None)

    @staticmethod
    def _sleep(ticket: _Ticket, seconds: float) -> bool:
        """Wait until somebody wakes the ticket; False if nobody did for so long."""
        try:
            ticket.wakes.get(timeout=seconds)
        except Empty:
            return False
        return True

    def _claim(self, ticket: _Ticket, user: StreamUser) -> bool:
        """Claim the workspace that this user had last, else a new one, else the one idle for longest."""
        for workspace in [workspace for workspace in reversed(self._idle) if workspace.user == user]:
            if self._take(ticket, workspace):
                return True
        if len(self._all) < self._limit and self._add(ticket, self._limit):
            ticket.claimed = True
            return True
        return any(self._take(ticket, workspace) for workspace in list(self._idle))

    def _take(self, ticket: _Ticket, workspace: W) -> bool:
        """Claim an idle workspace; False if another thread was faster."""
        ticket.workspace = workspace
        ticket.claim(workspace)
        try:
            self._idle.remove(workspace)
        except ValueError:
            ticket.leave(workspace)
            return False
        ticket.claimed = True
        return True

    def _add(self, ticket: _Ticket, limit: int) -> bool:
        """Make a workspace and claim it; False if other threads made the last ones meanwhile, or one empties the pool.

        Whoever empties the pool says so and then looks at ``_all``, here it is the other way round: one sees the other.
        """
        ticket.workspace = workspace = self.make()
        ticket.claim(workspace)
        self._all.append(workspace)
        if self._emptying is not None or self._closed or self._all.index(workspace) >= limit:
            self._all.remove(workspace)
            ticket.leave(workspace)
            self._wake()
            return False
        return True

    # -- what interrupts leave behind ---------------------------------------------------------------------------------------

    def _recover_lost(self) -> None:
        """Put back what no running call has: workspaces, places in the queue, the wish that nothing is lent.

        A workspace may be put back and claimed again while this looks: ``claims`` tells.
        """
        waiting, emptying, lent = list(self._waiting), self._emptying, []
        for workspace in list(self._all):
            claims = workspace.claims
            if workspace not in self._idle:
                lent.append((workspace, claims))
        for ticket in waiting:
            if has_ended(ticket.frame) and ticket in self._waiting:
                self._waiting.remove(ticket)
        if emptying is not None and has_ended(emptying.frame) and self._emptying is emptying:
            self._emptying = None
        for workspace, claims in lent:
            for frame in filter(has_ended, list(workspace.claimants)):
                with suppress(ValueError):  # another thread was faster
                    workspace.claimants.remove(frame)
            if not workspace.claimants and workspace not in self._idle and workspace.claims == claims:
                self._recover(workspace, claims)
        self._wake()

    def _recover(self, workspace: W, claims: int) -> None:
        """Put a lost workspace back, as after a call that failed."""
        try:
            self._all.remove(workspace)
        except ValueError:  # another thread was faster
            return
        if workspace.claims != claims:  # and has put it back already
            self._all.append(workspace)
            return
        workspace.claims += 1
        log.debug("%s: a buffer of an interrupted call is put back", self._name)
        user = workspace.lent_to or workspace.user
        try:
            if user is not None:
                if user != user_of(user[0]):
                    raise HpsError("its stream is another thread's own")
                workspace.end(user[0], user)
            workspace.invalidate()
        except HpsError as problem:
            log.warning("%s: a buffer of an interrupted call is out of use: %s", self._name, problem)
            self._abandoned.append(workspace)
            return
        if len(self._all) < self._limit:
            workspace.claimants.append(sys._getframe())
            self._all.append(workspace)
            self._idle.append(workspace)
            workspace.claimants.remove(sys._getframe())
        else:
            self._abandoned.append(workspace)

    # -- all of them --------------------------------------------------------------------------------------------------------

    def while_empty(self, stream: int, change: Callable[[], object]) -> None:
        """Call ``change`` while nothing is lent and all work with workspaces is done; calls that come meanwhile wait.

        All workspaces are freed before, with a wait on ``stream``. One thread at a time, and not while one closes the pool.
        """
        ticket = _Ticket()
        try:
            self._emptying = ticket
            self._free_all(ticket, stream)
            change()
        finally:
            self._emptying = None
            self._wake()
            ticket.frame = None

    def _free_all(self, ticket: _Ticket, stream: int) -> None:
        """Free every workspace as soon as it is idle. One that is being freed when an interrupt hits is recovered later."""
        pause = _FIRST_LOOK
        while self._all:
            for workspace in list(self._idle):
                if self._take(ticket, workspace):
                    workspace.release(stream)
                    self._all.remove(workspace)
                    ticket.leave(workspace)  # else ticket, workspace and frame are a cycle
                    ticket.workspace = None
            if self._all and self._is_nested():
                raise ReentryError(f"{self._name}: change or close inside a lookup of the same thread, which it would wait for")
            if self._all and not self._sleep(ticket, pause):
                self._recover_lost()
                pause = min(2 * pause, _LAST_LOOK)

    def drain(self, stream: int) -> None:
        """Wait until every workspace that is lent now was given back, and for the work with all of them.

        Nothing else waits meanwhile. ``stream`` is used for the wait.
        """
        lent, pause = list(self._all), 1e-5
        while lent := [workspace for workspace in lent if workspace in self._all and workspace not in self._idle]:
            time.sleep(pause)
            if pause == _LAST_DRAIN_LOOK:
                self._recover_lost()
            pause = min(2 * pause, _LAST_DRAIN_LOOK)
        for workspace in list(self._all):
            if workspace.event:
                workspace.backend.wait(stream, workspace.event)
                workspace.backend.synchronize(stream)

    @property
    def workspaces(self) -> list[W]:
        """All workspaces, lent or idle."""
        return list(self._all)

    @property
    def bytes(self) -> int:
        """Bytes of all workspaces."""
        return sum(workspace.bytes for workspace in self.workspaces)

    def close(self, stream: int) -> None:
        """Lend no more, wait for lent workspaces and for the work with them, and free the memory.

        Again finishes what a call that was interrupted left.
        """
        ticket = _Ticket()
        self._closed = True
        for waiting in list(self._waiting):
            waiting.wakes.put(None)
        self._emptying = ticket
        self._free_all(ticket, stream)
        while self._abandoned:
            self._abandoned[-1].release(stream)
            self._abandoned.pop()
        self._emptying = None
        ticket.frame = None


_OUTER_CALLS = frozenset(
    function.__code__ for function in (WorkspacePool.reuse, WorkspacePool.lend, WorkspacePool.while_empty, WorkspacePool.close)
)
