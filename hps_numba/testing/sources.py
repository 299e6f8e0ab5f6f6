"""What every update source has to do (``hps_numba.updates.UpdateSource``)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from hps_numba.testing._rows import assert_same_bits, ints, rows_of
from hps_numba.updates import Lost, Message, Position, Update, UpdateSource
from hps_numba.updates._batches import batch_of

__all__ = ["SourceContract"]

TABLE, OTHER = "hps_et.m.a", "hps_et.m.b"
DIM = 3


def upsert(table: str, keys: Sequence[int], stamp: int = 0, partition: int | str = 0) -> Update:
    """To be published; the source gives it a position."""
    return Update(table, ints(*keys), rows_of(keys, DIM, stamp), Position(partition, -1), 1000 + stamp)


def as_update(item: Update | Message | Lost) -> Update:
    """What ``poll`` returned, with its message decoded if it is one; no key may be in it twice."""
    assert not isinstance(item, Lost), f"{item}: nothing was dropped from the bus"
    if isinstance(item, Update):
        return item
    skipped: list[str] = []
    batch = batch_of([item], dim=DIM, key_bytes=8, finite=False, on_skip=lambda _, skip: skipped.append(str(skip)))
    assert not skipped, f"{item}: {skipped}"
    assert not (len(batch.keys) and len(batch.erased)), "published as one or the other"
    keys, rows = (batch.keys, batch.rows) if len(batch.keys) else (batch.erased, None)
    return Update(item.table, keys, rows, item.position, batch.newest_ms, batch.version)


class SourceContract:
    """Subclass it and override the fixtures ``open_source`` and ``publish``; both speak of one bus, which is empty at first.

    Attributes:
        patience: seconds in which everything that was published has to arrive: a limit for hangs, not a measurement.
        keeps: the bus keeps what was committed, for sources that do not resume.
    """

    patience = 60.0
    keeps = True

    @pytest.fixture
    def open_source(self) -> Callable[..., UpdateSource]:
        """Opens the source, with ``resume=`` as the class takes it; the test closes it before it opens the next."""
        raise NotImplementedError("a subclass of SourceContract has a fixture open_source")

    @pytest.fixture
    def publish(self) -> Callable[[Sequence[Update]], None]:
        """Puts updates of distinct keys on the bus, in order, those of a table in one partition."""
        raise NotImplementedError("a subclass of SourceContract has a fixture publish")

    def received(self, source: UpdateSource, count: int) -> list[Update]:
        """Poll until so many updates have come."""
        updates: list[Update] = []
        end = time.monotonic() + self.patience
        while len(updates) < count:
            assert time.monotonic() < end, f"{len(updates)} of {count} updates arrived within {self.patience} s"
            updates += map(as_update, source.poll(0.1))
        return updates

    def test_an_empty_bus_gives_nothing(self, open_source: Callable[..., UpdateSource]) -> None:
        source = open_source()
        assert list(source.poll(0.01)) == []
        source.keep_alive()
        source.commit([])
        assert source.lag() in (None, 0, {})
        source.close()
        source.close()

    def test_updates_arrive_whole_and_in_order(
        self, open_source: Callable[..., UpdateSource], publish: Callable[[Sequence[Update]], None]
    ) -> None:
        source = open_source()
        delete = Update(TABLE, ints(1, -5), None, Position(0, -1), 1003)
        sent = [upsert(TABLE, [1, -(2**63), 2**63 - 1]), upsert(OTHER, [7], 1), upsert(TABLE, [1], 2), delete]
        publish(sent)
        got = self.received(source, len(sent))
        for table in (TABLE, OTHER):
            mine = [one for one in got if one.table == table]
            for one, expected in zip(mine, [one for one in sent if one.table == table], strict=True):
                assert one.event_time_ms == expected.event_time_ms
                np.testing.assert_array_equal(one.keys, expected.keys)
                assert (one.rows is None) == (expected.rows is None)
                if one.rows is not None:
                    assert_same_bits(one.rows, expected.rows)
            assert len({one.position.partition for one in mine}) == 1
        for partition in {one.position.partition for one in got}:
            offsets = [one.position.offset for one in got if one.position.partition == partition]
            assert offsets == sorted(set(offsets)), "offsets of a partition ascend"
        source.close()

    def test_versions_arrive(
        self, open_source: Callable[..., UpdateSource], publish: Callable[[Sequence[Update]], None]
    ) -> None:
        publish([Update(TABLE, ints(1), rows_of([1], DIM), Position(0, -1), 5, version) for version in (None, 1, 2**40)])
        source = open_source()
        assert [one.version for one in self.received(source, 3)] == [None, 1, 2**40]
        source.close()

    def test_what_was_not_committed_comes_again(
        self, open_source: Callable[..., UpdateSource], publish: Callable[[Sequence[Update]], None]
    ) -> None:
        source = open_source()
        publish([upsert(TABLE, [number], number) for number in range(4)])
        source.commit([self.received(source, 4)[1].position])
        source.close()
        again = open_source()
        got = self.received(again, 2)
        assert [one.keys.tolist() for one in got] == [[2], [3]]
        publish([upsert(TABLE, [4], 4)])
        assert [one.keys.tolist() for one in self.received(again, 1)] == [[4]]
        again.commit([got[-1].position])
        again.close()
        last = open_source()
        assert [one.keys.tolist() for one in self.received(last, 1)] == [[4]]
        last.close()

    def test_a_source_that_does_not_resume_begins_with_the_oldest_update(
        self, open_source: Callable[..., UpdateSource], publish: Callable[[Sequence[Update]], None]
    ) -> None:
        publish([upsert(TABLE, [number], number) for number in range(3)])
        source = open_source(resume=False)
        got = self.received(source, 3)
        source.commit([got[-1].position])
        source.close()
        again = open_source(resume=False)
        if self.keeps:
            assert [one.keys.tolist() for one in self.received(again, 3)] == [[0], [1], [2]]
        else:
            assert list(again.poll(0.01)) == []
        again.close()

    def test_a_wake_ends_a_poll_or_is_ignored(self, open_source: Callable[..., UpdateSource]) -> None:
        source = open_source()
        source.wake()
        assert list(source.poll(0.01)) == []
        source.close()
        source.wake()
