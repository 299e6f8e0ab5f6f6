"""Servers of several processes over one copy of the rows (``multi_process_hash_map``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.children import in_child
from support.factories import Workshop
from support.oracles import assert_same_bits, rows_of
from support.shared_memory import MIB, Peer, kill_self, killed, new_name, segment_file
from support.waiting import wait_until

from hps_numba.storage.shared import segment
from hps_numba.storage.shared.content import SharedContent


@pytest.fixture
def name(workshop: Workshop) -> Iterator[str]:
    given = new_name()
    yield given
    for server in workshop.servers:
        server.close()
    segment_file(given).unlink(missing_ok=True)


def in_segment(name: str, size: int = 16 * MIB, **more: Any) -> dict[str, Any]:
    """The section of the config."""
    return {"type": "multi_process_hash_map", "shared_memory_name": name, "shared_memory_size": size, **more}


def test_two_servers_serve_from_one_copy(workshop: Workshop, name: str) -> None:  # D14
    keys = np.arange(30_000)
    model = workshop.model((keys, 16))
    first = workshop.open(model, volatile_db=in_segment(name))
    planned = first.plan().tables[0]
    assert planned.shared_bytes == planned.host_bytes > 30_000 * 64
    taken = segment.present_bytes(name)
    config = {"supportlonglong": True, "models": [model], "volatile_db": in_segment(name)}
    peer = Peer(config=config)
    assert segment.present_bytes(name) == taken
    (stats,) = first.stats()["m"].values()
    assert peer.do("stats", table="m") == [stats.rows, stats.bytes] == [30_000, stats.bytes]
    assert_same_bits(peer.rows("m", keys[:9]), rows_of(keys[:9], 16))
    newer = rows_of(keys[:9], 16, 1)
    peer.do("insert", table="m", keys=keys[:9].tolist(), rows=newer.tolist())
    assert_same_bits(np.asarray(first.lookup(keys[:9], "m", 0)), newer)
    third = workshop.open(model, volatile_db=in_segment(name))  # does not load again
    assert_same_bits(np.asarray(third.lookup(keys[:9], "m", 0)), newer)
    third.close()
    first.close()
    assert_same_bits(peer.rows("m", keys[:9]), newer)
    peer.end()
    assert not segment_file(name).exists()


def test_replacing_a_model_replaces_it_for_all_processes(workshop: Workshop, name: str) -> None:
    keys = np.arange(100)
    server = workshop.open(workshop.model((keys, 4)), volatile_db=in_segment(name))
    other = workshop.model((keys, 4), name="n", stamp=3)
    assert in_child(lambda: server.replace_model("m", other["sparse_files"]) is None) == 0
    assert_same_bits(np.asarray(server.lookup(keys, "m", 0)), rows_of(keys, 4, 3))
    server.insert([5], rows_of([5], 4, 9), "m", 0)
    late = workshop.open({**other, "model": "m"}, volatile_db=in_segment(name))  # the same files: they are not loaded again
    assert_same_bits(np.asarray(late.lookup([5], "m", 0)), rows_of([5], 4, 9))


def test_a_process_that_dies_while_it_loads_leaves_no_mark(workshop: Workshop, name: str) -> None:
    keys = np.arange(1000)
    model = workshop.model((keys, 4))

    def load_half() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SharedContent, "fill", lambda *given: kill_self())
            workshop.open(model, volatile_db=in_segment(name))

    killed(load_half)
    server = workshop.open(model, volatile_db=in_segment(name))
    assert_same_bits(np.asarray(server.lookup(keys, "m", 0)), rows_of(keys, 4))


def test_a_cache_follows_what_another_process_publishes(workshop: Workshop, name: str) -> None:
    keys = np.arange(200)
    model = workshop.model((keys, 4), gpucacheper=0.1, deployed_device_list=[0])
    server = workshop.open(model, volatile_db=in_segment(name), cache_on_cpu=True)
    more = np.arange(200, 5000)

    (table,) = server._catalog.models["m"].tables

    def grow() -> bool:
        host = server._loader.host
        assert host is not None
        return host.insert(table.spec.tag, more, rows_of(more, 4)) == len(more)

    assert table.store is not None and table.caches is not None
    (cache,) = table.caches
    link, before = cache.parts.link, table.store.block
    assert link is not None and link.block == before
    assert in_child(grow) == 0
    assert table.store.block != before
    wait_until(lambda: table.store is not None and link.block == table.store.block)
    for part in np.array_split(np.arange(5000), 50):
        assert_same_bits(np.asarray(server.lookup(part, "m", 0)), rows_of(part, 4))


# -- eviction --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["evict_random", "evict_least_used", "evict_oldest"])
def test_callbacks_are_told_of_rows_that_leave_shared_memory(workshop: Workshop, name: str, policy: str) -> None:
    section = in_segment(name, overflow_margin=10, num_partitions=1, overflow_policy=policy)
    server = workshop.open(workshop.model((range(8), 4)), volatile_db=section)
    gone: list[int] = []
    server.on_evict(gone.extend, "m", 0)
    for start in range(100, 160, 4):
        assert server.insert(range(start, start + 4), rows_of(range(start, start + 4), 4), "m", 0) == 4
    every = {*range(8), *range(100, 160)}
    left = sorted(every - set(gone))
    assert len(gone) == len(set(gone)) == len(every) - len(left) and 8 <= len(left) <= 10
    assert server.contains(left, "m", 0).all() and not server.contains(gone, "m", 0).any()
    assert_same_bits(np.asarray(server.lookup(left, "m", 0)), rows_of(left, 4))


def test_rows_that_leave_shared_memory_are_demoted(workshop: Workshop, name: str) -> None:
    server = workshop.open(
        workshop.model((range(8), 4)),
        volatile_db=in_segment(name, overflow_margin=10, num_partitions=1),
        persistent_db={"type": "support.fakes:DictTier", "initialize_after_startup": False},
    )
    server.update(range(4), rows_of(range(4), 4, 1), "m", 0)
    for start in range(100, 160, 4):
        server.insert(range(start, start + 4), rows_of(range(start, start + 4), 4), "m", 0)
    assert server.stats()["m"]["sparse_embedding0"].rows <= 10
    assert_same_bits(np.asarray(server.lookup(range(4), "m", 0)), rows_of(range(4), 4, 1))
    rest = [*range(4, 8), *range(100, 160)]
    assert_same_bits(np.asarray(server.lookup(rest, "m", 0)), rows_of(rest, 4))
