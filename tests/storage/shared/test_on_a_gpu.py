"""Two processes whose GPU reads one segment in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.oracles import assert_same_bits, rows_of
from support.shared_memory import MIB, Peer, new_name, segment_file
from support.waiting import wait_until

DIM, KEYS = 16, 20_000


@pytest.fixture
def peer_and_server(workshop: Workshop) -> Iterator[tuple[Peer, Any, str]]:
    """A process and a server in this one, each with a cache of a tenth of the rows on the same GPU."""
    name = new_name()
    model = workshop.model((np.arange(KEYS), DIM), deployed_device_list=[0], gpucacheper=0.1, max_batch_size=1024)
    section = {"type": "multi_process_hash_map", "shared_memory_name": name, "shared_memory_size": 64 * MIB}
    peer = Peer(config={"supportlonglong": True, "models": [model], "volatile_db": section})
    yield peer, workshop.open(model, volatile_db=section), name
    for server in workshop.servers:
        server.close()
    peer.end()
    assert not segment_file(name).exists()


def rows_from(server: Any, keys: np.ndarray) -> np.ndarray:
    """Rows of keys that are in the memory of the device: those of an array of the host are answered past its cache."""
    return server.lookup(pytest.importorskip("cupy").asarray(keys), "m", 0).get()


@pytest.mark.gpu
def test_caches_of_two_processes_serve_from_one_segment(peer_and_server: tuple[Peer, Any, str]) -> None:
    peer, server, _ = peer_and_server
    chance = np.random.default_rng(5)
    for _ in range(20):
        keys = chance.integers(0, KEYS, 1000)
        assert_same_bits(rows_from(server, keys), rows_of(keys, DIM))
        assert_same_bits(peer.rows("m", keys), rows_of(keys, DIM))


@pytest.mark.gpu
def test_a_gpu_follows_a_table_that_another_process_makes_grow(peer_and_server: tuple[Peer, Any, str]) -> None:
    peer, server, _ = peer_and_server
    (table,) = server._catalog.models["m"].tables
    before = table.store.block
    for start in range(KEYS, 3 * KEYS, 2000):
        keys = np.arange(start, start + 2000)
        peer.do("insert", table="m", keys=keys.tolist(), rows=rows_of(keys, DIM).tolist())
    assert table.store.block != before
    (cache,) = table.caches
    wait_until(lambda: cache.parts.link.block == table.store.block)
    for keys in np.array_split(np.random.default_rng(6).permutation(3 * KEYS), 60):
        assert_same_bits(rows_from(server, keys), rows_of(keys, DIM))


@pytest.mark.gpu
def test_rows_that_another_process_changes_reach_a_cache_with_its_refresh(peer_and_server: tuple[Peer, Any, str]) -> None:
    peer, server, _ = peer_and_server
    keys = np.arange(500)
    for _ in range(3):  # they are in both caches now
        rows_from(server, keys)
        peer.rows("m", keys)
    newer = rows_of(keys, DIM, 1)
    peer.do("insert", table="m", keys=keys.tolist(), rows=newer.tolist())
    assert_same_bits(peer.rows("m", keys), newer)
    server.refresh("m")
    assert_same_bits(rows_from(server, keys), newer)


@pytest.mark.gpu
def test_a_killed_process_leaves_the_gpu_of_another_one_serving(peer_and_server: tuple[Peer, Any, str]) -> None:
    _, server, name = peer_and_server
    config = server.config.to_dict()
    third = Peer(config=config)
    third.kill()
    keys = np.arange(KEYS)[::7]
    server.insert(keys, rows_of(keys, DIM, 2), "m", 0)
    assert_same_bits(rows_from(server, keys), rows_of(keys, DIM, 2))
    assert segment_file(name).exists()
