"""``in_process``: a queue in the memory of this process, from a trainer to the servers that run beside it.

Every server gets every update. What all of them have committed is dropped: there is nothing to replay, and nothing outlives the
process. The queue has a bound; a producer waits while it is full. A server that was closed and does not come back keeps its
place until the queue is full, and then loses it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hps_numba.errors import TierUnavailable
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.updates._producer import Outgoing, ProducerOptions, UpdateProducer
from hps_numba.updates._source import UpdateSource
from hps_numba.updates._update import Lost, Message, Position, Update

__all__ = ["PLUGIN", "Bus", "InProcessProducer", "InProcessSource", "Options", "bus_named"]

_MAX_UPDATES = 1024  # that one ``poll`` returns


@dataclass(frozen=True)
class Options:
    """Keys of an ``update_source`` of this type.

    Attributes:
        bus: name of the queue in this process.
        consumer: of the server, so that it finds its place again; a second server of the same name gets a place of its own.
    """

    bus: str = "updates"
    consumer: str = "server"


class Bus:
    """A queue of updates with a place for each consumer.

    Args:
        name: of the queue.   max_bytes: of keys and rows that it holds.

    Thread safety: every method.
    """

    def __init__(self, name: str, max_bytes: int = 2**28) -> None:
        self.name = name
        self.max_bytes = max_bytes
        self._updates: deque[Update | Message] = deque()
        self._first = 0  # offset of the first of them
        self._bytes = 0
        self._places: dict[str, int] = {}  # consumer -> offset of the first that it has not committed
        self._open: set[str] = set()
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """A new lock; the servers that read are those of the parent."""
        self._changed = threading.Condition(threading.Lock())

    # -- producers ---------------------------------------------------------------------

    def put(self, update: Update | Message, seconds: float = 30.0) -> int:
        """Add an update; returns its offset. Its position is replaced, and its arrays must not be changed any more.

        Raises:
            TierUnavailable: there was no room for so long.
        """
        end = time.monotonic() + seconds
        with self._changed:
            while self._bytes and self._bytes + update.size > self.max_bytes:
                self._trim(self._open)
                left = end - time.monotonic()
                if self._bytes and self._bytes + update.size > self.max_bytes and not (left > 0 and self._changed.wait(left)):
                    raise TierUnavailable(
                        f"bus {self.name!r}: expected room for {update.size:,} bytes within {seconds:g} s, "
                        f"got {self._bytes:,} of {self.max_bytes:,} in use: no server applies them fast enough"
                    )
            offset = self._first + len(self._updates)
            self._updates.append(replace(update, position=Position(0, offset)))
            self._bytes += update.size
            self._changed.notify_all()
            return offset

    # -- consumers ---------------------------------------------------------------------

    def join(self, consumer: str) -> tuple[str, int]:
        """Take the place of a consumer, or of the first ``consumer-2``, ``consumer-3``, ... that is not taken.

        Returns its name and the offset where it begins.
        """
        with self._changed:
            name, number = consumer, 1
            while name in self._open:
                number += 1
                name = f"{consumer}-{number}"
            self._open.add(name)
            return name, self._places.setdefault(name, self._first)

    def leave(self, consumer: str) -> None:
        """Free the place of a consumer; it finds it again."""
        with self._changed:
            self._open.discard(consumer)
            self._changed.notify_all()

    def read(self, offset: int, count: int, seconds: float, ended: Any) -> list[Update | Message]:
        """Up to ``count`` updates from an offset on; waits for the first for some seconds, or until ``ended()``."""
        end = time.monotonic() + seconds
        with self._changed:
            while offset >= self._first + len(self._updates) and not ended():
                left = end - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            start = max(0, offset - self._first)
            return [self._updates[i] for i in range(start, min(start + count, len(self._updates)))]

    def commit(self, consumer: str, offset: int) -> None:
        """The consumer has applied everything up to ``offset``; what all have is dropped."""
        with self._changed:
            self._places[consumer] = max(self._places[consumer], offset + 1)
            self._trim(self._places)
            self._changed.notify_all()

    def _trim(self, consumers: Iterable[str]) -> None:
        """Drop what these consumers have; with none of them, what all that ever were have lost their claim to."""
        every = self._first if not self._places else self._first + len(self._updates)
        until = min((self._places[consumer] for consumer in consumers), default=every)
        while self._first < until and self._updates:
            self._bytes -= self._updates.popleft().size
            self._first += 1

    @property
    def first(self) -> int:
        """Offset of the first update that there is, or will be."""
        return self._first

    def behind(self, offset: int) -> int:
        """How many updates there are from an offset on."""
        return max(0, self._first + len(self._updates) - offset)

    def wake(self) -> None:
        """End the waits of all readers, who look whether it was meant for them."""
        with self._changed:
            self._changed.notify_all()


_buses: dict[str, Bus] = {}


def bus_named(name: str) -> Bus:
    """The queue of a name, made on first use."""
    return _buses.get(name) or _buses.setdefault(name, Bus(name))


@dataclass(frozen=True, kw_only=True)
class InProcessProducerOptions(ProducerOptions):
    """Keys of the producer.

    Attributes:
        bus: name of the queue.   send_timeout_ms: how long a call waits for room in it.
    """

    bus: str = "updates"
    send_timeout_ms: float = 30_000.0


class InProcessProducer(UpdateProducer):
    """Publishes to the queue ``bus`` of this process. What it took is there: ``flush`` waits for nothing else."""

    Options = InProcessProducerOptions

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._bus = bus_named(self.options.bus)

    def _send(self, messages: Sequence[Outgoing]) -> int:
        first = messages[0]
        message = Message(first.table, first.value, Position(0, -1), first.headers)
        self._bus.put(message, self.options.send_timeout_ms / 1000)
        return 1


class InProcessSource(UpdateSource):
    """Reads the queue ``bus`` of this process."""

    Options = Options
    Producer = InProcessProducer

    def __init__(self, section: Any, *, resume: bool = True, key_bytes: int = 8) -> None:
        super().__init__(section, resume=resume, key_bytes=key_bytes)
        self.bus = bus_named(self.options.bus)
        self._consumer, self._next = self.bus.join(self.options.consumer)
        self._woken = self._closed = False
        self.starts_over = True

    def poll(self, seconds: float) -> Sequence[Update | Message | Lost]:
        got = self.bus.read(self._next, min(_MAX_UPDATES, self.section.max_batch_size), seconds, self._take_wake)
        if not got:
            return []
        self.has_more = self.bus.behind(got[-1].position.offset + 1) > 0
        expected, self._next = self._next, got[-1].position.offset + 1
        missing = got[0].position.offset - expected
        return [Lost(got[0].position, missing), *got] if missing else got

    def _take_wake(self) -> bool:
        woken, self._woken = self._woken, False
        return woken

    def commit(self, positions: Sequence[Position]) -> None:
        for position in positions:
            self.bus.commit(self._consumer, position.offset)

    def start_over(self, lost: Sequence[Lost]) -> None:
        self._next = self.bus.first  # its place moves with the next commit

    def lag(self) -> int:
        return self.bus.behind(self._next)

    def wake(self) -> None:
        self._woken = True
        self.bus.wake()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.bus.leave(self._consumer)


PLUGIN = InProcessSource
