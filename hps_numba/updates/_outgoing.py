"""What a producer sends: messages, and the buffers in which they are filled."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from hps_numba.errors import ConfigError
from hps_numba.updates._wire.messages import ERASED, headers_of

__all__ = ["Buffer", "Outgoing", "tag_of"]


@dataclass(frozen=True)
class Outgoing:
    """One message to be sent.

    Attributes:
        table: topic: the tag of the table.   partition: 0 to 7; a bus with fewer takes it modulo theirs.
        value, headers: of the message.
    """

    table: str
    partition: int
    value: bytes | None
    headers: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of memory that it takes."""
        return len(self.value or b"") + sum(map(len, self.headers.values()))


class Buffer:
    """The message that is being filled for one table and partition: rows, or deletions.

    Attributes:
        began: time when it got its first row.
    """

    def __init__(self, start: bytes, size: int, erases: bool, version: int | None) -> None:
        self.data = np.empty(size, np.uint8)
        self.at = 0 if erases else len(start)
        self.data[: self.at] = np.frombuffer(start, np.uint8)[: self.at]
        self.start, self.erases, self.version = start, erases, version
        self.event_ms: int | None = None
        self.began = time.monotonic()

    def sealed(self, table: str, partition: int) -> Outgoing:
        """As a message."""
        headers = headers_of(event_time_ms=self.event_ms or 0, version=self.version)
        content = self.data[: self.at].tobytes()
        if self.erases:
            return Outgoing(table, partition, self.start or None, {**headers, ERASED: content})
        return Outgoing(table, partition, content, headers)


def tag_of(model: str, table: str) -> str:
    """The tag of a table.

    Raises:
        ConfigError: one of the names is none that a config can have.
    """
    for what, name in (("model", model), ("table", table)):
        if not isinstance(name, str) or not 0 < len(name) <= 120 or not name.replace("_", "a").replace("-", "a").isalnum():
            raise ConfigError(f"{what}: expected 1 to 120 of the characters A-Z a-z 0-9 _ -, got {name!r}")
    return f"hps_et.{model}.{table}"
