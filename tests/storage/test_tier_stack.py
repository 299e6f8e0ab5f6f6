"""Tiers that are slower than host memory: in which order they are asked, what is kept, what time and failures cost."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.clocks import stop_clock
from support.factories import KEEPING, Workshop
from support.fakes import DictTier, NoisyTier, WrongTier
from support.oracles import NaiveServer, assert_same_bits, rows_of

import hps_numba
from hps_numba.config import PersistentDatabaseConfig
from hps_numba.errors import ClosedError, HpsError, TierError
from hps_numba.storage.tier_stack import TierStack
from hps_numba.storage.tiers._tier import Fetched
from hps_numba.storage.tiers._wrappers import CountingTier, FlakyTier, SlowTier

DIM = 3
TAG = "hps_et.m.sparse_embedding0"
KEYS = list(range(9))


def stats_of(server: hps_numba.HPS) -> Any:
    return server.stats()["m"]["sparse_embedding0"]


# --- the order of tiers -----------------------------------------------------------------------------------------------


def test_each_tier_is_asked_only_for_what_faster_ones_lack(workshop: Workshop) -> None:  # D01
    server, tier = workshop.open_cold()
    truth = NaiveServer(DIM, -7.5, places=2)
    truth.places[1].upsert(KEYS, rows_of(KEYS, DIM))
    for store in (server._catalog.models["m"].tables[0].store, truth.places[0]):
        store.upsert(np.array([0, 1]), rows_of([0, 1], DIM, 1))
    tier.calls.clear()
    tier.keys.clear()
    keys = [1, 5, 99, 5, 0, 98, 5, 7]
    assert_same_bits(server.lookup(keys, "m", 0), truth.lookup(keys))
    stats = stats_of(server)
    assert [stats.host_hits, stats.tier_hits, stats.absent] == truth.answered == [2, 4, 2]
    assert (tier.calls, tier.keys) == ({"fetch": 1}, {"fetch": 4})  # distinct keys: 5, 7, 98, 99


def test_no_slower_tier_is_asked_if_host_memory_has_all(workshop: Workshop) -> None:  # D01
    server, tier = workshop.open_cold(volatile={"type": "hash_map"})
    tier.calls.clear()
    for _ in range(3):
        server.lookup(KEYS, "m", 0)
    assert not tier.calls
    assert stats_of(server).host_hits == 27


def test_fetched_rows_are_not_kept_unless_asked_for(workshop: Workshop) -> None:  # D04
    server, tier = workshop.open_cold()
    for _ in range(2):
        server.lookup(KEYS, "m", 0)
    workshop.let_background_finish(server)
    assert (stats_of(server).rows, tier.keys["fetch"]) == (0, 18)


def stack_of(*contents: dict[int, int], wrap: Any = lambda tier: tier) -> Any:
    """A stack of dicts, each given as key -> stamp of its row."""
    tiers = []
    for content in contents:
        tier = DictTier(PersistentDatabaseConfig(max_batch_size=2))
        for key, stamp in content.items():
            tier.insert(TAG, np.array([key]), rows_of([key], DIM, stamp))
        tiers.append(wrap(tier))
    return TierStack(tiers)


def test_a_stack_answers_from_its_first_tier_that_has_a_key() -> None:  # D01
    stack = stack_of({1: 0, 2: 0}, {2: 1, 3: 1}, {3: 2, 4: 2}, wrap=CountingTier)
    rows = np.full((5, DIM), 9, np.float32)
    answer = stack.fetch(TAG, np.array([4, 3, 2, 1, 0]), rows)
    assert (answer.found.tolist(), answer.unsure.any(), answer.errors) == ([True] * 4 + [False], False, 0)
    expected = [rows_of([4], DIM, 2), rows_of([3], DIM, 1), rows_of([2, 1], DIM), np.full((1, DIM), 9, np.float32)]
    assert_same_bits(rows, np.concatenate(expected))
    assert [tier.keys["fetch"] for tier in stack.tiers] == [5, 3, 2]
    assert stack.contains(TAG, np.array([0, 1, 4])).tolist() == [False, True, True]


def test_a_stack_writes_the_slowest_tier_first_and_stops_at_a_failure() -> None:  # D01
    stack = stack_of({1: 0}, {1: 0}, {1: 0}, wrap=lambda tier: FlakyTier(tier, set()))
    stack.tiers[1].fail_on.add("insert")
    with pytest.raises(TierError):
        stack.insert(TAG, np.array([1, 5]), rows_of([1, 5], DIM, 3))
    assert [tier.size(TAG) for tier in stack.tiers] == [1, 1, 2]


def test_a_stack_updates_only_where_a_row_is() -> None:
    stack = stack_of({1: 0, 2: 0}, {2: 0, 3: 0})
    stack.update(TAG, np.array([1, 3, 4]), rows_of([1, 3, 4], DIM, 2))
    assert [sorted(next(tier.scan(TAG))[0].tolist()) for tier in stack.tiers] == [[1, 2], [2, 3]]
    rows = np.zeros((3, DIM), np.float32)
    stack.fetch(TAG, np.array([1, 2, 3]), rows)
    assert_same_bits(rows, np.concatenate([rows_of([1], DIM, 2), rows_of([2], DIM), rows_of([3], DIM, 2)]))


def test_a_read_only_tier_is_not_written() -> None:
    stack = TierStack([DictTier(PersistentDatabaseConfig(read_only=True)), DictTier(PersistentDatabaseConfig())])
    stack.insert(TAG, np.array([1]), rows_of([1], DIM))
    stack.update(TAG, np.array([1]), rows_of([1], DIM, 1))
    assert [tier.size(TAG) for tier in stack.tiers] == [0, 1]
    assert [tier.inner for tier in stack.writable] == list(stack.tiers[1:])
    stack.erase(TAG)
    assert stack.tiers[1].size(TAG) == 0


def test_an_empty_stack_is_false_and_knows_nothing() -> None:
    stack = TierStack([])
    assert not stack
    answer = stack.fetch(TAG, np.array([1]), np.zeros((1, DIM), np.float32))
    assert not answer.found.any()
    assert not answer.unsure.any()


class StuckTier(DictTier):
    """Cannot be closed."""

    def close(self) -> None:
        raise TierError("stuck")


def test_a_tier_that_cannot_be_closed_does_not_keep_others_open() -> None:
    tiers = [StuckTier(PersistentDatabaseConfig()), DictTier(PersistentDatabaseConfig())]
    for order in (tiers, tiers[::-1]):
        tiers[1].closed = False
        with pytest.raises(TierError, match="stuck"):
            TierStack(order).close()
        assert tiers[1].closed


def test_a_tier_that_cannot_drop_a_table_does_not_keep_it_in_others() -> None:
    for stuck in (0, 1):
        stack = stack_of({1: 0}, {1: 0}, wrap=lambda tier: FlakyTier(tier, set()))
        stack.tiers[stuck].fail_on.add("erase")
        with pytest.raises(TierError, match="erase: failed on purpose"):
            stack.erase(TAG)
        assert [tier.size(TAG) for tier in stack.tiers] == [int(stuck == 0), int(stuck == 1)]


def test_a_closed_stack_asks_no_tier() -> None:
    stack = stack_of({1: 0}, wrap=CountingTier)
    stack.close()
    keys, rows = np.array([1]), np.zeros((1, DIM), np.float32)
    for call in (
        lambda: stack.fetch(TAG, keys, rows),
        lambda: stack.contains(TAG, keys),
        lambda: stack.insert(TAG, keys, rows),
        lambda: stack.erase(TAG),
    ):
        with pytest.raises(ClosedError, match="the slower tiers are closed"):
            call()
    assert not stack.tiers[0].calls


# --- writes reach every tier ------------------------------------------------------------------------------------------


def test_writes_reach_host_memory_and_the_slower_tier(workshop: Workshop) -> None:
    server, tier = workshop.open_cold(volatile={"type": "hash_map"})
    assert server.insert([2, 50], rows_of([2, 50], DIM, 1), "m", 0) == 1
    assert server.update([3, 60], rows_of([3, 60], DIM, 2), "m", 0) == 1
    assert server.erase([4, 70], "m", 0) == 1
    behind = np.full((5, DIM), -7.5, np.float32)
    assert tier.fetch(TAG, np.array([2, 50, 3, 60, 4]), behind).found.tolist() == [True, True, True, False, False]
    assert_same_bits(server.lookup([2, 50, 3, 60, 4], "m", 0), behind)
    assert_same_bits(behind[:3], np.concatenate([rows_of([2, 50], DIM, 1), rows_of([3], DIM, 2)]))


def test_rows_that_host_memory_evicts_are_still_found(workshop: Workshop) -> None:  # D01, D03
    bound = {"type": "hash_map", "num_partitions": 1, "overflow_margin": 4, "overflow_resolution_target": 0.5}
    server, tier = workshop.open_cold(volatile={**bound, "max_batch_size": 1})
    assert 2 <= stats_of(server).rows <= 4
    assert_same_bits(server.lookup(KEYS, "m", 0), rows_of(KEYS, DIM))
    assert stats_of(server).evicted == len(KEYS) - stats_of(server).rows
    assert tier.size(TAG) == 9


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that only ``time.sleep`` lets pass."""
    return stop_clock(monkeypatch, 1000.0)


