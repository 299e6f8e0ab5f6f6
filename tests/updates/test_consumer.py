"""Updates reach every tier and cache of a server, in order, before they are committed; what goes wrong reaches no lookup."""

from __future__ import annotations

import gc
import logging
import re
import threading
import time
from typing import Any

import numpy as np
import pytest
from support.children import in_child
from support.factories import COLD, Workshop
from support.internals import slower_tier
from support.oracles import assert_same_bits, rows_of
from support.services import Service
from support.updates import ListBus, applied, fresh_bus, list_bus, message_of, source_of, update_of, wait_for
from support.waiting import HANG_SECONDS, wait_until

import hps_numba
from hps_numba.errors import ConfigError, TierError, TierUnavailable
from hps_numba.runtime import threads
from hps_numba.runtime.threads import Pool
from hps_numba.updates import Lost, Message, Position, _consumer, _counts
from hps_numba.updates._backlog import Backlog
from hps_numba.updates._consumer import Consumer
from hps_numba.updates._wire.messages import encode_rows

FAKE = "support.fakes:"


def opened(workshop: Workshop, source: Any, **top: Any) -> hps_numba.HPS:
    """A server of one table of keys 0 to 8 and width 3."""
    return workshop.open(workshop.model((range(9), 3)), update_source=source, allow_code=True, **top)


def published(bus: ListBus, *items: Any) -> int:
    """Put items on a bus; returns the offset of the last."""
    bus.items.extend(items)
    return len(bus.items) - 1


def test_rows_deletions_and_new_keys_reach_lookups(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_counts, "_WINDOW", HANG_SECONDS)  # the rate is above 0 however long kernels are compiled
    bus = fresh_bus()
    server = opened(workshop, source_of(bus))
    bus.put(update_of([1, 100], rows_of([1, 100], 3, 1)))
    bus.put(update_of([2], None))
    wait_for(server, bus.put(update_of([1], rows_of([1], 3, 2), event_time_ms=5, version=3)))
    expected = np.concatenate([rows_of([0], 3), rows_of([1], 3, 2), np.full((1, 3), -7.5, np.float32), rows_of([100], 3, 1)])
    assert_same_bits(server.lookup([0, 1, 2, 100], "m", 0), expected)
    (updates,) = server.stats()["m"]["sparse_embedding0"].updates
    assert (updates.source, updates.messages, updates.rows, updates.erased) == ("in_process", 3, 3, 1)
    assert (updates.version, updates.event_time_ms, updates.positions) == (3, 5, {0: 2})
    assert updates.age_seconds and updates.freshness_seconds and updates.rows_per_second > 0
    (source,) = server.update_stats()
    assert (source.name, source.type, source.running, source.skipped, source.lost) == ("in_process", "in_process", True, {}, 0)


def test_every_tier_and_every_cache_gets_them(on_cpu: Service) -> None:
    bus = fresh_bus()
    server = on_cpu.workshop.open(
        on_cpu.model((range(300), 17), gpucacheper=0.5),
        volatile_db={"type": "hash_map"},
        persistent_db={"type": FAKE + "DictTier"},
        cache_on_cpu=True,
        update_source=source_of(bus),
    )
    keys = np.arange(300)
    for _ in range(3):
        on_cpu.lookup(server, keys)
    bus.put(update_of(keys[::2], rows_of(keys[::2], 17, 1)))
    wait_for(server, bus.put(update_of(keys[1::4], None)))
    expected = rows_of(keys, 17)
    expected[::2], expected[1::4] = rows_of(keys[::2], 17, 1), -7.5
    assert_same_bits(on_cpu.lookup(server, keys), expected)
    there = np.setdiff1d(keys, keys[1::4])
    content = slower_tier(server).content["hps_et.m.sparse_embedding0"].rows
    assert sorted(content) == there.tolist()
    assert_same_bits(np.stack([content[key] for key in there]), expected[there])
    assert_same_bits(server.lookup_pooled(there, np.arange(len(there) + 1), "m", 0, None), expected[there])


