"""A server with caches: what config keys do, and that answers stay exact whatever tiers, writes, threads and forks do.

Every test runs with the cache in host memory; those with the fixture ``service`` also with CuPy keys on a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import threading
import time
import weakref
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.children import in_child
from support.factories import COLD, KEEPING, Workshop
from support.fakes import DictTier
from support.internals import bytes_in_use, due_refreshes, served_table, slower_tier, wait_for_release
from support.oracles import assert_same_bits, rows_of
from support.services import (
    DEFAULT,
    DIM,
    KEYS,
    Service,
    assert_adds_up,
    cache_of,
    defaults,
    stats_of,
)
from support.waiting import HANG_SECONDS, join_all, wait_until

import hps_numba
from hps_numba.cache.backends import CpuPreparedLookup
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.cache.launch_plan import LaunchPlan
from hps_numba.config import PersistentDatabaseConfig
from hps_numba.device import driver
from hps_numba.errors import DeviceError, PolicyError, TierError, UnknownModelError
from hps_numba.kernels.compiler.launch import PreparedLookup
from hps_numba.server.miss_list import MissList
from hps_numba.server.stats import Counters
from hps_numba.storage.host.store import HostStore

TAG = "hps_et.m.sparse_embedding0"
EVERY_TYPE: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "whole": {"gpucacheper": 1.0},
    "static": {"embedding_cache_type": "static"},
    "uvm": {"embedding_cache_type": "uvm", "gpucacheper": 0.4},
}


# --- capacity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 10, 130, 1000])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_capacity_is_at_least_that_of_hugectr(service: Service, share: float, rows: int) -> None:  # G09
    server = service.open((range(rows), DIM), gpucacheper=share, init_ec=False)
    expected = max(64, math.floor(Fraction(str(share)) * rows))
    cache = cache_of(server)
    assert cache.capacity >= -(-expected // 64) * 64
    assert cache.device == service.device
    assert cache.resident == 0


def test_gpucacheper_is_taken_as_a_decimal_fraction(on_cpu: Service) -> None:  # G09
    """0.29 * 1000 is 289.99 in floats and 290 on paper; the capacity may not be a step of 64 lower."""
    server = on_cpu.open((range(6400), DIM), gpucacheper=0.29, init_ec=False)  # 1856 = 29 * 64, less in floats
    assert 1856 <= cache_of(server).capacity < 1856 + 64


def test_cache_size_bytes_bounds_the_cache(service: Service) -> None:  # G10
    tables = [(range(2000), DIM)] * 3
    server = service.open(*tables, cache_size_bytes=[20_000, 0, 10_000_000], gpucacheper=0.5, init_ec=False)
    small, share, large = (cache_of(server, table) for table in range(3))
    table_bytes = [spec.bytes for spec in (small, share, large)]
    buffers = table_bytes[1] - (share.capacity // 10 * 128 + share.capacity * 80)  # what every cache takes besides
    assert table_bytes[0] - buffers <= 20_000
    assert small.capacity * (4 * DIM) >= 0.6 * 20_000 - buffers
    assert 1000 <= share.capacity < 1100
    assert large.capacity >= 2000


def test_cache_size_bytes_for_the_whole_table_holds_every_row(service: Service) -> None:  # G10
    server = service.open((range(300), DIM), cache_size_bytes=1_000_000, gpucacheper=0.0)
    assert cache_of(server).resident == 300
    assert_same_bits(service.lookup(server, range(300)), rows_of(range(300), DIM))
    assert cache_of(server).misses == 0


# --- warming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percentage", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_caches_are_warm_at_start(service: Service, share: float, percentage: float) -> None:  # G17
    server = service.open((range(200), DIM), gpucacheper=share, cache_refresh_percentage_per_iteration=percentage)
    cache = cache_of(server)
    assert cache.resident == len(next(iter(table_caches(server))).entries())
    assert cache.resident == 200 if share == 1 else 0.9 * cache.capacity <= cache.resident <= cache.capacity
    assert_same_bits(service.lookup(server, range(200)), rows_of(range(200), DIM))
    assert cache_of(server).hits == cache.resident
    assert_adds_up(server)


def test_without_init_ec_lookups_fill_the_cache(service: Service) -> None:  # G17
    server = service.open((range(30), DIM), gpucacheper=1.0, init_ec=False)
    for hits in (0, 30):
        assert_same_bits(service.lookup(server, range(30)), rows_of(range(30), DIM))
        assert cache_of(server).hits == hits
    assert (stats_of(server).host_hits, cache_of(server).insertions) == (30, 30)


def table_caches(server: hps_numba.HPS, table: int = 0) -> Any:
    return served_table(server, table).caches


# --- slower tiers and the threshold -----------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0, -1])
def test_threshold_0_answers_with_the_default_and_fetches_later(service: Service, threshold: float) -> None:  # G11, G13
    server, tier = service.open_cold(hit_rate_threshold=threshold)
    keys = [3, 4, 3, 50]
    assert_same_bits(service.lookup(server, keys), defaults(4))
    service.settle(server)
    assert stats_of(server).unanswered == 4
    assert_same_bits(service.lookup(server, [4, 3]), rows_of([4, 3], DIM))
    service.settle(server)
    assert (stats_of(server).unanswered, cache_of(server).hits) == (4, 2)
    assert tier.calls["fetch"] == 1  # nothing was missing in the second call, so nothing is asked for
    assert_adds_up(server)


@pytest.mark.parametrize("threshold", [1.0, 1.1, 100])
def test_threshold_1_is_exact(service: Service, threshold: float) -> None:  # G11, G12
    server, _ = service.open_cold(hit_rate_threshold=threshold)
    rng = np.random.default_rng(2)
    for _ in range(5):
        keys = rng.integers(0, 12, 20)
        expected = np.where((keys < 9)[:, None], rows_of(keys, DIM), DEFAULT)
        assert_same_bits(service.lookup(server, keys), expected)
    service.settle(server)
    assert stats_of(server).unanswered == 0
    assert_adds_up(server)


def test_the_hit_rate_counts_requests_not_distinct_keys(service: Service) -> None:  # G11, G13
    server, _ = service.open_cold(hit_rate_threshold=0.5)
    assert_same_bits(service.lookup(server, [0]), rows_of([0], DIM))  # 0 of 1: waits
    assert_same_bits(service.lookup(server, [0, 1, 2]), rows_of([0, 1, 2], DIM))  # 1 of 3
    keys = [0, 0, 0, 3, 4, 5]  # 3 of 6 requests, though 1 of 4 distinct keys
    assert_same_bits(service.lookup(server, keys), np.concatenate([rows_of([0, 0, 0], DIM), defaults(3)]))
    service.settle(server)
    assert stats_of(server).unanswered == 3
    assert_same_bits(service.lookup(server, keys), rows_of(keys, DIM))
    assert_same_bits(service.lookup(server, [6, 6, 6, 0, 0]), rows_of([6, 6, 6, 0, 0], DIM))  # 2 of 5
    assert_adds_up(server)


@pytest.mark.parametrize("threshold", [0, 0.5])
def test_a_miss_list_is_freed_once_if_a_lookup_is_interrupted_after_it_started_a_job(  # G13
    service: Service, monkeypatch: pytest.MonkeyPatch, threshold: float
) -> None:
    server, _ = service.open_cold(hit_rate_threshold=threshold)
    service.lookup(server, KEYS)
    service.settle(server)
    slow_path = served_table(server).slow_path
    assert slow_path is not None
    freed: list[MissList] = []
    release, background, add = MissList.release, slow_path.background, Counters.add
    started = threading.Event()

    def count(counters: Any, counter: int, amount: int) -> None:
        add(counters, counter, amount)
        if started.is_set() and threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt

    def start(job: Any) -> bool:
        accepted: bool = background(job)
        started.set()
        return accepted

    def free(misses: MissList) -> None:
        if misses not in freed:
            release(misses)
        freed.append(misses)

    monkeypatch.setattr(MissList, "release", free)
    monkeypatch.setattr(Counters, "add", count)
    monkeypatch.setattr(slow_path, "background", start)
    with contextlib.suppress(KeyboardInterrupt):
        service.lookup(server, [*KEYS, 99])
    service.settle(server)
    assert len(freed) == 1
    assert stats_of(server).unanswered >= 1


def test_no_background_job_is_started_if_no_key_is_missing(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:  # G13
    server, tier = service.open_cold(hit_rate_threshold=0.5)
    service.lookup(server, KEYS)
    table, jobs = served_table(server), []
    monkeypatch.setattr(table.slow_path, "background", lambda job: bool(jobs.append(job)))
    tier.calls.clear()
    assert_same_bits(service.lookup(server, KEYS), rows_of(KEYS, DIM))
    assert not jobs
    assert not tier.calls
    service.lookup(server, [*KEYS, 99])
    assert len(jobs) == 1


@pytest.mark.parametrize("threshold", [0, 0.5])
def test_keys_of_dropped_background_jobs_are_counted_as_unanswered(
    service: Service, monkeypatch: pytest.MonkeyPatch, threshold: float
) -> None:  # G13
    server, _ = service.open_cold(hit_rate_threshold=threshold)
    service.lookup(server, [0, 1])
    service.settle(server)
    before = stats_of(server).unanswered
    with monkeypatch.context() as full:
        full.setattr(served_table(server).slow_path, "background", lambda job: False)
        assert_same_bits(service.lookup(server, [0, 1, 2]), np.concatenate([rows_of([0, 1], DIM), defaults(1)]))
    assert stats_of(server).unanswered == before + 1
    assert_adds_up(server)


def test_background_jobs_fetch_the_keys_as_they_were_at_the_call(service: Service) -> None:  # G13
    server, tier = service.open_cold("support.fakes:HeldTier", hit_rate_threshold=0)
    keys = service.keys([3, 4])
    server.lookup(keys, "m", 0)
    keys[:] = 8
    assert tier.fetched.wait(HANG_SECONDS)
    tier.go_on.set()
    service.settle(server)
    assert sorted(table_keys(server)) == [3, 4]


def table_keys(server: hps_numba.HPS, table: int = 0) -> list[int]:
    (cache,) = table_caches(server, table)
    return [int(key) for key in cache.dump()]


def test_cache_missed_embeddings_keeps_rows_in_host_memory(service: Service) -> None:  # D04
    for threshold, entry in ((1.0, "m"), (0.0, "m")):
        server, _ = service.open_cold(volatile=KEEPING, hit_rate_threshold=threshold, name=entry)
        service.lookup(server, [1, 2, 99])
        service.settle(server)
        assert stats_of(server).rows == 2
        assert_same_bits(service.lookup(server, [1, 2]), rows_of([1, 2], DIM))


def test_lookups_are_answered_if_host_memory_has_no_room_to_keep_rows(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = service.open_cold(volatile=KEEPING, hit_rate_threshold=1.0)

    def refuse(*args: Any) -> int:
        raise hps_numba.CapacityError("no memory, on purpose")

    monkeypatch.setattr(HostStore, "upsert", refuse)
    assert_same_bits(service.lookup(server, [1, 2]), rows_of([1, 2], DIM))
    service.settle(server)
    assert_same_bits(service.lookup(server, [2, 1]), rows_of([2, 1], DIM))


def test_a_cache_serves_without_host_memory(service: Service) -> None:
    server, tier = service.open_cold(volatile={"type": "disabled"}, hit_rate_threshold=1.0)
    for _ in range(2):
        assert_same_bits(service.lookup(server, [1, 2, 99]), np.concatenate([rows_of([1, 2], DIM), defaults(1)]))
    assert (cache_of(server).hits, tier.keys["fetch"]) == (2, 4)
    server.update([1], rows_of([1], DIM, 1), "m", 0)
    server.erase([2], "m", 0)
    assert_same_bits(service.lookup(server, [1, 2]), np.concatenate([rows_of([1], DIM, 1), defaults(1)]))
    service.lookup(server, KEYS)
    server.replace_model("m", service.workshop.table("v2", [1, 5], DIM, 2))
    expected = np.concatenate([rows_of([1, 5], DIM, 2), defaults(1)])
    assert_same_bits(service.lookup(server, [1, 5, 6]), expected)
    assert_adds_up(server)


# --- defaults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY_TYPE)
def test_absent_keys_get_the_default_of_their_table(service: Service, kind: str) -> None:  # G14, G26
    server = service.open((range(20), DIM), (range(5, 40), DIM), **EVERY_TYPE[kind])
    assert_same_bits(service.lookup(server, [0, 99, 19, -1]), splice([0, 99, 19, -1], range(20), -7.5))
    assert_same_bits(service.lookup(server, [0, 99, 19, -1], 1), splice([0, 99, 19, -1], range(5, 40), -8.5))
    assert (stats_of(server).absent, stats_of(server, 1).absent) == (2, 3)


def splice(keys: Any, known: Any, default: float) -> np.ndarray:
    present = np.isin(keys, list(known))[:, None]
    return np.where(present, rows_of(keys, DIM), np.float32(default))


@pytest.mark.parametrize("kind", EVERY_TYPE)
def test_default_rows_are_never_cached(service: Service, kind: str) -> None:  # G15
    server = service.open((range(20), DIM), **EVERY_TYPE[kind])
    for _ in range(3):
        assert_same_bits(service.lookup(server, [50, 51, 50]), defaults(3))
    server.insert([50], rows_of([50], DIM), "m", 0)
    assert_same_bits(service.lookup(server, [50, 51]), np.concatenate([rows_of([50], DIM), defaults(1)]))


def test_default_rows_do_not_hide_later_rows_of_slower_tiers(service: Service) -> None:  # G15
    server, tier = service.open_cold(hit_rate_threshold=1.0)
    for _ in range(3):
        assert_same_bits(service.lookup(server, [50]), defaults(1))
    tier.insert(TAG, np.array([50]), rows_of([50], DIM))
    assert_same_bits(service.lookup(server, [50]), rows_of([50], DIM))


# --- kinds of caches --------------------------------------------------------------------------------------------------


def test_a_table_without_a_cache_gives_the_same_rows(service: Service) -> None:  # G16
    keys = [7, 99, 0, 7]
    cached, plain = (service.open((range(20), DIM), gpucache=on) for on in (True, False))
    assert_same_bits(service.lookup(plain, keys), service.lookup(cached, keys))
    assert stats_of(plain).caches == ()
    assert (stats_of(plain).host_hits, stats_of(plain).absent) == (3, 1)


@pytest.mark.parametrize("pagelock", [False, True])
def test_a_static_cache_holds_all_rows(service: Service, pagelock: bool) -> None:  # G22, G23
    server = service.open((range(200), DIM), embedding_cache_type="static", enable_pagelock=pagelock, gpucacheper=0.1)
    assert (cache_of(server).resident, cache_of(server).capacity) == (200, 200)
    keys = np.random.default_rng(3).integers(-20, 220, (10, 7))
    assert_same_bits(service.lookup(server, keys).reshape(-1, DIM), splice(keys.reshape(-1), range(200), -7.5))
    assert (cache_of(server).insertions, cache_of(server).misses) == (0, cache_of(server).absent)
    assert cache_of(server).absent == np.sum((keys < 0) | (keys >= 200))


def test_a_static_cache_needs_no_database(service: Service) -> None:  # G22
    server = service.open((range(20), DIM), volatile={"type": "disabled"}, embedding_cache_type="static")
    assert_same_bits(service.lookup(server, [3, 99]), splice([3, 99], range(20), -7.5))
    assert cache_of(server).hits == 1


def test_a_static_cache_serves_rows_inserted_later(service: Service, caplog: pytest.LogCaptureFixture) -> None:  # G22
    server = service.open((range(20), DIM), embedding_cache_type="static")
    server.insert([20, 3], rows_of([20, 3], DIM, 1), "m", 0)
    assert_same_bits(service.lookup(server, [20, 3]), rows_of([20, 3], DIM, 1))
    with caplog.at_level(logging.WARNING):
        server.replace_model("m", service.workshop.table("v2", range(10, 50), DIM, 2))
    assert "expected at most 20 rows, as the static cache has to hold all, got 40" in caplog.text
    expected = np.concatenate([defaults(1), rows_of([10, 45, 19], DIM, 2)])
    assert_same_bits(service.lookup(server, [3, 10, 45, 19]), expected)


def test_a_uvm_cache_serves_all_rows_and_keeps_the_first(service: Service) -> None:  # G26
    server = service.open((range(100), DIM), embedding_cache_type="uvm", gpucacheper=0.3)
    keys = [*range(100), 100, -1]
    assert_same_bits(service.lookup(server, keys), splice(keys, range(100), -7.5))
    assert (cache_of(server).capacity, cache_of(server).hits, stats_of(server).host_hits) == (30, 30, 70)
    server.update([2, 80], rows_of([2, 80], DIM, 1), "m", 0)
    assert_same_bits(service.lookup(server, [2, 80]), rows_of([2, 80], DIM, 1))


@pytest.mark.parametrize("kind", ["uvm", "dynamic"])
def test_threads_look_up_concurrently(service: Service, kind: str) -> None:  # G26
    entry = {"embedding_cache_type": kind, "gpucacheper": 0.2, "num_of_worker_buffer_in_pool": 2}
    server = service.open((range(500), DIM), **entry)
    problems: list[BaseException] = []

    def look_up(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(20):
                keys = rng.integers(0, 520, 40)
                assert_same_bits(service.lookup(server, keys), splice(keys, range(500), -7.5))
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=look_up, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    join_all(*threads)
    assert problems == []
    assert stats_of(server).keys == 4 * 20 * 40
    assert_adds_up(server)


@pytest.mark.parametrize(
    ("kind", "row_type", "dim", "relative", "absolute"),
    [
        ("dynamic", "float16", 16, 2**-11, 0),
        ("dynamic", "bfloat16", 3, 2**-8, 0),
        ("dynamic", "int8", 3, 0, 0.01),
        ("dynamic", "float8_e4m3", 16, 0, 0.05),
        ("static", "fp8_quant", 16, 0, 0.05),
    ],
)
def test_low_precision_rows_are_near_the_stored_values(
    service: Service, kind: str, row_type: str, dim: int, relative: float, absolute: float
) -> None:  # G24, G25
    entry = {"fp8_quant": True} if row_type == "fp8_quant" else {"cache_row_dtype": row_type}
    keys, model = np.arange(50), service.model((range(50), dim), embedding_cache_type=kind, gpucacheper=1.0, **entry)
    rows = np.random.default_rng(1).uniform(-1, 1, (50, dim)).astype(np.float32)
    rows.tofile(service.workshop.folder / "m_0.model" / "emb_vector")
    server = service.workshop.open(model, cache_on_cpu=True)
    for _ in range(2):
        np.testing.assert_allclose(service.lookup(server, keys), rows, rtol=relative, atol=absolute or 2**-25)
    assert (service.lookup(server, [99]) == DEFAULT).all()  # defaults are exact
    assert cache_of(server).hits == 100


# --- keys of the config that change no answer -------------------------------------------------------------------------

NO_DIFFERENCE: list[dict[str, Any]] = [
    {"use_hctr_cache_implementation": False},  # G28
    {"use_context_stream": False},  # G30
    {"enable_pagelock": True},  # G23
    {"fuse": True},  # G31
    {"fuse": True, "fuse_embedding_table": False},  # G33
    {"fuse": True, "embedding_cache_type": "static", "fp8_quant": False},  # G34
    {"num_of_refresher_buffer_in_pool": 3},
]


@pytest.mark.parametrize("entry", NO_DIFFERENCE, ids=lambda entry: "-".join(entry))
def test_hugectr_settings_are_accepted_and_change_no_answer(service: Service, entry: dict[str, Any]) -> None:
    server = service.open((range(30), DIM), (range(10, 40), DIM), **entry)
    assert_same_bits(service.lookup(server, [5, 15, 35]), splice([5, 15, 35], range(30), -7.5))
    assert_same_bits(service.lookup(server, [5, 15, 35], 1), splice([5, 15, 35], range(10, 40), -8.5))


@pytest.mark.parametrize("fuse", [True, False])
def test_equal_keys_of_tables_of_one_width_are_independent(service: Service, fuse: bool) -> None:  # G32, G35
    workshop = service.workshop
    model = service.model(*[(range(30), DIM)] * 3)
    for number in (1, 2):
        workshop.table(f"m_{number}.model", range(30), DIM, number)
    server = workshop.open(model, fuse_embedding_table=fuse, cache_on_cpu=True)
    for table in (2, 0, 1, 1):  # in any order, and never all of them together
        assert_same_bits(service.lookup(server, range(30), table), rows_of(range(30), DIM, table))
    server.update([7], rows_of([7], DIM, 5), "m", 1)
    for table, stamp in enumerate([0, 5, 2]):
        assert_same_bits(service.lookup(server, [7], table), rows_of([7], DIM, stamp))


@pytest.mark.parametrize("flat", [False, True])
def test_lookup_many_serves_from_caches(service: Service, flat: bool) -> None:  # G39
    server = service.open((range(30), DIM), (range(10, 40), DIM))
    asked = [[3, 99], [[12, 3]]]
    expected = [splice([3, 99], range(30), -7.5), splice([12, 3], range(10, 40), -8.5)[None]]
    got = server.lookup_many([service.keys(keys) for keys in asked], "m", flat=flat)
    if flat:
        assert_same_bits(got, np.concatenate([rows.reshape(-1) for rows in expected]))
        return
    for rows, expected_rows in zip(got, expected, strict=True):
        assert_same_bits(service.on_host(rows), expected_rows)
    named = server.lookup_many({1: service.keys([12])}, "m")
    assert_same_bits(service.on_host(named[1]), rows_of([12], DIM))


@pytest.mark.parametrize("threads", [1, 3])
def test_thread_pool_size_bounds_concurrent_fetches(service: Service, threads: int) -> None:  # G29
    before = set(threading.enumerate())
    server, tier = service.open_cold("support.fakes:CrowdTier", hit_rate_threshold=0, thread_pool_size=threads)
    for key in range(6):
        assert_same_bits(service.lookup(server, [key]), defaults(1))
    with tier.changed:
        assert tier.changed.wait_for(lambda: len(tier.inside) >= threads, HANG_SECONDS)
    time.sleep(0.05)  # time for one too many
    assert len(tier.inside) == threads
    assert len([name for name in server_threads(before) if name.startswith("hps_numba_background")]) == threads
    tier.go_on.set()
    service.settle(server)
    assert_same_bits(service.lookup(server, range(6)), rows_of(range(6), DIM))


# --- workspaces -------------------------------------------------------------------------------------------------------


def test_failed_lookups_leak_no_workspace(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:  # G18
    server = service.open((range(500), DIM), num_of_worker_buffer_in_pool=2)
    keys = range(300)
    service.lookup(server, keys)
    before = cache_of(server).bytes

    def fail(*args: Any) -> None:
        raise DeviceError("on purpose, during a lookup")

    for _ in range(5):  # more often than there are workspaces
        with monkeypatch.context() as broken:
            broken.setattr(LaunchPlan, "finish_lookup", fail)
            broken.setattr(PreparedLookup, "start", fail)
            broken.setattr(CpuPreparedLookup, "start", fail)
            with pytest.raises(DeviceError, match="on purpose"):
                service.lookup(server, keys)
        assert_same_bits(service.lookup(server, keys), rows_of(keys, DIM))
    assert cache_of(server).bytes <= 2 * before


def test_tiers_that_break_their_contract_leak_no_workspace(service: Service) -> None:  # G18
    server, tier = service.open_cold("support.fakes:WrongTier", hit_rate_threshold=1.0)
    for _ in range(5):
        with pytest.raises(TierError, match="expected Fetched, got NoneType"):
            service.lookup(server, KEYS)
    tier.fetch = tier.__class__.__mro__[1].fetch.__get__(tier)
    assert_same_bits(service.lookup(server, KEYS), rows_of(KEYS, DIM))


# --- refresh ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percentage", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("drop", [True, False])
def test_refresh_reloads_rows_changed_in_slower_tiers(service: Service, percentage: float, drop: bool) -> None:  # G20
    keys = range(30)  # so few that each finds a way in its set
    entry = {"cache_refresh_percentage_per_iteration": percentage, "gpucacheper": 1.0}
    server, tier = service.open_cold(keys=keys, hit_rate_threshold=1.0, **entry)
    service.lookup(server, keys)
    tier.insert(TAG, np.arange(10, 30), rows_of(range(10, 30), DIM, 1))
    tier.erase(TAG, np.arange(10))
    assert_same_bits(service.lookup(server, keys), rows_of(keys, DIM))  # the cache is not told
    server.refresh("m", drop=drop)
    gone = defaults(10) if drop else rows_of(range(10), DIM)
    assert_same_bits(service.lookup(server, keys), np.concatenate([gone, rows_of(range(10, 30), DIM, 1)]))
    assert cache_of(server).resident == (20 if drop else 30)


def test_refresh_asks_no_slower_tier_for_rows_in_host_memory(service: Service) -> None:  # G20
    server = service.open((range(60), DIM), persistent="support.fakes:CountedDictTier", gpucacheper=1.0)
    tier = slower_tier(server)
    tier.calls.clear()
    server.refresh("m")
    assert not tier.calls
    assert cache_of(server).resident == 60
    assert_same_bits(service.lookup(server, range(60)), rows_of(range(60), DIM))


def test_refresh_of_one_table_leaves_the_others(service: Service) -> None:  # G20
    server = service.open(*[(KEYS, DIM)] * 2, volatile=COLD, persistent="support.fakes:DictTier", hit_rate_threshold=1.0)
    tier = slower_tier(server)
    for table in (0, 1):
        service.lookup(server, KEYS, table)
        tier.insert(f"hps_et.m.sparse_embedding{table}", np.array(KEYS), rows_of(KEYS, DIM, 1))
    server.refresh("m", "sparse_embedding1")
    assert_same_bits(service.lookup(server, KEYS, 0), rows_of(KEYS, DIM))
    assert_same_bits(service.lookup(server, KEYS, 1), rows_of(KEYS, DIM, 1))
    with pytest.raises(UnknownModelError):
        server.refresh("m", 2)
    with pytest.raises(UnknownModelError):
        server.refresh("other")


def test_a_failed_refresh_drops_nothing(service: Service) -> None:  # G20
    server, tier = service.open_cold("support.fakes:FlakyDictTier", hit_rate_threshold=1.0)
    service.lookup(server, KEYS)
    tier.fail_on.add("fetch")
    with pytest.raises(TierError, match="9 keys are in doubt"):
        server.refresh("m")
    assert_same_bits(service.lookup(server, KEYS), rows_of(KEYS, DIM))


@pytest.mark.parametrize(
    "entry", [{"refresh_delay": 0.1}, {"refresh_interval": 0.05}, {"refresh_delay": 0.01, "refresh_interval": 0.2}]
)
def test_refresh_runs_on_its_timer(service: Service, entry: dict[str, float]) -> None:  # G21
    server, tier = service.open_cold(hit_rate_threshold=1.0)
    server.load_model(service.workshop.model((KEYS, DIM), name="timed", deployed_device_list=[service.device or 0], **entry))
    service.lookup(server, KEYS, model="timed")
    service.settle(server)  # the rows just fetched are in the cache, and do not come after those of the refresh
    tier.insert("hps_et.timed.sparse_embedding0", np.array(KEYS), rows_of(KEYS, DIM, 1))
    new = rows_of([0], DIM, 1)[0, 0]
    wait_until(lambda: service.lookup(server, [0], model="timed")[0, 0] == new)
    assert_same_bits(service.lookup(server, KEYS, model="timed"), rows_of(KEYS, DIM, 1))
    server.unload_model("timed")
    assert not due_refreshes(server)


# --- writes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slower", [False, True])
@pytest.mark.parametrize("kind", EVERY_TYPE)
def test_writes_reach_the_cache_before_they_return(service: Service, kind: str, slower: bool) -> None:  # D25
    tier = {"persistent": "support.fakes:DictTier", "hit_rate_threshold": 1.0} if slower else {}
    server = service.open((range(40), DIM), **EVERY_TYPE[kind], **tier)
    workshop = service.workshop
    service.lookup(server, range(40))
    assert server.update([1, 2, 90], rows_of([1, 2, 90], DIM, 1), "m", 0) == 2
    assert_same_bits(service.lookup(server, [1, 2, 90]), np.concatenate([rows_of([1, 2], DIM, 1), defaults(1)]))
    assert server.insert([1, 90], rows_of([1, 90], DIM, 2), "m", 0) == 1
    assert_same_bits(service.lookup(server, [1, 90]), rows_of([1, 90], DIM, 2))
    assert server.erase([2, 90], "m", 0) == 2
    assert_same_bits(service.lookup(server, [2, 90]), defaults(2))
    other = DictTier(PersistentDatabaseConfig())
    other.insert(TAG, np.array([3, 91]), rows_of([3, 91], DIM, 3))
    other.dump(TAG, workshop.folder / "new.bin")
    assert server.load_dump(workshop.folder / "new.bin", "m", 0) == 2
    assert_same_bits(service.lookup(server, [3, 91, 4]), np.concatenate([rows_of([3, 91], DIM, 3), rows_of([4], DIM)]))
    server.replace_model("m", workshop.table("v2", range(20, 50), DIM, 4))
    keys = [*range(60), 90, 91]
    expected = np.where(((np.array(keys) >= 20) & (np.array(keys) < 50))[:, None], rows_of(keys, DIM, 4), DEFAULT)
    for _ in range(2):
        assert_same_bits(service.lookup(server, keys), expected)
    assert stats_of(server).version == 2
    assert_adds_up(server)


@pytest.mark.parametrize("change", ["erase", "update"])
def test_a_row_written_during_its_fetch_does_not_enter_the_cache(service: Service, change: str) -> None:
    server, tier = service.open_cold("support.fakes:HeldTier", hit_rate_threshold=0)
    service.lookup(server, [3])
    assert tier.fetched.wait(HANG_SECONDS)
    if change == "erase":
        server.erase([3], "m", 0)
    else:
        server.update([3], rows_of([3], DIM, 1), "m", 0)
    tier.go_on.set()
    service.settle(server)
    assert table_keys(server) == []
    service.lookup(server, [3])
    service.settle(server)
    assert_same_bits(service.lookup(server, [3]), defaults(1) if change == "erase" else rows_of([3], DIM, 1))


# --- keys and answers -------------------------------------------------------------------------------------------------


def test_32_bit_keys(service: Service) -> None:  # C10
    keys = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
    server = service.open((keys, DIM), wide=False)
    unsigned = np.array([*keys, 5], np.uint32)
    for batch in (unsigned, unsigned.view(np.int32)):
        got = service.on_host(server.lookup(service.keys(batch, batch.dtype), "m", 0))
        assert_same_bits(got, np.concatenate([rows_of(keys, DIM), defaults(1)]))
    assert cache_of(server).absent == 2


def test_float16_answers(service: Service) -> None:
    server = service.open((range(30), DIM), output_dtype="float16")
    got = service.on_host(server.lookup(service.keys([3, 99, 29]), "m", 0))
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, splice([3, 99, 29], range(30), -7.5).astype(np.float16))


def test_a_lookup_of_no_keys_counts_nothing(service: Service) -> None:
    server, _ = service.open_cold()
    assert service.lookup(server, np.empty((0, 3))).shape == (0, 3, DIM)
    assert stats_of(server).keys == 0


def test_stats_count_every_key_once(service: Service) -> None:
    server = service.open(
        (range(400), DIM),
        volatile={"type": "hash_map", "initial_cache_rate": 0.5},
        persistent="support.fakes:DictTier",
        hit_rate_threshold=0.6,
    )
    rng = np.random.default_rng(5)
    asked = 0
    for round_number in range(12):
        keys = rng.integers(0, 450, 50) if round_number % 2 else rng.integers(0, 220, 50)
        service.lookup(server, keys)
        asked += 50
    service.settle(server)
    stats = stats_of(server)
    assert (stats.keys, stats.calls) == (asked, 12)
    assert min(stats.cache_hits, stats.host_hits, stats.tier_hits, stats.absent, stats.unanswered) > 0
    assert stats.cache_hits + stats.cache_misses == asked
    assert stats.cache_evictions > 0
    assert stats.hit_rate == (stats.cache_hits + stats.host_hits) / asked
    assert_adds_up(server)


# --- policies ---------------------------------------------------------------------------------------------------------

OWN = """
class MostRecent:
    def first(now, count):
        return 0xFFFFFFFF - now

    def touch(score, now, count):
        return 0xFFFFFFFF - now