def test_a_time_budget_gives_a_partial_answer_that_is_counted(workshop: Workshop, clock: list[float]) -> None:  # D07
    server, tier = workshop.open_cold("support.fakes:SlowDictTier", entry={"time_budget_ms": 150.0}, max_batch_size=1)
    tier.seconds = 0.1  # the batches begin after 0 and 100 ms; a third would after 200 ms
    rows = server.lookup([0, 1, 2, 3, 4, 4], "m", 0)
    assert_same_bits(rows[:2], rows_of([0, 1], DIM))
    assert (rows[2:] == -7.5).all()
    stats = stats_of(server)
    assert (stats.tier_hits, stats.unanswered, stats.absent, stats.defaults) == (2, 4, 0, 4)
    tier.seconds = 0.0
    assert_same_bits(server.lookup(KEYS, "m", 0), rows_of(KEYS, DIM))
    assert stats_of(server).unanswered == 4


def test_a_time_budget_of_0_waits(workshop: Workshop, clock: list[float]) -> None:  # D07
    server, tier = workshop.open_cold("support.fakes:SlowDictTier", entry={"time_budget_ms": 0}, max_batch_size=3)
    tier.seconds = 1e6
    assert_same_bits(server.lookup(KEYS, "m", 0), rows_of(KEYS, DIM))
    assert stats_of(server).unanswered == 0


