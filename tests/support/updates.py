"""Shared by tests of online updates: a queue in this process, servers that read it, and waits for what was published."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from support.waiting import wait_until

import hps_numba
from hps_numba.server.update_stats import SourceStats
from hps_numba.updates import Lost, Message, Position, Update, UpdateSource
from hps_numba.updates._wire.messages import encode_erasures, encode_rows, headers_of
from hps_numba.updates.in_process import Bus, bus_named

__all__ = [
    "TABLE",
    "ListSource",
    "applied",
    "fresh_bus",
    "list_bus",
    "message_of",
    "offset_in",
    "source_of",
    "update_of",
    "wait_for",
]

TABLE = "hps_et.m.sparse_embedding0"
_numbers = itertools.count()


def fresh_bus() -> Bus:
    """A queue that nobody reads yet."""
    return bus_named(f"bus-{next(_numbers)}")


def source_of(bus: Bus, **more: Any) -> dict[str, Any]:
    """A section of the config that reads a queue."""
    return {"type": "in_process", "bus": bus.name, "poll_timeout_ms": 20, "failure_backoff_ms": 1, **more}


def update_of(keys: Sequence[int] | np.ndarray, rows: np.ndarray | None, table: str = TABLE, **more: Any) -> Update:
    """To be published."""
    return Update(table, np.asarray(keys, np.int64), rows, Position(0, -1), **more)


def message_of(
    keys: Sequence[int], rows: np.ndarray | None, offset: int, table: str = TABLE, dim: int = 3, **more: Any
) -> Message:
    """The same in wire form."""
    if rows is None:
        value, headers = encode_erasures(np.array(keys, np.int64), dim)
    else:
        value, headers = encode_rows(np.array(keys, np.int64), rows), {}
    return Message(table, value, Position(0, offset), {**headers, **headers_of(**more)})


def applied(server: hps_numba.HPS, number: int = 0) -> Mapping[int | str, int]:
    """Offsets that a source of a server has applied and committed, once nothing waits; what was read counts as done after that.

    Empty for ever if it resumes and others had applied everything.
    """
    stats = server.update_stats()[number]
    done = stats.committed == stats.positions and not stats.backlog_messages and not stats.backlog_bytes
    return stats.committed if done else {}


def wait_for(server: hps_numba.HPS, offset: int, number: int = 0, partition: int | str = 0) -> SourceStats:
    """Wait until a source has applied and committed everything up to an offset."""
    wait_until(lambda: applied(server, number).get(partition, -1) >= offset)
    return server.update_stats()[number]


class ListSource(UpdateSource):
    """Gives what a test puts into ``items``, from where ``COMMITTED`` says; ``on_poll`` may fail."""

    items: list[Any]
    committed: list[Position]
    on_poll: Callable[[], object]

    def __init__(self, section: Any, **more: Any) -> None:
        super().__init__(section, **more)
        bus = BUSES[section.name]
        self.bus, self.at, self.closed = bus, bus.start, False
        self.starts_over = bus.starts_over
        bus.opened.append(self)

    def poll(self, seconds: float) -> Sequence[Update | Message | Lost]:
        self.bus.on_poll()
        some = self.bus.items[self.at : self.at + self.bus.at_once]
        self.at += len(some)
        self.has_more = self.bus.has_more
        if not some:
            self.bus.pause(seconds)
        return some

    def commit(self, positions: Sequence[Position]) -> None:
        self.bus.on_commit()
        self.bus.committed.extend(positions)

    def start_over(self, lost: Sequence[Lost]) -> None:
        self.bus.items = [item for item in self.bus.items if not isinstance(item, Lost)]
        self.at = 0

    def keep_alive(self) -> None:
        self.bus.kept_alive += 1

    def lag(self) -> int | None:
        return len(self.bus.items) - self.at if self.bus.tells_lag else None

    def close(self) -> None:
        self.closed = True


class ListBus:
    """What a ``ListSource`` reads, and what it was told."""

    def __init__(self) -> None:
        import threading

        self.items: list[Any] = []
        self.start, self.at_once = 0, 10
        self.starts_over = False
        self.tells_lag = self.has_more = True
        self.committed: list[Position] = []
        self.opened: list[ListSource] = []
        self.kept_alive = 0
        self.on_poll: Callable[[], object] = lambda: None
        self.on_commit: Callable[[], object] = lambda: None
        waits = threading.Event()
        self.pause = lambda seconds: waits.wait(min(seconds, 0.005))


BUSES: dict[str, ListBus] = {}


def list_bus() -> tuple[ListBus, dict[str, Any]]:
    """A bus, and the section of a config that reads it."""
    name = f"list-{next(_numbers)}"
    BUSES[name] = ListBus()
    return BUSES[name], {"type": "support.updates:ListSource", "name": name, "poll_timeout_ms": 5, "failure_backoff_ms": 1}


def offset_in(place: Path) -> int:
    """The last offset that a reader of a folder has committed to its position file, which is replaced as a whole; or -1."""
    return int(json.loads(place.read_bytes())["offset"]) - 1 if place.exists() else -1
