"""The queue in this process passes the contract suite; it drops what all have, bounds what waits, and says what is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from support.oracles import rows_of
from support.waiting import HANG_SECONDS, join_all

from hps_numba.errors import TierUnavailable
from hps_numba.testing import SourceContract
from hps_numba.updates import Lost, Position, Update
from hps_numba.updates.in_process import Bus, InProcessSource, bus_named


def update(key: int) -> Update:
    return Update("hps_et.m.a", np.array([key]), rows_of([key], 3), Position(0, -1), 5)


@pytest.fixture
def bus(request: pytest.FixtureRequest) -> Bus:
    return bus_named(request.node.nodeid)


class TestInProcessSource(SourceContract):
    keeps = False
    patience = HANG_SECONDS

    @pytest.fixture
    def open_source(self, bus: Bus) -> Callable[..., InProcessSource]:
        bus.leave(bus.join("server")[0])  # from here on, what is published is kept for it
        return lambda **keys: InProcessSource.from_options(bus=bus.name, **keys)

    @pytest.fixture
    def publish(self, bus: Bus) -> Callable[[Sequence[Update]], None]:
        return lambda updates: [bus.put(one) for one in updates] and None


def opened(bus: Bus, **keys: Any) -> InProcessSource:
    return InProcessSource.from_options(bus=bus.name, **keys)


def keys_of(source: InProcessSource) -> list[int]:
    return [int(one.keys[0]) for one in source.poll(0.01) if isinstance(one, Update)]


def test_every_server_gets_every_update_and_finds_its_place_again(bus: Bus) -> None:
    one, two = opened(bus), opened(bus)
    for key in range(4):
        bus.put(update(key))
    assert keys_of(one) == keys_of(two) == [0, 1, 2, 3]
    one.commit([Position(0, 3)])
    two.commit([Position(0, 1)])
    assert bus.behind(0) == 4 and bus._first == 2, "what both have is dropped"
    two.close()
    again = opened(bus)
    assert keys_of(again) == [2, 3]
    assert (one.lag(), again.lag()) == (0, 0)


def test_a_poll_is_bounded_by_the_batch_size(bus: Bus) -> None:
    source = opened(bus, max_batch_size=2)
    for key in range(5):
        bus.put(update(key))
    assert [keys_of(source) for _ in range(4)] == [[0, 1], [2, 3], [4], []]


def test_a_full_queue_keeps_the_producer_waiting_until_something_is_committed(bus: Bus) -> None:
    bus.max_bytes = 2 * update(0).size
    source = opened(bus)
    bus.put(update(0))
    bus.put(update(1))
    with pytest.raises(TierUnavailable, match=r"expected room for 20 bytes within 0\.01 s, got 40 of 40 in use"):
        bus.put(update(2), 0.01)
    waiting = threading.Thread(target=bus.put, args=(update(2), HANG_SECONDS))
    waiting.start()
    assert keys_of(source) == [0, 1]
    source.commit([Position(0, 0)])
    join_all(waiting)
    assert keys_of(source) == [2]


def test_a_server_that_does_not_come_back_loses_its_place_when_the_queue_is_full(bus: Bus) -> None:
    bus.max_bytes = 2 * update(0).size
    opened(bus).close()
    for key in range(3):
        bus.put(update(key), 0.01)
    lost, one = opened(bus).poll(0.01)
    assert isinstance(lost, Lost) and isinstance(one, Update)
    assert (lost.messages, lost.position.offset, one.keys.tolist()) == (2, 2, [2])


def test_without_any_server_nothing_is_dropped(bus: Bus) -> None:
    bus.max_bytes = 2 * update(0).size
    bus.put(update(0))
    bus.put(update(1))
    with pytest.raises(TierUnavailable, match="no server applies them"):
        bus.put(update(2), 0.01)
    assert keys_of(opened(bus)) == [0, 1]


def test_what_is_gone_is_said(bus: Bus) -> None:
    bus.max_bytes = 2 * update(0).size
    source = opened(bus)
    assert source.poll(0) == []
    bus.leave(source._consumer)  # as if it were closed, but it reads on
    for key in range(3):
        bus.put(update(key), 0.01)
    lost, one = source.poll(0.01)
    assert isinstance(lost, Lost) and isinstance(one, Update)
    assert (lost.messages, lost.position.offset, one.keys.tolist()) == (2, 2, [2])


def test_an_update_larger_than_the_queue_passes_through_an_empty_one(bus: Bus) -> None:
    bus.max_bytes = 1
    source = opened(bus)
    bus.put(update(7), 0.01)
    assert keys_of(source) == [7]
