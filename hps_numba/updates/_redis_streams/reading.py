"""The readers of one stream: of a consumer group, which goes on after what it has applied, or from the oldest entry.

*One reader at a time for a group.* Redis hands the entries of a stream to the consumers of a group in turn, so that two would
apply the changes of a key in any order. A lease, a key beside the stream, names the one that reads; others stand by, and take
over, with what was handed out and not acknowledged, when it is closed, has ended, or has not renewed its lease.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from hps_numba.errors import TierError
from hps_numba.updates._redis_streams.connecting import Connector, Stream
from hps_numba.updates._redis_streams.entries import BEGIN, message_of, offset_of
from hps_numba.updates._redis_streams.holder import is_gone, new_holder
from hps_numba.updates._redis_streams.scripts import FREE_LEASE, READ_GROUP, READ_STREAM, RENEW_LEASE, START_OVER
from hps_numba.updates._update import Lost, Message, Position

__all__ = ["GroupReader", "OldestReader", "StreamReader"]

_PAGE_BYTES = 4 << 20  # of entries that are asked for at once
_FEWEST, _MOST = 16, 4096  # entries
_ACKNOWLEDGED = 1000  # entries in one command
_CONSUMER = "hps"  # of every group: the lease says which process it is


class StreamReader(Protocol):
    """Reads one stream.

    Attributes:
        last: id of the last entry that was read.   behind: entries that were not read yet, or None.
    """

    last: bytes
    behind: int | None

    def read(self) -> list[Message | Lost]:
        """What comes next; nothing if there is nothing now.

        Raises:
            TierError: the server failed, or another process reads; the next call leaves nothing out.
        """

    def commit(self, offset: int) -> None:
        """Everything up to an offset is applied."""

    def start_over(self) -> None:
        """Go on with the oldest entry; what the group has acknowledged is forgotten.

        Raises:
            TierError: the server failed, or another process reads.
        """

    def losses_handled(self) -> None:
        """What was lost need not be said again.

        Raises:
            TierError: the server failed.
        """

    def keep(self) -> None:
        """Nothing is read for a while."""

    def close(self) -> None:
        """Leave the stream to others."""


@dataclass
class _Page:
    """How many entries to ask for, by the size of those that came last."""

    count: int = _FEWEST

    def saw(self, messages: Sequence[Message]) -> None:
        if messages:
            size = max(1, sum(message.size for message in messages) // len(messages))
            self.count = max(_FEWEST, min(_MOST, 2 * self.count, _PAGE_BYTES // size))


def _gap(stream: Stream, lost: int | None, newest: bytes, messages: Sequence[Message]) -> Lost:
    """Entries are missing before ``messages``; before what comes after ``newest`` if there are none."""
    return Lost(messages[0].position if messages else Position(stream.name, offset_of(newest) + 1), lost)


class OldestReader:
    """Reads a stream from its oldest entry; nothing is committed, so any number may read it."""

    def __init__(self, connector: Connector, stream: Stream) -> None:
        self._connector, self._stream = connector, stream
        self._page = _Page()
        self._look = False  # whether the stream is still the one that was read
        self._seen: int | None = None  # entries that were added up to ``last``
        self.last = BEGIN
        self.behind: int | None = None

    def read(self) -> list[Message | Lost]:
        look = self._look and self.last != BEGIN
        command = ("EVAL", READ_STREAM, 1, self._stream.name, self.last, self._page.count, int(look))
        try:
            added, removed, newest, there, entries = self._connector.run(self._stream, *command)
            messages = [message_of(self._stream.name, entry) for entry in entries]
        except BaseException:
            self._look = True
            raise
        seen = removed if self._seen is None else self._seen
        cut = there == 0 and removed < seen
        if added < seen or offset_of(newest) < offset_of(self.last) or cut:
            self._look, self._seen, self.last = False, None, BEGIN  # another stream, or what a server had saved of this one
            again = [item for item in self.read() if isinstance(item, Message)]
            return [_gap(self._stream, None, newest, again), *again]
        lost = max(0, removed - seen)
        self._look, self._seen = False, seen + lost + len(messages)
        self.behind = max(0, added - self._seen)
        self._page.saw(messages)
        if messages:
            self.last = entries[-1][0]
        return [_gap(self._stream, lost, newest, messages), *messages] if lost else [*messages]

    def commit(self, offset: int) -> None:
        """Nothing: the next reader begins with the oldest entry too."""

    def start_over(self) -> None:
        self._look, self._seen, self.last = False, None, BEGIN

    def losses_handled(self) -> None:
        """Nothing: the next reader has lost nothing."""

    def keep(self) -> None:
        """Nothing: nobody waits for this reader."""

    def close(self) -> None:
        """Nothing is held."""


class GroupReader:
    """Reads a stream for a consumer group."""

    def __init__(self, connector: Connector, stream: Stream, group: str, lease_ms: int) -> None:
        self._connector, self._stream, self._group, self._lease_ms = connector, stream, group, lease_ms
        self._lease = f"{{{stream.name}}}.reader.{group}"  # in the slot of the stream
        self._gap = f"{{{stream.name}}}.lost.{group}"  # is there from a loss on until it was handled
        self._holder = new_holder()
        self._page = _Page()
        self._at: bytes = b""  # '': begin; a cursor: of what was handed out before; '>': what comes next
        self._began = False
        self._missing = False  # nobody knows what was lost: the group was gone, or a process has ended that had not handled it
        self._unhandled = False
        self._handed_out: deque[tuple[int, bytes]] = deque()  # offset and id of what is not acknowledged
        self.last = BEGIN
        self.behind: int | None = None

    def read(self) -> list[Message | Lost]:
        while True:
            kind, *answer = self._ask(self._page.count)
            if kind == b"began":
                self._begin(bool(answer[0]), bool(answer[1]))
                continue
            if kind == b"new":
                return self._new(*answer)
            some = self._pending(*answer)
            if some:
                return some

    def _ask(self, count: int, gone: str = "") -> list[Any]:
        given = (self._group, _CONSUMER, self._holder, self._lease_ms, count, self._at, gone)
        try:
            keys = (self._stream.name, self._lease, self._gap)
            answer: list[Any] = self._connector.run(self._stream, "EVAL", READ_GROUP, len(keys), *keys, *given)
        except BaseException:
            self._at = b""  # what was handed out, and did not arrive, is asked for again
            raise
        if answer[0] != b"held":
            return answer
        holder = answer[1].decode(errors="backslashreplace")
        self._at = b""
        if holder != gone and is_gone(holder):
            return self._ask(count, holder)
        raise TierError(
            f"{self._stream}: expected one reader of group {self._group!r}, got another one, {holder}; "
            "'group' names another group, which gets everything too"
        )

    def _begin(self, made: bool, unhandled: bool) -> None:
        self._handed_out.clear()
        self._unhandled = unhandled
        self._missing = self._missing or unhandled or (made and self._began)
        self._began = True
        self._at = BEGIN

    def _pending(self, cursor: bytes, entries: list[Any], removed: list[bytes]) -> list[Message | Lost]:
        """What was handed out before; of what was removed meanwhile, only the number is known."""
        self._at = b">" if cursor == BEGIN else cursor
        messages = self._handed(entries)
        if not removed:
            return [*messages]
        return [_gap(self._stream, len(removed), max(removed, key=offset_of), messages), *messages]

    def _new(self, added: int, lost: int, done: int, newest: bytes, last: bytes, entries: list[Any]) -> list[Message | Lost]:
        messages = self._handed(entries)
        self.last = last
        self.behind = max(0, added - done - len(messages)) if done >= 0 else None
        if not (lost or self._missing) or not (messages or lost or self._unhandled):
            return [*messages]
        how_many = None if self._missing else lost
        self._missing = False
        return [_gap(self._stream, how_many, newest, messages), *messages]

    def _handed(self, entries: list[Any]) -> list[Message]:
        try:
            messages = [message_of(self._stream.name, entry) for entry in entries]
        except BaseException:
            self._at = b""
            raise
        self._handed_out.extend((message.position.offset, entry[0]) for message, entry in zip(messages, entries))
        self._page.saw(messages)
        return messages

    def commit(self, offset: int) -> None:
        while self._handed_out and self._handed_out[0][0] <= offset:
            ids = [one for at, one in islice(self._handed_out, _ACKNOWLEDGED) if at <= offset]
            self._connector.run(self._stream, "XACK", self._stream.name, self._group, *ids)
            for _ in ids:
                self._handed_out.popleft()

    def start_over(self) -> None:
        keys, given = (self._stream.name, self._lease), (self._group, self._holder)
        if not self._connector.run(self._stream, "EVAL", START_OVER, len(keys), *keys, *given):
            self._at = b""
            raise TierError(f"{self._stream}: expected to be the reader of group {self._group!r}, got another one meanwhile")
        self._handed_out.clear()
        self._at, self.last = b">", BEGIN
        self._missing = self._unhandled = False

    def losses_handled(self) -> None:
        self._connector.run(self._stream, "DEL", self._gap)
        self._unhandled = False

    def keep(self) -> None:
        if self._at and not self._connector.run(
            self._stream, "EVAL", RENEW_LEASE, 1, self._lease, self._holder, self._lease_ms
        ):
            self._at = b""

    def close(self) -> None:
        if self._began:
            self._connector.run(self._stream, "EVAL", FREE_LEASE, 1, self._lease, self._holder)
