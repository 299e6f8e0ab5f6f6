"""How all caches of a model switch to another version of its rows, while lookups go on: each call sees one version.

*Why a cache needs help.* The host store switches by one atomic store (``storage.host.versions``), but a cache holds copies of
rows. While they are replaced, a lookup would find old rows in the cache and new ones in the store.

*How.* For the time of the switch each cache has a stand-in: a cache that holds no row and answers from the store with the new
version. ``active`` is set to all stand-ins at one moment. A lookup that has claimed its workspace before that sees the old
version to its end, since nothing that it reads changes: its cache is left alone and keeps pointing to the old index
(``StoreLink.hold``), whose memory stays. A later one asks the stand-in. When all workspaces that were lent came back and the
device is done with them, the cache is filled with new rows, and ``active`` is None again; both give the same answers then. So
nobody waits, and the usual path is as long as before: it looks at one attribute.

*Why the order is safe.* A call first claims a workspace, then looks at ``active``; the switch first sets ``active``, then looks
for claimed workspaces. One of the two sees the other (``Lookups``, ``Pooling``, ``CacheGroup``).

*Graphs.* A replay of a captured graph looks at nothing here and reads the cache. ``server.replays`` keeps those that are
announced from running while the cache is changed.

Turned down: a pause of lookups (it lasts as long as the largest of them), a second full cache (memory of the device), and a
generation in every line of the cache (larger lines, and a kernel would still need the rows of two versions).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from hps_numba.errors import ClosedError
from hps_numba.runtime.fork import register_fork_reset

__all__ = ["StandIns", "VersionSwitch"]

T = TypeVar("T")
_TRIES = 3  # of a call that reads several tables, before it makes the next switch wait
_PATIENCE_SECONDS = 1.0  # of a switch, with calls that read several tables
_FORK_SECONDS = 5.0
_turning = threading.RLock()  # held while tables are of two versions: a process is not forked then


def _before_fork() -> None:
    _turning.acquire(timeout=_FORK_SECONDS)


def _after_fork_in_parent() -> None:
    try:
        _turning.release()
    except RuntimeError:  # it was not free for long, and the fork went on
        return


def _after_fork_in_child() -> None:
    global _turning
    _turning = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


class StandIn(Protocol):
    """What answers instead of a cache (``cache.parts.CacheParts``)."""

    @property
    def lookups(self) -> Any:
        """Its ``cache.lookup.Lookups``."""

    @property
    def pooling(self) -> Any:
        """Its ``cache.pooling.Pooling``."""


StandIns = Mapping[int, StandIn]
"""What answers instead of a cache, by the address of the cache's state."""


class VersionSwitch:
    """The version of a model, shared by its tables and caches.

    Attributes:
        active: None, or during a switch what answers instead of each cache.
        turns: even while all tables are of one version, odd for the moment in which they are switched.

    Thread safety: one thread at a time switches; everything else from any thread.
    """

    __slots__ = ("__weakref__", "_reading", "active", "turns")

    def __init__(self) -> None:
        self.active: StandIns | None = None
        self.turns = 0
        self._reading = threading.RLock()  # a signal handler may read too
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """In a forked child, nobody ends a switch of the parent; caches of the CPU are empty there (``CacheState``)."""
        self.active = None
        self.turns += self.turns % 2
        self._reading = threading.RLock()

    @contextmanager
    def turning(self) -> Iterator[None]:
        """The moment in which all tables are switched: nothing in it may wait for lookups."""
        alone = self._reading.acquire(timeout=_PATIENCE_SECONDS)
        try:
            with _turning:
                self.turns += 1
                try:
                    yield
                finally:
                    self.turns += 1
        finally:
            if alone:
                self._reading.release()

    def read_one_version(self, read: Callable[[], T]) -> T:
        """What ``read`` returns of several tables, all of one version; it is called again if a switch overtakes it.

        After some attempts the next switch waits for it.
        """
        for _ in range(_TRIES):
            found = self._try_to_read(read)
            if found is not None:
                return found[0]
        with self._reading:
            while True:
                found = self._try_to_read(read)
                if found is not None:
                    return found[0]

    def _try_to_read(self, read: Callable[[], T]) -> tuple[T] | None:
        before = self.turns
        while before % 2:
            time.sleep(1e-5)  # as long as it takes to store some words for each table
            before = self.turns
        answer = read()
        return (answer,) if before == self.turns else None

    def answer(self, ask: Callable[[StandIns], None]) -> bool:
        """Let the stand-ins answer: call ``ask`` with them. False if there are none, or none any more.

        Raises:
            As ``ask``.
        """
        stand_ins = self.active
        if stand_ins is None:
            return False
        try:
            ask(stand_ins)
        except ClosedError:
            if self.active is stand_ins:
                raise
            return False
        return True
