"""Whole messages: how one is written, what is expected of one that was read, and the headers that extend HugeCTR's form.

Deletions have no place in a value. A message of deletions has a value without pairs, which HugeCTR's readers ignore without a
warning, and the keys in a header. Where a message has both, its rows come first.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hps_numba.storage.host.content import address_of
from hps_numba.updates._update import NO_TIME, Message
from hps_numba.updates._wire.codec import encode_keys, encode_pairs

__all__ = [
    "ERASED",
    "HEADER_BYTES",
    "MAGIC",
    "TIME",
    "VERSION",
    "Content",
    "Skip",
    "encode_erasures",
    "encode_rows",
    "header_of",
    "headers_of",
    "read_message",
    "start_of",
]

MAGIC = b"HCTR"
HEADER_BYTES = 8
#: names of headers: packed keys to delete; version of the model and time of the event in ms since 1970, decimal digits
ERASED, VERSION, TIME = "hps-erased", "hps-version", "hps-time-ms"

_MAX_DIGITS = 19


class Skip(Exception):
    """A message is not applied.

    Attributes:
        reason: a word, by which such messages are counted.
    """

    def __init__(self, reason: str, expected: str) -> None:
        """``expected``: what should have been there, and what was."""
        super().__init__(expected)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Content:
    """What a message holds, checked but for the values of its rows.

    Attributes:
        pairs: number of rows.   erased: number of deletions.   data, keys: where they are, uint8, read-only.
        event_time_ms: or that of the bus.   version: or None.
    """

    pairs: int
    erased: int
    data: np.ndarray
    keys: np.ndarray
    event_time_ms: int
    version: int | None

    @property
    def size(self) -> int:
        """Number of writes."""
        return self.pairs + self.erased

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Where pairs and deleted keys are, and how many, for ``codec.decode_messages``; for as long as this is kept."""
        return address_of(self.data) + HEADER_BYTES, self.pairs, address_of(self.keys), self.erased


def read_message(message: Message, *, dim: int, key_bytes: int) -> Content:
    """Check a message for a table of rows of ``dim`` float32.

    Raises:
        Skip: it is malformed, or there is nothing in it.
    """
    if message.key is not None:
        raise Skip("keyed", f"expected no message key, got one of {len(message.key)} bytes")
    erased = _erased_keys(message.headers, key_bytes)
    time_ms = _number(message.headers, TIME)
    version = _number(message.headers, VERSION)
    if message.value is None:
        if erased is None:
            raise Skip("tombstone", "expected a value, got none")
        value, pairs = _EMPTY, 0
    else:
        value = _frozen(message.value)
        pairs = _pairs_in(message.value, dim, key_bytes)
    if not pairs and erased is None:
        raise Skip("beacon", "expected rows, got a header alone")
    return Content(
        pairs=pairs,
        erased=0 if erased is None else len(erased) // key_bytes,
        data=value,
        keys=_EMPTY if erased is None else erased,
        event_time_ms=message.time_ms if time_ms is None else time_ms,
        version=version,
    )


def _pairs_in(value: bytes, dim: int, key_bytes: int) -> int:
    if len(value) < HEADER_BYTES:
        raise Skip("short", f"expected at least {HEADER_BYTES} bytes, got {len(value)}")
    magic, row_bytes = struct.unpack_from("<4sI", value)
    if magic != MAGIC:
        raise Skip("magic", f"expected {MAGIC!r}, got {magic!r}")
    if row_bytes != 4 * dim:
        raise Skip("width", f"expected rows of {4 * dim} bytes, got {row_bytes}")
    pairs, rest = divmod(len(value) - HEADER_BYTES, key_bytes + row_bytes)
    if rest:
        raise Skip("ragged", f"expected pairs of {key_bytes} + {row_bytes} bytes, got {rest} bytes more than {pairs} pairs")
    return pairs


def _erased_keys(headers: Mapping[str, bytes], key_bytes: int) -> np.ndarray | None:
    packed = headers.get(ERASED)
    if packed is None:
        return None
    if not packed or len(packed) % key_bytes:
        raise Skip("header", f"{ERASED}: expected keys of {key_bytes} bytes, got {len(packed)} bytes")
    return _frozen(packed)


def _number(headers: Mapping[str, bytes], name: str) -> int | None:
    digits = headers.get(name)
    if digits is None:
        return None
    if not digits.isdigit() or len(digits) > _MAX_DIGITS:
        raise Skip("header", f"{name}: expected up to {_MAX_DIGITS} decimal digits, got {bytes(digits[:40])!r}")
    number = int(digits)
    if number >= 2**63:
        raise Skip("header", f"{name}: expected less than 2**63, got {number}")
    return number


def _frozen(data: bytes) -> np.ndarray:
    """uint8, read-only whatever memory it is of, so that one compiled kernel takes it."""
    array = np.frombuffer(data, np.uint8)
    array.flags.writeable = False
    return array


_EMPTY = _frozen(b"")


# -- writing ---------------------------------------------------------------------


def start_of(dim: int) -> bytes:
    """The first bytes of a value with rows of ``dim`` float32; alone, they are a value without rows."""
    return struct.pack("<4sI", MAGIC, 4 * dim)


def header_of(keys: np.ndarray, *, key_bytes: int = 8) -> bytes:
    """int64 ``[n]`` keys as the header ``ERASED`` has them."""
    out = np.empty(len(keys) * key_bytes, np.uint8)
    encode_keys(np.ascontiguousarray(keys), np.arange(len(keys)), 0, len(keys), key_bytes, out, 0)
    return out.tobytes()


def headers_of(*, event_time_ms: int = NO_TIME, version: int | None = None) -> dict[str, bytes]:
    """The headers that say when a change happened and of which version of the model it is."""
    headers = {}
    if event_time_ms != NO_TIME:
        headers[TIME] = b"%d" % event_time_ms
    if version is not None:
        headers[VERSION] = b"%d" % version
    return headers


def encode_rows(keys: np.ndarray, rows: np.ndarray, *, key_bytes: int = 8) -> bytes:
    """The value of a message.

    Args:
        keys: int64 ``[n]``.   rows: float32 ``[n, dim]``.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    start = start_of(rows.shape[1])
    out = np.empty(len(start) + len(keys) * (key_bytes + 4 * rows.shape[1]), np.uint8)
    out[: len(start)] = np.frombuffer(start, np.uint8)
    order = np.arange(len(keys))
    encode_pairs(np.ascontiguousarray(keys), rows.view(np.uint8), order, 0, len(keys), key_bytes, out, len(start))
    return out.tobytes()


def encode_erasures(keys: np.ndarray, dim: int, *, key_bytes: int = 8) -> tuple[bytes, dict[str, bytes]]:
    """Value and headers of a message that deletes the rows of int64 ``[n]`` keys."""
    return start_of(dim), {ERASED: header_of(keys, key_bytes=key_bytes)}
