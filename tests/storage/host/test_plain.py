"""Small lookups of plain arrays give what ``HostStore.lookup`` gives, and leave to it what is not plain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.oracles import assert_same_bits, rows_of

from hps_numba.kernels.layouts.host_store import COUNTER_ABSENT, COUNTER_BYTES, COUNTER_CALLS, COUNTER_KEYS, COUNTER_MISSES
from hps_numba.runtime.threads import SPLIT_BYTES
from hps_numba.storage.host.store import HostStore

DIM = 5
KEYS = np.arange(0, 600, 2)


def new_store(**options: Any) -> HostStore:
    store = HostStore(DIM, name="t", **options)
    store.upsert(KEYS, rows_of(KEYS, DIM))
    return store


def test_plain_lookups_equal_lookups() -> None:
    store, counters = new_store(), np.zeros(COUNTER_BYTES // 8, np.int64)
    plain = store.plain_lookups(-7.5, counters.ctypes.data)
    random = np.random.default_rng(1)
    calls = keys = absent = 0
    for n in (1, 2, 7, 100, 3000):
        some = random.integers(-10, 700, n)
        expected = np.empty((n, DIM), np.float32)
        missing = store.lookup(some, expected, -7.5)
        for out in (None, np.full((n, DIM), 9, np.float32)):
            rows = plain(some, out)
            assert rows is not None and (out is None or rows is out)
            assert_same_bits(rows, expected)
            calls, keys, absent = calls + 1, keys + n, absent + missing
    counted = {name: int(counters[name // 8]) for name in (COUNTER_CALLS, COUNTER_KEYS, COUNTER_MISSES, COUNTER_ABSENT)}
    assert counted == {COUNTER_CALLS: calls, COUNTER_KEYS: keys, COUNTER_MISSES: absent, COUNTER_ABSENT: absent}
    store.close()


def test_what_is_not_plain_is_left_alone() -> None:
    store, counters = new_store(), np.zeros(COUNTER_BYTES // 8, np.int64)
    plain = store.plain_lookups(0.0, counters.ctypes.data)
    keys, out = KEYS[:4].copy(), np.full((4, DIM), 9, np.float32)
    read_only = keys.copy()
    read_only.flags.writeable = False
    locked = out.copy()
    locked.flags.writeable = False
    memory = np.zeros(4 * DIM, np.float32)
    too_many = np.zeros((SPLIT_BYTES - 1) // (4 * DIM + 64) + 1, np.int64)
    for some, to in (
        (keys.astype(np.int32), out),
        (keys.astype(">i8"), out),
        (keys.reshape(2, 2), out),
        (np.zeros(8, np.int64)[::2], out),
        (np.zeros(33, np.uint8)[1:].view(np.int64), out),
        (read_only, out),
        (np.empty(0, np.int64), None),
        (np.empty(0, np.int64), np.empty((0, DIM), np.float32)),
        (too_many, None),
        (keys, out[:3]),
        (keys, np.empty((5, DIM), np.float32)),
        (keys, np.empty((4, DIM + 1), np.float32)),
        (keys, np.empty(4 * DIM, np.float32)),
        (keys, out.astype(np.float64)),
        (keys, np.empty((DIM, 4), np.float32).T),
        (keys, locked),
        (keys, out.tolist()),
        (memory[:8].view(np.int64), memory.reshape(4, DIM)),  # keys that would be overwritten while they are read
    ):
        assert plain(some, to) is None
    assert not counters.any() and (out == 9).all() and not memory.any()
    assert plain(too_many[1:], None) is not None
    store.close()


def test_plain_lookups_of_a_closed_store_do_nothing() -> None:
    store = new_store()
    plain = store.plain_lookups(0.0, 0)
    assert plain(KEYS, None) is not None
    store.close()
    assert plain(KEYS, None) is None
    assert len(store.epochs._idle) == 64  # the record came back


@pytest.mark.parametrize("policy", ["evict_oldest", "evict_least_used"])
def test_plain_lookups_keep_rows_from_eviction(policy: str) -> None:
    store = new_store(max_rows=len(KEYS), policy=policy, target=0.5)
    plain = store.plain_lookups(0.0, 0)
    used = KEYS[100:140].copy()
    for _ in range(3):
        plain(used, None)
    store.upsert(np.array([1]), rows_of(np.array([1]), DIM))  # one row too many
    assert len(store) == len(KEYS) // 2 and store.contains(used).all()
    store.close()
