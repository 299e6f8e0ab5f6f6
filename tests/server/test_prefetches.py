"""``prefetch``: rows of slower tiers come into host memory and caches ahead of lookups, and never in their way."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from support.factories import COLD, KEEPING, Workshop
from support.internals import served_model, served_table, slower_tier, wait_for_background
from support.oracles import assert_same_bits, rows_of
from support.waiting import HANG_SECONDS, join_all, wait_until

import hps_numba
from hps_numba.errors import ClosedError, ConfigError, KeyDtypeError, TierError, UnknownModelError
from hps_numba.runtime.background import BackgroundJobs
from hps_numba.server.prefetches import Prefetches
from hps_numba.server.shared_fetches import SharedFetches

DIM = 3
KEYS = list(range(9))
CACHED = {"deployed_device_list": [0], "gpucacheper": 1.0, "hit_rate_threshold": 1.0, "init_ec": False}


def stats_of(server: hps_numba.HPS) -> Any:
    return server.stats()["m"]["sparse_embedding0"]


def open_cached(workshop: Workshop, volatile: Any = COLD, tier: str = "CountedDictTier") -> tuple[hps_numba.HPS, Any]:
    model = workshop.model((range(9), DIM), **CACHED)
    persistent = {"type": f"support.fakes:{tier}"}
    server = workshop.open(model, cache_on_cpu=True, volatile_db=volatile, persistent_db=persistent)
    return server, slower_tier(server)


@pytest.mark.parametrize("wait", [False, True])
def test_rows_come_into_host_memory_and_lookups_ask_no_slower_tier(workshop: Workshop, wait: bool) -> None:
    server, tier = workshop.open_cold()
    assert server.prefetch([[3, 4], [3, 99]], "m", 0, wait=wait) is True
    wait_for_background(server)
    assert (tier.calls["fetch"], tier.keys["fetch"]) == (1, 3)
    assert (stats_of(server).rows, stats_of(server).prefetched, stats_of(server).keys) == (2, 2, 0)
    assert_same_bits(server.lookup([4, 3], "m", "sparse_embedding0"), rows_of([4, 3], DIM))
    assert tier.calls["fetch"] == 1
    assert stats_of(server).host_hits == 2


def test_what_is_in_host_memory_is_not_fetched(workshop: Workshop) -> None:
    server, tier = workshop.open_cold()
    server.prefetch([1, 2], "m", 0, wait=True)
    server.prefetch([1, 2, 3], "m", 0, wait=True)
    server.prefetch([3, 2, 1], "m", 0, wait=True)
    assert (tier.calls["fetch"], tier.keys["fetch"], stats_of(server).prefetched) == (2, 3, 3)


@pytest.mark.parametrize("volatile", [COLD, {"type": "disabled"}], ids=["host", "no host memory"])
@pytest.mark.parametrize("device", [None, 0])
def test_rows_come_into_the_cache(workshop: Workshop, volatile: Any, device: int | None) -> None:
    server, tier = open_cached(workshop, volatile)
    server.prefetch([1, 2, 50], "m", 0, device, wait=True)
    (cache,) = served_table(server).caches  # type: ignore[misc]
    assert sorted(int(key) for key in cache.dump()) == [1, 2]
    calls = tier.calls["fetch"]
    assert_same_bits(server.lookup([2, 1], "m", 0), rows_of([2, 1], DIM))
    assert (tier.calls["fetch"], stats_of(server).cache_hits) == (calls, 2)
    server.update([1], rows_of([1], DIM, 1), "m", 0)
    assert_same_bits(server.lookup([1], "m", 0), rows_of([1], DIM, 1))


def test_rows_of_host_memory_come_into_the_cache(workshop: Workshop) -> None:
    server, tier = open_cached(workshop, {"type": "hash_map"})
    tier.calls.clear()
    server.prefetch([1, 2], "m", 0, wait=True)
    (cache,) = served_table(server).caches  # type: ignore[misc]
    assert sorted(int(key) for key in cache.dump()) == [1, 2]
    assert not tier.calls


def test_a_table_without_slower_tiers_has_nothing_to_bring_up(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(9), DIM)))
    assert server.prefetch(KEYS, "m", 0, wait=True)
    assert stats_of(server).prefetched == 0
    assert server.prefetch([], "m", 0)


def test_keys_are_fetched_some_at_a_time(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prefetches, "STEP", 4)
    server, tier = workshop.open_cold()
    server.prefetch(np.array(KEYS)[::-1], "m", 0, wait=True)
    assert (tier.calls["fetch"], tier.keys["fetch"], stats_of(server).rows) == (3, 9, 9)


def test_keys_are_those_of_the_call(workshop: Workshop) -> None:
    server, tier = workshop.open_cold("support.fakes:GateTier")
    tier.shut()
    keys = np.array([1, 2])
    server.prefetch([0], "m", 0)
    wait_until(lambda: tier.inside)
    server.prefetch(keys, "m", 0)
    keys[:] = 7
    tier.open()
    wait_for_background(server)
    assert tier.asked == [[0], [1, 2]]


def test_a_lookup_waits_for_the_prefetch_of_its_keys(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedFetches, "PATIENCE_SECONDS", HANG_SECONDS)
    server, tier = workshop.open_cold("support.fakes:GateTier")
    tier.shut()
    server.prefetch(KEYS, "m", 0)
    wait_until(lambda: tier.inside)
    answers: list[Any] = []
    reader = threading.Thread(target=lambda: answers.append(server.lookup([3, 4], "m", 0)))
    reader.start()
    flights = served_table(server).slow_path._fetches._flights  # type: ignore[union-attr]
    wait_until(lambda: any(flight._waiting for flight in tuple(flights)))
    tier.open()
    join_all(reader)
    assert_same_bits(answers[0], rows_of([3, 4], DIM))
    assert (len(tier.asked), stats_of(server).joined, stats_of(server).tier_hits) == (1, 2, 2)


@pytest.mark.parametrize("change", ["update", "erase", "replace"])
def test_a_row_that_is_written_meanwhile_does_not_come_back(workshop: Workshop, change: str) -> None:
    server, tier = workshop.open_cold("support.fakes:GateTier")
    tier.shut()
    server.prefetch([3, 4], "m", 0)
    wait_until(lambda: tier.inside)
    if change == "update":
        server.update([3], rows_of([3], DIM, 1), "m", 0)
    elif change == "erase":
        server.erase([3], "m", 0)
    else:
        server.replace_model("m", [workshop.table("v2", [3, 4], DIM, 1)])
    tier.open()
    wait_for_background(server)
    expected = np.full((1, DIM), -7.5, np.float32) if change == "erase" else rows_of([3], DIM, 1)
    assert_same_bits(server.lookup([3], "m", 0), expected)
    assert_same_bits(server.lookup([4], "m", 0), rows_of([4], DIM, 1 if change == "replace" else 0))
    if change == "update":
        assert stats_of(server).rows == 2  # the second attempt brought both


def test_failures_count_and_do_not_reach_lookups(workshop: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    server, tier = workshop.open_cold("support.fakes:FlakyDictTier")
    tier.fail_on = {"fetch"}
    server.prefetch([1], "m", 0)
    server.prefetch([2], "m", 0, wait=True)
    wait_for_background(server)
    assert (stats_of(server).tier_errors, stats_of(server).prefetched, stats_of(server).unanswered) == (2, 0, 0)
    tier.fail_on = set()
    assert_same_bits(server.lookup([1, 2], "m", 0), rows_of([1, 2], DIM))
    assert not caplog.records


def test_a_tier_that_breaks_its_contract_is_reported_to_who_waits(workshop: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    server, _ = workshop.open_cold("support.fakes:WrongTier")
    with pytest.raises(TierError, match="expected Fetched"):
        server.prefetch([1], "m", 0, wait=True)
    server.prefetch([1], "m", 0)
    wait_for_background(server)
    assert "expected Fetched" in caplog.text


def test_what_is_too_much_is_dropped(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    server, tier = workshop.open_cold("support.fakes:GateTier")
    tier.shut()
    monkeypatch.setattr(BackgroundJobs, "LIMIT", 3)
    monkeypatch.setattr(Prefetches, "MAX_KEYS", 5)
    assert server.prefetch(range(7), "m", 0)  # one call may have more
    wait_until(lambda: tier.inside)
    assert not server.prefetch([1], "m", 0)
    tier.open()
    wait_for_background(server)
    tier.shut()
    accepted = [server.prefetch([8], "m", 0) for _ in range(4)]
    assert accepted == [True, True, True, False]
    tier.open()
    wait_for_background(server)
    assert not served_model(server).prefetches._waiting
    assert server.prefetch([8], "m", 0)


def test_close_ends_a_prefetch(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prefetches, "STEP", 1)
    server, tier = workshop.open_cold("support.fakes:GateTier")
    tier.shut()
    server.prefetch(KEYS, "m", 0)
    server.prefetch(KEYS, "m", 0)
    wait_until(lambda: tier.inside)
    prefetches = served_model(server).prefetches
    closer = threading.Thread(target=server.close)
    closer.start()
    wait_until(lambda: prefetches._closed)
    tier.open()
    join_all(closer)
    assert len(tier.asked) <= 2
    with pytest.raises(ClosedError):
        server.prefetch([1], "m", 0)


def test_a_prefetch_inside_a_fetch_of_the_same_thread_does_not_wait_for_itself(workshop: Workshop) -> None:
    server, tier = workshop.open_cold()
    done: list[bool] = []

    def before(call: str, keys: int) -> None:
        if call == "fetch" and not done:
            done.append(True)
            server.prefetch([1, 2], "m", 0, wait=True)

    tier.before = before
    assert_same_bits(server.lookup([1, 2, 3], "m", 0), rows_of([1, 2, 3], DIM))
    assert done and stats_of(server).rows == 2


def test_bad_arguments_are_typed_errors(workshop: Workshop) -> None:
    server, _ = workshop.open_cold(volatile=KEEPING)
    with pytest.raises(UnknownModelError, match="'x' is not deployed"):
        server.prefetch([1], "x", 0)
    with pytest.raises(UnknownModelError, match="has no table"):
        server.prefetch([1], "m", 3)
    with pytest.raises(KeyDtypeError):
        server.prefetch([1.5], "m", 0)
    with pytest.raises(hps_numba.DeviceError, match="not on 5"):
        server.prefetch([1], "m", 0, 5)
    with pytest.raises(ConfigError, match="wait"):
        server.prefetch([1], "m", 0, wait="yes")  # type: ignore[arg-type]


def test_lookups_and_writes_beside_prefetches(workshop: Workshop) -> None:
    bounded = {**COLD, "overflow_margin": 6, "num_partitions": 1}
    server, _ = workshop.open_cold("support.fakes:SlowDictTier", volatile=bounded)
    stop, problems = threading.Event(), []

    def prefetch() -> None:
        rng = np.random.default_rng(1)
        while not stop.is_set():
            server.prefetch(rng.integers(0, 12, 4), "m", 0, wait=bool(rng.integers(2)))

    def look_up() -> None:
        try:
            while not stop.is_set():
                assert_same_bits(server.lookup(KEYS[1:], "m", 0), rows_of(KEYS[1:], DIM))
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=job) for job in (prefetch, look_up, look_up)]
    for thread in threads:
        thread.start()
    try:
        for stamp in range(1, 30):
            server.insert([0], rows_of([0], DIM, stamp), "m", 0)
            assert_same_bits(server.lookup([0], "m", 0), rows_of([0], DIM, stamp))
    finally:
        stop.set()
        join_all(*threads)
    assert not problems, problems
