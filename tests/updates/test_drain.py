"""A source can wait until what it gave is applied, before another process takes over, or have it dropped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from support.updates import ListBus, ListSource, list_bus, message_of
from support.waiting import HANG_SECONDS, wait_until

from hps_numba.server.table_writes import Applied
from hps_numba.updates._consumer import Consumer


class Gate:
    """A table whose writes wait, and may fail."""

    key_bytes, closed, outlive_the_process, dim = 8, False, True, 3

    def __init__(self) -> None:
        self.open = threading.Event()
        self.fails = False
        self.began = 0
        self.written: list[int] = []

    def find(self, tag: str) -> Gate:
        return self

    def refuses(self, version: int | None, event_ms: int) -> None:
        return None

    def apply(self, keys: np.ndarray, rows: np.ndarray, erased: np.ndarray, times: np.ndarray) -> Applied:
        self.began += 1
        if self.fails:
            raise OSError("out of order")
        assert self.open.wait(HANG_SECONDS)
        self.written += keys.tolist()
        return Applied(np.zeros(len(keys) + len(erased), bool))


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def started(gate: Gate) -> Iterator[Callable[[int], tuple[ListBus, Consumer]]]:
    made: list[Consumer] = []

    def start(messages: int) -> tuple[ListBus, Consumer]:
        bus, section = list_bus()
        bus.items = [message_of([key], np.zeros((1, 3), np.float32), key) for key in range(messages)]
        bus.at_once = 2
        section = {**section, "max_batch_size": 1}
        section.pop("type")
        made.append(Consumer(ListSource.from_options(**section), gate, "list"))  # type: ignore[arg-type]
        made[-1].start()
        return bus, made[-1]

    yield start
    gate.open.set()
    gate.fails = False
    for one in made:
        one.close()


def once(bus: ListBus, what: Callable[[ListSource], object]) -> list[object]:
    """What the source gets when it calls something in its next poll, before which it goes back to its first message."""
    answers: list[object] = []

    def call() -> None:
        if not answers:
            answers.append(what(bus.opened[0]))
            bus.opened[0].at = 0

    bus.on_poll = call
    wait_until(lambda: answers)
    return answers


def test_what_was_given_is_applied_and_committed_before_the_source_goes_on(
    gate: Gate, started: Callable[[int], tuple[ListBus, Consumer]]
) -> None:
    bus, _ = started(6)
    wait_until(lambda: gate.began and bus.opened[0].at == 6)
    threading.Timer(0.05, gate.open.set).start()
    seen: list[tuple[list[int], list[int]]] = []

    def drain(source: ListSource) -> bool:
        done = source.drained(HANG_SECONDS)
        seen.append((list(gate.written), [position.offset for position in bus.committed]))
        return done

    assert once(bus, drain) == [True]
    assert seen[0][0] == list(range(6)) and seen[0][1][-1] == 5


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_not_applied_in_time_is_dropped_and_not_committed(
    gate: Gate, started: Callable[[int], tuple[ListBus, Consumer]], fails: bool
) -> None:
    gate.fails = fails
    bus, consumer = started(6)
    wait_until(lambda: gate.began and bus.opened[0].at == 6)
    assert once(bus, lambda source: source.drained(0.01)) == [False]
    assert bus.committed == []
    if fails:  # an attempt may have begun before that; the second one from here is of what came again
        begun = gate.began
        wait_until(lambda: gate.began >= begun + 2)
    gate.fails = False
    gate.open.set()
    wait_until(lambda: bus.committed and bus.committed[-1].offset == 5)
    began = [0] if not fails else []  # that one was being written
    assert gate.written == began + list(range(6))
    wait_until(lambda: [updates.lag_messages for updates in consumer.stats().tables.values()] == [0])
