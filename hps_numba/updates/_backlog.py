"""Updates that were read and wait to be applied: bounded in bytes, one thread puts in, another takes out.

Neither thread holds a lock of Python code: each counts what it did, and the queues only end sleeps, so that no interrupt and no
fork leaves a lock taken.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Protocol

from hps_numba.updates._update import Message, Update

__all__ = ["Backlog", "Item", "Sized", "writes_of"]

Item = Update | Message


class Sized(Protocol):
    """Something that waits in order, and writes no rows."""

    @property
    def size(self) -> int:
        """Bytes."""


_OVERHEAD = 256  # bytes of an update beside its keys and rows
_PREFIX = 8  # bytes of a message before its pairs


def writes_of(item: Item | Sized) -> int:
    """About how many rows an item writes."""
    if isinstance(item, Update):
        return len(item.keys)
    if not isinstance(item, Message) or item.value is None or len(item.value) <= _PREFIX:
        return 1
    return 1 + len(item.value) // (8 + int.from_bytes(item.value[4:8], "little"))


class Backlog:
    """Items that wait.

    Args:
        max_bytes: from which on it is full.

    Thread safety: ``put`` and ``wait_for_room`` by one thread, ``take``, ``done`` and ``hold`` by another, the rest by any.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._items: SimpleQueue[tuple[Item | Sized, ...] | None] = SimpleQueue()
        self._rest: deque[Item | Sized] = deque()  # of what was taken from the queue
        self._room: SimpleQueue[None] = SimpleQueue()
        self._put_bytes = self._taken_bytes = 0
        self._put = self._taken = 0
        self._held = self._held_bytes = 0

    @property
    def added(self) -> int:
        """Items that were ever put in."""
        return self._put

    @property
    def finished(self) -> int:
        """Items that are done with: those that ``take`` returns have the numbers that follow."""
        return self._taken

    @property
    def bytes(self) -> int:
        """Of the items that wait, and of what is held."""
        return max(0, self._put_bytes - self._taken_bytes) + self._held_bytes

    @property
    def messages(self) -> int:
        """Items that wait, are being applied, or are held."""
        return max(0, self._put - self._taken) + self._held

    @property
    def full(self) -> bool:
        """Nothing more should be put in."""
        return self.bytes >= self._max_bytes

    def put(self, items: Sequence[Item | Sized]) -> None:
        """Add items, however full it is."""
        if items:
            self._put_bytes += sum(item.size + _OVERHEAD for item in items)
            self._put += len(items)
            self._items.put(tuple(items))  # at once: the thread that takes them wakes once, and finds them all

    def wait_for_room(self, seconds: float) -> None:
        """Wait until it is not full, or for some seconds."""
        end = time.monotonic() + seconds
        while self.full and (left := end - time.monotonic()) > 0:
            try:
                self._room.get(timeout=left)
            except Empty:
                return

    def take(self, writes: int, seconds: float) -> list[Item | Sized]:
        """The next items, until together they write so many rows; waits for the first. They count as waiting until ``done``."""
        items: list[Item | Sized] = []
        while writes > 0:
            try:
                some = () if self._rest else self._items.get(block=not items, timeout=seconds)
            except Empty:
                break
            if some is None:
                break
            self._rest.extend(some)
            item = self._rest.popleft()
            items.append(item)
            writes -= writes_of(item)
        return items

    def done(self, items: Sequence[Item | Sized]) -> None:
        """These were applied; their memory is free."""
        self._taken += len(items)
        self._taken_bytes += sum(item.size + _OVERHEAD for item in items)
        self._tell_of_room()

    def hold(self, messages: int, size: int) -> None:
        """Of what was done, so many items and bytes are still to be applied in part; 0 and 0: of nothing any more."""
        self._held, self._held_bytes = messages, size
        self._tell_of_room()

    def _tell_of_room(self) -> None:
        if self._room.empty():  # nobody takes from it while there is room
            self._room.put(None)

    def wake(self) -> None:
        """End the sleeps of both threads."""
        self._items.put(None)
        self._room.put(None)
