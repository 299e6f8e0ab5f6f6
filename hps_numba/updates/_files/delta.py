"""A delta: messages in one file, behind a header that says where the file belongs and what its content sums up to.

A reader takes a file whole or not at all. One that is shorter than it says, or does not match its sum, is not finished: it may
be on its way from another machine, and is read again later.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hps_numba.errors import TierError
from hps_numba.updates._files.reading import content_of
from hps_numba.updates._files.writing import PARTIAL
from hps_numba.updates._producer import Outgoing
from hps_numba.updates._update import Message, Position

__all__ = ["Delta", "NotWhole", "delta_path", "encode_delta", "first_offset_of", "number_of", "read_delta"]

_MAGIC = b"HPSDELTA"
_VERSION = 1
_NAME = re.compile(r"delta-([0-9]{20})\.hps")
_HEADER = struct.Struct(
    "<8sII16sQQQQ"
)  # magic, version, sum of the rest, stream, number, first offset, messages, bytes of them
_RECORD = struct.Struct("<HBBI")  # bytes of the tag, number of headers, whether there is a value, bytes of the value
_FIELD = struct.Struct("<BI")  # bytes of a name and of its value
_SUMMED = 16  # bytes of the header that the sum does not cover


class NotWhole(Exception):
    """A file is not there, or not all of it."""


@dataclass(frozen=True)
class Delta:
    """What a file says of itself.

    Attributes:
        stream: of the folder, 32 hexadecimal digits.   number: of the file, from 1.
        first_offset: of its first message.   messages: how many.
    """

    stream: str
    number: int
    first_offset: int
    messages: int


def delta_path(folder: Path, number: int) -> Path:
    """Where the file of a number is; names sort by number."""
    return folder / f"delta-{number:020}.hps"


def number_of(path: Path) -> int | None:
    """The number of the file at a path that ``delta_path`` has made, whole or unfinished; None for any other file."""
    match = _NAME.fullmatch(path.name.removesuffix(PARTIAL))
    return int(match[1]) if match else None


def encode_delta(stream: str, number: int, first_offset: int, messages: Sequence[Outgoing]) -> bytes:
    """The content of a file."""
    parts: list[bytes] = []
    for message in messages:
        tag, value = message.table.encode(), message.value
        parts.append(_RECORD.pack(len(tag), len(message.headers), value is not None, len(value or b"")))
        parts.append(tag)
        for name, content in message.headers.items():
            encoded = name.encode()
            parts += (_FIELD.pack(len(encoded), len(content)), encoded, content)
        if value is not None:
            parts.append(value)
    size = sum(map(len, parts))
    header = _HEADER.pack(_MAGIC, _VERSION, 0, bytes.fromhex(stream), number, first_offset, len(messages), size)
    total = zlib.crc32(header[_SUMMED:])
    for part in parts:
        total = zlib.crc32(part, total)
    return b"".join((header[: _SUMMED - 4], struct.pack("<I", total), header[_SUMMED:], *parts))


def read_delta(path: Path) -> tuple[Delta, list[Message]]:
    """The messages of a file.

    Raises:
        NotWhole: see there; the message says what is wrong.   OSError: it cannot be read.
    """
    try:
        content = content_of(path)
    except FileNotFoundError:
        raise NotWhole(f"{path}: no such file") from None
    _, _, total, stream, number, first, count, size = _header_of(path, content)
    if len(content) != _HEADER.size + size:
        raise NotWhole(f"{path}: expected {_HEADER.size + size} bytes, got {len(content)}")
    if zlib.crc32(memoryview(content)[_SUMMED:]) != total:
        raise NotWhole(f"{path}: the checksum does not match")
    delta = Delta(stream.hex(), number, first, count)
    try:
        return delta, list(_messages(content, delta))
    except (struct.error, UnicodeDecodeError) as problem:
        raise NotWhole(f"{path}: expected {count} messages, got others: {problem}") from None


def _header_of(path: Path, content: bytes) -> tuple[bytes, int, int, bytes, int, int, int, int]:
    if len(content) < _HEADER.size:
        raise NotWhole(f"{path}: expected a header of {_HEADER.size} bytes, got {len(content)} bytes")
    header: tuple[bytes, int, int, bytes, int, int, int, int] = _HEADER.unpack_from(content)
    if header[:2] != (_MAGIC, _VERSION):
        raise NotWhole(f"{path}: expected {_MAGIC!r} of version {_VERSION}, got {header[0]!r} of version {header[1]}")
    return header


def first_offset_of(path: Path) -> int:
    """The offset of the first message of a file.

    Raises:
        TierError: it is not there, or no such file.
    """
    try:
        with path.open("rb") as file:
            return _header_of(path, file.read(_HEADER.size))[5]
    except (NotWhole, OSError) as problem:
        raise TierError(str(problem)) from problem


def _messages(content: bytes, delta: Delta) -> Iterator[Message]:
    at = _HEADER.size
    for offset in range(delta.first_offset, delta.first_offset + delta.messages):
        tag_bytes, fields, has_value, size = _RECORD.unpack_from(content, at)
        at += _RECORD.size
        tag = content[at : at + tag_bytes].decode()
        at += tag_bytes
        headers = {}
        for _ in range(fields):
            name_bytes, value_bytes = _FIELD.unpack_from(content, at)
            at += _FIELD.size
            name = content[at : at + name_bytes].decode()
            at += name_bytes
            headers[name] = content[at : at + value_bytes]
            at += value_bytes
        value = content[at : at + size] if has_value else None
        at += size
        yield Message(tag, value, Position(delta.stream, offset), headers)
