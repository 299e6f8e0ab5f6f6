"""Replays of captured CUDA graphs, as readers of a model whose version may be replaced.

*Problem.* The kernels in a graph are bound to the cache of a table, and no code of the host runs when a graph is replayed: a
replay cannot ask a stand-in for the cache (``cache.version_switch``), as other lookups do. One that ran while the cache takes
the rows of another version would see both.

*Choice.* The caller says when he replays (``HPS.replaying``). A block notes itself when it is entered; when it is left it has
an event recorded on its stream. A replacement asks for the caches before it switches: from then on blocks wait to be entered,
and when all are left and their events have passed, the versions are switched, what the caches hold is dropped, and they read
the new version. Then blocks are entered again, and the caches are filled beside them. Nothing is added to a graph.

*Nothing hangs.* A block may last, or its work may wait for a replay that another thread has yet to begin. So a thread waits a
second for a block to be entered and then lets all in, and the replacement asks again when those that kept it waiting are left.
Only while the caches are changed, which waits for nothing, no block is entered. The replacement waits a minute in all and then
fails, before anything was changed. A block that an interrupt kept from being left is over when the object of ``replaying`` is
dropped, or when the function with its ``with`` statement has ended.

*Turned down.* Stopping streams on the device while the caches change (a wait that is captured meanwhile is in every replay, and
streams may be destroyed); a version in the first node of each graph (costs every replay, and the device would have to hold the
rows of two versions); events recorded by the replacement itself (a stream may be captured or destroyed by then).
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn

from hps_numba.arrays.kinds import NUMPY
from hps_numba.arrays.streams import ambient_stream, stream_handle
from hps_numba.cache.backends import Backend
from hps_numba.cache.workspace import StreamUser, user_of
from hps_numba.errors import ClosedError, DeviceError, HpsError, ReentryError
from hps_numba.runtime.blocks import EnteredAt
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.server.model_jobs import Check, go_on
from hps_numba.server.table import ServedTable

__all__ = ["ReplayedWork", "Replaying", "Replays"]

log = logging.getLogger(__name__)
_PATIENCE_SECONDS = 1.0  # of a block that waits to be entered
_LIMIT_SECONDS = 60.0  # of a replacement that waits for blocks to be left
_CLOSE_SECONDS = 30.0
_FIRST_PAUSE, _LAST_PAUSE = 1e-5, 1e-2


class ReplayedWork:
    """The work of replays on one device.

    Args:
        backend: of the device.   begins: what each lookup begins with, of each cache there.

    Thread safety: every method; ``close`` when nobody calls the others any more.
    """

    def __init__(self, device: int, backend: Backend, begins: tuple[Callable[[], None], ...]) -> None:
        self.device, self._backend, self._begins = device, backend, begins
        self._events: dict[StreamUser, int] = {}

    def begin(self, stream: int) -> None:
        """What each replay begins with.

        Raises:
            ClosedError, HpsError: as a lookup.   DeviceError: the stream is being captured.
        """
        for begin in self._begins:
            begin()
        with self._backend.current():
            if self._backend.is_capturing(stream):
                raise DeviceError(f"replaying: expected a stream to replay graphs on, got {stream:#x}, which is being captured")

    def note(self, stream: int) -> None:
        """All work that is on the stream now is that of replays; again does no harm."""
        user = user_of(stream)
        with self._backend.current():
            event = self._events.get(user, 0)
            if event:  # the handle may be that of another stream now: whoever waits for this one waits for that too
                self._backend.wait(stream, event)
            else:
                event = self._events.setdefault(user, self._backend.new_event())
            self._backend.record(event, stream)

    def is_done(self) -> bool:
        """Whether the device has done all of it."""
        with self._backend.current():
            return all(map(self._backend.event_done, list(self._events.values())))

    def close(self) -> None:
        """Destroy the events."""
        with self._backend.current():
            while self._events:
                self._backend.destroy_event(self._events.popitem()[1])


class _Replay:
    """One block that was entered. ``stream``: of ``work``, which is None where there is no device."""

    __slots__ = ("at", "stream", "thread", "work")

    def __init__(self, work: ReplayedWork | None, stream: int, at: EnteredAt) -> None:
        self.work, self.stream, self.at, self.thread = work, stream, at, threading.get_ident()


class Replays:
    """The replays of one model.

    Args:
        name: of the model.

    Attributes:
        announced: some block was entered, or a WARNING has said that none was.

    Thread safety: every method from any thread; one at a time calls ``hold_back``, ``let_in`` and ``close``.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.announced = self._closed = False
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """In a forked child: blocks of the parent's other threads are left by nobody here, and devices are the parent's."""
        self._open: dict[_Replay, None] = {}
        self._works: dict[int, ReplayedWork] = {}
        self._asked = False  # blocks that are not entered yet wait for a while
        self._stopped = False  # they wait until the caches have been changed

    # -- blocks -------------------------------------------------------------------------------------------------------------

    def work_on(self, device: int, tables: Iterable[ServedTable]) -> ReplayedWork | None:
        """The work on a device; None if none of the model's tables has a cache there."""
        work = self._works.get(device)
        if work is None:
            caches = [cache for table in tables if (cache := table.cache_on(device)) is not None]
            if caches:
                begins = tuple(cache.parts.lifecycle.begin for cache in caches)
                work = self._works.setdefault(device, ReplayedWork(device, caches[0].backend, begins))
        return work

    def refuse_here(self, place: str) -> None:
        """Refuse what may wait for a replacement, if this thread is in a block, for which the replacement would wait.

        Raises:
            ReentryError: it is.
        """
        if self._open and self._is_inside(None):
            raise ReentryError(
                f"{place}: expected a call from outside, got one from inside a replaying() block of the same thread: leave "
                "that first"
            )

    def _is_inside(self, replay: _Replay | None) -> bool:
        """Whether this thread is in a block, apart from that of ``replay``."""
        thread = threading.get_ident()
        return any(other is not replay and other.thread == thread and not other.at.is_over for other in list(self._open))

    def enter(self, replay: _Replay) -> None:
        """Count a block as entered, as soon as it may be.

        Raises:
            ClosedError: the model was closed.
        """
        waits = True
        while True:
            self._open[replay] = None  # first: either ``hold_back`` sees it, or it sees what that has set
            if self._closed:
                raise ClosedError(f"model {self._name!r}: it is closed")
            if not self._stopped and not (waits and self._asked):
                break
            if self._is_inside(replay):  # the outer block is waited for anyway
                break
            self._open.pop(replay, None)
            waits = self._wait_to_enter()
        self.announced = True

    def _wait_to_enter(self) -> bool:
        """Wait until blocks may be entered; false if it was for too long: then they all are let in."""
        end, pause = time.monotonic() + _PATIENCE_SECONDS, _FIRST_PAUSE
        while (self._asked or self._stopped) and not self._closed:
            if time.monotonic() > end and not self._stopped:
                self._asked = False
                return False
            time.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE)
        return True

    def leave(self, replay: _Replay) -> None:
        """Count a block as left; again does nothing. One that was interrupted is to be called again.

        Raises:
            DeviceError: the device refused the event.
        """
        if replay not in self._open:  # also in the child of a fork inside the block
            return
        try:
            if replay.work is not None:
                if user_of(replay.stream)[1] not in (0, replay.thread):
                    raise DeviceError(
                        f"model {self._name!r}: a replay on the default stream of another thread is not waited for"
                    )
                replay.work.note(replay.stream)
        except HpsError:
            self.forget(replay)
            raise
        self.forget(replay)

    def has(self, replay: _Replay) -> bool:
        """Whether a block is open."""
        return replay in self._open

    def forget(self, replay: _Replay) -> None:
        """Count a block as left in which nothing was done."""
        self._open.pop(replay, None)

    def _leave_lost(self) -> None:
        """Leave the blocks that an interrupt kept from being left."""
        for replay in list(self._open):
            if replay.at.is_over:
                self.leave_quietly(replay)

    def leave_quietly(self, replay: _Replay) -> None:
        """``leave``; an error is logged."""
        try:
            self.leave(replay)
        except HpsError as problem:
            log.warning("model %s: replaying: %s", self._name, problem)

    # -- changes ------------------------------------------------------------------------------------------------------------

    def hold_back(self, check: Check = go_on, *, stop: bool = False) -> None:
        """Wait until no block is open and its work is done; until ``let_in``, blocks that are to be entered wait for a while.

        Args:
            check: called during the wait.   stop: they wait until ``let_in``, however long that is.

        Raises:
            DeviceError: that took a minute; blocks are let in then.   As ``check``.
        """
        end = time.monotonic() + _LIMIT_SECONDS
        try:
            while True:
                self._asked = True
                self._wait(list(self._open), end, check)
                self._stopped = stop
                if self._is_idle() and self._asked:
                    return
                self._stopped = False
        except BaseException:
            self.let_in()
            raise

    def _wait(self, blocks: list[_Replay], end: float, check: Check) -> None:
        """Wait until there are no replays; once others were let in, until these blocks are left, and for a while."""
        pause, let_in = _FIRST_PAUSE, 0.0
        while not self._is_idle():
            check()
            now = time.monotonic()
            if now > end:
                raise DeviceError(self._late(_LIMIT_SECONDS))
            if not self._asked:
                let_in = let_in or now
                if now - let_in > _PATIENCE_SECONDS and not any(block in self._open for block in blocks):
                    return
            time.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE)

    def _late(self, seconds: float) -> str:
        blocks = [f"one entered in {block.at} by thread {block.thread} is open" for block in list(self._open)[:1]]
        found = (blocks or ["all are left, and the device is at work"])[0]
        return f"model {self._name!r}: expected all replaying() blocks and their work to end within {seconds:g} s: {found}"

    def _is_idle(self) -> bool:
        if self._open:
            self._leave_lost()
        return not self._open and all(work.is_done() for work in list(self._works.values()))

    def let_in(self) -> None:
        """Let blocks be entered again."""
        self._asked = self._stopped = False

    def close(self) -> None:
        """Refuse further blocks, and wait for those that are open, and for their work, at most 30 s; again does no harm."""
        self._closed = True
        end, pause = time.monotonic() + _CLOSE_SECONDS, _FIRST_PAUSE
        while not self._is_idle():
            if time.monotonic() > end:
                log.warning("%s", self._late(_CLOSE_SECONDS))
                return
            time.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE)
        for work in list(self._works.values()):
            work.close()


