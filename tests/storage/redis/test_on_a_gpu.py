"""Lookups whose misses go from the cache of a GPU to bounded host memory and on to Redis; the same with a cache on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.factories import ON_BOTH, Workshop
from support.internals import wait_for_background
from support.oracles import assert_same_bits, partition_of, rows_of
from support.redis_servers import PATIENT, Cluster, cluster_of
from support.waiting import wait_until

from hps_numba.storage.redis.layout import partitions_of
from hps_numba.storage.tiers.redis_cluster import RedisClusterTier

DIM, ROWS, PARTS = 16, 4000, 8
IN_HOST = 1000  # rows that host memory holds, of those at the head of the file
KEYS = np.arange(ROWS)
DEFAULT = -7.5
TABLE = "hps_et.m.sparse_embedding0"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """It keeps what it acknowledged when a node is killed."""
    options = ("--appendonly", "yes", "--appendfsync", "always")
    with cluster_of(tmp_path_factory.mktemp("three"), options=options) as made:
        yield made


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RedisClusterTier, "limits", PATIENT)


@pytest.fixture(params=ON_BOTH)
def server(workshop: Workshop, cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A cache of a tenth of the rows in front of host memory with a quarter of them, in front of Redis with all."""
    cluster.flush()
    device = {} if request.param is None else {"deployed_device_list": [0]}
    model = workshop.model((KEYS, DIM), gpucacheper=0.1, max_batch_size=256, hit_rate_threshold=1.0, **device)
    host = {
        "type": "hash_map",
        "initial_cache_rate": IN_HOST / ROWS,
        "num_partitions": 1,
        "overflow_margin": IN_HOST,
        "cache_missed_embeddings": True,
    }
    redis = {"type": "redis_cluster", "address": cluster.address, "num_partitions": PARTS, "initialize_after_startup": True}
    opened = workshop.open(model, tiers=[host, redis], cache_on_cpu=request.param is None)
    yield opened
    opened.close()


def look_up(server: Any, keys: np.ndarray) -> np.ndarray:
    """Rows of keys that are where the cache is: those of an array of the host are answered past the cache of a device."""
    if server.config.models[0].deployed_device_list:
        keys = pytest.importorskip("cupy").asarray(keys)
    rows = server.lookup(keys, "m", 0)
    return rows if isinstance(rows, np.ndarray) else rows.get()


def stats_of(server: Any) -> Any:
    wait_for_background(server)
    (stats,) = server.stats()["m"].values()
    return stats


def test_each_key_is_counted_where_it_was_answered(server: Any) -> None:
    hot, elsewhere = KEYS[:100], KEYS[-100:]
    before = stats_of(server)
    assert before.rows <= IN_HOST
    assert_same_bits(look_up(server, elsewhere), rows_of(elsewhere, DIM))
    once = stats_of(server)
    assert (once.tier_hits - before.tier_hits, once.unanswered, once.absent) == (100, 0, 0)
    assert_same_bits(look_up(server, elsewhere), rows_of(elsewhere, DIM))  # now in the cache, or in host memory
    twice = stats_of(server)
    assert twice.tier_hits == once.tier_hits
    assert_same_bits(look_up(server, hot), rows_of(hot, DIM))
    unknown = np.arange(ROWS, ROWS + 7)
    assert_same_bits(look_up(server, unknown), np.full((7, DIM), DEFAULT, np.float32))
    after = stats_of(server)
    (cache,) = after.caches
    assert after.absent == 7 and after.unanswered == 0
    assert after.keys == sum([after.host_hits, after.tier_hits, after.absent, cache.hits])


def test_any_keys_have_their_rows_whatever_moves_between_the_tiers(server: Any) -> None:
    chance = np.random.default_rng(5)
    for _ in range(40):
        keys = chance.integers(-50, ROWS + 50, 250)
        known = (keys >= 0) & (keys < ROWS)
        expected = np.where(known[:, None], rows_of(keys, DIM), np.float32(DEFAULT))
        assert_same_bits(look_up(server, keys), expected)
    stats = stats_of(server)
    (cache,) = stats.caches
    assert stats.rows <= IN_HOST and stats.unanswered == 0
    assert min(cache.hits, stats.host_hits, stats.tier_hits) > 0


def test_a_killed_node_costs_its_own_keys_and_comes_back(server: Any, cluster: Cluster) -> None:
    from redis.crc import key_slot

    killed, chance = cluster.servers[1], np.random.default_rng(6)
    parts = partitions_of(TABLE, PARTS, key_slot)
    lost = np.array([cluster.owner_of(parts[partition_of(key, PARTS)].slot) is killed for key in KEYS.tolist()])
    assert 0 < lost.sum() < ROWS
    killed.kill()
    try:
        for _ in range(20):
            keys = chance.integers(0, ROWS, 250)
            rows = look_up(server, keys)
            living = ~lost[keys]
            assert_same_bits(rows[living], rows_of(keys[living], DIM))
            answered = (rows != np.float32(DEFAULT)).any(axis=1)
            assert_same_bits(rows[answered], rows_of(keys[answered], DIM))  # of the cache or host memory, or the default
        without = stats_of(server)
        assert without.unanswered > 0 and without.absent == 0
    finally:
        killed.start()
    wait_until(cluster.settled)
    wait_until(lambda: np.array_equal(look_up(server, KEYS[lost]), rows_of(KEYS[lost], DIM)))
    before = stats_of(server)
    keys = chance.permutation(ROWS)[:1000]
    for some in np.array_split(keys, 4):
        assert_same_bits(look_up(server, some), rows_of(some, DIM))
    assert stats_of(server).unanswered == before.unanswered