def test_unanswered_keys_are_not_kept_as_default_rows(workshop: Workshop, clock: list[float]) -> None:  # D04, D07
    server, tier = workshop.open_cold(
        "support.fakes:SlowDictTier", volatile=KEEPING, entry={"time_budget_ms": 25.0}, max_batch_size=1
    )
    tier.seconds = 0.01
    server.lookup(KEYS, "m", 0)
    workshop.let_background_finish(server)
    kept = [int(key) for keys, _ in server._catalog.models["m"].tables[0].store.scan() for key in keys]
    assert sorted(kept) == [0, 1, 2]
    tier.seconds = 0.0
    assert_same_bits(server.lookup(KEYS, "m", 0), rows_of(KEYS, DIM))


def test_a_stack_reports_late_keys_as_unsure_unless_a_later_tier_has_them() -> None:  # D07
    stack = stack_of({1: 0, 2: 0, 3: 0}, {3: 1}, wrap=lambda tier: tier)
    stack.tiers = (SlowTier(stack.tiers[0], 0.0), stack.tiers[1])
    rows = np.zeros((3, DIM), np.float32)
    answer = stack.fetch(TAG, np.array([1, 2, 3]), rows, deadline=time.monotonic() - 1)
    assert (answer.found.tolist(), answer.unsure.tolist()) == ([False] * 3, [True] * 3)


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_failing_tier_is_counted_and_host_memory_serves_on(workshop: Workshop) -> None:
    server, tier = workshop.open_cold("support.fakes:FlakyDictTier", volatile={"type": "hash_map", "initial_cache_rate": 0.5})
    tier.fail_on.add("fetch")
    rows = server.lookup([0, 4, 8, 8, 99], "m", 0)
    assert_same_bits(rows[:2], rows_of([0, 4], DIM))
    assert (rows[2:] == -7.5).all()
    stats = stats_of(server)
    assert (stats.host_hits, stats.unanswered, stats.absent, stats.tier_errors) == (2, 3, 0, 1)
    tier.fail_on.clear()
    assert_same_bits(server.lookup([8], "m", 0), rows_of([8], DIM))
    assert stats_of(server).tier_hits == 1


