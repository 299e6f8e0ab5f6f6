"""Rows that host memory evicts: demoted to slower tiers that lack them, and told to callbacks, without harm to the write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.factories import COLD, KEEPING, Workshop
from support.fakes import DictTier
from support.internals import served_table, slower_tier, wait_for_background
from support.oracles import assert_same_bits, rows_of
from support.waiting import HANG_SECONDS, wait_until

import hps_numba
from hps_numba.config import PersistentDatabaseConfig
from hps_numba.errors import ConfigError, ReentryError, UnknownModelError
from hps_numba.server.evictions import Evictions
from hps_numba.storage.host.store import HostStore

DIM = 3
TAG = "hps_et.m.sparse_embedding0"
BOUND = 10
BOUNDED = {"type": "hash_map", "overflow_margin": BOUND, "num_partitions": 1}
EMPTY = {"initialize_after_startup": False}


def open_server(workshop: Workshop, tier: str = "CountedDictTier", keys: Any = range(8), **top: Any) -> hps_numba.HPS:
    """Rows of the sparse model in host memory only: the slower tier came later, and is empty."""
    given = {"volatile_db": BOUNDED, "persistent_db": {"type": f"support.fakes:{tier}", **EMPTY}, **top}
    return workshop.open(workshop.model((keys, DIM)), **given)


def content(tier: Any) -> dict[int, list[float]]:
    return {int(key): row.tolist() for keys, rows in tier.scan(TAG) for key, row in zip(keys, rows, strict=True)}


# --- in a store -------------------------------------------------------------------------------------------------------


class Watcher:
    """Notes what it sees, and keeps rows while ``keeps`` is set."""

    watches = True

    def __init__(self) -> None:
        self.leaves: dict[int, np.ndarray] = {}
        self.gone: list[int] = []
        self.keeps = False
        self.look: Callable[[np.ndarray], Any] = lambda keys: None

    def leaving(self, keys: np.ndarray, rows: np.ndarray) -> bool:
        assert keys.dtype == np.int64 and rows.dtype == np.float32
        self.look(keys)
        if not self.keeps:
            self.leaves |= {int(key): row for key, row in zip(keys, rows, strict=True)}
        return not self.keeps

    def left(self, keys: np.ndarray) -> None:
        self.gone += keys.tolist()


@pytest.mark.parametrize("policy", ["evict_random", "evict_least_used", "evict_oldest"])
def test_a_watcher_sees_the_rows_that_would_leave_anyway(policy: str) -> None:
    rng = np.random.default_rng(3)
    keys = rng.permutation(3000)
    stores = [HostStore(DIM, max_rows=1000, policy=policy, target=0.6, batch_rows=500, seed=7) for _ in range(2)]
    watcher = Watcher()
    watcher.look = lambda keys: stores[1].contains(keys).all() or pytest.fail("gone before it was seen")
    stores[1].bound.watcher = watcher
    out = np.empty((100, DIM), np.float32)
    for start in range(0, 3000, 250):
        part = keys[start : start + 250]
        for store in stores:
            store.upsert(part, rows_of(part, DIM))
            store.lookup(np.ascontiguousarray(keys[start : start + 100]), out)
    if policy != "evict_oldest":  # whose clock is real
        assert sorted(stores[0].keys()) == sorted(stores[1].keys())
    assert stores[0].evicted == stores[1].evicted == len(watcher.gone)
    assert sorted(watcher.leaves) == sorted(watcher.gone) == sorted(set(keys.tolist()) - set(stores[1].keys().tolist()))
    for key, row in watcher.leaves.items():
        assert_same_bits(row, rows_of(key, DIM))
    found = stores[1].keys()
    rows = np.empty((len(found), DIM), np.float32)
    assert stores[1].lookup(found, rows) == 0
    assert_same_bits(rows, rows_of(found, DIM))


def test_rows_that_have_to_stay_stay_until_a_later_write() -> None:
    store, watcher = HostStore(DIM, max_rows=10, target=0.5), Watcher()
    store.bound.watcher, watcher.keeps = watcher, True
    for key in range(14):
        store.upsert(np.array([key]), rows_of([key], DIM))
    assert (len(store), store.evicted) == (14, 0)
    watcher.keeps = False
    store.upsert(np.array([14]), rows_of([14], DIM))
    assert (len(store), store.evicted, len(watcher.gone)) == (5, 10, 10)


# --- demotion ---------------------------------------------------------------------------------------------------------


def test_rows_that_no_slower_tier_has_are_demoted_before_they_leave(workshop: Workshop) -> None:
    server = open_server(workshop)
    tier = slower_tier(server)
    server.insert(range(100, 103), rows_of(range(100, 103), DIM), "m", 0)  # 11 rows: one too many
    assert server.stats()["m"]["sparse_embedding0"].rows == 8
    evicted = set(range(8)) | {100, 101, 102} - set(served_table(server).store.keys().tolist())  # type: ignore[union-attr]
    assert set(content(tier)) >= {100, 101, 102} and set(content(tier)) <= evicted | {100, 101, 102}
    every = [*range(8), 100, 101, 102]
    assert_same_bits(server.lookup(every, "m", 0), rows_of(every, DIM))


def test_only_what_a_slower_tier_lacks_is_written(workshop: Workshop) -> None:
    server = open_server(workshop)
    tier = slower_tier(server)
    for start in range(100, 140, 4):
        keys = range(start, start + 4)
        server.insert(keys, rows_of(keys, DIM), "m", 0)
    assert tier.keys["insert"] == len(content(tier)) <= 48
    every = [*range(8), *range(100, 140)]
    assert_same_bits(server.lookup(every, "m", 0), rows_of(every, DIM))


def test_a_demoted_row_is_the_newest_one(workshop: Workshop) -> None:
    server = open_server(workshop)
    server.update([0, 1, 2, 3], rows_of([0, 1, 2, 3], DIM, 1), "m", 0)  # in host memory only, as only it has them
    for start in range(100, 160, 4):
        server.insert(range(start, start + 4), rows_of(range(start, start + 4), DIM), "m", 0)
    assert_same_bits(server.lookup(range(4), "m", 0), rows_of(range(4), DIM, 1))
    assert_same_bits(server.lookup(range(4, 8), "m", 0), rows_of(range(4, 8), DIM))


def test_an_erased_row_is_not_demoted(workshop: Workshop) -> None:
    server = open_server(workshop)
    server.erase([0, 1, 2], "m", 0)
    for start in range(100, 160, 4):
        server.insert(range(start, start + 4), rows_of(range(start, start + 4), DIM), "m", 0)
    assert not server.contains([0, 1, 2], "m", 0).any()
    assert server.contains(range(3, 8), "m", 0).all()


def test_rows_stay_over_the_bound_while_no_tier_takes_them(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Evictions, "PAUSE_SECONDS", 0.0)
    server = open_server(workshop, "FlakyDictTier")
    tier = slower_tier(server)
    tier.fail_on = {"contains"}
    server.insert(range(100, 104), rows_of(range(100, 104), DIM), "m", 0)
    every = [*range(8), *range(100, 104)]
    assert_same_bits(server.lookup(every, "m", 0), rows_of(every, DIM))
    stats = server.stats()["m"]["sparse_embedding0"]
    assert (stats.rows, stats.evicted) == (12, 0)
    assert "host memory is over its bound: its rows cannot be demoted" in caplog.text
    tier.fail_on = set()
    server.insert([104], rows_of([104], DIM), "m", 0)
    assert server.stats()["m"]["sparse_embedding0"].rows == 8
    assert_same_bits(server.lookup(every, "m", 0), rows_of(every, DIM))


def test_after_a_failure_the_tier_is_left_alone_for_a_while(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    server = open_server(workshop, "FlakyDictTier")
    evictions = served_table(server).writes.evictions
    tier = slower_tier(server)
    tier.fail_on = {"contains"}
    keys, rows = np.array([1]), rows_of([1], DIM)
    monkeypatch.setattr(Evictions, "PAUSE_SECONDS", 0.05)
    assert not evictions.leaving(keys, rows)
    tier.fail_on = set()
    wait_until(lambda: evictions.leaving(keys, rows))
    tier.fail_on = {"contains"}
    monkeypatch.setattr(Evictions, "PAUSE_SECONDS", HANG_SECONDS)
    assert not evictions.leaving(keys, rows)
    tier.fail_on = set()
    assert not evictions.leaving(keys, rows)


@pytest.mark.parametrize(
    ("volatile", "persistent", "demotes"),
    [
        (BOUNDED, {}, False),  # the slower tier gets every row
        (BOUNDED, EMPTY, True),
        ({**BOUNDED, **EMPTY}, EMPTY, False),  # host memory gets rows by writes and lookups only
        (BOUNDED, {**EMPTY, "read_only": True}, False),
    ],
)
def test_nothing_is_asked_where_no_row_can_be_lost(workshop: Workshop, volatile: Any, persistent: Any, demotes: bool) -> None:
    server = workshop.open(
        workshop.model((range(8), DIM)),
        volatile_db=volatile,
        persistent_db={"type": "support.fakes:CountedDictTier", **persistent},
    )
    assert served_table(server).writes.evictions.demotes is demotes


def test_the_slowest_of_several_tiers_is_written_first(workshop: Workshop) -> None:
    tiers = [{"type": "hash_map", "overflow_margin": BOUND, "num_partitions": 1}]
    tiers += [{"type": "support.fakes:CountedDictTier", **EMPTY}, {"type": "support.fakes:CountedDictTier", **EMPTY}]
    server = workshop.open(workshop.model((range(8), DIM)), tiers=tiers)
    order: list[tuple[int, str]] = []
    for number, tier in enumerate(server._loader.slower.tiers):
        tier.before = lambda call, keys, number=number: order.append((number, call))
    server.insert(range(100, 103), rows_of(range(100, 103), DIM), "m", 0)
    inserts = [number for number, call in order if call == "insert"]
    assert inserts == [1, 0, 1, 0]  # the new rows, then the demoted ones


# --- callbacks --------------------------------------------------------------------------------------------------------


def test_callbacks_get_the_keys_that_have_left(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(8), DIM)), volatile_db=BOUNDED)
    gone: list[int] = []

    def told(keys: np.ndarray) -> None:
        assert keys.dtype == np.int64
        assert not server.contains(keys, "m", 0).any()
        assert (server.lookup(keys, "m", 0) == -7.5).all()  # there is no other tier
        gone.extend(keys.tolist())
        keys[:] = 0  # a copy

    stop = server.on_evict(told, "m", "sparse_embedding0")
    other: list[int] = []
    server.on_evict(other.extend, "m", 0)
    server.insert(range(100, 104), rows_of(range(100, 104), DIM), "m", 0)
    left = {*range(8), *range(100, 104)} - set(gone)
    assert len(gone) == len(set(gone)) == 4 and server.contains(sorted(left), "m", 0).all()
    assert other == gone
    stop()
    stop()
    server.insert(range(200, 204), rows_of(range(200, 204), DIM), "m", 0)
    assert (len(gone), len(other)) == (4, 8)


def test_rows_that_lookups_bring_up_evict_others(workshop: Workshop) -> None:
    server, _ = workshop.open_cold(volatile={**KEEPING, "overflow_margin": 4, "num_partitions": 1})
    gone: list[int] = []
    server.on_evict(gone.extend, "m", 0)
    server.lookup(range(9), "m", 0)
    wait_for_background(server)
    assert sorted([*gone, *served_table(server).store.keys()]) == list(range(9))  # type: ignore[union-attr]


@pytest.mark.parametrize("problem", [ValueError("no"), SystemExit(3)])
def test_what_a_callback_raises_is_logged_and_changes_nothing(
    workshop: Workshop, caplog: pytest.LogCaptureFixture, problem: BaseException
) -> None:
    server = workshop.open(workshop.model((range(8), DIM)), volatile_db=BOUNDED)
    gone: list[int] = []

    def fail(keys: np.ndarray) -> None:
        raise problem

    server.on_evict(fail, "m", 0)
    server.on_evict(gone.extend, "m", 0)
    assert server.insert(range(100, 104), rows_of(range(100, 104), DIM), "m", 0) == 4
    assert len(gone) == 4
    (record,) = caplog.records
    assert record.levelname == "ERROR" and "on_evict: a callback failed" in record.getMessage()
    left = sorted({*range(8), *range(100, 104)} - set(gone))
    assert_same_bits(server.lookup(left, "m", 0), rows_of(left, DIM))


def test_changes_inside_a_callback_are_refused(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(8), DIM)), volatile_db=BOUNDED)
    refused: list[str] = []

    def change(keys: np.ndarray) -> None:
        calls: dict[str, Callable[[], Any]] = {
            "insert": lambda: server.insert(keys, rows_of(keys, DIM), "m", 0),
            "erase": lambda: server.erase(keys, "m", 0),
            "replace": lambda: server.replace_model("m"),
            "unload": lambda: server.unload_model("m"),
            "close": server.close,
        }
        for name, call in calls.items():
            try:
                call()
            except ReentryError:
                refused.append(name)
        server.prefetch(keys, "m", 0, wait=True)

    server.on_evict(change, "m", 0)
    server.insert(range(100, 104), rows_of(range(100, 104), DIM), "m", 0)
    assert refused == ["insert", "erase", "replace", "unload", "close"]
    assert server.stats()["m"]["sparse_embedding0"].rows == 8


def test_bad_arguments_are_typed_errors(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(8), DIM)), volatile_db=COLD)
    with pytest.raises(ConfigError, match="callback: expected a function"):
        server.on_evict(3, "m", 0)  # type: ignore[arg-type]
    with pytest.raises(UnknownModelError):
        server.on_evict(print, "x", 0)
    assert isinstance(DictTier(PersistentDatabaseConfig()), DictTier)
