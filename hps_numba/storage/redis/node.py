"""One node: its connections, and whether it answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any
from weakref import WeakSet

from hps_numba.errors import TierError
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.storage.redis.breaker import CircuitBreaker, Verdict
from hps_numba.storage.redis.client import RedisClient, error_line
from hps_numba.storage.redis.limits import Limits

__all__ = ["Node", "NodeFailure"]


class NodeFailure(TierError):
    """A node did not answer, or answered with an error line."""


#: how long a call that waits for a connection sleeps at most before it looks again
_NAP_SECONDS = 0.01


class _Lease:
    """The right of one call to one connection."""


class Node:
    """A node of a cluster, or the only one.

    Attributes:
        name: ``host:port``.   breaker: whether it is asked.

    Thread safety: every method; at most ``connections`` calls talk to the node at a time, others wait.
    """

    def __init__(self, client: RedisClient, host: str, port: int, connections: int, limits: Limits) -> None:
        self.host, self.port, self.name = host, port, f"{host}:{port}"
        self._client, self._limits, self._connections = client, limits, connections
        self._pool: Any = client.pool(host, port, connections)
        self.breaker = CircuitBreaker(limits.first_pause, limits.longest_pause)
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """No connection is in use; redis-py's pool sees by itself that the process is another one."""
        self._leases: WeakSet[_Lease] = WeakSet()
        self._returned: SimpleQueue[None] = SimpleQueue()

    @contextmanager
    def connection(self, deadline: float | None = None) -> Iterator[Any]:
        """A redis-py connection for this caller alone; whatever the block raises closes it, as answers may be under way.

        Raises:
            NodeFailure: the node is known to be dead, cannot be reached, or has no free connection in time.
        """
        self._ask_breaker()
        lease = self._lease(deadline)
        try:
            connection = self._open()
            try:
                yield connection
            except BaseException:
                connection.disconnect()
                raise
            finally:
                self._pool.release(connection)
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
            self.breaker.failed()
            raise NodeFailure(f"{self.name}: {_one_line(problem)}") from problem

    def commands(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Answers to pipelined commands; one that is an error line is an instance of ``RedisClient.refusal``.

        Raises:
            NodeFailure: the node does not answer.
        """
        with self.connection() as connection:
            try:
                connection.send_packed_command(connection.pack_commands(commands))
                answers = [self._answer(connection) for _ in commands]
            except self._client.problems as problem:
                self.breaker.failed()
                raise NodeFailure(f"{self.name}: {_one_line(problem)}") from problem
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

    def close(self) -> None:
        """Close all connections."""
        self._pool.disconnect()


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:300] or type(problem).__name__
