"""One node: its connections, and whether it answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any
from weakref import WeakSet

from hps_numba.errors import ClosedError, TierError
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.weak import members
from hps_numba.storage.redis.breaker import CircuitBreaker, Verdict
from hps_numba.storage.redis.client import Opening, RedisClient, error_line, shut_down, socket_of
from hps_numba.storage.redis.limits import Limits

__all__ = ["Node", "NodeFailure"]


class NodeFailure(TierError):
    """A node did not answer, or answered with an error line."""


#: how long a call that waits for a connection sleeps at most before it looks again
_NAP_SECONDS = 0.01


class _Lease:
    """The right of one call to one connection, which that call alone closes.

    Another thread that closed it would give its file descriptor away while a kernel waits for it: to the next socket of this
    process, whose bytes the kernel would take. It shuts the connection down instead, which ends the wait.
    """

    def __init__(self) -> None:
        self._connection: Any = None
        self._lock = threading.RLock()  # of C: an interrupt cannot lose it; reentrant for handlers of signals that close

    def uses(self, connection: Any) -> bool:
        """Whether it is the right to this connection."""
        return self._connection is connection

    def begin(self, connection: Any) -> None:
        """It is used from now on."""
        self._connection = connection

    def end(self) -> None:
        """It is used no more: whoever asks may close it."""
        with self._lock:
            self._connection = None

    def shut_down(self) -> None:
        """End what goes on over the connection, by any thread."""
        with self._lock:
            shut_down(socket_of(self._connection))


class Node:
    """A node of a cluster, or the only one.

    Attributes:
        name: ``host:port``.   breaker: whether it is asked.

    Thread safety: every method; at most ``connections`` calls talk to the node at a time, others wait.
    """

    def __init__(self, client: RedisClient, host: str, port: int, connections: int, limits: Limits) -> None:
        self.host, self.port, self.name = host, port, f"{host}:{port}"
        self._client, self._limits, self._connections = client, limits, connections
        self._opening = Opening()
        self._pool: Any = client.pool(host, port, connections, self._opening)
        self.breaker = CircuitBreaker(limits.first_pause, limits.longest_pause)
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """No connection is in use; redis-py's pool sees by itself that the process is another one."""
        self._opening.forget()
        self._leases: WeakSet[_Lease] = WeakSet()
        self._returned: SimpleQueue[None] = SimpleQueue()

    @contextmanager
    def connection(self, deadline: float | None = None) -> Iterator[Any]:
        """A redis-py connection for this caller alone; whatever the block raises closes it, as answers may be under way.

        Raises:
            NodeFailure: the node is known to be dead, cannot be reached, or has no free connection in time.
            ClosedError: after ``close``.
        """
        self.check_open()
        self._ask_breaker()
        lease = self._lease(deadline)
        try:
            connection = self._open()
            try:
                lease.begin(connection)
                self._opening.remove(socket_of(connection))
                self.check_open()
                yield connection
            except BaseException:
                lease.end()
                connection.disconnect()
                raise
            finally:
                lease.end()
                self._pool.release(connection)
                if self._opening.closed:
                    self._close_idle()
        finally:
            self._leases.discard(lease)
            if self._returned.empty():
                self._returned.put(None)

    def _lease(self, deadline: float | None) -> _Lease:
        """The right to one connection.

        Not a semaphore: an interrupt right after it was taken would leave one connection fewer for ever. A lease ends with the
        call that holds it, whatever becomes of that.
        """
        lease, until = _Lease(), time.monotonic() + self._limits.queue
        if deadline is not None:
            until = min(until, deadline)
        while True:
            self._leases.add(lease)
            if len(self._leases) <= self._connections:
                return lease
            self._leases.discard(lease)
            self.check_open()
            if self.breaker.is_open or time.monotonic() >= until:
                raise NodeFailure(f"{self.name}: expected one of {self._connections} connections to become free, got none")
            with suppress(Empty):
                self._returned.get(timeout=_NAP_SECONDS)

    def _ask_breaker(self) -> None:
        verdict = self.breaker.verdict()
        if verdict is Verdict.PROBE:
            if self._client.probe(self.host, self.port):
                self.breaker.answered()
                return
            self.breaker.failed()
        if verdict is not Verdict.ASK:
            raise NodeFailure(f"{self.name}: does not answer, and is asked again later")

    def _open(self) -> Any:
        try:
            return self._pool.get_connection()
        except self._client.problems as problem:
            raise self._failure(problem) from problem

    def _failure(self, problem: Exception) -> NodeFailure:
        """What to raise for a problem; ClosedError if ``close`` may have made it."""
        self.check_open()
        self.breaker.failed()
        return NodeFailure(f"{self.name}: {_one_line(problem)}")

    def drop(self, connection: Any) -> None:
        """Close a connection of this caller, which is of no more use."""
        for lease in members(self._leases):
            if lease.uses(connection):
                lease.end()
        connection.disconnect()

    def commands(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Answers to pipelined commands; one that is an error line is an instance of ``RedisClient.refusal``.

        Raises:
            NodeFailure: the node does not answer.   ClosedError: after ``close``.
        """
        with self.connection() as connection:
            try:
                connection.send_packed_command(connection.pack_commands(commands))
                answers = [self._answer(connection) for _ in commands]
            except self._client.problems as problem:
                raise self._failure(problem) from problem
        self.breaker.answered()
        return answers

    def _answer(self, connection: Any) -> Any:
        try:
            return connection.read_response()
        except self._client.refusal as refusal:
            return refusal

    def command(self, *words: Any) -> Any:
        """The answer to one command.

        Raises:
            NodeFailure: the node does not answer, or with an error line, which is then the text.
        """
        (answer,) = self.commands([words])
        if isinstance(answer, Exception):
            raise NodeFailure(f"{self.name}: {words[0]}: {error_line(answer)}")
        return answer

    def check_open(self) -> None:
        """
        Raises:
            ClosedError: after ``close``.
        """
        if self._opening.closed:
            raise ClosedError(f"{self._client.who}: {self.name}: the tier is closed")

    def close(self) -> None:
        """Close all connections; calls that use one end, close it themselves and raise ClosedError."""
        self._opening.close()
        self._close_idle()
        for lease in members(self._leases):
            lease.shut_down()

    def _close_idle(self) -> None:
        self._pool.disconnect(inuse_connections=False)


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:300] or type(problem).__name__
