"""The two loops that send requests, and the connections that they share."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from hps_numba.cli._serve_load.connection import Connection, Target
from hps_numba.cli._serve_load.http import ServeError
from hps_numba.cli._serve_load.outcomes import Outcomes

__all__ = ["Connections", "closed_loop", "open_loop"]

NO_ANSWER = "no answer"
_SWEEP_SECONDS, _RETRY_SECONDS = 0.25, 0.1
_now = time.perf_counter


class Connections:
    """Open connections to a server; one that is lost is opened again.

    A slot of a connection is ``(due, sent)`` of its request.   Thread safety: used by the thread of the event loop.
    """

    def __init__(self, target: Target, expected: int | None, timeout: float) -> None:
        self._target, self._expected, self.timeout = target, expected, timeout
        self.idle: list[Connection] = []
        self.busy: set[Connection] = set()
        self._reopening: set[asyncio.Task[None]] = set()
        self.reopened = 0
        self.on_idle: Any = None
        """Called when a lost connection is open again."""

    async def open(self, count: int) -> None:
        """Have so many open connections, all idle.

        Raises:
            ServeError: the server refuses one.
        """
        await asyncio.gather(*self._reopening)
        self.idle = [one for one in self.idle if one.alive]
        while len(self.idle) < count:
            self.idle.append(await self._target.connect(self._expected))
        for extra in self.idle[count:]:
            extra.abort()
        del self.idle[count:]

    def take(self) -> Connection | None:
        """An idle connection, the one used last; None if there is none. Those that the server has closed are opened again."""
        while self.idle:
            connection = self.idle.pop()
            if connection.alive:
                self.busy.add(connection)
                return connection
            self._open_again()
        return None

    def put_back(self, connection: Connection) -> None:
        """A connection whose request is answered."""
        self.busy.discard(connection)
        if connection.alive:
            self.idle.append(connection)
        else:
            self._open_again()

    def abort_older(self, sent_before: float) -> None:
        """End requests that were sent before a time."""
        for connection in [one for one in self.busy if one.slot[1] < sent_before]:
            connection.slot = (*connection.slot[:2], NO_ANSWER)
            connection.abort()

    def close(self) -> None:
        """Close all connections."""
        for task in self._reopening:
            task.cancel()
        for connection in [*self.idle, *self.busy]:
            connection.abort()
        self.idle.clear()

    def _open_again(self) -> None:
        task = asyncio.get_running_loop().create_task(self._reopen())
        self._reopening.add(task)
        task.add_done_callback(self._reopening.discard)

    async def _reopen(self) -> None:
        end = _now() + self.timeout
        while _now() < end:
            try:
                connection = await self._target.connect(self._expected)
            except ServeError:
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            self.reopened += 1
            self.idle.append(connection)
            if self.on_idle is not None:
                self.on_idle()
            return


class _Loop:
    """What both loops do: send, record, give up on requests that take too long."""

    def __init__(self, connections: Connections, wires: Sequence[bytes], outcomes: Outcomes) -> None:
        self._connections, self._wires, self._outcomes = connections, wires, outcomes
        self._loop = asyncio.get_running_loop()
        self._sent = 0
        self._finished = self._loop.create_future()
        self._ended = False
        self.most_busy = 0

    def _send(self, connection: Connection, due: float) -> None:
        self.most_busy = max(self.most_busy, len(self._connections.busy))
        wire = self._wires[self._sent % len(self._wires)]
        self._sent += 1
        connection.slot = (due, _now())
        connection.send(wire, self._done)

    def _done(self, connection: Connection, status: str, size: int) -> None:
        done = _now()
        due, sent, *why = connection.slot
        self._outcomes.add(due, sent, done, why[0] if why else status, size)
        self._connections.put_back(connection)
        self._next()

    def _next(self) -> None:
        raise NotImplementedError

    def _sweep(self) -> None:
        self._connections.abort_older(_now() - self._connections.timeout)
        self._sweeper = self._loop.call_later(_SWEEP_SECONDS, self._sweep)

    async def _wait(self, until: float) -> None:
        """Until all is sent and answered, but not longer than ``until``."""
        self._sweep()
        self._connections.on_idle = self._next
        try:
            await asyncio.wait([self._finished], timeout=max(0.0, until - _now()))
            self._ended = True
            self._connections.abort_older(float("inf"))
            while self._connections.busy:
                await asyncio.sleep(_RETRY_SECONDS)
        finally:
            self._sweeper.cancel()
            self._connections.on_idle = None

    def _finish(self) -> None:
        if not self._finished.done():
            self._finished.set_result(None)


class _OpenLoop(_Loop):
    def __init__(self, connections: Connections, wires: Sequence[bytes], outcomes: Outcomes, due: np.ndarray) -> None:
        super().__init__(connections, wires, outcomes)
        self._due: list[float] = due.tolist()
        self._next_due = 0
        self._waiting: deque[float] = deque()
        self.most_waiting = 0

    async def run(self) -> float:
        begin = self._begin = _now()
        self._offset = self._loop.time() - begin
        self._tick()
        await self._wait(begin + (self._due[-1] if self._due else 0.0) + self._connections.timeout)
        now = _now()
        for due in self._waiting:  # nothing was free for them
            self._outcomes.add(due, now, now, NO_ANSWER, 0)
        return begin

    def _tick(self) -> None:
        """Send, or let wait, what is due; come again when the next one is."""
        if self._ended:
            return
        while self._next_due < len(self._due):
            due = self._begin + self._due[self._next_due]
            if due > _now():
                self._loop.call_at(due + self._offset, self._tick)
                break
            self._next_due += 1
            self._waiting.append(due)
            self._send_waiting()
        self._next()

    def _send_waiting(self) -> None:
        while self._waiting and not self._ended:
            connection = self._connections.take()
            if connection is None:
                self.most_waiting = max(self.most_waiting, len(self._waiting))
                return
            self._send(connection, self._waiting.popleft())

    def _next(self) -> None:
        self._send_waiting()
        if self._next_due == len(self._due) and not self._waiting and not self._connections.busy:
            self._finish()


class _ClosedLoop(_Loop):
    def __init__(self, connections: Connections, wires: Sequence[bytes], outcomes: Outcomes, seconds: float) -> None:
        super().__init__(connections, wires, outcomes)
        self._end = _now() + seconds

    async def run(self) -> float:
        begin = _now()
        self._next()
        await self._wait(self._end + self._connections.timeout)
        return begin

    def _next(self) -> None:
        if (_now() < self._end or not self._sent) and not self._ended:  # one each, however short the time is
            while (connection := self._connections.take()) is not None:
                self._send(connection, _now())
        elif not self._connections.busy:
            self._finish()


async def open_loop(
    connections: Connections, wires: Sequence[bytes], due: np.ndarray
) -> tuple[Outcomes, float, dict[str, int]]:
    """Send requests when they are due, in seconds from the start; returns outcomes, the time of the start, and marks."""
    outcomes = Outcomes()
    loop = _OpenLoop(connections, wires, outcomes, due)
    begin = await loop.run()
    return outcomes, begin, {"most_busy": loop.most_busy, "most_waiting": loop.most_waiting}


async def closed_loop(
    connections: Connections, wires: Sequence[bytes], seconds: float
) -> tuple[Outcomes, float, dict[str, int]]:
    """Send on each open connection when its last request was answered; returns as :func:`open_loop`."""
    outcomes = Outcomes()
    loop = _ClosedLoop(connections, wires, outcomes, seconds)
    begin = await loop.run()
    return outcomes, begin, {"most_busy": loop.most_busy, "most_waiting": 0}