def test_lookups_log_nothing_above_debug(workshop: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    server, tier = workshop.open_cold("support.fakes:FlakyDictTier", volatile=KEEPING)
    caplog.clear()
    with caplog.at_level(logging.DEBUG):
        server.lookup([1, 99], "m", 0)
        tier.fail_on.add("fetch")
        server.lookup([2, 99], "m", 0)
        workshop.let_background_finish(server)
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("DEBUG", f"{TAG}: FlakyDictTier: fetch failed: fetch: failed on purpose")
    ]


def test_a_tier_after_a_failing_one_is_asked() -> None:
    stack = stack_of({1: 0, 2: 0}, {2: 1}, wrap=lambda tier: FlakyTier(tier, set()))
    stack.tiers[0].fail_on.add("fetch")
    rows = np.zeros((2, DIM), np.float32)
    answer = stack.fetch(TAG, np.array([1, 2]), rows)
    assert (answer.found.tolist(), answer.unsure.tolist(), answer.errors) == ([False, True], [True, False], 1)
    assert_same_bits(rows[1:], rows_of([2], DIM, 1))


@pytest.mark.parametrize("call", ["insert", "erase"])
def test_a_write_that_a_tier_refuses_raises_and_leaves_faster_tiers_unchanged(workshop: Workshop, call: str) -> None:
    server, tier = workshop.open_cold("support.fakes:FlakyDictTier", volatile={"type": "hash_map"})
    tier.fail_on.add(call)
    with pytest.raises(TierError, match=f"{call}: failed on purpose"):
        if call == "insert":
            server.insert([1], rows_of([1], DIM, 1), "m", 0)
        else:
            server.erase([1], "m", 0)
    assert_same_bits(server.lookup([1], "m", 0), rows_of([1], DIM))


def test_a_tier_that_cannot_be_filled_at_the_start_is_closed_again(workshop: Workshop) -> None:
    NoisyTier.opened.clear()
    with pytest.raises(TierError, match="insert: failed on purpose"):
        workshop.open(workshop.model((KEYS, DIM)), persistent_db={"type": "support.fakes:NoisyTier"})
    assert [tier.closed for tier in NoisyTier.opened] == [True]


def test_a_tier_is_closed_if_the_next_one_cannot_be_opened(workshop: Workshop) -> None:
    NoisyTier.opened.clear()
    with pytest.raises(HpsError, match="has no 'MissingTier'"):
        workshop.open(
            workshop.model((KEYS, DIM)),
            volatile_db={"type": "support.fakes:NoisyTier"},
            persistent_db={"type": "support.fakes:MissingTier"},
        )
    assert [tier.closed for tier in NoisyTier.opened] == [True]


# --- answers that break the contract ----------------------------------------------------------------------------------

BAD_ANSWERS: dict[str, tuple[Any, str]] = {
    "numbers": (Fetched(np.array([0, 1, 1]), 3), r"fetch: found: expected bool\[3\], got int64\[3\]"),
    "short": (Fetched(np.ones(2, bool), 3), r"fetch: found: expected bool\[3\], got bool\[2\]"),
    "column": (Fetched(np.ones((3, 1), bool), 3), r"fetch: found: expected bool\[3\], got bool\[3, 1\]"),
    "list": (Fetched([True, False, True], 3), r"fetch: found: expected bool\[3\], got list"),  # type: ignore[arg-type]
    "negative": (Fetched(np.ones(3, bool), -1), r"fetch: asked: expected 0 to 3, got -1"),
    "beyond": (Fetched(np.ones(3, bool), 4), r"fetch: asked: expected 0 to 3, got 4"),
    "none": (None, r"fetch: expected Fetched, got NoneType"),
}


@pytest.mark.parametrize("kind", BAD_ANSWERS)
def test_an_answer_that_breaks_the_contract_is_raised(workshop: Workshop, kind: str) -> None:
    server, tier = workshop.open_cold("support.fakes:WrongTier")
    tier.answer, message = BAD_ANSWERS[kind]
    with pytest.raises(TierError, match=f"WrongTier.{message}"):
        server.lookup([0, 1, 2], "m", 0)
    assert stats_of(server).tier_errors == 0  # not taken for a tier that is out of order


