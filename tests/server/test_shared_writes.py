"""Writes of several processes to one table in shared memory, with slower tiers behind it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.fakes import DictTier, WatchedWritesTier
from support.internals import served_table, wait_for_background
from support.oracles import assert_same_bits, rows_of
from support.shared_memory import MIB, kill_self, killed, new_name, open_tier, segment_file, started_child
from support.waiting import join_all

import hps_numba
from hps_numba.config import PersistentDatabaseConfig
from hps_numba.errors import TierUnavailable
from hps_numba.server.table_writes import TableWrites
from hps_numba.storage.shared import change_lock
from hps_numba.storage.shared.segment import Segment
from hps_numba.storage.tier_stack import TierStack
from hps_numba.storage.tiers.multi_process_hash_map import MultiProcessHashMapTier

DIM = 3
KEYS = np.arange(4)


@pytest.fixture
def name(workshop: Workshop) -> Iterator[str]:
    given = new_name()
    yield given
    for server in workshop.servers:
        server.close()
    segment_file(given).unlink(missing_ok=True)


@pytest.fixture
def spec(workshop: Workshop) -> Any:
    return hps_numba.read_config({"supportlonglong": True, "models": [workshop.model(([], DIM))]}).tables()[0]


@contextmanager
def in_other_process(held: Callable[[], Any]) -> Iterator[None]:
    """A block in which a forked child is inside the context manager ``held()``."""
    (ready, tell), (wait, go_on) = os.pipe(), os.pipe()

    def hold() -> None:
        os.close(go_on)
        with held():
            os.write(tell, b"1")
            os.read(wait, 1)

    child = started_child(hold)
    os.close(tell)
    try:
        assert os.read(ready, 1) == b"1"
        yield
    finally:
        os.close(go_on)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        os.close(ready)
        os.close(wait)


def segment_of(tier: MultiProcessHashMapTier) -> Segment:
    return tier._tables.segment


# -- rows that were fetched ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
def test_a_lookup_does_not_wait_for_a_writer_of_another_process(workshop: Workshop, name: str, cached: bool) -> None:
    entry: dict[str, Any] = {"deployed_device_list": [0], "gpucacheper": 0.5} if cached else {}
    server = workshop.open(
        workshop.model((range(8), DIM), **entry),
        cache_on_cpu=cached,
        volatile_db={
            "type": "multi_process_hash_map",
            "shared_memory_name": name,
            "shared_memory_size": 16 * MIB,
            "initialize_after_startup": False,
            "cache_missed_embeddings": True,
        },
        persistent_db={"type": "support.fakes:DictTier"},
    )
    host = server._loader.host
    assert isinstance(host, MultiProcessHashMapTier)
    store = served_table(server).store
    assert store is not None
    with in_other_process(segment_of(host).turn):  # which a lookup that waits gets after a minute, or never
        assert_same_bits(np.asarray(server.lookup(KEYS, "m", 0)), rows_of(KEYS, DIM))
        wait_for_background(server)
        assert not store.contains(KEYS).any()
    assert_same_bits(np.asarray(server.lookup(KEYS, "m", 0)), rows_of(KEYS, DIM))
    wait_for_background(server)
    assert store.contains(KEYS).all()


def writes_of(spec: Any, host: MultiProcessHashMapTier, slower: DictTier) -> TableWrites:
    """Writes as another process has them: to a host store of its own in the same segment."""
    return TableWrites(spec, host.store(spec.tag, DIM), TierStack([slower]))


def test_rows_that_other_processes_bring_up_keep_none_out(spec: Any, name: str) -> None:
    slower = DictTier(PersistentDatabaseConfig())
    hosts = [open_tier(name) for _ in range(2)]
    one, other = (writes_of(spec, host, slower) for host in hosts)
    count = other.count
    one.keep(KEYS, rows_of(KEYS, DIM), one.count)
    assert one.contains(KEYS).all() and other.count == count
    other.keep(KEYS + 4, rows_of(KEYS + 4, DIM), count)
    assert one.contains(KEYS + 4).all()
    one.insert(KEYS, rows_of(KEYS, DIM, 1))
    assert other.count != count
    other.keep(KEYS + 8, rows_of(KEYS + 8, DIM), count)
    assert not one.contains(KEYS + 8).any()
    for host in hosts:
        host.close()


# -- host memory and slower tiers ------------------------------------------------------------------------------------------


def rows_in(slower: DictTier, spec: Any) -> dict[int, list[float]]:
    return {int(key): row.tolist() for keys, rows in slower.scan(spec.tag) for key, row in zip(keys, rows, strict=True)}


def rows_of_host(host: MultiProcessHashMapTier, spec: Any) -> dict[int, list[float]]:
    return {int(key): row.tolist() for keys, rows in host.scan(spec.tag) for key, row in zip(keys, rows, strict=True)}


def test_writes_wait_for_a_change_of_all_tiers_by_another_process(spec: Any, name: str) -> None:
    slower, host = DictTier(PersistentDatabaseConfig()), open_tier(name)
    writes = writes_of(spec, host, slower)
    writes.insert(KEYS, rows_of(KEYS, DIM))
    eraser = threading.Thread(target=writes.erase, args=(KEYS,))
    with in_other_process(writes.changing):
        eraser.start()
        eraser.join(0.1)
        assert eraser.is_alive() and len(rows_in(slower, spec)) == 4
        writes.refresh()  # changes no tier
    join_all(eraser)
    assert not rows_in(slower, spec) and not rows_of_host(host, spec)
    host.close()


def test_fetched_rows_stay_out_while_another_process_changes_all_tiers(spec: Any, name: str) -> None:
    host = open_tier(name)
    writes = writes_of(spec, host, DictTier(PersistentDatabaseConfig()))
    with in_other_process(writes.changing):
        writes.keep(KEYS, rows_of(KEYS, DIM), writes.count)
        assert not rows_of_host(host, spec)
    writes.keep(KEYS, rows_of(KEYS, DIM), writes.count)
    assert len(rows_of_host(host, spec)) == 4
    host.close()


def test_a_process_that_is_killed_in_a_change_of_all_tiers_keeps_nobody_waiting(spec: Any, name: str) -> None:
    host = open_tier(name)
    writes = writes_of(spec, host, DictTier(PersistentDatabaseConfig()))

    def die() -> None:
        with writes.changing():
            kill_self()

    killed(die)
    assert writes.insert(KEYS, rows_of(KEYS, DIM)) == 4
    host.close()


def test_a_process_that_keeps_a_table_is_named(spec: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slower, host = DictTier(PersistentDatabaseConfig()), open_tier(name)
    writes = writes_of(spec, host, slower)
    monkeypatch.setattr(change_lock, "LOCK_SECONDS", 0.05)
    with (
        in_other_process(writes.changing),
        pytest.raises(TierUnavailable, match=rf"{spec.tag}: process \d+ has been changing .* for 0.05 s: nothing was written"),
    ):
        writes.insert(KEYS, rows_of(KEYS, DIM))
    assert not rows_in(slower, spec)
    writes.insert(KEYS, rows_of(KEYS, DIM))
    host.close()


def test_an_insertion_beside_an_erasure_leaves_tiers_that_agree(spec: Any, name: str) -> None:
    slower = WatchedWritesTier(PersistentDatabaseConfig())
    hosts = [open_tier(name) for _ in range(2)]
    one, other = (writes_of(spec, host, slower) for host in hosts)
    eraser = threading.Thread(target=other.erase, args=(KEYS,))

    def erase_meanwhile(number: int) -> None:
        if number == 1:  # the insertion has come to the slower tier and not yet to host memory
            eraser.start()
            eraser.join(0.1)

    slower.after_write = erase_meanwhile
    one.insert(KEYS, rows_of(KEYS, DIM))
    join_all(eraser)
    assert rows_in(slower, spec) == rows_of_host(hosts[0], spec) == {}
    for host in hosts:
        host.close()


def test_a_row_that_is_demoted_beside_an_update_is_the_new_one(spec: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slower = DictTier(PersistentDatabaseConfig())
    hosts = [open_tier(name, overflow_margin=4, num_partitions=1, overflow_resolution_target=0.25) for _ in range(2)]
    one, other = (writes_of(spec, host, slower) for host in hosts)
    for writes in (one, other):
        writes.evictions.demotes = True
    hosts[0].insert(spec.tag, KEYS, rows_of(KEYS, DIM))  # in host memory only
    evictor = threading.Thread(target=one.insert, args=(KEYS + 4, rows_of(KEYS + 4, DIM)))
    update = TierStack.update

    def evict_meanwhile(self: TierStack, *given: Any) -> Any:
        answer = update(self, *given)  # the slower tier has no such row yet
        evictor.start()
        evictor.join(0.1)
        return answer

    monkeypatch.setattr(TierStack, "update", evict_meanwhile)
    assert other.update(KEYS, rows_of(KEYS, DIM, 1)) == 4
    join_all(evictor)
    rows, found = one.read(KEYS)
    assert found.all()
    assert_same_bits(rows, rows_of(KEYS, DIM, 1))
    for host in hosts:
        host.close()
