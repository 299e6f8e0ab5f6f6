"""Rows by key in the wire format of Redis (RESP2 and RESP3): requests are written, sent, awaited and parsed without the GIL.

Commands of one batch are pipelined over one connection a node, and all connections are served by one thread that polls them:
while one node works, the rows of another are copied to where the caller wants them. A reply of a kind that is not expected here
ends its connection; an error line belongs to its command.

*Why the system calls are made here.* A thread that returns to Python after each ``recv`` waits for the GIL each time, up to
5 ms beside a busy thread, and a batch takes hundreds of them. *Why poll and not a thread a node.* A node that hangs would hold
a thread of the pool until its time is over; here all time-outs pass together.
"""

from __future__ import annotations

import numpy as np
from numba import types

from hps_numba.kernels.compiler.njit import host_function, host_kernel
from hps_numba.kernels.hashing import partition_hash
from hps_numba.kernels.host.atomics import array_address, load_word

__all__ = [
    "ALL_ANSWERED",
    "ANSWERED",
    "CLOSED",
    "COMMAND",
    "COMMAND_END",
    "COMMAND_FIELDS",
    "CONNECTION_FIELDS",
    "COUNTS",
    "ELEMENT",
    "ERROR",
    "ERROR_BYTES",
    "EXPIRED",
    "FILLED",
    "FOREIGN",
    "INTERRUPTED",
    "KIND",
    "OK",
    "OPEN",
    "PRESENCE",
    "PROBLEM",
    "PROGRESS",
    "REPLIES",
    "ROWS",
    "SEND_AT",
    "SEND_END",
    "SKIP",
    "SOCKET",
    "START",
    "STATUS",
    "TOTAL",
    "WIDTH",
    "copy_bytes",
    "exchange",
    "group_by_partition",
    "parse_replies",
    "write_items",
]

#: kinds of commands: an array of rows or nulls; one of which only presence is noted; integers, which are added up
ROWS, PRESENCE, COUNTS = 0, 1, 2
#: columns of a command, int64: its kind, where its keys begin in ``order``, how many replies or elements it has, how many came,
#: the sum of its integers (or the width of a row that does not fit), and what became of it
KIND, START, REPLIES, ANSWERED, TOTAL, STATUS = 0, 1, 2, 3, 4, 5
COMMAND_FIELDS = 6
#: status of a command: no error so far; an error line, kept in ``errors``; a row of another width, kept in TOTAL
OK, ERROR, WIDTH = 0, 1, 2
ERROR_BYTES = 240

#: columns of a connection, int64: file descriptor; range of the request that is to be sent; bytes in its buffer; range of its
#: commands that are to be answered; elements of the current one that came, -1 before its header; bytes to skip; time of the
#: last progress in ns; and its problem
SOCKET, SEND_AT, SEND_END, FILLED, COMMAND, COMMAND_END, ELEMENT, SKIP, PROGRESS, PROBLEM = 0, 1, 2, 3, 4, 5, 6, 7, 8, 9
CONNECTION_FIELDS = 10
#: problem of a connection: none; the other side closed it; no progress in time; a reply that is not expected here
OPEN, CLOSED, EXPIRED, FOREIGN = 0, 1, 2, 3
#: results of ``exchange``: every connection has its answers or a problem; a signal may have come, call again
ALL_ANSWERED, INTERRUPTED = 0, 1

_POLLIN, _POLLOUT = 1, 4
_STAR, _DOLLAR, _COLON, _PLUS, _MINUS, _UNDERSCORE, _BANG = 42, 36, 58, 43, 45, 95, 33
_CR, _LF, _ZERO, _NINE = 13, 10, 48, 57
_LARGEST, _NO_NUMBER = 1 << 40, -(1 << 62)

_poll = types.ExternalFunction("poll", types.int32(types.uintp, types.uint64, types.int32))
_send = types.ExternalFunction("send", types.int64(types.int32, types.uintp, types.uintp, types.int32))
_recv = types.ExternalFunction("recv", types.int64(types.int32, types.uintp, types.uintp, types.int32))
_memcpy = types.ExternalFunction("memcpy", types.uintp(types.uintp, types.uintp, types.uintp))
_memmove = types.ExternalFunction("memmove", types.uintp(types.uintp, types.uintp, types.uintp))
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.uintp))

