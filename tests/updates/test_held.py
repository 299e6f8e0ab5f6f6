"""Keys that a part of a slower tier cannot take wait for it; all others go on, and no key ever gets an older row."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.internals import slower_tier
from support.oracles import assert_same_bits, rows_of
from support.updates import ListBus, applied, list_bus, message_of, wait_for
from support.waiting import wait_until

import hps_numba
from hps_numba.errors import TierError
from hps_numba.server.manifest import Manifest
from hps_numba.server.model_versions import ModelVersion
from hps_numba.storage import PartialWriteError
from hps_numba.storage.tiers._checked import CheckedTier, TierDefect
from hps_numba.updates import Lost, Message, Position
from hps_numba.updates._batches import TableBatch
from hps_numba.updates._held import HeldUpdates
from hps_numba.updates._manifests import manifest_headers
from hps_numba.updates._row_writer import RowWriter
from hps_numba.updates._source_counts import SourceCounts
from hps_numba.updates._update import NO_TIME

TABLE = "hps_et.m.sparse_embedding0"
ABSENT = np.full((1, 3), -7.5, np.float32)
Opened = tuple[ListBus, dict[str, Any], hps_numba.HPS, Any]


@pytest.fixture
def opened(workshop: Workshop) -> Opened:
    """A bus, its section, a server of keys 0 to 8 in memory and a tier, and the tier."""
    bus, source = list_bus()
    server = served(workshop, source)
    return bus, source, server, slower_tier(server)


def served(workshop: Workshop, source: Any) -> hps_numba.HPS:
    return workshop.open(
        workshop.model((range(9), 3)),
        update_source=source,
        allow_code=True,
        cache_on_cpu=True,
        tiers=[{"type": "hash_map"}, {"type": "support.fakes:PartlyDownTier"}],
    )


def published(bus: ListBus, *items: Any) -> int:
    bus.items.extend(items)
    return len(bus.items) - 1


def first_of(server: hps_numba.HPS, *keys: int) -> list[float]:
    """The first element of the row of each key."""
    return [float(value) for value in server.lookup(list(keys), "m", 0)[:, 0]]


def is_served(server: hps_numba.HPS, key: int, stamp: int) -> bool:
    return first_of(server, key) == [float(rows_of([key], 3, stamp)[0, 0])]


# --- what a server does ----------------------------------------------------------------------------------------------------


@contextmanager
def no_attempts(server: hps_numba.HPS) -> Iterator[None]:
    """A block in which nothing that is held is tried again."""
    writer, asked = server._updates._consumers[0]._writer, threading.Event()  # type: ignore[attr-defined]
    attempt = writer.try_again
    writer.try_again = lambda goes_on: asked.set()
    try:
        wait_until(asked.is_set)  # an attempt that was under way is over
        yield
    finally:
        writer.try_again = attempt


def test_other_keys_go_on_and_nothing_is_committed_until_the_tier_is_back(opened: Opened) -> None:
    bus, _, server, tier = opened
    tier.down = frozenset({1, 3, 100})
    published(bus, message_of([1, 2, 100], rows_of([1, 2, 100], 3, 1), 0), message_of([3, 4], None, 1))
    last = published(bus, *(message_of([1, 2], rows_of([1, 2], 3, stamp), stamp) for stamp in range(2, 6)))
    wait_until(lambda: is_served(server, 2, 5))
    assert_same_bits(server.lookup([1, 3], "m", 0), rows_of([1, 3], 3))
    assert_same_bits(server.lookup([4, 100], "m", 0), np.concatenate([ABSENT, ABSENT]))
    wait_until(lambda: (server.update_stats()[0].lag_messages, server.update_stats()[0].held_rows) == (last + 1, 3))
    (stats,) = server.update_stats()
    assert (stats.positions, bus.committed) == ({}, [])
    (updates,) = server.stats()["m"]["sparse_embedding0"].updates
    assert (updates.erased, updates.held_rows, updates.lag_messages) == (1, 3, last + 1)
    assert "keys that cannot be written wait and are tried again: a part is down" in stats.last_problem
    before = tier.refused
    wait_until(lambda: tier.refused > before)  # it is asked again and again
    tier.down = frozenset()
    stats = wait_for(server, last)
    assert (stats.held_rows, stats.backlog_messages, stats.backlog_bytes) == (0, 0, 0)
    assert_same_bits(server.lookup([1, 2], "m", 0), rows_of([1, 2], 3, 5))
    assert_same_bits(server.lookup([3, 100], "m", 0), np.concatenate([ABSENT, rows_of([100], 3, 1)]))
    assert_same_bits(np.stack([tier.content[TABLE].rows[key] for key in (1, 2)]), rows_of([1, 2], 3, 5))
    assert 3 not in tier.content[TABLE].rows
    (updates,) = server.stats()["m"]["sparse_embedding0"].updates
    assert (updates.erased, updates.held_rows, updates.lag_messages) == (2, 0, 0)
    assert updates.rows >= 4


def test_an_older_row_that_is_held_never_follows_a_newer_one(opened: Opened) -> None:
    """The tier takes the newer row before the older one is tried again."""
    bus, _, server, tier = opened
    tier.down = frozenset({1, 2, 3})
    published(bus, message_of([1, 2, 3], rows_of([1, 2, 3], 3, 1), 0))
    wait_until(lambda: server.update_stats()[0].held_rows == 3)
    with no_attempts(server):
        tier.down = frozenset({3})
        published(bus, message_of([1], rows_of([1], 3, 2), 1), message_of([2], None, 2))
        wait_until(lambda: server.update_stats()[0].held_rows == 1)
    tier.down = frozenset()
    wait_for(server, published(bus, message_of([8], rows_of([8], 3, 1), 3)))
    expected = np.concatenate([rows_of([1], 3, 2), ABSENT, rows_of([3], 3, 1)])
    assert_same_bits(server.lookup([1, 2, 3], "m", 0), expected)


def test_parts_that_come_back_one_by_one_get_theirs(workshop: Workshop) -> None:
    bus, source = list_bus()
    server = served(workshop, {**source, "max_batch_size": 7})
    tier = slower_tier(server)
    keys = np.arange(100)
    tier.down = frozenset(range(100))
    last = published(bus, *(message_of(some, rows_of(some, 3, 1), i) for i, some in enumerate(keys.reshape(10, 10))))
    wait_until(lambda: server.update_stats()[0].held_rows == 100)
    tier.down = frozenset(range(50))
    wait_until(lambda: server.update_stats()[0].held_rows == 50)
    assert_same_bits(server.lookup(keys[50:], "m", 0), rows_of(keys[50:], 3, 1))
    assert bus.committed == []
    tier.down = frozenset()
    wait_for(server, last)
    assert_same_bits(server.lookup(keys, "m", 0), rows_of(keys, 3, 1))


def test_a_full_backlog_of_held_rows_ends_reading_until_there_is_room(workshop: Workshop) -> None:
    bus, source = list_bus()
    server = served(workshop, {**source, "max_backlog_bytes": 2**16})
    tier = slower_tier(server)
    tier.down = frozenset(range(5000))
    keys = np.arange(5000).reshape(100, 50)
    items = (message_of([*some, 9000], rows_of([*some, 9000], 3, number), number) for number, some in enumerate(keys))
    last = published(bus, *items)
    wait_until(lambda: bus.kept_alive)
    assert bus.opened[0].at <= last, "the bus keeps the rest"
    wait_until(lambda: server.update_stats()[0].held_rows * 32 >= 2**16)
    assert server.update_stats()[0].held_rows < 5000
    assert first_of(server, 9000) != [-7.5], "that key is not down"
    tier.down = frozenset()
    wait_for(server, last)
    numbers = np.repeat(np.arange(100), 50)
    expected = np.concatenate([rows_of([key], 3, number) for key, number in zip(keys.ravel(), numbers)])
    assert_same_bits(server.lookup(keys.ravel(), "m", 0), expected)


def test_the_same_keys_again_and_again_take_no_more_room(workshop: Workshop) -> None:
    bus, source = list_bus()
    server = served(workshop, {**source, "max_backlog_bytes": 2**16})
    tier = slower_tier(server)
    tier.down = frozenset(range(50))
    keys = np.arange(100)
    last = published(bus, *(message_of(keys, rows_of(keys, 3, number % 20), number) for number in range(300)))
    wait_until(lambda: is_served(server, 99, 299 % 20))
    assert server.update_stats()[0].held_rows == 50
    tier.down = frozenset()
    wait_for(server, last)
    assert_same_bits(server.lookup(keys, "m", 0), rows_of(keys, 3, 299 % 20))


def test_a_server_that_ends_meanwhile_gets_what_it_held_again(opened: Opened, workshop: Workshop) -> None:
    bus, source, server, tier = opened
    wait_for(server, published(bus, message_of([1, 2], rows_of([1, 2], 3, 1), 0)))
    tier.down = frozenset({1})
    last = published(bus, message_of([1, 2], rows_of([1, 2], 3, 2), 1), message_of([2], rows_of([2], 3, 3), 2))
    wait_until(lambda: is_served(server, 2, 3))
    server.close()
    assert bus.committed[-1] == (0, 0), "what is held was not committed, nor what came after it"
    bus.start = bus.committed[-1].offset + 1
    again = served(workshop, source)
    wait_for(again, last)
    assert_same_bits(again.lookup([1, 2], "m", 0), np.concatenate([rows_of([1], 3, 2), rows_of([2], 3, 3)]))


def test_before_partitions_go_to_another_process_held_rows_are_written(opened: Opened) -> None:
    bus, _, server, tier = opened
    tier.down = frozenset({1})
    published(bus, message_of([1, 2], rows_of([1, 2], 3, 1), 0))
    wait_until(lambda: server.update_stats()[0].held_rows == 1)
    answers: list[tuple[bool, list[Any]]] = []

    def drain() -> None:
        if not answers:
            tier.down = frozenset()
            answers.append((bus.opened[0].drained(1e6), list(bus.committed)))

    bus.on_poll = drain
    wait_until(lambda: answers)
    assert answers == [(True, [(0, 0)])]
    assert is_served(server, 1, 1)


def test_what_is_held_when_partitions_go_is_dropped_and_comes_again(opened: Opened) -> None:
    bus, _, server, tier = opened
    tier.down = frozenset({1})
    published(bus, message_of([1, 2], rows_of([1, 2], 3, 1), 0), message_of([3], rows_of([3], 3, 1), 1))
    wait_until(lambda: server.update_stats()[0].held_rows == 1 and is_served(server, 3, 1))
    answers: list[bool] = []

    def drain() -> None:
        if not answers:
            answers.append(bus.opened[0].drained(0.01))
            bus.items[:] = [message_of([1], rows_of([1], 3, 9), 0)]  # the next one has gone further, and gives them back
            bus.opened[0].at = 0
            tier.down = frozenset()

    bus.on_poll = drain
    wait_until(lambda: answers == [False])
    wait_for(server, 0)
    assert is_served(server, 1, 9)
    assert bus.committed == [(0, 0)]
    assert server.update_stats()[0].held_rows == 0


def test_what_is_held_is_dropped_when_files_are_loaded_again(opened: Opened, workshop: Workshop) -> None:
    bus, source, _, _ = opened
    bus.starts_over = True
    server = served(workshop, source)
    tier = slower_tier(server)
    tier.down = frozenset({1})
    published(bus, message_of([1, 2], rows_of([1, 2], 3, 1), 0))
    wait_until(lambda: server.update_stats()[0].held_rows == 1)
    bus.items[:] = [message_of([2], rows_of([2], 3, 8), 7)]
    bus.items += [Lost(Position(0, 7), 6), *bus.items]
    wait_until(lambda: server.update_stats()[0].lost == 6)
    tier.down = frozenset()
    wait_until(lambda: server.update_stats()[0].reloads == 1)
    wait_for(server, 7)
    assert_same_bits(server.lookup([1, 2], "m", 0), np.concatenate([rows_of([1], 3), rows_of([2], 3, 8)]))


# --- versions --------------------------------------------------------------------------------------------------------------


def version_message(workshop: Workshop, number: int, offset: int) -> Message:
    path = workshop.table(f"version-{number}", range(9), 3, number)
    manifest = Manifest(model="m", version=number, tables={"sparse_embedding0": path}, issued_ms=number)
    return Message(TABLE, None, Position(0, offset), manifest_headers(manifest))


def test_a_version_waits_for_what_is_held_of_its_model(opened: Opened, workshop: Workshop) -> None:
    bus, _, server, tier = opened
    tier.down = frozenset({1})
    last = published(bus, message_of([1, 2], rows_of([1, 2], 3, 1), 0), version_message(workshop, 7, 1))
    wait_until(lambda: is_served(server, 2, 1))
    before = tier.refused
    wait_until(lambda: tier.refused >= before + 3)
    assert server.model_version("m") == 1
    tier.down = frozenset()
    wait_for(server, last)
    assert server.model_version("m") == 7
    assert_same_bits(server.lookup([1, 2], "m", 0), rows_of([1, 2], 3, 7))


def test_what_is_held_of_a_version_that_a_call_replaced_is_not_applied(opened: Opened, workshop: Workshop) -> None:
    bus, _, server, tier = opened
    wait_for(server, published(bus, version_message(workshop, 7, 0)))
    tier.down = frozenset({1, 2})
    published(bus, message_of([1], rows_of([1], 3, 20), 1, version=7), message_of([2], rows_of([2], 3, 20), 2))
    wait_until(lambda: server.update_stats()[0].held_rows == 2)
    with no_attempts(server):
        tier.down = frozenset()
        server.replace_model("m", [workshop.table("by-call", range(9), 3, 8)])
    wait_for(server, published(bus, message_of([3], rows_of([3], 3, 21), 3)))
    expected = [rows_of([1], 3, 8), rows_of([2], 3, 20), rows_of([3], 3, 21)]
    assert_same_bits(server.lookup([1, 2, 3], "m", 0), np.concatenate(expected))
    (stats,) = server.update_stats()
    assert stats.skipped == {"other_version": 1} and stats.last_skipped.startswith(f"other_version: {TABLE}: 1 that were held")


def test_what_is_held_and_older_than_the_files_of_another_version_is_counted() -> None:
    first, second = (ModelVersion(number=number, sources=()) for number in (1, 2))
    counts, held = SourceCounts("source"), HeldUpdates(TABLE, 3, first)
    writer = RowWriter(None, None, counts, lambda failures: 0.0)  # type: ignore[arg-type]
    writer._held[TABLE] = held
    held.note(batch([1, 2, 3], rows_of([1, 2, 3], 3), [4, 5], [8, NO_TIME, 2**50, 7, 2**50]), np.ones(5, bool))
    target: Any = SimpleNamespace(dim=3, version=second, still_taken=lambda accepted, times: times >= 100)
    assert writer._held_for(TABLE, target) is held
    assert len(held) == 2 and counts.skipped == {"older": 2, "other_version": 1}
    assert counts.of(TABLE).skipped == counts.skipped
    assert writer._held_for(TABLE, target) is held and sum(counts.skipped.values()) == 3  # each once


def test_what_is_held_of_a_model_that_is_unloaded_is_dropped_and_counted(opened: Opened) -> None:
    bus, _, server, tier = opened
    tier.down = frozenset({1, 2})
    published(bus, message_of([1], rows_of([1], 3, 1), 0), message_of([1], rows_of([1], 3, 2), 1), message_of([2], None, 2))
    wait_until(lambda: server.update_stats()[0].held_rows == 2)
    server.unload_model("m")
    wait_until(lambda: applied(server) == {0: 2})
    (stats,) = server.update_stats()
    assert (stats.held_rows, stats.skipped) == (0, {"unknown_table": 2})
    assert stats.last_skipped == f"unknown_table: {TABLE}: 2 that were held: expected a table that takes updates"
    assert stats.tables[TABLE].skipped == {"unknown_table": 2}


def test_what_is_held_for_a_table_that_has_another_width_now_is_counted(opened: Opened, workshop: Workshop) -> None:
    bus, _, server, tier = opened
    tier.down = frozenset({1, 2})
    published(bus, message_of([1, 2], rows_of([1, 2], 3, 1), 0))
    wait_until(lambda: server.update_stats()[0].held_rows == 2)
    with no_attempts(server):
        server.unload_model("m")
        tier.down = frozenset()
        tier.erase(TABLE)
        server.load_model(workshop.model((range(9), 5)))
    wait_until(lambda: server.update_stats()[0].skipped)
    assert server.update_stats()[0].skipped == {"width": 2}
    assert server.update_stats()[0].held_rows == 0


# --- what keeps them -------------------------------------------------------------------------------------------------------


def batch(keys: list[int], rows: np.ndarray, erased: list[int], times: list[int]) -> TableBatch:
    return TableBatch(np.array(keys, np.int64), rows, np.array(erased, np.int64), np.array(times, np.int64))


def content_of(held: HeldUpdates, most: int = 100) -> tuple[dict[int, tuple[bytes, int]], dict[int, int]]:
    """Rows with their times, and times of deletions, by key."""
    got = held.some(most)
    n = len(got.keys)
    rows = {int(key): (row.tobytes(), int(at)) for key, row, at in zip(got.keys, got.rows, got.times[:n], strict=True)}
    return rows, {int(key): int(at) for key, at in zip(got.erased, got.times[n:], strict=True)}


def test_the_last_update_of_a_key_is_kept_bit_by_bit() -> None:
    held = HeldUpdates(TABLE, 2, ModelVersion(number=1, sources=()))
    strange = np.array([[0x7FC00001, 0xFFC12345], [1, 0x80000000]], np.uint32).view(np.float32)
    edges = [np.iinfo(np.int64).min, np.iinfo(np.int64).max]
    held.note(batch(edges, strange, [5], [2**62 + 1, NO_TIME, 3]), np.ones(3, bool))
    assert (len(held), held.bytes) == (3, 3 * (8 + 4 * 5))
    rows, erased = content_of(held)
    assert rows == {edges[0]: (strange[0].tobytes(), 2**62 + 1), edges[1]: (strange[1].tobytes(), NO_TIME)}
    assert erased == {5: 3}
    held.note(batch([5, edges[0]], strange, [edges[1]], [7, 8, 9]), np.array([True, False, True]))
    assert content_of(held) == ({5: (strange[0].tobytes(), 7)}, {edges[1]: 9})
    held.forget(lambda times: times == 9)
    assert content_of(held) == ({5: (strange[0].tobytes(), 7)}, {})


def test_each_has_its_turn() -> None:
    held = HeldUpdates(TABLE, 1, ModelVersion(number=1, sources=()))
    keys = list(range(10))
    held.note(batch(keys, rows_of(keys, 1), [], keys), np.ones(10, bool))
    seen = [set(content_of(held, 4)[0]) for _ in range(3)]
    assert [len(some) for some in seen] == [4, 4, 2]
    assert set().union(*seen) == set(keys)
    got = held.some(4)
    assert (got.writes, got.deletions, got.oldest_ms, got.newest_ms) == (4, 0, got.times.min(), got.times.max())


# --- what a tier says ------------------------------------------------------------------------------------------------------


def test_what_insert_and_erase_raise_is_checked() -> None:
    from support.fakes import PartlyDownTier

    inner = PartlyDownTier.from_options()
    tier = CheckedTier(inner)
    inner.down = frozenset({1})
    with pytest.raises(PartialWriteError) as raised:
        tier.insert(TABLE, np.array([1, 2]), rows_of([1, 2], 3))
    assert isinstance(raised.value, TierError) and raised.value.failed.tolist() == [True, False]
    again = pickle.loads(pickle.dumps(raised.value))  # as between processes
    assert type(again) is PartialWriteError and str(again) == str(raised.value) and again.failed.tolist() == [True, False]
    for wrong in (np.array([1, 0]), np.ones(3, bool), [True, False], None):

        def insert(table: str, keys: np.ndarray, rows: np.ndarray, wrong: Any = wrong) -> int:
            raise PartialWriteError("down", wrong)

        inner.insert = inner.erase = insert  # type: ignore[method-assign, assignment]
        with pytest.raises(TierDefect, match=r"PartlyDownTier\.insert: failed: expected bool\[2\], got"):
            tier.insert(TABLE, np.array([1, 2]), rows_of([1, 2], 3))
