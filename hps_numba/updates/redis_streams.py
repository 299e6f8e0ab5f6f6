"""``redis_streams``: streams of a Redis server or cluster as a bus; redis-py is all it needs.

A message is an entry. All tables share a stream, or a few over which keys are spread (``num_streams``). A server whose rows
outlive it reads for a consumer group and acknowledges what is in every tier; one that is killed, or whose connection breaks,
gets what it had not acknowledged again. Others read from the oldest entry and leave no trace.

What is kept is up to the producer (``max_messages``, ``max_age_ms``) and to the persistence of Redis. Entries that were
removed before they were read are counted and said.
"""

from __future__ import annotations

import logging
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from hps_numba.errors import ConfigError, TierError
from hps_numba.updates._producer import Outgoing, ProducerOptions, UpdateProducer
from hps_numba.updates._redis_streams.connecting import Connection, Connector, Stream
from hps_numba.updates._redis_streams.entries import fields_of
from hps_numba.updates._redis_streams.reading import GroupReader, OldestReader, StreamReader
from hps_numba.updates._source import UpdateSource
from hps_numba.updates._update import Lost, Message, Position

__all__ = ["PLUGIN", "Options", "RedisStreamsProducer", "RedisStreamsSource"]

log = logging.getLogger(__name__)
_SENT_BYTES = 8 << 20  # in one transaction, or one message
_BLOCK_MS = 100  # that a server waits for an entry: as long as ``wake`` may take
_GROUP = re.compile(r"[A-Za-z0-9_.:-]{0,200}")


@dataclass(frozen=True, kw_only=True)
class RedisStreamsProducerOptions(ProducerOptions, Connection):
    """Keys of the producer.

    Attributes:
        max_messages: about so many entries are kept in a stream.   max_age_ms: entries older than about this are dropped.
            With 0, the default, neither is: a Redis that is full refuses more.
    """

    max_messages: int = 0
    max_age_ms: int = 0


class RedisStreamsProducer(UpdateProducer):
    """Appends entries to streams, those of a call in one transaction a stream. What a server took is there."""

    Options = RedisStreamsProducerOptions

    def __init__(self, options: Any = None) -> None:
        self._connector: Connector | None = None
        super().__init__(options)
        self.options.check()
        for name in ("max_messages", "max_age_ms"):
            if getattr(self.options, name) < 0:
                raise ConfigError(f"{name}: expected at least 0, got {getattr(self.options, name)}")
        self._newest_ms: dict[Stream, int] = {}
        self._connector = Connector(self.options)

    def reset_after_fork(self) -> None:
        super().reset_after_fork()
        self._taken: set[int] = set()  # ids of waiting messages that a stream has, while another one before them fails

    def _send(self, messages: Sequence[Outgoing]) -> int:
        assert self._connector is not None
        streams = self._connector.streams
        some = self._first_of(messages)
        waiting: dict[Stream, list[Outgoing]] = {}
        for message in some:
            if id(message) not in self._taken:
                waiting.setdefault(streams[message.partition % len(streams)], []).append(message)
        problem: TierError | None = None
        for stream, mine in waiting.items():
            try:
                self._append(self._connector, stream, mine)
            except TierError as failure:
                problem = problem or failure
                continue
            self._taken.update(map(id, mine))
        count = 0
        while count < len(some) and id(some[count]) in self._taken:
            self._taken.discard(id(some[count]))
            count += 1
        if not count and problem is not None:
            raise problem
        return count

    @staticmethod
    def _first_of(messages: Sequence[Outgoing]) -> Sequence[Outgoing]:
        count = size = 0
        while count < len(messages) and size < _SENT_BYTES:
            size += messages[count].size
            count += 1
        return messages[:count]

    def _append(self, connector: Connector, stream: Stream, messages: Sequence[Outgoing]) -> None:
        """All of them or none, so that a Redis that is full leaves no gap in their order."""
        commands: list[Sequence[Any]] = [("XADD", stream.name, "*", *fields_of(message)) for message in messages]
        if self.options.max_messages:
            commands.append(("XTRIM", stream.name, "MAXLEN", "~", self.options.max_messages))
        if self.options.max_age_ms and stream in self._newest_ms:
            commands.append(("XTRIM", stream.name, "MINID", "~", max(0, self._newest_ms[stream] - self.options.max_age_ms)))
        if len(commands) == 1:
            answers = [connector.run(stream, *commands[0])]
        else:
            answers = connector.run_all(stream, [("MULTI",), *commands, ("EXEC",)])[-1]
        refused = [answer for answer in answers if isinstance(answer, Exception)]
        if refused:
            raise TierError(f"{stream}: {refused[0]}")
        self._newest_ms[stream] = int(answers[len(messages) - 1].partition(b"-")[0])

    def _close(self) -> None:
        if self._connector is not None:
            self._connector.close()