def test_contains_refuses_positions_instead_of_flags() -> None:
    tier = WrongTier(PersistentDatabaseConfig())
    tier.answer = np.array([0, 2])
    with pytest.raises(TierError, match=r"WrongTier.contains: expected bool\[3\], got int64\[2\]"):
        TierStack([tier]).contains(TAG, np.arange(3))


BAD_FLAGS: dict[str, tuple[Any, str]] = {
    "positions": (np.array([0, 2]), r"expected bool\[3\], got int64\[2\]"),
    "list": ([True, False, True], r"expected bool\[3\], got list"),
    "none": (None, r"expected bool\[3\], got NoneType"),
    "long": (np.ones(4, bool), r"expected bool\[3\], got bool\[4\]"),
}


@pytest.mark.parametrize("kind", BAD_FLAGS)
def test_update_refuses_flags_that_break_the_contract_and_writes_nothing(kind: str) -> None:
    tier = WrongTier(PersistentDatabaseConfig())
    tier.answer, message = BAD_FLAGS[kind]
    with pytest.raises(TierError, match=f"WrongTier.contains: {message}"):
        TierStack([tier]).update(TAG, np.arange(3), rows_of(range(3), DIM))
    assert tier.size(TAG) == 0


BAD_CHUNKS: dict[str, tuple[Any, str]] = {
    "no_pair": (np.arange(3), r"scan: expected pairs of keys and rows, got int64\[3\]"),
    "narrow": ((np.arange(3, dtype=np.int32), rows_of(range(3), DIM)), r"scan: keys: expected int64\[n\], got int32\[3\]"),
    "wide": ((np.arange(3), np.zeros((3, DIM))), r"scan: rows: expected float32\[3, dim\], got float64\[3, \d+\]"),
    "short": ((np.arange(3), rows_of(range(2), DIM)), r"scan: rows: expected float32\[3, dim\], got float32\[2, \d+\]"),
    "none": (None, "scan: expected pairs of keys and rows, got NoneType"),
}


@pytest.mark.parametrize("kind", BAD_CHUNKS)
def test_a_chunk_of_a_scan_that_breaks_the_contract_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk, message = BAD_CHUNKS[kind]
    monkeypatch.setattr(DictTier, "scan", lambda *_: iter([chunk]))
    (tier,) = TierStack([DictTier(PersistentDatabaseConfig())]).checked
    with pytest.raises(TierError, match=f"DictTier.{message}"):
        list(tier.scan(TAG))
    monkeypatch.setattr(DictTier, "scan", lambda *_: 5)
    with pytest.raises(TierError, match=r"DictTier\.scan: expected an answer or a TierError, got TypeError"):
        list(tier.scan(TAG))


CALLS: dict[str, Callable[[Any], object]] = {
    "fetch": lambda server: server.lookup([0, 1], "m", 0),
    "contains": lambda server: server.contains([0, 1], "m", 0),
    "insert": lambda server: server.insert([0], rows_of([0], DIM), "m", 0),
    "erase": lambda server: server.erase([0], "m", 0),
    "scan": lambda server: server.locked_table("m", 0).__enter__(),
}


@pytest.mark.parametrize("raised", [ValueError("no\nsuch"), SystemExit(2), GeneratorExit(), StopIteration(), KeyError("x")])
@pytest.mark.parametrize("call", CALLS)
def test_whatever_a_tier_raises_is_a_tier_error_and_the_server_lives_on(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, call: str, raised: BaseException
) -> None:
    server, tier = workshop.open_cold("support.fakes:DictTier")

    def fail(*args: Any, **options: Any) -> Any:
        raise raised

    with monkeypatch.context() as patch:
        patch.setattr(tier, call, fail)
        with pytest.raises(TierError, match=rf"DictTier\.{call}: expected an answer or a TierError, got ") as caught:
            CALLS[call](server)
        assert caught.value.__cause__ is raised
        assert "\n" not in str(caught.value)
    assert np.array_equal(server.lookup([0, 1], "m", 0), rows_of([0, 1], DIM))


def test_a_ctrl_c_in_a_tier_reaches_the_caller(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    server, tier = workshop.open_cold("support.fakes:DictTier")
    monkeypatch.setattr(tier, "fetch", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        server.lookup([0, 1], "m", 0)
