"""Updates that wait: what comes together is taken together, in order, as much at a time as was asked for."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from support.oracles import rows_of
from support.updates import message_of

from hps_numba.updates import Message
from hps_numba.updates._backlog import Backlog


def messages(*offsets: int) -> list[Message]:
    """Of ten rows each."""
    return [message_of(range(10), rows_of(np.arange(10), 3), offset) for offset in offsets]


def offsets(items: object) -> list[int]:
    return [item.position.offset for item in items]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("writes", "taken"), [(1, [1, 1, 1, 1, 1]), (15, [2, 2, 1]), (30, [3, 2]), (1000, [5])])
def test_items_are_taken_in_order_as_many_as_write_so_many_rows(writes: int, taken: list[int]) -> None:
    backlog = Backlog(1 << 20)
    backlog.put(messages(0, 1, 2))
    backlog.put([])
    backlog.put(messages(3, 4))
    assert backlog.messages == 5 and backlog.bytes > 5 * 10 * 20
    some = [backlog.take(writes, 0.001) for _ in taken]
    assert [len(items) for items in some] == taken
    assert offsets(chain.from_iterable(some)) == [0, 1, 2, 3, 4]
    assert backlog.take(writes, 0.001) == []
    for items in some:
        backlog.done(items)
    assert (backlog.messages, backlog.bytes, backlog.finished) == (0, 0, 5)


def test_a_wake_ends_a_wait_and_loses_nothing() -> None:
    backlog = Backlog(1 << 20)
    backlog.wake()
    assert backlog.take(100, 60) == []
    backlog.put(messages(0))
    backlog.wake()
    backlog.put(messages(1))
    assert offsets(backlog.take(100, 60)) == [0]
    assert offsets(backlog.take(100, 60)) == [1]
