"""Requests and replies of one batch over the connections of all nodes.

Plain sockets are served together by one kernel. An encrypted connection is read and written by Python, each on a thread of the
pool, and parsed by the same kernel. Where a version of redis-py does not have its socket where it was, redis-py and hiredis
send and parse.
"""

from __future__ import annotations

import logging
import math
import select
import socket
import ssl
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hps_numba.kernels.host import resp
from hps_numba.runtime.threads import run_ranges
from hps_numba.storage.redis.client import error_line, socket_of

__all__ = ["CANNOT_WAIT", "Exchange", "compile_kernels", "exchange", "now_ns"]

log = logging.getLogger(__name__)
#: a problem of a connection beside those of ``kernels.host.resp``: the system does not let this process wait for it
CANNOT_WAIT = resp.FOREIGN + 1
_FOR_EVER = 2**62
_MOST_LATE = 100  # interrupts in a row after the deadline, each of which kept the kernel from a look at the sockets
_LEAST, _MOST = 1 << 12, 1 << 18  # bytes of a buffer for replies
_FLAGS = getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_NOSIGNAL", 0)
_CAN_POLL = hasattr(socket, "MSG_DONTWAIT") and hasattr(time, "CLOCK_MONOTONIC")


@dataclass
class Exchange:
    """The arrays of a batch, as ``kernels.host.resp`` describes them, and the redis-py connection of each row of ``states``."""

    connections: list[Any]
    problems: tuple[type[Exception], ...]
    refusal: type[Exception]
    states: np.ndarray
    request: np.ndarray
    commands: np.ndarray
    order: np.ndarray
    rows: int
    row_bytes: int
    found: np.ndarray

    def __post_init__(self) -> None:
        per_key = self.row_bytes + 16
        expected = per_key * int(self.commands[:, resp.REPLIES].sum()) // max(1, len(self.states)) + _LEAST
        size = max(min(expected, _MOST), 2 * per_key)
        self.buffers = np.empty((len(self.states), size), np.uint8)
        self.errors = np.zeros((len(self.commands), resp.ERROR_BYTES), np.uint8)

    def parse(self, number: int) -> None:
        """Take the replies in the buffer of a connection."""
        resp.parse_replies(
            self.states[number],
            self.buffers[number],
            self.commands,
            self.order,
            self.rows,
            self.row_bytes,
            self.found,
            self.errors,
        )

    def waits(self, number: int) -> bool:
        """Whether replies are still to come over a connection."""
        state = self.states[number]
        answered = state[resp.COMMAND] >= state[resp.COMMAND_END] and state[resp.SKIP] == 0
        return bool(state[resp.PROBLEM] == resp.OPEN and not answered)


def exchange(batch: Exchange, patience: float, deadline: float | None) -> None:
    """Send all requests and take all replies; what went wrong is in ``states`` and ``commands``.

    Args:
        patience: seconds without progress after which a connection is given up.
        deadline: ``time.monotonic()`` at which all are given up.
    """
    sockets = [socket_of(connection) for connection in batch.connections]
    batch.states[:, resp.PROGRESS] = now_ns()
    plain = [i for i, sock in enumerate(sockets) if type(sock) is socket.socket and _CAN_POLL]
    others = [i for i in range(len(sockets)) if i not in plain]
    if plain:
        _in_kernel(batch, plain, sockets, patience, deadline)
    if others:
        until = math.inf if deadline is None else deadline

        def serve(start: int, stop: int) -> int:
            for i in others[start:stop]:
                if isinstance(sockets[i], ssl.SSLSocket):
                    _encrypted(batch, i, sockets[i], patience, until)
                else:
                    _by_client(batch, i)
            return 0

        run_ranges(serve, [(i, i + 1) for i in range(len(others))])


