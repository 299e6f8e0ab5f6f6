"""The parts of a host store, each by itself: header, versions, write lock, bound."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from support.oracles import rows_of
from support.waiting import join_all

from hps_numba.device.host_memory import PlainHostAllocator
from hps_numba.errors import CapacityError, ClosedError
from hps_numba.storage.host.bound import RowBound
from hps_numba.storage.host.content import TableContent
from hps_numba.storage.host.epochs import Epochs
from hps_numba.storage.host.header import StoreHeader
from hps_numba.storage.host.store import HostStore
from hps_numba.storage.host.versions import Versions
from hps_numba.storage.host.write_lock import WriteLock

DIM = 2


class Interrupt(BaseException):
    """Not an error of ours."""


@pytest.fixture
def allocator() -> PlainHostAllocator:
    return PlainHostAllocator()


@pytest.fixture
def header(allocator: PlainHostAllocator) -> StoreHeader:
    return StoreHeader(allocator, "t")


@pytest.fixture
def epochs() -> Epochs:
    return Epochs()


def content_of(allocator: PlainHostAllocator, keys: range) -> TableContent:
    content = TableContent(DIM, len(keys), allocator=allocator)
    content.rows_view(0, len(keys))[:] = rows_of(keys, DIM)
    content.fill(np.array(keys), 1)
    return content


@pytest.fixture
def versions(header: StoreHeader, epochs: Epochs, allocator: PlainHostAllocator) -> Versions:
    return Versions(header, epochs, content_of(allocator, range(3)))


def test_a_header_tells_its_watchers_each_block(header: StoreHeader) -> None:
    seen: list[int] = []
    header.watch(seen.append)
    before = header.snapshot()
    header.publish(4096)
    header.unwatch(seen.append)
    header.publish(0)
    assert (seen, header.block, before.tolist()) == ([0, 4096], 0, [0])


def test_a_swapped_version_is_published_and_the_old_one_released(
    versions: Versions, header: StoreHeader, allocator: PlainHostAllocator
) -> None:
    old, new = versions.current, content_of(allocator, range(5))
    versions.swap(new)
    assert (versions.current, header.block, versions.retired) == (new, new.block, 1)
    in_use = allocator.in_use
    versions.retire(old, 1.0)
    assert versions.retired == 0 and allocator.in_use < in_use


def test_an_old_version_stays_while_a_reader_holds_its_epoch(
    versions: Versions, epochs: Epochs, allocator: PlainHostAllocator
) -> None:
    old = versions.current
    with epochs.reading():
        versions.swap(content_of(allocator, range(5)))
        versions.retire(old, 0.01)
        assert versions.retired == 1
    versions.collect()
    assert versions.retired == 0


@pytest.mark.parametrize("published", [False, True])
def test_repair_follows_the_header(
    versions: Versions, header: StoreHeader, allocator: PlainHostAllocator, monkeypatch: pytest.MonkeyPatch, published: bool
) -> None:
    """An interrupt before or after the one store that swaps the versions."""
    old, new = versions.current, content_of(allocator, range(5))
    publish = header.publish

    def interrupted(block: int) -> None:
        if published:
            publish(block)
        raise Interrupt

    monkeypatch.setattr(header, "publish", interrupted)
    with pytest.raises(Interrupt):
        versions.swap(new)
    versions.repair()
    assert versions.current is (new if published else old)
    versions.collect()
    assert versions.retired == 0


def test_an_interrupted_write_is_repaired_by_the_next(header: StoreHeader, versions: Versions) -> None:
    lock = WriteLock("t", header, versions)
    with pytest.raises(Interrupt), lock.writing():
        raise Interrupt
    with lock.at_rest(1.0) as (writes, block):
        assert (writes, block) == (1, 0)
    with lock.writing() as content:
        assert content.live == 3
    with lock.at_rest(1.0) as (writes, block):
        assert (writes, block) == (2, header.block)


def test_an_error_of_ours_needs_no_repair(header: StoreHeader, versions: Versions) -> None:
    lock = WriteLock("t", header, versions)
    with pytest.raises(CapacityError), lock.writing():
        lock.settle()
        raise CapacityError("full")
    with lock.at_rest(1.0) as (_, block):
        assert block == header.block


def test_an_error_of_ours_from_a_signal_handler_is_repaired(header: StoreHeader, versions: Versions) -> None:
    lock = WriteLock("t", header, versions)
    with pytest.raises(CapacityError), lock.writing():
        raise CapacityError("another table is full")
    with lock.at_rest(1.0) as (_, block):
        assert block == 0


def test_a_watcher_that_raises_keeps_a_write_from_beginning(header: StoreHeader, versions: Versions) -> None:
    lock = WriteLock("t", header, versions)

    def refuse() -> None:
        raise Interrupt

    lock.watch(refuse)
    with pytest.raises(Interrupt), lock.writing():
        raise AssertionError("the write began")
    lock.unwatch(refuse)
    with lock.at_rest(1.0) as (_, block):
        assert block == header.block


def test_a_closed_lock_refuses_writers(header: StoreHeader, versions: Versions) -> None:
    lock = WriteLock("t", header, versions)
    for expected in (True, False):
        with lock.closing() as first:
            assert first is expected
    with pytest.raises(ClosedError, match="t: the store is closed"), lock.writing():
        raise AssertionError("the write began")


def test_at_rest_gives_up_while_a_writer_is_active(header: StoreHeader, versions: Versions) -> None:
    lock = WriteLock("t", header, versions)
    seen: list[tuple[int, int]] = []

    def look() -> None:
        with lock.at_rest(0.01) as state:
            seen.append(state)

    with lock.writing():
        thread = threading.Thread(target=look)
        thread.start()
        join_all(thread)
    assert seen == [(-1, 0)]


def test_a_bound_trims_to_its_target(allocator: PlainHostAllocator, epochs: Epochs) -> None:
    content = content_of(allocator, range(20))
    for max_rows, left in ((None, 20), (20, 20), (19, 10)):
        bound = RowBound(max_rows, "evict_random", 0.5, 0)
        bound.trim(content, epochs)
        assert (content.live, bound.evicted) == (left, 20 - left)


def test_a_dropped_store_frees_its_memory_at_once(allocator: PlainHostAllocator) -> None:
    """Its parts do not refer to it: there is no cycle that only the garbage collector would find."""
    gc.disable()
    try:
        store = HostStore(DIM, rows=100, allocator=allocator)
        store.upsert(np.arange(3), rows_of(range(3), DIM))
        assert allocator.in_use > 0
        del store
        assert allocator.in_use == 0
    finally:
        gc.enable()
