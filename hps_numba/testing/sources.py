"""What every update source has to do (``hps_numba.updates.UpdateSource``)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from hps_numba.testing._rows import assert_same_bits, ints, rows_of
from hps_numba.updates import Position, Update, UpdateSource

__all__ = ["SourceContract"]

TABLE, OTHER = "hps_et.m.a", "hps_et.m.b"
DIM = 3


def upsert(table: str, keys: Sequence[int], stamp: int = 0, partition: int = 0) -> Update:
    """To be published; the source gives it a position."""
    return Update(table, ints(*keys), rows_of(keys, DIM, stamp), Position(partition, -1), 1000 + stamp)


class SourceContract:
    """Subclass it and override the fixtures ``open_source`` and ``publish``; both speak of one bus, which is empty at first.

    Attributes:
        patience: seconds in which everything that was published has to arrive: a limit for hangs, not a measurement.
    """

    patience = 60.0

    @pytest.fixture
    def open_source(self) -> Callable[[], UpdateSource]:
        """Opens the source; called again it resumes where the last one was applied up to. It must not leave one open."""
        raise NotImplementedError("a subclass of SourceContract has a fixture open_source")

    @pytest.fixture
    def publish(self) -> Callable[[Sequence[Update]], None]:
        """Puts updates on the bus, in order, each in the partition of its position."""
        raise NotImplementedError("a subclass of SourceContract has a fixture publish")

    def received(self, source: UpdateSource, count: int) -> list[Update]:
        """Poll until so many updates have come."""
        updates: list[Update] = []
        end = time.monotonic() + self.patience
        while len(updates) < count:
            assert time.monotonic() < end, f"{len(updates)} of {count} updates arrived within {self.patience} s"
            updates += source.poll(0.1)
        return updates

    def test_an_empty_bus_gives_nothing(self, open_source: Callable[[], UpdateSource]) -> None:
        source = open_source()
        assert list(source.poll(0.01)) == []
        source.close()
        source.close()

    def test_updates_arrive_whole_and_in_order(
        self, open_source: Callable[[], UpdateSource], publish: Callable[[Sequence[Update]], None]
    ) -> None:
        source = open_source()
        delete = Update(TABLE, ints(1), None, Position(0, -1), 1003)
        sent = [upsert(TABLE, [1, -(2**63), 2**63 - 1]), upsert(OTHER, [7], 1), upsert(TABLE, [1], 2), delete]
        publish(sent)
        got = self.received(source, len(sent))
        for one, expected in zip(got, sent, strict=True):
            assert (one.table, one.event_time_ms) == (expected.table, expected.event_time_ms)
            np.testing.assert_array_equal(one.keys, expected.keys)
            assert (one.rows is None) == (expected.rows is None)
            if one.rows is not None:
                assert_same_bits(one.rows, expected.rows)
        offsets = [one.position.offset for one in got]
        assert offsets == sorted(set(offsets)), "offsets of a partition ascend"
        source.close()

    def test_what_was_not_applied_comes_again(
        self, open_source: Callable[[], UpdateSource], publish: Callable[[Sequence[Update]], None]
    ) -> None:
        source = open_source()
        publish([upsert(TABLE, [number], number) for number in range(4)])
        source.applied(self.received(source, 4)[1].position)
        source.close()
        again = open_source()
        got = self.received(again, 2)
        assert [one.keys.tolist() for one in got] == [[2], [3]]
        again.applied(got[-1].position)
        again.close()
        last = open_source()
        assert list(last.poll(0.01)) == []
        last.close()