_hash = host_function(partition_hash)


@host_kernel
def group_by_partition(keys, n, partitions, order, ends):
    """Order the positions of ``n`` keys by partition, each partition's in the order given.

    Args:
        keys: address of int64.   order: int64 ``[n]``.   ends: int64 ``[partitions]``, zeros.

    **Writes:** order; ends, where the positions of a partition end in it.
    """
    of_key = np.empty(n, np.int32)
    divisor = np.uint64(partitions)
    for i in range(n):
        part = np.int64(_hash(np.uint64(load_word(keys + 8 * i))) % divisor)
        of_key[i] = part
        ends[part] += 1
    at = np.int64(0)
    for part in range(partitions):
        count = ends[part]
        ends[part] = at
        at += count
    for i in range(n):
        part = of_key[i]
        order[ends[part]] = i
        ends[part] += 1


@host_kernel
def write_items(buffer, at, keys, order, start, stop, key_bytes, prefix, middle, values, value_bytes, stride, suffix):
    """Write ``prefix key middle value suffix`` for the keys at ``order[start:stop]``; returns where the text ends.

    Args:
        buffer: uint8.   keys: address of int64, of which the first ``key_bytes`` bytes are written.
        values: address of the values, ``stride`` bytes apart, 0 for one value for all.   prefix, middle, suffix: uint8.

    **Writes:** buffer, from ``at`` on.
    """
    base = array_address(buffer)
    texts = array_address(prefix), array_address(middle), array_address(suffix)
    for i in range(start, stop):
        position = order[i]
        _memcpy(base + at, texts[0], len(prefix))
        at += len(prefix)
        _memcpy(base + at, keys + 8 * position, key_bytes)
        at += key_bytes
        _memcpy(base + at, texts[1], len(middle))
        at += len(middle)
        _memcpy(base + at, values + stride * position, value_bytes)
        at += value_bytes
        _memcpy(base + at, texts[2], len(suffix))
        at += len(suffix)
    return at


@host_function
def _end_of_line(buffer, at, end):
    """Where the line at ``at`` ends, at its CR; -1 if it is not complete."""
    for i in range(at, end - 1):
        if buffer[i] == _CR and buffer[i + 1] == _LF:
            return i
    return -1


@host_function
def _number(buffer, at, end):
    """The decimal number at ``at``; _NO_NUMBER if it is not one, or one so large that no server means it."""
    negative = at < end and buffer[at] == _MINUS
    at += 1 if negative else 0
    value = np.int64(0 if at < end else _NO_NUMBER)
    for i in range(at, end):
        if not _ZERO <= buffer[i] <= _NINE or value > _LARGEST:
            return np.int64(_NO_NUMBER)
        value = value * 10 + (np.int64(buffer[i]) - _ZERO)
    return -value if negative and value > 0 else value


@host_function
def _note_error(command, error, buffer, start, end):
    """Keep the text of the first error of a command.   **Writes:** command, error."""
    if command[STATUS] != ERROR:
        command[STATUS] = ERROR
        n = min(end - start, ERROR_BYTES)
        error[:n] = buffer[start : start + n]
        error[n:] = 0


@host_function
def _count_element(connection, command):
    """One more element of the current command came; go on to the next one after the last.   **Writes:** both."""
    connection[ELEMENT] += 1
    command[ANSWERED] += 1
    if connection[ELEMENT] >= command[REPLIES]:
        connection[COMMAND] += 1
        connection[ELEMENT] = -1


@host_function
def _take_row(connection, command, buffer, at, line_end, end, order, rows, row_bytes, found):
    """Take the row whose header ``$<length>`` is at ``at``; returns where it ends, or ``at`` if it is not complete, or none."""
    length = _number(buffer, at + 1, line_end)
    if length < -1:
        connection[PROBLEM] = FOREIGN
        return at
    after = line_end + 2
    if length == row_bytes and command[KIND] == ROWS:
        if after + length + 2 > end:
            return at
        position = order[command[START] + connection[ELEMENT]]
        _memcpy(rows + row_bytes * position, array_address(buffer) + after, row_bytes)
        found[position] = 1
        _count_element(connection, command)
        return after + length + 2
    if length >= 0:
        if command[KIND] == PRESENCE:
            found[order[command[START] + connection[ELEMENT]]] = 1
        elif command[STATUS] == OK:
            command[STATUS] = WIDTH
            command[TOTAL] = length
        connection[SKIP] = length + 2
    _count_element(connection, command)
    return after


