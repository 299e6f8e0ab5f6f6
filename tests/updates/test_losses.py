"""A consumer that was paused for longer than the bus keeps updates: it says so, loads the files again, and replays the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import COLD, Workshop
from support.kafka_brokers import kafka, mock_cluster
from support.oracles import assert_same_bits, rows_of
from support.redis_servers import one_server
from support.trainers import content_of
from support.updates import TABLE, applied, fresh_bus, list_bus, message_of
from support.waiting import HANG_SECONDS, wait_until

import hps_numba
from hps_numba.errors import ModelFileError, TierError
from hps_numba.kernels.hashing import partition_hash
from hps_numba.server.manifest import Manifest
from hps_numba.server.model_loader import ModelLoader
from hps_numba.updates import Lost, Message, Position, UpdateProducer, open_producer
from hps_numba.updates._manifests import manifest_headers
from hps_numba.updates.kafka_message_queue import KafkaSource

DIM, TOPIC = 17, "hps_et.m.sparse_embedding0"  # a width that other tests have kernels for
QUICK = {"poll_timeout_ms": 20, "failure_backoff_ms": 1}
MAX_BACKLOG = 2**16
Rows = dict[int, bytes]


class Rig:
    """A server whose rows outlive it, what publishes to it, and what its rows have to be.

    Attributes:
        drop: makes the bus drop everything that it has, in the first partition if there are several.
    """

    def __init__(
        self, workshop: Workshop, section: dict[str, Any], producer: UpdateProducer, drop: Callable[[], object]
    ) -> None:
        self.workshop, self.producer, self.drop = workshop, producer, drop
        log = {"type": "row_log", "path": str(workshop.folder / "log"), "initialize_after_startup": False}
        self.top = {"tiers": [COLD, log], "update_source": {**QUICK, "on_loss": "reload", **section}}
        self.model = workshop.model((range(9), DIM))
        self.oracle: Rows = {}

    def open(self, **more: Any) -> hps_numba.HPS:
        source = {**self.top["update_source"], **more}  # type: ignore[dict-item]
        return self.workshop.open(self.model, **{**self.top, "update_source": source})

    def publish(self, stamp: int, keys: Sequence[int], gone: Sequence[int] = ()) -> None:
        for key in keys:  # each in a message of its own, so that the bus can drop some
            row = rows_of([key], DIM, stamp)
            self.producer.update("m", "sparse_embedding0", np.array([key], np.int64), row)
            self.producer.flush()
            self.oracle[key] = row.tobytes()
        if gone:
            self.producer.erase("m", "sparse_embedding0", np.array(gone, np.int64))
            self.producer.flush()
        for key in gone:
            self.oracle.pop(key, None)

    def snapshot(self, older: Rows | None = None) -> None:
        """The files of the model become what the trainer has, but for some older rows."""
        folder, rows = Path(self.model["sparse_files"][0]), {**self.oracle, **(older or {})}
        np.array(list(rows), np.int64).tofile(folder / "key")
        (folder / "emb_vector").write_bytes(b"".join(rows.values()))

    def wait_for_rows(self, server: hps_numba.HPS) -> None:
        wait_until(lambda: content_of(server, 0) == self.oracle)
        wait_until(lambda: applied(server))
        assert content_of(server, 0) == self.oracle


def in_process(workshop: Workshop, ending: ExitStack) -> Rig:
    bus = fresh_bus()
    bus.max_bytes = 10_000
    section = {"type": "in_process", "bus": bus.name}
    producer = ending.enter_context(open_producer({**section, "linger_ms": 0}))
    junk = np.arange(100, 190)

    def drop() -> None:  # a server that is closed loses its place when the queue is full
        while bus._first == 0 or len(bus._updates) > 2:
            producer.update("m", "other", junk, np.zeros((90, 20), np.float32))
            producer.flush()

    return Rig(workshop, section, producer, drop)


def files(workshop: Workshop, ending: ExitStack) -> Rig:
    section = {"type": "files", "folder": str(workshop.folder / "bus"), "poll_interval_ms": 1}
    more = {"max_files": 4, "sync": False, "linger_ms": 0}
    producer = ending.enter_context(open_producer({"type": "files", "folder": section["folder"], **more}))

    def drop() -> None:
        for _ in range(4):
            producer.update("m", "other", np.arange(2), np.zeros((2, DIM), np.float32))
            producer.flush()

    return Rig(workshop, section, producer, drop)


def redis_streams(workshop: Workshop, ending: ExitStack, parts: int = 1) -> Rig:
    server = ending.enter_context(one_server(workshop.folder / "redis"))
    section = {"type": "redis_streams", "address": server.address, "stream": "losses", "num_streams": parts}
    producer = ending.enter_context(open_producer({**section, "linger_ms": 0}))
    name = "losses" if parts == 1 else "losses.0"
    return Rig(workshop, section, producer, partial(server.client.xtrim, name, maxlen=0, approximate=False))


def kafka_message_queue(workshop: Workshop, ending: ExitStack, parts: int = 1) -> Rig:
    cluster = ending.enter_context(mock_cluster())
    cluster.create_topic(TOPIC, parts)
    section = {
        "type": "kafka_message_queue",
        "brokers": cluster.address,
        "metadata_refresh_interval_ms": 100,
        "properties": {"session.timeout.ms": 2000},
    }
    keys = {"type": "kafka_message_queue", "brokers": cluster.address, "linger_ms": 0}
    producer = ending.enter_context(open_producer(keys))
    client = kafka().Producer({"bootstrap.servers": cluster.address, "message.max.bytes": 10**7})

    def drop() -> None:
        for _ in range(12):  # 5 MB are kept
            client.produce(TOPIC, bytes(900_000), None, 0)
        assert client.flush(HANG_SECONDS) == 0

    return Rig(workshop, section, producer, drop)


@pytest.fixture(params=[in_process, files, redis_streams, kafka_message_queue], ids=lambda make: make.__name__)
def rig(request: pytest.FixtureRequest, workshop: Workshop) -> Iterator[Rig]:
    with ExitStack() as ending:
        yield request.param(workshop, ending)
        for server in workshop.servers:
            server.close()


def paused_past_retention(rig: Rig) -> None:
    """Some updates were applied, others are gone, some are there, and the files are newer than those that are gone."""
    rig.publish(1, [1, 2, 20], [3])
    server = rig.open()
    rig.wait_for_rows(server)
    server.close()
    rig.publish(2, [4, 5, 21], [2, 20])
    rig.snapshot()
    rig.drop()
    rig.publish(3, [6, 20], [5])


def test_the_files_are_loaded_again_and_what_the_bus_has_is_replayed(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    paused_past_retention(rig)
    with caplog.at_level(logging.WARNING):
        server = rig.open()
        rig.wait_for_rows(server)
    (stats,) = server.update_stats()
    assert stats.resumes and stats.lost > 0 and stats.reloads == 1
    assert "are gone from the bus and were not applied: files are loaded again" in caplog.text
    assert "model m: its files were loaded again" in caplog.text
    rig.publish(4, [7, 22], [6])
    rig.wait_for_rows(server)
    server.close()
    again = rig.open()  # the loss was made up for
    rig.publish(5, [8], [7])
    rig.wait_for_rows(again)
    assert (again.update_stats()[0].lost, again.update_stats()[0].reloads) == (0, 0)


def test_a_server_that_ends_before_the_files_are_loaded_does_it_at_the_next_start(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused_past_retention(rig)
    asked = []

    def away(self: ModelLoader, model: str) -> None:
        asked.append(model)
        raise TierError("away")

    with monkeypatch.context() as patch:
        patch.setattr(ModelLoader, "reload", away)
        server = rig.open()
        wait_until(lambda: len(asked) > 2)
        wait_until(lambda: "its files cannot be loaded again: away" in server.update_stats()[0].last_problem)
        assert server.update_stats()[0].reloads == 0
        server.close()
    again = rig.open()
    rig.wait_for_rows(again)
    assert again.update_stats()[0].reloads == 1


@pytest.mark.parametrize("on_loss", ["continue", "auto"])
def test_rows_that_outlive_the_process_stay_by_default(rig: Rig, on_loss: str, caplog: pytest.LogCaptureFixture) -> None:
    paused_past_retention(rig)
    before = {**rig.oracle, **{key: rows_of([key], DIM, 1).tobytes() for key in (2,)}}
    for key in (4, 5, 21):
        before.pop(key, None)
    server = rig.open(on_loss=on_loss)
    wait_until(lambda: content_of(server, 0) == before)
    wait_until(lambda: applied(server))
    (stats,) = server.update_stats()
    assert stats.lost > 0 and stats.reloads == 0
    assert "are gone from the bus and were not applied: load the last snapshot" in caplog.text
    server.close()
    again = rig.open(on_loss=on_loss)
    rig.publish(4, [7])
    wait_until(lambda: applied(again))
    assert again.update_stats()[0].lost == 0


def test_files_that_cannot_be_loaded_are_tried_ten_times_and_the_rows_stay(
    rig: Rig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused_past_retention(rig)
    asked = []

    def damaged(self: ModelLoader, model: str) -> None:
        asked.append(model)
        raise ModelFileError("damaged")

    monkeypatch.setattr(ModelLoader, "reload", damaged)
    server = rig.open()
    wait_until(lambda: applied(server))
    assert "model m keeps rows that may be old: load the last snapshot: damaged" in caplog.text
    assert asked == ["m"] * 10
    (stats,) = server.update_stats()
    assert stats.lost > 0 and stats.reloads == 0 and "damaged" in stats.last_problem
    assert content_of(server, 0)[2] == rows_of([2], DIM, 1).tobytes()


# --- several partitions, versions, sources -----------------------------------------------------------------------------------


@pytest.fixture(params=[redis_streams, kafka_message_queue], ids=lambda make: make.__name__)
def halves(request: pytest.FixtureRequest, workshop: Workshop) -> Iterator[Rig]:
    """Two partitions."""
    with ExitStack() as ending:
        yield request.param(workshop, ending, 2)
        for server in workshop.servers:
            server.close()


@pytest.mark.parametrize("interrupted", [False, True])
def test_what_other_partitions_have_is_replayed_too(halves: Rig, interrupted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = halves
    with np.errstate(over="ignore"):
        parts = [int(partition_hash(np.uint64(key))) % 8 % 2 for key in range(9)]
    first, second = parts.index(0), parts.index(1)
    rig.publish(1, [first, second])
    server = rig.open()
    rig.wait_for_rows(server)
    older = {second: rig.oracle[second]}
    rig.publish(2, [second])  # newer than the files; applied and committed
    rig.wait_for_rows(server)
    server.close()
    rig.publish(3, [first])
    rig.snapshot(older)
    rig.drop()
    rig.publish(4, [parts.index(0, first + 1)])
    asked: list[str] = []

    def away(self: ModelLoader, model: str) -> None:
        asked.append(model)
        raise TierError("away")

    if interrupted:
        with monkeypatch.context() as patch:
            patch.setattr(ModelLoader, "reload", away)
            server = rig.open()
            wait_until(lambda: asked)
            server.close()
    server = rig.open()
    rig.wait_for_rows(server)
    assert server.update_stats()[0].reloads == 1


@pytest.mark.parametrize("make", [files, redis_streams], ids=lambda make: make.__name__)
def test_a_server_that_runs_and_is_too_slow(make: Callable[[Workshop, ExitStack], Rig], workshop: Workshop) -> None:
    with ExitStack() as ending:
        rig = make(workshop, ending)
        rig.top["tiers"] = [{"type": "hash_map"}]
        rig.oracle = {key: rows_of([key], DIM)[0].tobytes() for key in range(9)}
        server = rig.open(max_backlog_bytes=MAX_BACKLOG, on_loss="auto")
        keys = np.arange(100, 400)
        with server.locked_table("m", 0):  # nothing is applied
            for stamp in range(40):
                before = server.update_stats()[0].backlog_bytes
                rig.publish(stamp, [1, 2])
                rig.producer.update("m", "sparse_embedding0", keys, rows_of(keys, DIM, stamp))
                rig.producer.flush()
                # it has read some, so that it misses the rest, and reads no more until the bus has dropped that
                wait_until(partial(read_or_full, server, before + len(keys) * DIM * 4))
            rig.oracle.update((int(key), row.tobytes()) for key, row in zip(keys, rows_of(keys, DIM, 39)))
            rig.snapshot()
            rig.drop()
            rig.publish(50, [3])
        wait_until(lambda: server.update_stats()[0].reloads)
        rig.wait_for_rows(server)
        (stats,) = server.update_stats()
        assert not stats.resumes and stats.lost > 0
        server.close()


def read_or_full(server: hps_numba.HPS, size: int) -> bool:
    """Whether so many bytes were read and wait, or as many as may."""
    return server.update_stats()[0].backlog_bytes >= min(size, MAX_BACKLOG)


def gap(offset: int) -> Lost:
    return Lost(Position(0, offset), 1)


def test_updates_before_the_message_of_the_version_in_force_are_left_out(workshop: Workshop) -> None:
    bus, source = list_bus()
    bus.starts_over = True
    model = workshop.model((range(9), 3))
    server = workshop.open(model, tiers=[{"type": "hash_map"}], update_source=source, allow_code=True)
    files = {"sparse_embedding0": workshop.table("seven", range(9), 3, 7)}
    told: list[int] = []
    server.on_version(lambda version, manifest: told.append(version), "m")
    named = Manifest(model="m", version=7, tables=files, issued_ms=5)
    rows = [rows_of([key], 3, 20) for key in range(3)]
    bus.items += [
        message_of([0], rows[0], 0),
        Message(TABLE, None, Position(0, 1), manifest_headers(named)),
        message_of([1], rows[1], 2),
    ]
    wait_until(lambda: server.update_stats()[0].committed.get(0) == 2)
    bus.items += [gap(3), message_of([2], rows[2], 3)]
    wait_until(lambda: server.update_stats()[0].reloads and server.update_stats()[0].committed.get(0) == 3)
    expected = np.concatenate([rows_of([0], 3, 7), rows[1], rows[2], rows_of([3], 3, 7)])
    assert_same_bits(server.lookup(range(4), "m", 0, version=7), expected)
    assert server.update_stats()[0].skipped == {"older": 1}
    assert told == [7] and server.roll_back_model("m") == 1, "to load files again is no new version"
    assert_same_bits(server.lookup([3], "m", 0), rows_of([3], 3))


def test_with_two_sources_nothing_is_taken_back(workshop: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    (bus, source), (_, other) = list_bus(), list_bus()
    bus.starts_over = True
    server = workshop.open(workshop.model((range(9), 3)), update_sources=[source, other], allow_code=True)
    bus.items += [message_of([0], rows_of([0], 3, 20), 0), gap(2), message_of([1], rows_of([1], 3, 20), 2)]
    wait_until(lambda: server.update_stats()[0].committed.get(0) == 2)
    assert (server.update_stats()[0].lost, server.update_stats()[0].reloads) == (1, 0)
    assert "not applied: load the last snapshot" in caplog.text
    assert_same_bits(server.lookup([0, 1], "m", 0), rows_of([0, 1], 3, 20))


@pytest.mark.parametrize("scope", ["process", "host", "shared"])
def test_rows_that_others_have_written_are_not_taken_back(scope: str) -> None:
    kafka()
    source = KafkaSource.from_options(brokers="127.0.0.1:1", scope=scope)
    assert source.starts_over is (scope == "process")
    source.close()
