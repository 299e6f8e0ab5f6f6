"""The RESP codec: every reply in pieces of any size, against a slow parser; requests byte by byte; what servers must not do."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.oracles import partition_of
from support.waiting import HANG_SECONDS, wait_until

from hps_numba.kernels.host import resp
from hps_numba.storage.redis import transport

ERROR_LINES = [b"MOVED 1 127.0.0.1:7001", b"ERR " + b"x" * 300, b"OOM"]


def bulk(text: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(text), text)


class Replies:
    """Commands with made-up replies, as bytes, and what should become of them."""

    def __init__(self, random: np.random.Generator, row_bytes: int, version: int) -> None:
        self.random, self.row_bytes, self.version = random, row_bytes, version
        self.text = b""
        self.commands: list[list[int]] = []
        self.expected: list[dict[str, Any]] = []
        self.rows: dict[int, bytes] = {}
        self.found: set[int] = set()
        self.keys = 0
        self.order = random.permutation(2000)

    def add(self) -> None:
        kind = int(self.random.integers(3))
        replies = int(self.random.integers(1, 9))
        self.commands.append([kind, self.keys, replies, 0, 0, 0])
        if kind == resp.COUNTS:
            self.counts(replies)
        elif self.random.random() < 0.2:
            line = ERROR_LINES[int(self.random.integers(len(ERROR_LINES)))]
            self.text += self.error(line)
            self.expected.append({"status": resp.ERROR, "error": line[: resp.ERROR_BYTES], "answered": 0, "total": 0})
        else:
            self.row_array(kind, replies)
        self.keys += replies

    def error(self, line: bytes) -> bytes:
        if self.version == 3 and self.random.random() < 0.5:
            return b"!%d\r\n%b\r\n" % (len(line), line)
        return b"-" + line + b"\r\n"

    def counts(self, replies: int) -> None:
        total, error = 0, b""
        for _ in range(replies):
            choice = self.random.random()
            if choice < 0.6:
                value = int(self.random.integers(-5, 10**12))
                self.text += b":%d\r\n" % value
                total += value
            elif choice < 0.8:
                self.text += b"+OK\r\n"
            else:
                line = ERROR_LINES[int(self.random.integers(len(ERROR_LINES)))]
                error = error or line[: resp.ERROR_BYTES]
                self.text += self.error(line)
        status = resp.ERROR if error else resp.OK
        self.expected.append({"status": status, "error": error, "answered": replies, "total": total})

    def row_array(self, kind: int, replies: int) -> None:
        self.text += b"*%d\r\n" % replies
        width = None
        for i in range(replies):
            position = int(self.order[self.keys + i])
            choice = self.random.random()
            if choice < 0.3:
                self.text += b"_\r\n" if self.version == 3 else b"$-1\r\n"
                continue
            size = self.row_bytes if choice < 0.9 else int(self.random.integers(0, 3)) * 4 * self.row_bytes
            row = self.random.bytes(size)
            self.text += bulk(row)
            if kind == resp.PRESENCE:
                self.found.add(position)
            elif size == self.row_bytes:
                self.found.add(position)
                self.rows[position] = row
            elif width is None:
                width = size
        status = resp.OK if width is None else resp.WIDTH
        self.expected.append({"status": status, "error": b"", "answered": replies, "total": width or 0})


class Parser:
    """The arrays that the kernel works on."""

    def __init__(self, replies: Replies, capacity: int) -> None:
        self.row_bytes = replies.row_bytes
        self.commands = np.array(replies.commands, np.int64)
        self.order = replies.order.astype(np.int64)
        self.rows = np.zeros((2000, self.row_bytes), np.uint8)
        self.found = np.zeros(2000, np.uint8)
        self.errors = np.zeros((len(self.commands), resp.ERROR_BYTES), np.uint8)
        self.buffer = np.zeros(capacity, np.uint8)
        self.state = np.zeros(resp.CONNECTION_FIELDS, np.int64)
        self.state[resp.COMMAND_END], self.state[resp.ELEMENT] = len(self.commands), -1

    def feed(self, text: bytes) -> int:
        """Put as much as fits into the buffer and parse; returns how much that was."""
        at = int(self.state[resp.FILLED])
        n = min(len(text), len(self.buffer) - at)
        self.buffer[at : at + n] = np.frombuffer(text[:n], np.uint8)
        self.state[resp.FILLED] += n
        resp.parse_replies(
            self.state, self.buffer, self.commands, self.order, self.rows.ctypes.data, self.row_bytes, self.found, self.errors
        )
        return n


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("version", [2, 3])
def test_replies_in_pieces_of_any_size(seed: int, version: int) -> None:
    random = np.random.default_rng(seed)
    replies = Replies(random, 4 * int(random.integers(1, 40)), version)
    for _ in range(60):
        replies.add()
    parser = Parser(replies, max(512, 2 * (replies.row_bytes + 16)))
    text, most = replies.text, int(random.choice([1, 7, 100, 10_000]))
    while text:
        text = text[parser.feed(text[: int(random.integers(1, most + 1))]) :]
        assert parser.state[resp.PROBLEM] == resp.OPEN
    assert parser.state[resp.COMMAND] == len(replies.commands)
    assert (parser.state[resp.SKIP], parser.state[resp.FILLED]) == (0, 0)
    assert {int(i) for i in np.flatnonzero(parser.found)} == replies.found
    assert {i: parser.rows[i].tobytes() for i in replies.rows} == replies.rows
    untouched = [i for i in range(2000) if i not in replies.rows]
    assert not parser.rows[untouched].any()
    for command, error, expected in zip(parser.commands, parser.errors, replies.expected, strict=True):
        got = {"status": command[resp.STATUS], "error": error.tobytes().rstrip(b"\0")}
        assert {**got, "answered": command[resp.ANSWERED], "total": command[resp.TOTAL]} == expected


@pytest.mark.parametrize(
    "text",
    [
        b"*3\r\n",
        b"*-1\r\n",
        b"$4\r\nabcd\r\n",
        b":1\r\n",
        b"+OK\r\n",
        b">2\r\n",
        b"HTTP/1.1 400 Bad Request\r\n",
        b"\r\n",
        b"*2\r\n*1\r\n",
    ],
)
def test_a_reply_of_another_kind_ends_the_connection(text: bytes) -> None:
    replies = Replies(np.random.default_rng(0), 8, 2)
    replies.commands = [[resp.ROWS, 0, 2, 0, 0, 0]]
    parser = Parser(replies, 512)
    parser.feed(text)
    assert parser.state[resp.PROBLEM] == resp.FOREIGN
    assert not parser.found.any()


def test_replies_that_nobody_asked_for_end_the_connection() -> None:
    replies = Replies(np.random.default_rng(0), 8, 2)
    replies.commands = [[resp.COUNTS, 0, 1, 0, 0, 0]]
    parser = Parser(replies, 512)
    parser.feed(b":1\r\n:2\r\n")
    assert (parser.state[resp.PROBLEM], parser.commands[0, resp.TOTAL]) == (resp.FOREIGN, 1)


@pytest.mark.parametrize(
    "text", [b"x" * 600, b"*2\r\n$" + b"9" * 600, b"*1\r\n!-7\r\n", b"*2\r\n$99999999999999999999\r\n" * 9]
)
def test_what_makes_no_sense_never_ends_in_a_row(text: bytes) -> None:
    replies = Replies(np.random.default_rng(0), 8, 2)
    replies.commands = [[resp.ROWS, 0, 2, 0, 0, 0]]
    parser = Parser(replies, 512)
    while text and parser.state[resp.PROBLEM] == resp.OPEN and (n := parser.feed(text)):
        text = text[n:]
    assert not parser.found.any() and not parser.rows.any()


@pytest.mark.parametrize(
    "length",
    [
        *(b"%d" % number for number in (-2, -8, 2**44, 2**63 - 1, 2**63, 2**64 - 1, 2**64 + 8, 2**64 - 2**34)),
        *(b"9" * 40, b"", b"-", b"--1", b"1-", b"8x", b"+8", b" 8"),
    ],
)
@pytest.mark.parametrize("mark", [b"$", b"!"])
def test_lengths_that_cannot_be_end_the_connection_at_once(mark: bytes, length: bytes) -> None:
    """Not as a null, a row, or text to be waited for."""
    replies = Replies(np.random.default_rng(0), 8, 2)
    replies.commands = [[resp.ROWS, 0, 2, 0, 0, 0]]
    parser = Parser(replies, 512)
    parser.feed(b"*2\r\n" + mark + length + b"\r\n" + b"8 bytes.\r\n")
    assert parser.state[resp.PROBLEM] == resp.FOREIGN
    assert (parser.commands[0, resp.ANSWERED], parser.commands[0, resp.STATUS]) == (0, resp.OK)
    assert not parser.found.any() and not parser.rows.any() and not parser.errors.any()


@pytest.mark.parametrize("number", [b"%d" % (2**64 + 3), b"-%d" % 2**63, b"", b"-", b"3x"])
def test_counts_that_are_no_numbers_end_the_connection(number: bytes) -> None:
    replies = Replies(np.random.default_rng(0), 8, 2)
    replies.commands = [[resp.COUNTS, 0, 1, 0, 0, 0]]
    parser = Parser(replies, 512)
    parser.feed(b":" + number + b"\r\n")
    assert (parser.state[resp.PROBLEM], parser.commands[0, resp.ANSWERED]) == (resp.FOREIGN, 0)


@pytest.mark.parametrize("partitions", [1, 3, 16])
@pytest.mark.parametrize("n", [0, 1, 500])
def test_keys_are_ordered_by_partition(n: int, partitions: int) -> None:
    keys = np.random.default_rng(n).integers(-(2**63), 2**63 - 1, n)
    order, ends = np.empty(n, np.int64), np.zeros(partitions, np.int64)
    resp.group_by_partition(keys.ctypes.data, n, partitions, order, ends)
    parts = [partition_of(int(key), partitions) for key in keys]
    assert order.tolist() == sorted(range(n), key=lambda i: (parts[i], i))
    assert ends.tolist() == np.cumsum([parts.count(part) for part in range(partitions)]).tolist()


@pytest.mark.parametrize("key_bytes", [4, 8])
@pytest.mark.parametrize("stride", [0, 12])
def test_items_are_written_in_order(key_bytes: int, stride: int) -> None:
    keys = np.array([5, 2**32 - 1, 7], np.int64)
    values = np.arange(9, dtype=np.float32).reshape(3, 3)
    order = np.array([2, 0, 1], np.int64)
    buffer = np.zeros(200, np.uint8)
    before, middle, after = (np.frombuffer(text, np.uint8) for text in (b"<", b"==", b">"))
    given = (keys.ctypes.data, order, 1, 3, key_bytes, before, middle, values.ctypes.data, 12, stride, after)
    end = resp.write_items(buffer, 10, *given)
    rows = [values[i if stride else 0].tobytes() for i in (0, 1)]
    expected = b"".join(b"<" + keys[i].tobytes()[:key_bytes] + b"==" + rows[i] + b">" for i in (0, 1))
    assert buffer[10:end].tobytes() == expected
    assert not buffer[:10].any() and not buffer[end:].any()


HOUR = 3600 * 10**9
FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
HANG = int(HANG_SECONDS * 10**9)
ROW = bytes(range(16))
REPLY = b"*1\r\n" + bulk(ROW)


class Connections:
    """Connections that each ask for one row, and the other ends, which a test plays."""

    def __init__(self, n: int, request: bytes = b"?") -> None:
        pairs = [socket.socketpair() for _ in range(n)]
        self.ours, self.theirs = [ours for ours, _ in pairs], [theirs for _, theirs in pairs]
        commands = np.zeros((n, resp.COMMAND_FIELDS), np.int64)
        commands[:, resp.START], commands[:, resp.REPLIES] = np.arange(n), 1
        states = np.zeros((n, resp.CONNECTION_FIELDS), np.int64)
        states[:, resp.SOCKET] = [sock.fileno() for sock in self.ours]
        states[:, resp.SEND_END] = len(request)
        states[:, resp.COMMAND], states[:, resp.COMMAND_END] = np.arange(n), np.arange(n) + 1
        states[:, resp.ELEMENT] = -1
        self.rows = np.zeros((n, len(ROW)), np.uint8)
        self.states, self.commands, self.request = states, commands, np.frombuffer(request, np.uint8)

    def answer(self, number: int, text: bytes) -> None:
        """A node answers, and its answer is there."""
        self.theirs[number].sendall(text)
        wait_until(lambda: select.select([self.ours[number]], [], [], 0)[0])

    def exchange(self, *, late: int = 0, patience: int = HANG, deadline: int = 2**62) -> list[int]:
        """Serve them, ``late`` ns after their last progress; returns their problems."""
        self.states[:, resp.PROGRESS] = transport.now_ns() - late
        batch = transport.Exchange(
            [], (), Exception, self.states, self.request, self.commands, np.arange(len(self.states)),
            self.rows.ctypes.data, len(ROW), np.zeros(len(self.states), np.uint8),
        )  # fmt: skip
        arrays = (batch.states, batch.request, batch.buffers, batch.commands, batch.order)
        out = (batch.rows, batch.row_bytes, batch.found, batch.errors)
        while resp.exchange(*arrays, *out, time.CLOCK_MONOTONIC, patience, deadline, FLAGS) == resp.INTERRUPTED:
            pass
        assert (batch.found == [row.tobytes() == ROW for row in self.rows]).all()
        return self.states[:, resp.PROBLEM].tolist()


@pytest.fixture
def connect() -> Iterator[Any]:
    made: list[Connections] = []

    def connections(n: int, request: bytes = b"?") -> Connections:
        made.append(Connections(n, request))
        return made[-1]

    yield connections
    for sock in (sock for one in made for sock in (*one.ours, *one.theirs)):
        sock.close()


def test_replies_that_are_there_are_taken_however_late(connect: Any) -> None:
    """A process that stood still for an hour gives up only the node that has not answered meanwhile."""
    nodes = connect(3)
    nodes.states[:, resp.SEND_AT] = nodes.states[:, resp.SEND_END]
    nodes.answer(0, REPLY)
    nodes.answer(2, REPLY)
    assert nodes.exchange(late=HOUR) == [resp.OPEN, resp.EXPIRED, resp.OPEN]
    assert nodes.commands[:, resp.ANSWERED].tolist() == [1, 0, 1]


def test_a_request_that_was_not_sent_in_time_is_sent(connect: Any) -> None:
    nodes = connect(1)
    nodes.answer(0, REPLY)
    assert nodes.exchange(late=HOUR) == [resp.OPEN]
    assert nodes.theirs[0].recv(10) == b"?"


def test_time_counts_from_the_last_part_of_a_reply(connect: Any) -> None:
    """The first part is there, the rest never comes."""
    nodes = connect(1)
    nodes.answer(0, REPLY[:9])
    assert nodes.exchange(late=HOUR, patience=10**7) == [resp.EXPIRED]
    assert nodes.states[0, resp.PROGRESS] > transport.now_ns() - HOUR


def test_at_the_deadline_what_is_there_is_taken_once(connect: Any) -> None:
    """And a node that always has a little more does not go on for ever."""
    nodes = connect(2)
    nodes.answer(0, REPLY)
    nodes.answer(1, REPLY[:9])
    assert nodes.exchange(deadline=transport.now_ns()) == [resp.OPEN, resp.EXPIRED]
    assert nodes.rows[0].tobytes() == ROW


@pytest.mark.parametrize("late", [0, HOUR])
def test_a_connection_that_the_other_side_closed_is_no_time_out(connect: Any, late: int) -> None:
    nodes = connect(1)
    nodes.answer(0, REPLY[:9])
    nodes.theirs[0].shutdown(socket.SHUT_WR)
    assert nodes.exchange(late=late) == [resp.CLOSED]


def test_a_request_that_the_socket_does_not_take_expires(connect: Any) -> None:
    """The node reads nothing and answers nothing."""
    nodes = connect(1, b"?" * 10_000_000)
    assert nodes.exchange(patience=10**7) == [resp.EXPIRED]
    assert 0 < nodes.states[0, resp.SEND_AT] < nodes.states[0, resp.SEND_END]