def test_messages_in_wire_form_of_several_tables_and_models(workshop: Workshop) -> None:
    bus, source = list_bus()
    models = [workshop.model((range(5), 3), (range(5), 2)), workshop.model((range(5), 3), name="other")]
    server = workshop.open(*models, update_source=source, allow_code=True)
    last = published(
        bus,
        message_of([1], rows_of([1], 3, 1), 0),
        message_of([1, 9], rows_of([1, 9], 2, 2), 1, "hps_et.m.sparse_embedding1"),
        message_of([1], rows_of([1], 3, 3), 2, "hps_et.other.sparse_embedding0"),
        message_of([1], None, 3),
    )
    wait_for(server, last)
    assert_same_bits(server.lookup([1], "m", 0), np.full((1, 3), -7.5, np.float32))
    assert_same_bits(server.lookup([1, 9], "m", 1), rows_of([1, 9], 2, 2))
    assert_same_bits(server.lookup([1], "other", 0), rows_of([1], 3, 3))


def test_the_thread_that_applies_updates_shares_its_work_with_none(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """As threads of the pool would take the GIL from lookups, for every range of a batch."""
    bus, source = list_bus()
    server = opened(workshop, source)
    submitted: list[str] = []
    monkeypatch.setattr(Pool, "submit", lambda pool, job: submitted.append(threading.current_thread().name))
    monkeypatch.setattr(threads._pool, "threads", 4)
    keys = np.arange(200_000)
    rows = rows_of(keys, 3)
    wait_for(server, published(bus, message_of(keys, rows, 0)))  # type: ignore[arg-type]
    assert submitted == []
    assert_same_bits(server.lookup(keys, "m", 0), rows)
    server.insert(keys, rows, "m", 0)
    assert submitted  # large enough for several threads


def test_narrow_keys(workshop: Workshop) -> None:
    bus, source = list_bus()
    model = workshop.model((range(9), 3))
    server = workshop.open(model, update_source=source, allow_code=True, supportlonglong=False)
    keys = np.array([1, 2**32 - 1])
    rows = rows_of(keys, 3, 1)
    wide = Message("hps_et.m.sparse_embedding0", encode_rows(keys[:1], rows[:1]), Position(0, 1))
    published(bus, Message(wide.table, encode_rows(keys, rows, key_bytes=4), Position(0, 0)), wide)
    stats = wait_for(server, 1)
    assert_same_bits(server.lookup(keys.astype(np.uint32), "m", 0), rows)
    assert stats.skipped == {"ragged": 1}, "a pair of wide keys has another size"


def test_what_cannot_be_applied_is_counted_with_its_place_and_the_rest_is(
    workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    bus, source = list_bus()
    server = opened(workshop, {**source, "refuse_not_finite": True})
    good = message_of([1], rows_of([1], 3, 1), 0)
    bad = [
        Message(good.table, b"HCTX" + (good.value or b"")[4:], Position(0, 0)),
        Message(good.table, good.value, Position(0, 1), key=b"k"),
        Message("hps_et.gone.sparse_embedding0", good.value, Position(0, 2)),
        Message("hps_et.m.gone", good.value, Position(0, 3)),
        Message("__hps_beacon", good.value, Position(0, 4)),
        message_of([1], np.full((1, 3), np.nan, np.float32), 5),
        message_of([1], rows_of([1], 4), 6),
        message_of([2], rows_of([2], 3, 1), 7),
    ]
    stats = wait_for(server, published(bus, *bad))
    expected = {"magic": 1, "keyed": 1, "unknown_table": 2, "topic": 1, "not_finite": 1, "width": 1}
    assert stats.skipped == expected
    assert re.fullmatch(r"\w+: \S+, partition 0, offset [0-6]: expected .+", stats.last_skipped)
    (updates,) = server.stats()["m"]["sparse_embedding0"].updates
    assert updates.skipped == {"magic": 1, "keyed": 1, "not_finite": 1, "width": 1}
    assert_same_bits(server.lookup([1, 2], "m", 0), np.concatenate([rows_of([1], 3), rows_of([2], 3, 1)]))
    assert "magic: hps_et.m.sparse_embedding0, partition 0, offset 0: expected b'HCTR', got b'HCTX'" in caplog.text


# --- filters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "host", "disk"),
    [
        (None, True, True),
        ((["^hps_.+$"], [".+"]), True, True),  # HugeCTR's default as it is documented
        ((["m"], ["other"]), True, False),
        ((["other|m"], []), True, False),
        (([], ["^m$"]), False, True),
        ((["mm", "x.*"], ["hps_et.m"]), False, False),
    ],
)
def test_u05_filters_choose_the_models_that_a_tier_takes_updates_of(
    workshop: Workshop, filters: Any, host: bool, disk: bool
) -> None:
    bus = fresh_bus()
    volatile, persistent = {"type": "hash_map"}, {"type": FAKE + "DictTier"}
    if filters is not None:
        volatile, persistent = {**volatile, "update_filters": filters[0]}, {**persistent, "update_filters": filters[1]}
    server = opened(workshop, source_of(bus), volatile_db=volatile, persistent_db=persistent)
    stats = wait_for(server, bus.put(update_of([1], rows_of([1], 3, 1))))
    assert_same_bits(server.lookup([1], "m", 0), rows_of([1], 3, int(host)))
    row = slower_tier(server).content["hps_et.m.sparse_embedding0"].rows[1]
    assert_same_bits(row, rows_of([1], 3, int(disk))[0])
    assert stats.skipped == ({} if host or disk else {"filtered": 1})


# --- order, repetition, failures -------------------------------------------------------------------------------------------


def test_the_slowest_tier_is_written_first_and_nothing_is_committed_before_all_are(workshop: Workshop) -> None:
    bus, source = list_bus()
    server = opened(workshop, source, volatile_db={"type": "hash_map"}, persistent_db={"type": FAKE + "WatchedWritesTier"})
    seen: list[Any] = []

    def look(_: int) -> None:
        seen.append((server.lookup([1], "m", 0)[0, 0], list(bus.committed)))

    tier = slower_tier(server)
    tier.before_write = tier.after_write = look
    wait_for(server, published(bus, message_of([1], rows_of([1], 3, 1), 0)))
    old, new = rows_of([1], 3)[0, 0], rows_of([1], 3, 1)[0, 0]
    assert seen == [(old, []), (old, [])]
    assert server.lookup([1], "m", 0)[0, 0] == new
    assert bus.committed == [(0, 0)]


def test_a_tier_that_fails_is_tried_again_and_lookups_go_on(workshop: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    bus, source = list_bus()
    server = opened(workshop, source, volatile_db={"type": "hash_map"}, persistent_db={"type": FAKE + "FlakyDictTier"})
    tier = slower_tier(server)
    tier.fail_on = {"insert", "erase"}
    last = published(
        bus, message_of([1], rows_of([1], 3, 1), 0), message_of([2], None, 1), message_of([1], rows_of([1], 3, 2), 2)
    )
    wait_until(lambda: server.update_stats()[0].retries > 3)
    wait_until(lambda: server.update_stats()[0].lag_messages == 3)  # the bus was asked before the messages were read, or after
    assert_same_bits(server.lookup([1, 2], "m", 0), rows_of([1, 2], 3))
    stats = server.update_stats()[0]
    assert (bus.committed, stats.positions) == ([], {})
    assert "keys that cannot be written wait and are tried again" in stats.last_problem
    assert stats.held_rows == 2
    tier.fail_on = set()
    wait_for(server, last)
    assert_same_bits(server.lookup([1], "m", 0), rows_of([1], 3, 2))
    assert not server.contains([2], "m", 0).any()
    assert len([line for line in caplog.messages if "tried again" in line]) == 1, "said once a minute"


@pytest.mark.parametrize("problem", [TierError("away"), OSError("away"), SystemExit("away")])
def test_a_source_that_fails_is_polled_again(workshop: Workshop, problem: BaseException) -> None:
    bus, source = list_bus()
    left = [3]

    def fail() -> None:
        if left[0]:
            left[0] -= 1
            raise problem

    bus.on_poll = bus.on_commit = fail
    server = opened(workshop, source)
    last = published(bus, message_of([1], rows_of([1], 3, 1), 0))
    wait_until(lambda: not left[0])
    left[0] = 2  # whatever comes first: a poll or the commit
    wait_for(server, last)
    wait_until(lambda: not left[0])  # everything may have been applied before there were two more
    wait_until(lambda: failures_of(server) >= 5)
    stats = server.update_stats()[0]
    assert failures_of(server) == 5
    assert "away" in stats.last_problem
    assert_same_bits(server.lookup([1], "m", 0), rows_of([1], 3, 1))


def failures_of(server: hps_numba.HPS) -> int:
    """Polls and commits that failed."""
    (stats,) = server.update_stats()
    return stats.failed_reads + stats.failed_commits


def test_what_is_applied_again_changes_nothing(workshop: Workshop) -> None:
    bus, source = list_bus()
    items = [message_of([key % 5], rows_of([key % 5], 3, key % 7) if key % 3 else None, key) for key in range(40)]
    published(bus, *items)
    first = opened(workshop, source)
    wait_for(first, 39)
    keys = np.arange(9)
    rows = first.lookup(keys, "m", 0)
    published(bus, *items[17:])  # as a bus does that was not told in time; the last offsets are the same
    wait_until(lambda: first.update_stats()[0].tables["hps_et.m.sparse_embedding0"].messages == 63)
    assert_same_bits(first.lookup(keys, "m", 0), rows)


def test_the_backlog_is_bounded_and_the_source_is_kept_alive(workshop: Workshop) -> None:
    bus, source = list_bus()
    server = opened(
        workshop,
        {**source, "max_backlog_bytes": 2**16, "max_batch_size": 10},
        volatile_db={"type": "hash_map"},
        persistent_db={"type": FAKE + "FlakyDictTier"},
    )
    tier = slower_tier(server)
    tier.fail_on = {"insert"}
    keys = np.arange(5000).reshape(100, 50)
    last = published(bus, *(message_of(some, rows_of(some, 3, 1), number) for number, some in enumerate(keys)))
    wait_until(lambda: bus.kept_alive)
    (reader,) = bus.opened
    assert reader.at < 100
    size = server.update_stats()[0].backlog_bytes
    assert 2**16 <= size < 2 * (2**16 + 11 * 1_300), "what is held takes a little more than the message that it came in"
    wait_until(lambda: server.update_stats()[0].lag_messages == 100)
    tier.fail_on = set()
    stats = wait_for(server, last)
    assert (stats.backlog_bytes, stats.backlog_messages) == (0, 0)
    assert_same_bits(server.lookup(keys.ravel(), "m", 0), rows_of(keys.ravel(), 3, 1))


def test_commits_come_after_so_many_messages_or_when_nothing_more_comes(workshop: Workshop) -> None:
    bus, source = list_bus()
    bus.at_once = 1
    published(bus, *(message_of([1], rows_of([1], 3), number) for number in range(100)))
    server = opened(workshop, {**source, "max_commit_interval": 30})
    wait_for(server, 99)
    assert bus.committed[-1] == (0, 99)
    assert len(bus.committed) < 20


@pytest.mark.parametrize("has_more", [True, False])
def test_what_comes_soon_after_is_collected_unless_the_bus_has_more(workshop: Workshop, has_more: bool) -> None:
    bus, source = list_bus()
    bus.at_once, bus.has_more, polls = 1, has_more, list[float]()
    bus.on_poll = lambda: polls.append(time.monotonic())
    last = published(bus, *(message_of([1], rows_of([1], 3), number) for number in range(8)))
    pause = 0.03 if not has_more else 1.0
    server = opened(workshop, {**source, "batch_interval_ms": int(1000 * pause)})
    wait_for(server, last)
    between = np.diff(polls[:8])
    assert between.min() >= pause if not has_more else between.min() < pause


def test_how_much_waits_is_asked_again_soon_while_a_source_cannot_tell(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_consumer, "_LAG_SECONDS", HANG_SECONDS)
    bus, source = list_bus()
    bus.tells_lag = False
    server = opened(workshop, source)
    wait_for(server, published(bus, message_of([1], rows_of([1], 3), 0)))
    assert server.update_stats()[0].lag_messages is None
    bus.tells_lag = True
    wait_until(lambda: server.update_stats()[0].lag_messages == 0)


def test_updates_that_the_bus_has_dropped_are_counted_and_said(workshop: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    bus, source = list_bus()
    server = opened(workshop, source)
    published(bus, Lost(Position("p", 7), 7), message_of([1], rows_of([1], 3, 1), 0), Lost(Position("q", 1)))
    wait_until(lambda: server.update_stats()[0].lost == 8)
    wait_for(server, 0)
    assert "partition p: 7 updates before offset 7 are gone from the bus and were not applied" in caplog.text


def test_a_loss_is_counted_before_lookups_see_what_came_after_it(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    put, seen = Backlog.put, []
    bus, source = list_bus()
    server = opened(workshop, source)

    def watched(self: Backlog, items: Any) -> None:
        seen.extend(server.update_stats()[0].lost for _ in items)
        put(self, items)

    monkeypatch.setattr(Backlog, "put", watched)
    bus.items += [Lost(Position(0, 0), 5), message_of([1], rows_of([1], 3, 1), 0)]
    wait_for(server, 0)
    assert seen == [5]


def test_rows_that_a_read_only_tier_would_serve_again_are_left_out(workshop: Workshop) -> None:
    bus = fresh_bus()
    server = opened(
        workshop,
        source_of(bus),
        volatile_db=COLD,
        persistent_db={"type": FAKE + "DictTier", "read_only": True},
    )
    slower_tier(server).insert("hps_et.m.sparse_embedding0", np.array([1, 2]), rows_of([1, 2], 3))
    bus.put(update_of([1], rows_of([1], 3, 1)))
    stats = wait_for(server, bus.put(update_of([2, 3], None)))
    assert_same_bits(server.lookup([1, 2], "m", 0), np.concatenate([rows_of([1], 3, 1), rows_of([2], 3)]))
    assert stats.skipped == {"read_only_keys": 1}


def test_without_a_tier_that_can_be_written_updates_are_skipped(workshop: Workshop) -> None:
    bus = fresh_bus()
    tier = {"type": FAKE + "DictTier", "read_only": True}
    server = opened(workshop, source_of(bus), volatile_db={"type": "disabled"}, persistent_db=tier)
    assert wait_for(server, bus.put(update_of([1], rows_of([1], 3)))).skipped == {"read_only": 1}


# --- life ------------------------------------------------------------------------------------------------------------------


def test_closing_commits_what_was_applied_and_a_new_server_goes_on_there(workshop: Workshop) -> None:
    bus = fresh_bus()
    tiers = {"volatile_db": COLD, "persistent_db": {"type": FAKE + "WatchedWritesTier", "initialize_after_startup": False}}
    server = opened(workshop, source_of(bus, start="committed"), **tiers)
    for key in range(5):
        bus.put(update_of([key], rows_of([key], 3, 1)))
    wait_until(lambda: applied(server))
    server.close()
    committed = max(server.update_stats()[0].committed.values())
    bus.put(update_of([7], rows_of([7], 3, 1)))
    again = opened(workshop, source_of(bus, start="committed"), **tiers)
    wait_for(again, 5)
    assert again.update_stats()[0].tables["hps_et.m.sparse_embedding0"].messages == 5 - committed
    assert not server.update_stats()[0].running


def test_a_server_is_closed_while_a_tier_is_out_of_order(workshop: Workshop) -> None:
    bus, source = list_bus()
    server = opened(workshop, source, volatile_db={"type": "hash_map"}, persistent_db={"type": FAKE + "FlakyDictTier"})
    slower_tier(server).fail_on = {"insert"}
    published(bus, message_of([1], rows_of([1], 3, 1), 0))
    wait_until(lambda: server.update_stats()[0].retries)
    server.close()
    assert bus.committed == []
    assert [one.closed for one in bus.opened] == [True]
    assert not [thread.name for thread in threading.enumerate() if source["name"] in thread.name]


def test_a_server_that_is_forgotten_ends_its_threads(workshop: Workshop) -> None:
    bus, source = list_bus()
    server = opened(workshop, source)
    workshop.servers.clear()
    del server

    def ended() -> bool:
        gc.collect()  # again, as one of its threads may have used it a moment ago
        return bus.opened[0].closed

    wait_until(ended)


def test_a_model_that_is_unloaded_and_one_that_is_loaded(workshop: Workshop) -> None:
    bus = fresh_bus()
    server = opened(workshop, source_of(bus))
    server.load_model(workshop.model((range(5), 3), name="late"))
    wait_for(server, bus.put(update_of([1], rows_of([1], 3, 1), "hps_et.late.sparse_embedding0")))
    assert_same_bits(server.lookup([1], "late", 0), rows_of([1], 3, 1))
    server.unload_model("late")
    stats = wait_for(server, bus.put(update_of([1], rows_of([1], 3, 1), "hps_et.late.sparse_embedding0")))
    assert stats.skipped == {"unknown_table": 1}


def test_a_forked_child_serves_what_there_was_and_reads_no_updates(workshop: Workshop) -> None:
    bus, source = list_bus()
    server = opened(workshop, source)
    wait_for(server, published(bus, message_of([1], rows_of([1], 3, 1), 0)))

    def work() -> bool:
        (stats,) = server.update_stats()
        right = np.array_equal(server.lookup([1], "m", 0), rows_of([1], 3, 1)) and not stats.running
        server.close()
        return bool(right) and bus.committed == [(0, 0)] and not bus.opened[0].closed

    assert in_child(work) == 0
    wait_for(server, published(bus, message_of([2], rows_of([2], 3, 1), 1)))


def test_several_sources_feed_one_table(workshop: Workshop) -> None:
    buses = [fresh_bus(), fresh_bus()]
    server = workshop.open(workshop.model((range(9), 3)), update_sources=[source_of(bus) for bus in buses])
    for number, bus in enumerate(buses):
        wait_for(server, bus.put(update_of([number], rows_of([number], 3, 1))), number)
    assert_same_bits(server.lookup([0, 1], "m", 0), rows_of([0, 1], 3, 1))
    updates = server.stats()["m"]["sparse_embedding0"].updates
    assert [one.source for one in updates] == ["in_process-0", "in_process-1"]


def test_where_reading_starts_follows_from_whether_rows_outlive_the_process(workshop: Workshop) -> None:
    cold_disk = {"type": "row_log", "path": str(workshop.folder / "log"), "initialize_after_startup": False}
    cases: list[tuple[Any, str, bool]] = [
        ([{"type": "hash_map"}], "auto", False),
        ([COLD], "auto", False),
        ([COLD, cold_disk], "auto", True),
        ([{"type": "hash_map"}, cold_disk], "auto", False),
        ([COLD, {**cold_disk, "initialize_after_startup": True}], "auto", False),
        ([COLD, cold_disk], "oldest", False),
        ([{"type": "hash_map"}], "committed", True),
    ]
    for tiers, start, resumes in cases:
        model = workshop.model((range(9), 3))
        with workshop.open(model, tiers=tiers, update_source=source_of(fresh_bus(), start=start)) as server:
            assert server.update_stats()[0].resumes is resumes, (tiers, start)


# --- what is refused at the start -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ({"type": "in_process", "bus": 5}, ConfigError, r"update_source\.bus: expected a string, got 5"),
        ({"type": "support.updates:Nobody"}, TierUnavailable, "no 'Nobody'"),
        ({"type": "support.fakes:DictTier"}, ConfigError, r"update_source\.type: expected a subclass of UpdateSource"),
        ({"type": "hps_numba.updates:UpdateSource"}, ConfigError, "expected a source with commit, poll, got"),
        ({"type": "support.updates:ListSource", "name": "no-bus"}, TierUnavailable, "cannot open: KeyError"),
    ],
)
def test_a_source_that_cannot_be_opened_is_an_error_at_the_start(
    workshop: Workshop, source: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        opened(workshop, source)


def test_unknown_options_are_warned_about_or_refused(workshop: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    source = {"type": "in_process", "buss": "x"}
    opened(workshop, source)
    assert "update_source.buss: unknown key, did you mean 'bus'?" in caplog.text
    config = {"models": [workshop.model((range(9), 3))], "update_source": source}
    with pytest.raises(ConfigError, match=r"update_source\.buss: unknown key"):
        hps_numba.HPS(config, strict=True)


def test_without_a_second_thread_the_server_does_not_open(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    from hps_numba.errors import CapacityError

    start = _consumer.start_thread

    def one_only(target: Any, args: Any, *, name: str, purpose: str) -> threading.Thread:
        if name.endswith("_apply"):
            return start(target, args, name=name, purpose=purpose)
        raise CapacityError(f"{purpose}: expected one more thread")

    monkeypatch.setattr(_consumer, "start_thread", one_only)
    bus, source = list_bus()
    with pytest.raises(CapacityError, match="updates: expected one more thread"):
        opened(workshop, source)
    assert [one.closed for one in bus.opened] == [True]


def test_a_defect_ends_the_updates_and_not_the_server(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(self: Consumer, items: Any) -> None:
        raise ZeroDivisionError("defect")

    monkeypatch.setattr(Consumer, "_apply", defect)
    logging.getLogger("hps_numba.updates._consumer").disabled = False
    bus, source = list_bus()
    server = opened(workshop, source)
    published(bus, message_of([1], rows_of([1], 3, 1), 0))
    wait_until(lambda: not server.update_stats()[0].running)
    assert_same_bits(server.lookup([1], "m", 0), rows_of([1], 3))
    assert (bus.committed, "defect" in server.update_stats()[0].last_problem) == ([], True)