def now_ns() -> int:
    """The clock of ``PROGRESS``, in nanoseconds."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) if _CAN_POLL else time.monotonic_ns()


def compile_kernels() -> None:
    """Compile the kernels of a batch, or load them, so that no time-out passes meanwhile."""
    arrays = [np.zeros((1, width), np.int64) for width in (resp.CONNECTION_FIELDS, resp.COMMAND_FIELDS)]
    nothing = Exchange(
        [], (), Exception, arrays[0], np.empty(0, np.uint8), arrays[1], np.empty(0, np.int64), 0, 0, np.empty(0, np.uint8)
    )
    nothing.parse(0)
    _in_kernel(nothing, [], [], 0.0, None)


def _in_kernel(batch: Exchange, plain: list[int], sockets: list[Any], patience: float, deadline: float | None) -> None:
    now = now_ns()
    until = _FOR_EVER if deadline is None else now + int(1e9 * (deadline - time.monotonic()))
    states = np.ascontiguousarray(batch.states[plain])
    states[:, resp.SOCKET] = [sockets[i].fileno() for i in plain]
    buffers = batch.buffers if len(plain) == len(sockets) else batch.buffers[: len(plain)].copy()
    try:
        late = 0
        while True:
            result = resp.exchange(
                states,
                batch.request,
                buffers,
                batch.commands,
                batch.order,
                batch.rows,
                batch.row_bytes,
                batch.found,
                batch.errors,
                time.CLOCK_MONOTONIC,
                int(1e9 * patience),
                until,
                _FLAGS,
            )
            if result != resp.INTERRUPTED:
                break
            # Python runs the handlers of signals here
            if not _can_wait(sockets[i] for i in plain):
                _give_up(states, CANNOT_WAIT)
                break
            late = late + 1 if now_ns() > min(until, int(states[:, resp.PROGRESS].max() + 1e9 * patience)) else 0
            if late > _MOST_LATE:
                _give_up(states, resp.EXPIRED)
                break
    finally:
        batch.states[plain] = states


def _can_wait(sockets: Iterable[socket.socket]) -> bool:
    """Whether poll(2) works for so many sockets: more than RLIMIT_NOFILE allows are refused, and so is all without memory."""
    poll = select.poll()
    for sock in sockets:
        poll.register(sock)
    try:
        poll.poll(0)
    except OSError as problem:
        log.debug("redis: sockets cannot be waited for: poll: %s", problem.strerror)
        return False
    return True


def _give_up(states: np.ndarray, problem: int) -> None:
    """Let the connections that wait have a problem.   **Writes:** states."""
    answered = (states[:, resp.COMMAND] >= states[:, resp.COMMAND_END]) & (states[:, resp.SKIP] == 0)
    states[(states[:, resp.PROBLEM] == resp.OPEN) & ~answered, resp.PROBLEM] = problem


def _encrypted(batch: Exchange, number: int, sock: ssl.SSLSocket, patience: float, until: float) -> None:
    state, buffer = batch.states[number], batch.buffers[number].data
    before = sock.gettimeout()
    try:
        sock.settimeout(_left(patience, until))
        sock.sendall(batch.request[state[resp.SEND_AT] : state[resp.SEND_END]].data)
        state[resp.SEND_AT] = state[resp.SEND_END]
        while batch.waits(number):
            sock.settimeout(_left(patience, until))
            got = sock.recv_into(buffer[state[resp.FILLED] :])
            if not got:
                state[resp.PROBLEM] = resp.CLOSED
                return
            state[resp.FILLED] += got
            state[resp.PROGRESS] = now_ns()
            batch.parse(number)
        sock.settimeout(before)
    except TimeoutError:
        state[resp.PROBLEM] = resp.EXPIRED
    except OSError:
        state[resp.PROBLEM] = resp.CLOSED


def _left(patience: float, until: float) -> float:
    left = min(patience, until - time.monotonic())
    if left <= 0:
        raise TimeoutError
    return left


def _by_client(batch: Exchange, number: int) -> None:
    state, connection = batch.states[number], batch.connections[number]
    try:
        connection.send_packed_command([batch.request[state[resp.SEND_AT] : state[resp.SEND_END]].tobytes()])
        for at in range(state[resp.COMMAND], state[resp.COMMAND_END]):
            _take(batch, at, connection)
            state[resp.COMMAND] += 1
    except TimeoutError:
        state[resp.PROBLEM] = resp.EXPIRED
    except batch.problems as problem:
        expired = "timeout" in type(problem).__name__.lower()
        state[resp.PROBLEM] = resp.EXPIRED if expired else resp.CLOSED


def _take(batch: Exchange, at: int, connection: Any) -> None:
    command = batch.commands[at]
    answers = 1 if command[resp.KIND] != resp.COUNTS else int(command[resp.REPLIES])
    for _ in range(answers):
        try:
            answer = connection.read_response()
        except batch.refusal as refusal:
            _note(batch, at, error_line(refusal))
            continue
        if isinstance(answer, list):
            _take_rows(batch, command, answer)
        elif isinstance(answer, int):
            command[resp.TOTAL] += answer
    command[resp.ANSWERED] = command[resp.REPLIES]


def _note(batch: Exchange, at: int, text: str) -> None:
    batch.commands[at, resp.STATUS] = resp.ERROR
    line = np.frombuffer(text.encode()[: resp.ERROR_BYTES], np.uint8)
    batch.errors[at, : len(line)] = line


def _take_rows(batch: Exchange, command: np.ndarray, answer: list[bytes | None]) -> None:
    start, size = command[resp.START], batch.row_bytes
    for position, row in zip(batch.order[start : start + len(answer)], answer, strict=True):
        if row is None:
            continue
        if command[resp.KIND] == resp.PRESENCE:
            batch.found[position] = 1
        elif len(row) == size:
            resp.copy_bytes(batch.rows + size * int(position), np.frombuffer(row, np.uint8))
            batch.found[position] = 1
        else:
            command[resp.STATUS], command[resp.TOTAL] = resp.WIDTH, len(row)
