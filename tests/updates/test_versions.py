"""Versions by message: all tables and the dense part switch in one moment, in the order of the updates, and back again.

``HPS_NUMBA_VERSION_SWITCHES`` is the number of switches of the test with readers.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from support.factories import COLD, Workshop
from support.internals import slower_tier
from support.oracles import assert_same_bits, rows_of
from support.updates import fresh_bus, message_of, source_of, update_of
from support.waiting import join_all, wait_until

import hps_numba
from hps_numba.errors import ConfigError, UnknownModelError, VersionError
from hps_numba.updates import Message, Position, UpdateProducer, open_producer
from hps_numba.updates._manifests import MANIFEST
from hps_numba.updates.in_process import Bus

SWITCHES = int(os.environ.get("HPS_NUMBA_VERSION_SWITCHES", "12"))
READERS = 8
ROWS, DIM = 500, 4
NAMES = ("sparse_embedding0", "sparse_embedding1")
FILES = itertools.count()


def files_of(workshop: Workshop, value: float, keys: Any = range(ROWS), tables: int = 2) -> dict[str, str]:
    """Sparse models whose rows are all of one value, at the URL of a file system in memory."""
    paths = {}
    for name in NAMES[:tables]:
        path = workshop.folder / f"{name}-{next(FILES)}.model"
        keys = np.asarray(keys, np.int64)
        hps_numba.write_model(path, DIM, [(keys, np.full((len(keys), DIM), value, np.float32))])
        paths[name] = path.as_uri()
    return paths


def opened(workshop: Workshop, bus: Bus, tables: int = 2, **top: Any) -> hps_numba.HPS:
    """A server whose first version has rows of zeros."""
    entry = workshop.model(*[(range(ROWS), DIM)] * tables, **top.pop("entry", {}))
    entry["sparse_files"] = list(files_of(workshop, 0.0, tables=tables).values())
    return workshop.open(entry, update_source=source_of(bus), **top)


def producer_to(bus: Bus) -> UpdateProducer:
    return open_producer({"type": "in_process", "bus": bus.name, "linger_ms": 0})


def row(value: float) -> np.ndarray:
    return np.full((1, DIM), value, np.float32)


def settled(server: hps_numba.HPS, bus: Bus, producer: UpdateProducer) -> None:
    """Wait until the server has dealt with everything that was published."""
    producer.flush()
    wait_until(lambda: bus.behind(server.update_stats()[0].committed.get(0, -1) + 1) == 0)


def values(server: hps_numba.HPS, *keys: int, table: int = 0) -> list[float]:
    return [float(one) for one in server.lookup(list(keys), "m", table)[:, 0]]


def skipped(server: hps_numba.HPS) -> Mapping[str, int]:
    return server.update_stats()[0].skipped


# --- by message ---------------------------------------------------------------------------------------------------------------


def test_u12_a_message_switches_all_tables_and_the_dense_part_and_back(workshop: Workshop) -> None:
    bus = fresh_bus()
    server = opened(workshop, bus)
    told: list[Any] = []
    dense = {"version": 1}

    def hook(version: int, manifest: Mapping[str, Any]) -> Any:
        told.append((version, manifest.get("dense"), values(server, 1), dense["version"]))
        return lambda: dense.update(version=version)

    end = server.on_version(hook, "m")
    with producer_to(bus) as producer:
        producer.update("m", NAMES[0], [1], row(0.5))
        producer.replace_model("m", 7, files_of(workshop, 7.0), dense="s3://bucket/dense-7")
        producer.update("m", NAMES[0], [2], row(7.5), version=7)
        settled(server, bus, producer)
        assert told == [(7, "s3://bucket/dense-7", [0.5], 1)] and dense["version"] == 7
        assert values(server, 1, 2) == [7.0, 7.5] and values(server, 1, table=1) == [7.0]
        assert server.model_version("m") == server.stats()["m"][NAMES[1]].version == 7
        assert values(server, 1) == list(server.lookup([1], "m", 0, version=7)[:, 0])
        producer.roll_back_model("m", 1, NAMES)
        settled(server, bus, producer)
        assert values(server, 1, 2) == [0.0, 0.0] and server.model_version("m") == 1
        end()
        producer.replace_model("m", 8, files_of(workshop, 8.0))
        settled(server, bus, producer)
        assert values(server, 1, 2) == [8.0, 8.0] and told[1] == (1, None, [7.0], 7) and len(told) == 2 and not skipped(server)


def test_rows_of_other_versions_are_left_out_and_counted(workshop: Workshop) -> None:
    bus = fresh_bus()
    server = opened(workshop, bus)
    with producer_to(bus) as producer:
        producer.update("m", NAMES[0], [1], row(0.5), version=99)  # no message has named a version yet: it has no effect
        settled(server, bus, producer)
        assert values(server, 1) == [0.5]
        producer.replace_model("m", 7, files_of(workshop, 7.0))
        producer.update("m", NAMES[0], [1], row(6.5), version=6)
        producer.update("m", NAMES[0], [2], row(8.5), version=8)
        producer.update("m", NAMES[0], [3], row(7.5), version=7)
        producer.update("m", NAMES[0], [4], row(7.5))
        settled(server, bus, producer)
    assert values(server, 1, 2, 3, 4) == [7.0, 7.0, 7.5, 7.5]
    assert skipped(server) == {"other_version": 2}


@pytest.mark.parametrize("where", ["host", "slower"])
def test_updates_that_are_newer_than_the_snapshot_are_kept_and_older_ones_are_not(workshop: Workshop, where: str) -> None:
    bus = fresh_bus()
    tiers = {"volatile_db": COLD, "persistent_db": {"type": "support.fakes:CountedDictTier"}} if where == "slower" else {}
    server = opened(workshop, bus, **tiers)
    with producer_to(bus) as producer:
        producer.update("m", NAMES[0], [1, 2, 3], np.full((3, DIM), 0.25, np.float32))
        since = producer.announce_snapshot("m", 7, NAMES)
        files = files_of(workshop, 7.0, range(10))
        producer.update("m", NAMES[0], [2, 1000], np.full((2, DIM), 0.5, np.float32))  # 1000 is in no file
        producer.erase("m", NAMES[1], [3])
        producer.replace_model("m", 7, files, since_ms=since)
        late = update_of([5], row(0.125), f"hps_et.m.{NAMES[0]}", event_time_ms=since - 1)  # from a partition that is behind
        settled(server, bus, producer)
        bus.put(late)
        producer.update("m", NAMES[0], [6], row(7.5))
        settled(server, bus, producer)
    assert values(server, 1, 2, 3, 1000, 5, 6) == [7.0, 0.5, 7.0, 0.5, 7.0, 7.5]
    assert values(server, 2, 3, table=1) == [7.0, -8.5]
    assert skipped(server) == {"older": 1}
    if where == "slower":
        tag = f"hps_et.m.{NAMES[0]}"
        keys = np.concatenate([some for some, _ in slower_tier(server).scan(tag)])
        assert sorted(keys.tolist()) == [*range(10), 1000]


def test_what_cannot_be_followed_is_counted_and_the_version_in_force_stays(workshop: Workshop) -> None:
    bus = fresh_bus()
    server = opened(workshop, bus)
    good = files_of(workshop, 5.0)
    with producer_to(bus) as producer:
        producer.replace_model("m", 5, good)
        producer.replace_model("m", 4, good)  # older
        producer.replace_model("m", 6, {NAMES[0]: good[NAMES[0]]})  # not all tables
        producer.replace_model("m", 6, good, since_ms=12345)  # never announced
        producer.roll_back_model("m", 3, NAMES)  # not there
        settled(server, bus, producer)
        assert skipped(server) == {"older": 1, "manifest": 2, "not_announced": 1}
        producer.replace_model("m", 6, {**good, NAMES[1]: "file:///nowhere/x.model"})
        producer.update("m", NAMES[0], [1], row(6.5), version=6)
        settled(server, bus, producer)
    assert (server.model_version("m"), values(server, 1), values(server, 1, table=1)) == (5, [5.0], [5.0])
    assert skipped(server) == {"older": 1, "manifest": 2, "not_announced": 1, "version": 1, "other_version": 1}
    assert "nowhere" in server.update_stats()[0].last_problem


def test_malformed_manifests_are_skipped(workshop: Workshop) -> None:
    bus = fresh_bus()
    server = opened(workshop, bus)
    tag = f"hps_et.m.{NAMES[0]}"
    texts = [b"", b"{", b"[]", b'{"model":"m"}', b'{"model":"m","version":-1}', b'{"model":"m","version":true}', b"[" * 100_000]
    texts += [b'{"model":"m","version":1,"more":1}', b'{"model":"m","version":2,"tables":[1]}', b'{"model":3,"version":2}']
    texts += [
        b'{"model":"m","version":2,"since_ms":"x","issued_ms":1}',
        b'{"model":"m","version":2,"roll_back":2,"issued_ms":1}',
    ]
    for text in texts:
        bus.put(Message(tag, None, Position(0, 0), {MANIFEST: text}))
    bus.put(Message(tag, b"HCTR", Position(0, 0), {MANIFEST: b'{"model":"m","version":2}'}))
    bus.put(Message(tag, None, Position(0, 0), {MANIFEST: b'{"model":"other","version":2,"issued_ms":1}'}))
    last = bus.put(message_of([1], row(0.5), 0, tag))
    wait_until(lambda: server.update_stats()[0].committed.get(0) == last)
    assert skipped(server) == {"manifest": len(texts) + 1, "topic": 1}
    assert values(server, 1) == [0.5] and server.model_version("m") == 1


def test_a_hook_that_fails_keeps_the_version_in_force_and_a_switch_that_fails_does_not(workshop: Workshop) -> None:
    bus = fresh_bus()
    server = opened(workshop, bus)
    calls = itertools.count()

    def hook(version: int, manifest: Mapping[str, Any]) -> Any:
        if version == 7:
            next(calls)
            raise RuntimeError("the dense part is broken")
        return lambda: 1 / 0

    server.on_version(hook, "m")
    with producer_to(bus) as producer:
        producer.replace_model("m", 7, files_of(workshop, 7.0))
        settled(server, bus, producer)
        assert values(server, 1) == [0.0] and next(calls) > 1 and skipped(server) == {"version": 1}
        producer.replace_model("m", 8, files_of(workshop, 8.0))
        settled(server, bus, producer)
    assert values(server, 1) == [8.0]
    with pytest.raises(RuntimeError, match="broken"):
        server.replace_model("m", list(files_of(workshop, 7.0).values()), version=7)
    assert values(server, 1) == [8.0] and server.model_version("m") == 8


# --- by call ------------------------------------------------------------------------------------------------------------------


def test_versions_by_call(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(9), 3), (range(9), 3)))
    with pytest.raises(VersionError, match="expected a version before that in force, got none"):
        server.roll_back_model("m")
    assert server.model_version("m") == 1
    server.replace_model("m")
    assert server.model_version("m") == 2
    server.replace_model("m", [workshop.table(f"new{number}", range(9), 3, 5) for number in range(2)], version=70)
    assert server.model_version("m") == 70
    assert_same_bits(server.lookup([1], "m", 0, version=70), rows_of([1], 3, 5))
    assert_same_bits(server.lookup_many([[1], [2]], "m", version=70)[1], rows_of([2], 3, 5))
    assert_same_bits(server.lookup_pooled([1, 2], [0, 2], "m", 0, version=70), rows_of([1, 2], 3, 5).sum(0, keepdims=True))
    assert server.roll_back_model("m") == 2 and server.model_version("m") == 2
    assert_same_bits(server.lookup([1], "m", 0), rows_of([1], 3))
    assert server.roll_back_model("m") == 70
    calls: list[tuple[Any, ...]] = [(server.lookup, [1], "m", 0), (server.lookup_many, [[1], [1]], "m")]
    for call, *given in (*calls, (server.lookup_pooled, [1], [0, 1], "m", 0)):
        with pytest.raises(VersionError, match="expected 70, which is in force of model 'm', got 2"):
            call(*given, version=2)
    with pytest.raises(UnknownModelError):
        server.lookup([1], "x", 0, version=2)
    with pytest.raises(ConfigError, match="version: expected at least 0, got -1"):
        server.replace_model("m", version=-1)
    with pytest.raises(ConfigError, match="hook"):
        server.on_version(3, "m")  # type: ignore[arg-type]


# --- beside lookups -----------------------------------------------------------------------------------------------------------


class Readers:
    """Look up both tables over and over, in two ways; what is not of one version fails the test."""

    def __init__(self, server: hps_numba.HPS, dense: dict[str, int]) -> None:
        self.server, self.dense = server, dense
        self.stop, self.problems = threading.Event(), []  # type: ignore[var-annotated]
        self.of_a_version = 0
        self.threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(READERS)]

    def _run(self, number: int) -> None:
        rng = np.random.default_rng(number)
        try:
            while not self.stop.is_set():
                keys = [rng.integers(0, ROWS, 64), rng.integers(0, ROWS, 64)]
                (self._of_a_version if number % 2 else self._of_any)(keys)
        except BaseException as problem:
            self.problems.append(problem)

    def _of_any(self, keys: list[np.ndarray]) -> None:
        found = {int(value) for rows in self.server.lookup_many(keys, "m") for value in np.unique(rows)}
        assert len(found) == 1, found

    def _of_a_version(self, keys: list[np.ndarray]) -> None:
        """The dense part names the version that it is of, and the rows are of that or there are none."""
        version = self.dense["version"]
        try:
            many = self.server.lookup_many(keys, "m", version=version)
            found = {
                int(value)
                for rows in (*many, self.server.lookup(keys[0], "m", 0, version=version))
                for value in np.unique(rows)
            }
        except VersionError:
            return
        assert found == {version}, (found, version)
        self.of_a_version += 1


def test_u_e_every_request_during_switches_is_of_one_version(workshop: Workshop) -> None:
    bus = fresh_bus()
    server = opened(workshop, bus, entry={"deployed_device_list": [0], "gpucacheper": 0.4}, cache_on_cpu=True)
    dense = {"version": 0}
    server.replace_model("m", list(files_of(workshop, 0.0).values()), version=0)
    server.on_version(lambda version, _: lambda: dense.update(version=version), "m")
    readers = Readers(server, dense)
    for thread in readers.threads:
        thread.start()
    rng = np.random.default_rng(0)
    with producer_to(bus) as producer:
        for version in range(1, SWITCHES + 1):
            since = producer.announce_snapshot("m", version, NAMES) if version % 3 == 0 else None
            keys = rng.integers(0, ROWS, 32)
            producer.update("m", NAMES[0], keys, np.full((32, DIM), version - 0.75, np.float32), version=version - 1)
            producer.replace_model("m", version, files_of(workshop, float(version)), since_ms=since)
            for some in range(4):
                for named in (version, version - 1, version + 1):  # the last two are of no version in force
                    rows = np.full((32, DIM), named + (some + 1) / 8, np.float32)
                    producer.update("m", NAMES[some % 2], rng.integers(0, ROWS, 32), rows, version=named)
            producer.flush()
        settled(server, bus, producer)
    wait_until(lambda: readers.of_a_version or readers.problems)
    readers.stop.set()
    join_all(*readers.threads)
    assert not readers.problems, readers.problems[0]
    assert server.model_version("m") == SWITCHES and readers.of_a_version > 0
    rows = np.concatenate(server.lookup_many([np.arange(ROWS)] * 2, "m"))
    assert set(rows.astype(int).ravel().tolist()) == {SWITCHES} and len(np.unique(rows)) == 5
    assert set(skipped(server)) == {"other_version"}


def test_a_server_is_closed_while_it_takes_a_version(workshop: Workshop) -> None:
    bus = fresh_bus()
    server = opened(workshop, bus)
    closing = threading.Thread(target=server.close)

    def hook(version: int, manifest: Mapping[str, Any]) -> None:
        closing.start()
        wait_until(lambda: not server.update_stats()[0].running)

    server.on_version(hook, "m")
    with producer_to(bus) as producer:
        producer.replace_model("m", 7, files_of(workshop, 7.0))
        producer.flush()
        wait_until(lambda: server.closed)
    join_all(closing)
    assert not closing.is_alive() and server.update_stats()[0].positions == {}
