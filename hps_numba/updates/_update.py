"""What travels between a bus and a server: updates, messages that hold them in wire form, and gaps."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from hps_numba.errors import ArrayError

__all__ = ["NO_TIME", "Lost", "Message", "Position", "Update", "now_ms"]

#: ``event_time_ms`` of what does not tell when it happened
NO_TIME = -1


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class Position(NamedTuple):
    """A place in a source: offsets ascend within a partition.

    Attributes:
        partition: number or name; what is in one partition is ordered.
        offset: of an update or message in its partition.
    """

    partition: int | str
    offset: int


@dataclass(frozen=True, slots=True)
class Update:
    """Changed rows of one table.

    Attributes:
        table: tag, ``hps_et.<model>.<table>``.
        keys: int64 ``[n]``; of equal keys the last wins.
        rows: float32 ``[n, dim]``, or None to delete the keys.
        position: of this update in the source.
        event_time_ms: when the change happened, in ms since 1970, or ``NO_TIME``.
        version: of the model that the rows belong to, if the source knows.

    Raises:
        ArrayError: ``keys`` or ``rows`` are not as above.
    """

    table: str
    keys: np.ndarray
    rows: np.ndarray | None
    position: Position
    event_time_ms: int = NO_TIME
    version: int | None = None

    def __post_init__(self) -> None:
        if self.keys.dtype != np.int64 or self.keys.ndim != 1:
            raise ArrayError(f"{self.table}: keys: expected int64[n], got {self.keys.dtype}{list(self.keys.shape)}")
        n, rows = len(self.keys), self.rows
        if rows is not None and (rows.dtype != np.float32 or rows.ndim != 2 or len(rows) != n):
            raise ArrayError(f"{self.table}: rows: expected float32[{n}, dim] or None, got {rows.dtype}{list(rows.shape)}")

    @property
    def size(self) -> int:
        """Bytes of memory that it takes."""
        return self.keys.nbytes + (0 if self.rows is None else self.rows.nbytes)


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a bus, not decoded yet (``updates._wire``): whoever applies it checks it and counts it if it is malformed.

    Attributes:
        table: where it came from: the topic, expected to be the tag of a table.
        value: its bytes, or None if it has none.
        position: in the source.
        headers: the extension of the wire format, by name.
        key: the message key of the bus; updates have none.
        time_ms: when the bus took it, in ms since 1970, or ``NO_TIME``.
    """

    table: str
    value: bytes | None
    position: Position
    headers: Mapping[str, bytes] = field(default_factory=dict)
    key: bytes | None = None
    time_ms: int = NO_TIME

    @property
    def size(self) -> int:
        """Bytes of memory that it takes."""
        return len(self.value or b"") + sum(map(len, self.headers.values()))


@dataclass(frozen=True, slots=True)
class Lost:
    """The bus no longer has what comes after the last applied position, because it was trimmed: updates are missing.

    Attributes:
        position: the first that is there again.
        messages: how many are missing, or None if the bus does not tell.
        table: tag of the table whose updates they were, if a partition has those of one; empty: of any.
    """

    position: Position
    messages: int | None = None
    table: str = ""