@dataclass(frozen=True, kw_only=True)
class Options(Connection):
    """Keys of an ``update_source`` of this type.

    Attributes:
        group: the consumer group, for servers that go on after what they have applied; by default ``hps.`` and the name of the
            host. Each server has one of its own: of several in a group, one reads, and the others stand by for it.
        lease_ms: a reader of a group that has not been heard of for so long, and is on another host, is replaced.
        poll_interval_ms: between two looks at the streams of a cluster, if there are several; one is waited for.
    """

    group: str = ""
    lease_ms: int = 10_000
    poll_interval_ms: float = 5.0


class RedisStreamsSource(UpdateSource):
    """Reads the streams of a bus."""

    Options = Options
    Producer = RedisStreamsProducer

    def __init__(self, section: Any, *, resume: bool = True, key_bytes: int = 8) -> None:
        super().__init__(section, resume=resume, key_bytes=key_bytes)
        options: Options = self.options
        options.check()
        if not _GROUP.fullmatch(options.group):
            raise ConfigError(f"group: expected at most 200 of the characters A-Z a-z 0-9 _ . : -, got {options.group!r}")
        for name, least in (("lease_ms", 3000), ("poll_interval_ms", 1)):
            if getattr(options, name) < least:
                raise ConfigError(f"{name}: expected at least {least}, got {getattr(options, name)}")
        self._wakes: SimpleQueue[None] = SimpleQueue()
        self._closed = False
        self.starts_over = True
        self._connector = Connector(options)
        group = options.group or f"hps.{platform.node() or 'host'}"
        self._readers: dict[str, StreamReader] = {
            stream.name: GroupReader(self._connector, stream, group, options.lease_ms)
            if resume
            else OldestReader(self._connector, stream)
            for stream in self._connector.streams
        }

    def poll(self, seconds: float) -> Sequence[Message | Lost]:
        end = time.monotonic() + seconds
        while True:
            some = self._read()
            self.has_more = self.lag() != 0
            left = end - time.monotonic()
            if some or left <= 0 or self._woken():
                return some
            self._wait(left)

    def _read(self) -> list[Message | Lost]:
        """What all streams have. One that fails raises if the others have nothing, as what they gave would be left out."""
        some: list[Message | Lost] = []
        problem: TierError | None = None
        for reader in self._readers.values():
            try:
                some += reader.read()
            except TierError as failure:
                problem = problem or failure
        if problem is not None and not some:
            raise problem
        return some

    def _woken(self) -> bool:
        try:
            self._wakes.get_nowait()
        except Empty:
            return False
        return True

    def _wait(self, seconds: float) -> None:
        """Until a stream has something, or a moment."""
        if not self._connector.one_node:
            try:
                self._wakes.get(timeout=min(seconds, self.options.poll_interval_ms / 1000))
            except Empty:
                return
            self._wakes.put(None)
            return
        names, lasts = list(self._readers), [reader.last for reader in self._readers.values()]
        block = max(1, min(_BLOCK_MS, int(seconds * 1000)))
        self._connector.run(self._connector.streams[0], "XREAD", "COUNT", 1, "BLOCK", block, "STREAMS", *names, *lasts)

    def commit(self, positions: Sequence[Position]) -> None:
        for partition, offset in positions:
            reader = self._readers.get(str(partition))
            if reader is not None:
                reader.commit(offset)

    def start_over(self, lost: Sequence[Lost]) -> None:
        for reader in self._readers.values():
            reader.start_over()

    def losses_handled(self) -> None:
        for reader in self._readers.values():
            reader.losses_handled()

    def keep_alive(self) -> None:
        for reader in self._readers.values():
            reader.keep()

    def lag(self) -> int | None:
        behind = [reader.behind for reader in self._readers.values()]
        return None if None in behind else sum(filter(None, behind))

    def wake(self) -> None:
        self._wakes.put(None)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for name, reader in self._readers.items():
            try:
                reader.close()
            except TierError as problem:
                log.debug("%s is left to others when the lease expires: %s", name, problem)
        self._connector.close()


PLUGIN = RedisStreamsSource
