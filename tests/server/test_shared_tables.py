"""Servers of several processes over one copy of the rows (``multi_process_hash_map``)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.children import in_child
from support.factories import Workshop
from support.internals import slower_tier
from support.oracles import assert_same_bits, rows_of
from support.shared_memory import MIB, Peer, kill_self, killed, new_name, open_tier, segment_file
from support.waiting import join_all, wait_until

from hps_numba.server.replacement import Replacement
from hps_numba.storage.host.memory import Mark
from hps_numba.storage.host.store import HostStore
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
    assert stats.memory == planned.host
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


# -- replacement ---------------------------------------------------------------------------------------------------------


def test_a_process_that_starts_during_a_replacement_waits_for_it_and_keeps_its_rows(
    workshop: Workshop, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys = np.arange(100)
    model = workshop.model((keys, 4))
    new = workshop.model((keys, 4), name="n", stamp=3)["sparse_files"]
    server = workshop.open(model, volatile_db=in_segment(name))
    starting = threading.Thread(target=lambda: workshop.open(model, volatile_db=in_segment(name)))
    settle = Replacement._settle

    def start_first(self: Replacement, old: Any) -> None:
        starting.start()
        starting.join(0.5)
        settle(self, old)

    monkeypatch.setattr(Replacement, "_settle", start_first)
    server.replace_model("m", new)
    join_all(starting)
    monkeypatch.undo()
    server.insert([5], rows_of([5], 4, 9), "m", 0)
    workshop.open({**model, "sparse_files": new}, volatile_db=in_segment(name))  # loads nothing, as they are there
    for each in workshop.servers:
        assert_same_bits(np.asarray(each.lookup(keys[6:], "m", 0)), rows_of(keys[6:], 4, 3))
        assert_same_bits(np.asarray(each.lookup([5], "m", 0)), rows_of([5], 4, 9))
    assert len(workshop.servers) == 3
    (record,) = (record for record in caplog.records if "replace_model" in record.getMessage())
    assert record.levelname == "WARNING" and model["sparse_files"][0] in record.getMessage()
    assert new[0][-70:] in record.getMessage()


@pytest.mark.parametrize("during", [False, True])
def test_a_process_that_starts_after_a_replacement_writes_its_old_files_to_no_tier(
    workshop: Workshop, name: str, monkeypatch: pytest.MonkeyPatch, during: bool
) -> None:
    keys = np.arange(100)
    model = workshop.model((keys, 4), (keys, 8))
    new = workshop.model((keys, 4), (keys, 8), name="n", stamp=3)["sparse_files"]
    slower = {"type": "support.fakes:DictTier", "initialize_after_startup": True}

    def start() -> None:
        workshop.open(model, volatile_db=in_segment(name), persistent_db=slower)

    start()
    first, late = workshop.servers[0], threading.Thread(target=start)
    settle = Replacement._settle

    def start_first(self: Replacement, old: Any) -> None:
        late.start()
        late.join(0.5)
        settle(self, old)

    if during:
        monkeypatch.setattr(Replacement, "_settle", start_first)
    first.replace_model("m", new)
    if not during:
        late.start()
    join_all(late)
    of_first, of_late = (slower_tier(server) for server in workshop.servers)
    for number, dim in enumerate((4, 8)):
        tag = first._catalog.table("m", number).spec.tag
        assert (of_first.size(tag), of_late.size(tag)) == (100, 0)  # each server of the test has a tier of its own
        for server in workshop.servers:
            assert_same_bits(np.asarray(server.lookup(keys, "m", number)), rows_of(keys, dim, 3))


def test_a_process_that_is_killed_right_after_the_turn_leaves_the_new_version(
    workshop: Workshop, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = np.arange(100)
    model = workshop.model((keys, 4), (keys, 4))
    new = workshop.model((keys, 4), (keys, 4), name="n", stamp=3)["sparse_files"]
    server = workshop.open(model, volatile_db=in_segment(name))
    monkeypatch.setattr(Replacement, "_settle", lambda *given: kill_self())
    killed(lambda: server.replace_model("m", new))
    server.insert([5], rows_of([5], 4, 9), "m", 0)
    late = workshop.open(model, volatile_db=in_segment(name))
    assert_same_bits(np.asarray(late.lookup([5], "m", 0)), rows_of([5], 4, 9))
    for table in range(2):
        assert_same_bits(np.asarray(late.lookup(keys[6:], "m", table)), rows_of(keys[6:], 4, 3))


@pytest.mark.parametrize("again", [False, True])
def test_a_process_that_is_killed_between_two_tables_leaves_no_mixture(
    workshop: Workshop, name: str, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    keys = np.arange(100)
    model = workshop.model((keys, 4), (keys, 4))
    new = workshop.model((keys, 4), (keys, 4), name="n", stamp=3)["sparse_files"]
    server = workshop.open(model, volatile_db=in_segment(name))
    if again:
        server.replace_model("m", workshop.model((keys, 4), (keys, 4), name="o", stamp=2)["sparse_files"])
    switch_to = HostStore.switch_to

    def die_at_the_second(self: HostStore, sibling: HostStore) -> Any:
        return kill_self() if self.name.endswith("1") else switch_to(self, sibling)

    monkeypatch.setattr(HostStore, "switch_to", die_at_the_second)
    killed(lambda: server.replace_model("m", new))
    monkeypatch.undo()
    late = workshop.open(model, volatile_db=in_segment(name))
    for each in (server, late):
        for table in range(2):
            assert_same_bits(np.asarray(each.lookup(keys, "m", table)), rows_of(keys, 4))


def test_a_long_path_is_noted_by_its_end(name: str) -> None:
    tier = open_tier(name)
    store = tier.store("t", 4)
    for path in ("", "/models/new", "/m\u00f6del" * 40 + "/new"):
        store.memory.mark = Mark(bytes(range(32)), path, True)
        mark = store.memory.mark
        assert (mark.digest, mark.replaced, mark.known) == (bytes(range(32)), True, True)
        assert mark.path == path or (mark.path.startswith("...") and path.endswith(mark.path[5:]))
    store.memory.mark = Mark()
    assert not store.memory.mark.known and not store.memory.mark.path
    tier.close()


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