@host_function
def _take_error_text(connection, command, error, buffer, at, line_end, end):
    """Take an error, ``-<text>`` or ``!<length>`` and the text; returns where it ends, or ``at`` as ``_take_row``."""
    after = line_end + 2
    if buffer[at] == _BANG:
        length = _number(buffer, at + 1, line_end)
        if length < 0:
            connection[PROBLEM] = FOREIGN
        if length < 0 or after + length + 2 > end:
            return at
        _note_error(command, error, buffer, after, after + length)
        after += length + 2
    else:
        _note_error(command, error, buffer, at + 1, line_end)
    if command[KIND] != COUNTS and connection[ELEMENT] < 0:
        connection[COMMAND] += 1
    else:
        if connection[ELEMENT] < 0:
            connection[ELEMENT] = 0
        _count_element(connection, command)
    return after


@host_function
def _take_integer(connection, command, buffer, at, line_end):
    """Take ``:<number>``, or ``+<text>`` as 0; returns where it ends, or ``at`` if it is none."""
    value = _number(buffer, at + 1, line_end) if buffer[at] == _COLON else 0
    if value == _NO_NUMBER:
        connection[PROBLEM] = FOREIGN
        return at
    if connection[ELEMENT] < 0:
        connection[ELEMENT] = 0
    command[TOTAL] += value
    _count_element(connection, command)
    return line_end + 2


@host_function
def _parse(connection, buffer, commands, order, rows, row_bytes, found, errors):
    """As ``parse_replies``."""
    at, end = np.int64(0), connection[FILLED]
    while connection[PROBLEM] == OPEN:
        if connection[SKIP] > 0:
            step = min(connection[SKIP], end - at)
            at += step
            connection[SKIP] -= step
            if connection[SKIP] > 0:
                break
        if connection[COMMAND] >= connection[COMMAND_END]:
            if at < end:
                connection[PROBLEM] = FOREIGN
            break
        line_end = _end_of_line(buffer, at, end)
        if line_end < 0:
            if end - at >= len(buffer):
                connection[PROBLEM] = FOREIGN
            break
        number = connection[COMMAND]
        command = commands[number]
        kind, before = buffer[at], at
        in_rows = command[KIND] != COUNTS and connection[ELEMENT] >= 0
        if kind in (_MINUS, _BANG):
            at = _take_error_text(connection, command, errors[number], buffer, at, line_end, end)
        elif kind == _DOLLAR and in_rows:
            at = _take_row(connection, command, buffer, at, line_end, end, order, rows, row_bytes, found)
        elif kind == _UNDERSCORE and in_rows:
            _count_element(connection, command)
            at = line_end + 2
        elif kind in (_COLON, _PLUS) and command[KIND] == COUNTS:
            at = _take_integer(connection, command, buffer, at, line_end)
        elif kind == _STAR and command[KIND] != COUNTS and connection[ELEMENT] < 0:
            if _number(buffer, at + 1, line_end) != command[REPLIES]:
                connection[PROBLEM] = FOREIGN
            connection[ELEMENT] = 0
            at = line_end + 2
        else:
            connection[PROBLEM] = FOREIGN
        if at == before:
            break
    left = end - at
    if at > 0 and left > 0:
        _memmove(array_address(buffer), array_address(buffer) + at, left)
    connection[FILLED] = left


@host_kernel
def parse_replies(connection, buffer, commands, order, rows, row_bytes, found, errors):
    """Take all complete replies from the front of ``buffer`` and move what is left of it to the front.

    Args:
        connection: int64 [CONNECTION_FIELDS].   buffer: uint8, longer than a row with its header.
        commands: int64 [m, COMMAND_FIELDS].   order: int64, positions of keys.   rows: address of uint8 ``[n, row_bytes]``.
        found: uint8 ``[n]``.   errors: uint8 [m, ERROR_BYTES].

    **Writes:** all but order.
    """
    _parse(connection, buffer, commands, order, rows, row_bytes, found, errors)