class Replaying:
    """What ``HPS.replaying`` gives: a context manager, to be entered any number of times, also inside itself, by any thread.

    Args:
        work: on the device; None: there is none.   stream: on which graphs are replayed, None: the current one.
        explain: raises what a caller has to know if the model was closed.
    """

    __slots__ = ("_entered", "_explain", "_replays", "_stream", "_work")

    def __init__(
        self, replays: Replays, work: ReplayedWork | None, stream: Any, explain: Callable[[ClosedError], NoReturn]
    ) -> None:
        self._entered: list[_Replay] = []
        self._replays, self._work, self._explain = replays, work, explain
        self._stream = None if work is None or stream is None else stream_handle(stream, NUMPY, work.device)

    def __enter__(self) -> None:
        work, stream = self._work, self._stream or 0
        if work is not None and self._stream is None:
            stream = ambient_stream(work.device)
        replay = _Replay(work, stream, EnteredAt(sys._getframe(1)))
        if self._entered:
            self._end_lost(replay)
        self._entered.append(replay)  # first: whatever interrupts this, it is left when this object is dropped
        try:
            self._replays.enter(replay)
            if work is not None:
                work.begin(stream)
        except BaseException as problem:
            self._replays.forget(replay)
            self._entered.remove(replay)
            if isinstance(problem, ClosedError):
                self._explain(problem)
            raise

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        thread = threading.get_ident()
        replay = next(replay for replay in reversed(self._entered) if replay.thread == thread)
        try:
            self._end(replay)
        except HpsError:
            raise
        except BaseException:  # an interrupt
            self._end(replay)
            raise

    def _end_lost(self, entered: _Replay) -> None:
        """Leave the blocks that an interrupt kept from being left, now that ``entered`` is."""
        for replay in list(self._entered):
            if not self._replays.has(replay) and replay.thread == entered.thread:
                self._entered.remove(replay)
            elif replay.at.is_left_for(entered.at) or replay.at.is_over:
                self._end(replay)

    def _end(self, replay: _Replay) -> None:
        """Leave a block; again does nothing."""
        try:
            self._replays.leave(replay)
        finally:
            if not self._replays.has(replay):
                with suppress(ValueError):
                    self._entered.remove(replay)

    def __del__(self) -> None:
        for replay in getattr(self, "_entered", ()):  # an interrupt may have come before it was set
            self._replays.leave_quietly(replay)
