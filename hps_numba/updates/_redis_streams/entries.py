"""One message as one entry: fields ``table`` and ``value``, and the headers by their names; its id is the offset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hps_numba.errors import TierError
from hps_numba.updates._producer import Outgoing
from hps_numba.updates._update import Message, Position

__all__ = ["BEGIN", "fields_of", "id_of", "message_of", "offset_of"]

#: the id before all others
BEGIN = b"0-0"
_SEQUENCE_BITS = 32
_TABLE, _VALUE = b"table", b"value"


def offset_of(entry_id: bytes) -> int:
    """An id ``milliseconds-number`` as one int that ascends like ids.

    Raises:
        TierError: more than 4 billion entries within a millisecond: an id that no server gives by itself.
    """
    milliseconds, _, number = entry_id.partition(b"-")
    if int(number or 0) >> _SEQUENCE_BITS:
        raise TierError(f"expected an entry whose id the server chose, got {entry_id.decode()}")
    return int(milliseconds) << _SEQUENCE_BITS | int(number or 0)


def id_of(offset: int) -> str:
    """The id of an ``offset_of``, as commands of Redis take it."""
    return f"{offset >> _SEQUENCE_BITS}-{offset & ((1 << _SEQUENCE_BITS) - 1)}"


def fields_of(message: Outgoing) -> list[Any]:
    """Names and values of the fields of an entry, in turn."""
    fields: list[Any] = [_TABLE, message.table]
    if message.value is not None:
        fields += (_VALUE, message.value)
    for name, value in message.headers.items():
        fields += (name, value)
    return fields


def message_of(stream: str, entry: Sequence[Any]) -> Message:
    """The message that an entry holds; of one that is none, as much as can be told, so that it is counted."""
    entry_id, flat = entry
    fields = dict(zip(flat[::2], flat[1::2])) if flat else {}
    table = fields.pop(_TABLE, b"").decode(errors="backslashreplace")
    value = fields.pop(_VALUE, None)
    headers = {name.decode(errors="backslashreplace"): content for name, content in fields.items()}
    return Message(table, value, Position(stream, offset_of(entry_id)), headers, time_ms=int(entry_id.partition(b"-")[0]))
