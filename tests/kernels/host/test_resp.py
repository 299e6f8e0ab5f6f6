"""The RESP codec: every reply in pieces of any size, against a slow parser; requests byte by byte; what servers must not do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.oracles import partition_of

from hps_numba.kernels.host import resp

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