@host_function
def _now(clock, time):
    """Nanoseconds of a clock of the system.   **Writes:** time, int64 [2]."""
    _clock_gettime(np.int32(clock), array_address(time))
    return time[0] * 1_000_000_000 + time[1]


@host_function
def _waits(connection):
    """Whether replies are still to come over a connection."""
    answered = connection[COMMAND] >= connection[COMMAND_END] and connection[SKIP] == 0
    return connection[PROBLEM] == OPEN and not answered


@host_function
def _list(connections, polls, now, patience, deadline):
    """List the connections that wait for poll; returns (how many, ns until the time of the first is over, 0 if it is)."""
    waiting, left = 0, patience
    for i in range(len(connections)):
        connection = connections[i]
        polls[i, 0] = -1
        polls[i, 1] = 0
        if not _waits(connection):
            continue
        waiting += 1
        left = min(left, min(connection[PROGRESS] + patience, deadline) - now)
        polls[i, 0] = connection[SOCKET]
        polls[i, 1] = _POLLIN | (_POLLOUT if connection[SEND_AT] < connection[SEND_END] else 0)
    return waiting, max(left, 0)


@host_function
def _send_more(connection, source, flags, now):
    """Send as much of the request as the socket takes."""
    size = connection[SEND_END] - connection[SEND_AT]
    sent = _send(np.int32(connection[SOCKET]), source + connection[SEND_AT], size, np.int32(flags))
    if sent > 0:
        connection[SEND_AT] += sent
        connection[PROGRESS] = now


@host_function
def _expire(connections, looked, patience, deadline):
    """Note the connections whose time was over before ``looked``, when poll was asked, and that still wait after it."""
    for i in range(len(connections)):
        connection = connections[i]
        if _waits(connection) and looked >= min(connection[PROGRESS] + patience, deadline):
            connection[PROBLEM] = EXPIRED


@host_kernel
def exchange(connections, request, buffers, commands, order, rows, row_bytes, found, errors, clock, patience, deadline, flags):
    """Send the requests of all connections and take their replies; arguments as for ``parse_replies``, and

    Args:
        connections: int64 [c, CONNECTION_FIELDS], each with the range of ``request``, uint8, that it sends.
        buffers: uint8 [c, b].
        clock: number of the clock of ``deadline``, in ns.   patience: ns without progress after which a connection expires.
        flags: of send and recv, so that they do not wait.

    A connection expires only after a look at its socket: if this process stood still for longer than ``patience``, replies that
    came meanwhile are taken. At ``deadline`` what is there is taken once.

    Returns ALL_ANSWERED or INTERRUPTED.   **Writes:** all arrays but request and order.
    """
    polls = np.zeros((len(connections), 2), np.int32)
    time = np.zeros(2, np.int64)
    source = array_address(request)
    while True:
        looked = _now(clock, time)
        waiting, left = _list(connections, polls, looked, patience, deadline)
        if waiting == 0:
            return ALL_ANSWERED
        milliseconds = left // 1_000_000 + 1 if left > 0 else 0
        if _poll(array_address(polls), np.uint64(len(connections)), np.int32(milliseconds)) < 0:
            return INTERRUPTED
        now = _now(clock, time)
        for i in range(len(connections)):
            events = (polls[i, 1] >> 16) & 0xFFFF
            if polls[i, 0] < 0 or events == 0:
                continue
            connection, buffer = connections[i], buffers[i]
            if events & _POLLOUT:
                _send_more(connection, source, flags, now)
            if events & ~_POLLOUT:
                into = array_address(buffer) + connection[FILLED]
                got = _recv(np.int32(connection[SOCKET]), into, len(buffer) - connection[FILLED], np.int32(flags))
                if got > 0:
                    connection[FILLED] += got
                    connection[PROGRESS] = now
                    _parse(connection, buffer, commands, order, rows, row_bytes, found, errors)
                elif got == 0 or events & ~(_POLLIN | _POLLOUT):
                    connection[PROBLEM] = CLOSED
        _expire(connections, looked, patience, deadline)


@host_kernel
def copy_bytes(target, source):
    """Copy ``source``, uint8, to the address ``target``."""
    _memcpy(target, array_address(source), len(source))