"""


@pytest.mark.parametrize(("policy", "dim"), [("lru", DIM), ("lfu", 3), ("fifo", 16), ("file", DIM)])
def test_every_policy_serves(service: Service, policy: str, dim: int) -> None:
    if policy == "file":
        own = service.workshop.folder / "own.py"
        own.write_text(OWN)
        policy = f"{own}:MostRecent"
    server = service.open((range(500), dim), gpucacheper=0.0, cache_policy=policy, allow_code=True)
    rng = np.random.default_rng(6)
    for _ in range(5):
        keys = rng.integers(0, 500, 100)
        assert_same_bits(service.lookup(server, keys), rows_of(keys, dim))
    assert stats_of(server).cache_evictions > 0
    assert_adds_up(server)


@pytest.mark.parametrize(
    ("policy", "message"), [("lur", "lur"), ("own.py:MostRecent", "allow_code"), (["lru", "math:pi"], "math:pi")]
)
def test_an_invalid_policy_is_refused_before_anything_is_allocated(
    service: Service, monkeypatch: pytest.MonkeyPatch, policy: Any, message: str
) -> None:
    server = service.open((KEYS, DIM), gpucache=False)
    before = bytes_in_use(server)
    model = service.model((KEYS, DIM), (KEYS, DIM), name="wrong", cache_policy=policy)
    with pytest.raises(PolicyError, match=message):
        server.load_model(model)
    assert (bytes_in_use(server), server.models) == (before, ("m",))
    opened: list[object] = []
    monkeypatch.setattr("hps_numba.server.model_loader.open_tiers", lambda *args, **options: opened.append(args))
    with pytest.raises(PolicyError, match=message):
        service.workshop.open(service.model((KEYS, DIM)), model, cache_on_cpu=True)
    assert not opened


# --- the end ----------------------------------------------------------------------------------------------------------


def server_threads(before: set[threading.Thread]) -> list[str]:
    """Names of the threads of servers that were not there before."""
    names = [thread.name for thread in threading.enumerate() if thread not in before]
    return [name for name in names if name.startswith(("hps_numba_background", "hps_numba_ref"))]


@pytest.mark.parametrize("end", ["unload", "close"])
def test_unload_and_close_free_caches_and_threads(service: Service, end: str) -> None:  # D24
    before = set(threading.enumerate())
    server, _ = service.open_cold(gpucache=False)
    in_use = bytes_in_use(server)
    entry = {"name": "second", "hit_rate_threshold": 0, "refresh_interval": 0.01}
    server.load_model(service.model((range(2000), DIM), **entry))
    service.lookup(server, range(1000), model="second")
    assert server_threads(before)
    caches = [weakref.ref(cache) for cache in served_table(server, model="second").caches]
    assert len(caches) == 1
    if end == "unload":
        server.unload_model("second")
        wait_for_release(server, in_use, headers=1)
        with pytest.raises(UnknownModelError):
            service.lookup(server, [1], model="second")
        assert server_threads(before) == ["hps_numba_refresh"]  # the server's, which is idle
    else:
        server.close()
        wait_for_release(server, 0)  # not even a header, as nobody refers to a table
        with pytest.raises(hps_numba.ClosedError):
            service.lookup(server, [1], model="second")
        assert not server_threads(before)
    wait_until(lambda: gc.collect() >= 0 and not any(cache() for cache in caches))  # whoever did the work lets go of it


def test_a_server_that_cannot_be_opened_closes_its_caches(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[EmbeddingCache] = []
    warm = EmbeddingCache.warm

    def fail(cache: EmbeddingCache) -> int:
        made.append(cache)
        if len(made) == 2:
            raise hps_numba.CapacityError("on purpose")
        return warm(cache)

    monkeypatch.setattr(EmbeddingCache, "warm", fail)
    with pytest.raises(hps_numba.CapacityError, match="on purpose"):
        service.open((KEYS, DIM), (KEYS, DIM))
    assert len(made) == 2
    for cache in made:
        with pytest.raises(hps_numba.ClosedError):
            warm(cache)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_answers_from_its_own_cache(on_cpu: Service) -> None:
    server = on_cpu.open(
        (range(200), DIM),
        volatile={"type": "hash_map", "initial_cache_rate": 0.5},
        persistent="support.fakes:DictTier",
        hit_rate_threshold=0.5,
        refresh_interval=0.01,
    )
    keys = [*range(60), 150, 99, 500]
    on_cpu.lookup(server, keys)
    on_cpu.settle(server)
    expected = splice(keys, range(200), -7.5)

    def in_child_process() -> bool:
        on_cpu.lookup(server, keys)
        on_cpu.settle(server)
        right = bool((on_cpu.lookup(server, keys) == expected).all())
        server.update([1], rows_of([1], DIM, 1), "m", 0)
        right &= bool((on_cpu.lookup(server, [1]) == rows_of([1], DIM, 1)).all())
        server.refresh("m")
        right &= bool((on_cpu.lookup(server, [1, 2]) == np.concatenate([rows_of([1], DIM, 1), rows_of([2], DIM)])).all())
        server.close()
        return right

    assert in_child(in_child_process) == 0
    assert_same_bits(on_cpu.lookup(server, keys), expected)


# --- graphs and several devices -----------------------------------------------------------------------------------------


def capture(server: hps_numba.HPS, keys: Any, out: Any, stream: Any) -> Any:
    """A CuPy graph of one lookup."""
    stream.begin_capture()
    try:
        server.lookup(keys, "m", 0, out=out, stream=stream)
    finally:
        graph = stream.end_capture()
    return graph


@pytest.mark.gpu
def test_gpu_a_captured_lookup_follows_changes_of_the_table(workshop: Workshop) -> None:  # G40
    import cupy

    service = Service(workshop, 0)
    server = service.open((range(500), DIM), gpucacheper=0.2)
    keys, out = cupy.arange(300), cupy.empty((300, DIM), np.float32)
    service.lookup(server, range(300))  # builds the kernels
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        graph = capture(server, keys, out, stream)
        for first in (0, 150, 300):  # rows in the cache, rows that it lacks, keys in no tier
            keys[:] = cupy.arange(first, first + 300)
            graph.launch(stream)
            stream.synchronize()
            assert_same_bits(out.get(), splice(range(first, first + 300), range(500), -7.5))
        server.update([300, 301], rows_of([300, 301], DIM, 1), "m", 0)
        server.erase([302], "m", 0)
        graph.launch(stream)
        stream.synchronize()
    assert_same_bits(out.get()[:4], np.concatenate([rows_of([300, 301], DIM, 1), defaults(1), rows_of([303], DIM)]))
    del graph
    server.close()


@pytest.mark.gpu
def test_gpu_a_graph_cannot_wait_for_slower_tiers(workshop: Workshop) -> None:  # G40
    import cupy

    server, _ = Service(workshop, 0).open_cold()
    keys, out, stream = cupy.arange(9), cupy.empty((9, DIM), np.float32), cupy.cuda.Stream(non_blocking=True)
    with stream, pytest.raises(DeviceError, match="a graph cannot capture lookups of a table with slower tiers"):
        capture(server, keys, out, stream)


@pytest.mark.gpu
def test_gpu_every_device_gives_the_same_values(workshop: Workshop) -> None:  # G36, G38
    count = driver.device_count()
    if count < 2:
        pytest.skip(f"needs 2 devices, there are {count}")
    order = [1, 0]
    server = workshop.open(workshop.model((range(500), DIM), deployed_device_list=order))
    keys = np.random.default_rng(7).integers(0, 520, 300)
    expected = splice(keys, range(500), -7.5)
    services = [Service(workshop, device) for device in order]
    for service in services:
        assert_same_bits(service.lookup(server, keys), expected)
    assert [cache.device for cache in stats_of(server).caches] == order
    assert [cache.keys for cache in stats_of(server).caches] == [300, 300]
    server.update([5], rows_of([5], DIM, 1), "m", 0)
    server.erase([6], "m", 0)
    for service in services:
        assert_same_bits(service.lookup(server, [5, 6]), np.concatenate([rows_of([5], DIM, 1), defaults(1)]))
    assert_adds_up(server)


@pytest.mark.gpu
def test_gpu_only_listed_devices_serve(workshop: Workshop) -> None:  # G38
    count = driver.device_count()
    if count < 2:
        pytest.skip(f"needs 2 devices, there are {count}")
    server = workshop.open(workshop.model((range(50), DIM), deployed_device_list=[1]))
    assert_same_bits(Service(workshop, 1).lookup(server, range(50)), rows_of(range(50), DIM))
    with pytest.raises(DeviceError, match=r"deployed on \[1\], not on 0"):
        Service(workshop, 0).lookup(server, [1])


def test_a_static_table_without_a_database_is_dumped_and_loaded(on_cpu: Service, tmp_path: Path) -> None:
    server = on_cpu.open((KEYS, DIM), volatile={"type": "disabled"}, embedding_cache_type="static")
    assert server.dump(tmp_path / "table.bin", "m", 0) == len(KEYS)
    before = server.lookup(on_cpu.keys(KEYS), "m", 0)
    server.update(KEYS[:5], np.zeros((5, DIM), np.float32), "m", 0)
    assert server.load_dump(tmp_path / "table.bin", "m", 0) == len(KEYS)
    assert np.array_equal(server.lookup(on_cpu.keys(KEYS), "m", 0), before)
