"""Ctrl-C at any moment keeps nothing that other processes wait for, even if its traceback stays, as in a notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from support.children import in_child
from support.interrupts import interrupted_everywhere
from support.oracles import assert_same_bits, rows_of
from support.shared_memory import MIB, new_name, open_tier
from support.waiting import wait_until

from hps_numba.storage.shared.file_locks import try_lock
from hps_numba.storage.shared.layout import WRITE_LOCK
from hps_numba.storage.tiers.multi_process_hash_map import MultiProcessHashMapTier

TAG, DIM = "hps_et.m.a", 4
KEYS = np.arange(20)
#: what the main thread runs in a call
FILES = ("tiers/multi_process_hash_map.py", "tiers/_host_tables.py", "storage/shared/segment.py", "storage/shared/table.py")


@pytest.fixture
def tier() -> Iterator[MultiProcessHashMapTier]:
    opened = open_tier(new_name(), MIB)
    opened.insert(TAG, KEYS, rows_of(KEYS, DIM))
    yield opened
    opened.close()


def another_process_may_write(tier: MultiProcessHashMapTier) -> bool:
    file = tier._tables.segment._file
    return in_child(lambda: try_lock(file, WRITE_LOCK)) == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda tier: tier.insert(TAG, KEYS, rows_of(KEYS, DIM)),
        lambda tier: tier.erase(TAG, KEYS),
        lambda tier: (
            tier.erase("hps_et.m.b") if tier.size("hps_et.m.b") else tier.insert("hps_et.m.b", KEYS, rows_of(KEYS, DIM))
        ),
    ],
    ids=["insert", "erase", "whole table"],
)
def test_an_interrupted_write_keeps_no_turn(
    tier: MultiProcessHashMapTier, call: Callable[[MultiProcessHashMapTier], int]
) -> None:
    kept = []
    for problem in interrupted_everywhere(lambda: call(tier), *FILES):
        kept.append(problem)
        wait_until(lambda: another_process_may_write(tier))
    assert any(problem is not None for problem in kept)
    newer = rows_of(KEYS, DIM, 7)
    assert in_child(lambda: tier.insert(TAG, KEYS, newer) in (0, len(KEYS))) == 0
    rows = np.empty((len(KEYS), DIM), np.float32)
    assert tier.fetch(TAG, KEYS, rows).found.all()
    assert_same_bits(rows, newer)
