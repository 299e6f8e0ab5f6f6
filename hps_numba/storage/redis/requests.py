"""What is asked of a partition: commands as text, of which the bulk of keys and rows is written by a kernel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from hps_numba.kernels.host.resp import COUNTS, PRESENCE, ROWS
from hps_numba.storage.redis.layout import Partition

__all__ = [
    "PERMISSION",
    "Request",
    "Values",
    "add_uses",
    "count_rows",
    "delete",
    "get",
    "look_for",
    "put",
    "stamp",
    "with_asking",
]

_ASKING = b"*1\r\n$6\r\nASKING\r\n"


@dataclass(frozen=True)
class Values:
    """Values beside keys: ``size`` bytes each, from ``address`` on, ``stride`` bytes apart (0: one for all keys)."""

    address: int = 0
    size: int = 0
    stride: int = 0

    @classmethod
    def of(cls, rows: np.ndarray) -> Values:
        """Rows of a contiguous float32 array, which has to stay alive.

        Not by its strides: those of a single row may be anything.
        """
        return cls(rows.ctypes.data, 4 * rows.shape[1], 4 * rows.shape[1])


@dataclass(frozen=True)
class Request:
    """``head``, then for each key ``before``, the key, ``middle``, its value and ``after``.

    Attributes:
        kind: of the replies, see ``kernels.host.resp``.   replies: how many, or elements of the only one.
    """

    kind: int
    replies: int
    head: bytes
    before: bytes = b""
    middle: bytes = b""
    after: bytes = b""
    values: Values = Values()
    with_keys: bool = True

    def size(self, keys: int, key_bytes: int) -> int:
        """Bytes of the text."""
        each = len(self.before) + key_bytes + len(self.middle) + self.values.size + len(self.after)
        return len(self.head) + (keys * each if self.with_keys else 0)


def _head(words: int, *given: bytes) -> bytes:
    return b"*%d\r\n" % words + b"".join(map(_word, given))


def _word(word: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(word), word)


def _before(key_bytes: int) -> bytes:
    return b"$%d\r\n" % key_bytes


def get(part: Partition, keys: int, key_bytes: int) -> Request:
    """The rows of keys."""
    return Request(ROWS, keys, _head(keys + 2, b"HMGET", part.rows), _before(key_bytes), b"\r\n")


def look_for(part: Partition, keys: int, key_bytes: int) -> Request:
    """Which keys have a row: one command for all, where HEXISTS takes one a key and is slower though it returns no rows."""
    return replace(get(part, keys, key_bytes), kind=PRESENCE)


def put(part: Partition, keys: int, key_bytes: int, values: Values) -> Request:
    """Write rows; the reply is how many keys are new."""
    head = _head(2 * keys + 2, b"HSET", part.rows)
    return Request(COUNTS, 1, head, _before(key_bytes), b"\r\n$%d\r\n" % values.size, b"\r\n", values)


def stamp(part: Partition, keys: int, key_bytes: int, now: np.ndarray) -> Request:
    """Note when keys were used: ``now``, 8 bytes, has to stay alive."""
    head = _head(2 * keys + 2, b"HSET", part.uses)
    return Request(COUNTS, 1, head, _before(key_bytes), b"\r\n$8\r\n", b"\r\n", Values(now.ctypes.data, 8, 0))


def add_uses(part: Partition, keys: int, key_bytes: int) -> Request:
    """Count a use of each key: one command a key, as Redis has none for several."""
    before = _head(4, b"HINCRBY", part.uses) + _before(key_bytes)
    return Request(COUNTS, keys, b"", before, b"\r\n$1\r\n1\r\n")


def delete(name: bytes, keys: int, key_bytes: int) -> Request:
    """Remove keys from the hash ``name``; the reply is how many there were."""
    return Request(COUNTS, 1, _head(keys + 2, b"HDEL", name), _before(key_bytes), b"\r\n")


def count_rows(part: Partition) -> Request:
    """How many rows a partition has."""
    return Request(COUNTS, 1, _head(2, b"HLEN", part.rows), with_keys=False)


def with_asking(requests: Iterable[Request]) -> list[Request]:
    """The same for a node that is about to take over the slot: each command needs its permission, answered by ``+OK``."""
    permitted = []
    for request in requests:
        if request.head:
            permitted += [PERMISSION, request]
        else:
            permitted.append(replace(request, before=_ASKING + request.before, replies=2 * request.replies))
    return permitted


#: ASKING, before a request of one command
PERMISSION = Request(COUNTS, 1, _ASKING, with_keys=False)
