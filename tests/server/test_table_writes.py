"""``TableWrites`` without a server: what keeps fetched rows out once a table is written, and exact reads of all tiers."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.fakes import DictTier, FlakyDictTier
from support.oracles import assert_same_bits, rows_of
from support.waiting import HANG_SECONDS, join_all

import hps_numba
from hps_numba.config import PersistentDatabaseConfig
from hps_numba.errors import TierError
from hps_numba.server.table_writes import TableWrites
from hps_numba.storage.host.store import HostStore
from hps_numba.storage.tier_stack import TierStack

DIM = 3
KEYS = np.arange(4)


@pytest.fixture
def spec(workshop: Workshop) -> Any:
    return hps_numba.read_config({"supportlonglong": True, "models": [workshop.model(([], DIM))]}).tables()[0]


def tier_with(spec: Any, keys: np.ndarray, kind: Any = DictTier) -> Any:
    tier = kind(PersistentDatabaseConfig())
    tier.insert(spec.tag, keys, rows_of(keys, DIM))
    return tier


def unwritten(writes: TableWrites, count: int) -> bool:
    with writes.unwritten_since(count) as answer:
        return answer


def test_a_table_is_unwritten_until_the_next_write(spec: Any) -> None:
    writes = TableWrites(spec, HostStore(DIM), TierStack([]))
    count = writes.count
    assert unwritten(writes, count)
    for change in (
        lambda: writes.insert(KEYS, rows_of(KEYS, DIM)),
        lambda: writes.update(KEYS, rows_of(KEYS, DIM, 1)),
        lambda: writes.read_modify_write(KEYS, lambda rows, found: rows),
        lambda: writes.erase(KEYS),
        lambda: writes.adopt(None),
    ):
        change()
        assert not unwritten(writes, count)
        count = writes.count
        assert unwritten(writes, count)


def test_a_write_that_fails_counts_as_a_write(spec: Any) -> None:
    tier = tier_with(spec, KEYS, FlakyDictTier)
    writes = TableWrites(spec, None, TierStack([tier]))
    count = writes.count
    tier.fail_on = {"insert"}
    with pytest.raises(TierError):
        writes.insert(KEYS, rows_of(KEYS, DIM))
    assert not unwritten(writes, count)


def test_a_write_in_progress_is_noticed_without_waiting(spec: Any) -> None:
    writes = TableWrites(spec, HostStore(DIM), TierStack([]))
    begun, go_on = threading.Event(), threading.Event()

    def write() -> None:
        with writes.changing():
            begun.set()
            assert go_on.wait(HANG_SECONDS)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert begun.wait(HANG_SECONDS)
        assert not unwritten(writes, writes.count)
    finally:
        go_on.set()
        join_all(writer)
    assert unwritten(writes, writes.count)


def test_writes_wait_for_the_end_of_an_insertion(spec: Any) -> None:
    writes = TableWrites(spec, HostStore(DIM), TierStack([]))
    with writes.unwritten_since(writes.count) as answer:
        writer = threading.Thread(target=writes.insert, args=(KEYS, rows_of(KEYS, DIM)))
        writer.start()
        writer.join(0.05)
        assert answer and writer.is_alive() and not writes.contains(KEYS).any()
    join_all(writer)
    assert writes.contains(KEYS).all()


def test_reads_find_the_rows_of_every_tier(spec: Any) -> None:
    store = HostStore(DIM)
    store.upsert(KEYS[:2], rows_of(KEYS[:2], DIM, 1))
    writes = TableWrites(spec, store, TierStack([tier_with(spec, KEYS[1:])]))
    rows, found = writes.read(np.array([3, 0, 1, 9, 3]))
    assert found.tolist() == [True, True, True, False, True]
    expected = np.concatenate([rows_of([3], DIM), rows_of([0, 1], DIM, 1), np.full((1, DIM), -7.5), rows_of([3], DIM)])
    assert_same_bits(rows, expected.astype(np.float32))
    assert writes.keys().tolist() == [0, 1, 2, 3]
    assert writes.contains(np.array([0, 3, 9])).tolist() == [True, True, False]


def test_reads_raise_if_a_slower_tier_fails(spec: Any) -> None:
    tier = tier_with(spec, KEYS, FlakyDictTier)
    writes = TableWrites(spec, HostStore(DIM), TierStack([tier]))
    tier.fail_on = {"fetch"}
    with pytest.raises(TierError, match="1 keys are in doubt"):
        writes.read(np.array([3]))
