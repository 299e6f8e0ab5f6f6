"""Kafka as a bus: HugeCTR's messages and groups on a real broker, and brokers that play faults."""

from __future__ import annotations

import json
import os
import platform
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from support.children import in_child
from support.factories import COLD, Workshop
from support.kafka_brokers import MockCluster, Tansu, kafka, mock_cluster, tansu
from support.oracles import assert_same_bits, rows_of
from support.processes import environment
from support.servers import free_port
from support.waiting import HANG_SECONDS, wait_until

import hps_numba
from hps_numba.errors import ConfigError, TierError, TierUnavailable
from hps_numba.kernels.hashing import partition_hash
from hps_numba.server.table_writes import Applied
from hps_numba.testing import SourceContract
from hps_numba.testing.sources import OTHER, TABLE
from hps_numba.updates import Lost, Message, Position, Update, open_producer
from hps_numba.updates._consumer import Consumer
from hps_numba.updates._kafka import reader
from hps_numba.updates._kafka.client import Client
from hps_numba.updates._wire.messages import encode_erasures, encode_rows, headers_of
from hps_numba.updates.kafka_message_queue import KafkaProducer, KafkaSource

TOPIC = "hps_et.m.sparse_embedding0"
#: the real broker lets the first member of a group wait for half of that
QUICK = {"session.timeout.ms": 6000, "heartbeat.interval.ms": 500}
PRODUCE, FETCH, OFFSET_COMMIT = 0, 1, 8  # requests of the protocol
NOT_LEADER, MESSAGE_TOO_LARGE, METADATA_TOO_LARGE, COORDINATOR_LOADING = 6, 10, 12, 14  # errors of it


@pytest.fixture
def broker() -> Iterator[Tansu]:
    with tansu() as made:
        yield made


@pytest.fixture
def cluster() -> Iterator[MockCluster]:
    with mock_cluster() as made:
        yield made


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., KafkaSource]]:
    """Opens sources that wait for an answer for as long as it takes."""
    monkeypatch.setattr(reader, "_ASK_SECONDS", HANG_SECONDS)
    monkeypatch.setattr(reader, "_COMMIT_SECONDS", HANG_SECONDS)
    made: list[KafkaSource] = []

    def source(address: str, **more: Any) -> KafkaSource:
        quick = {"metadata_refresh_interval_ms": 100, "properties": {**QUICK, "session.timeout.ms": 2000}}
        made.append(KafkaSource.from_options(brokers=address, **{**quick, **more}))
        return made[-1]

    yield source
    for one in made:
        one.close()


def section(address: str, **more: Any) -> dict[str, Any]:
    """Of the config."""
    short = {"metadata_refresh_interval_ms": 100, "poll_timeout_ms": 20, "failure_backoff_ms": 1}
    return {"type": "kafka", "brokers": address, "properties": QUICK, **short, **more}


def put(address: str, *messages: tuple[str, int, bytes | None, dict[str, bytes]], key: bytes | None = None) -> None:
    """What a program without this package would send: topic, partition, value and headers."""
    producer = kafka().Producer({"bootstrap.servers": address, "message.max.bytes": 10**7})
    for topic, partition, value, headers in messages:
        producer.produce(topic, value, key, partition, headers=headers)
    assert producer.flush(HANG_SECONDS) == 0


def read(source: KafkaSource, count: int) -> list[Message | Lost]:
    """Poll until so many items have come."""
    items: list[Message | Lost] = []

    def more() -> bool:
        items.extend(source.poll(0.05))
        return len(items) >= count

    wait_until(more)
    return items


def positions_of(items: Sequence[Message | Lost]) -> list[Position]:
    return [item.position for item in items]


class TestKafkaSource(SourceContract):
    patience = HANG_SECONDS

    @pytest.fixture
    def open_source(self, cluster: MockCluster, opened: Callable[..., KafkaSource]) -> Callable[..., KafkaSource]:
        """Nothing makes the group assign its partitions again, after which what was not committed would come twice."""
        for topic in (TABLE, OTHER):
            cluster.create_topic(topic, 4)
        return lambda **more: opened(cluster.address, **more)

    @pytest.fixture
    def publish(self, cluster: MockCluster) -> Callable[[Sequence[Update]], None]:
        def publish(updates: Sequence[Update]) -> None:
            for one in updates:
                if one.rows is None:
                    value, headers = encode_erasures(one.keys, 3)
                else:
                    value, headers = encode_rows(one.keys, one.rows), {}
                more = headers_of(event_time_ms=one.event_time_ms, version=one.version)
                put(cluster.address, (one.table, 0, value, {**headers, **more}))

        return publish


# --- the form of HugeCTR, on a real broker ---------------------------------------------------------------------------------


def test_u01_messages_built_byte_by_byte_reach_lookups_and_ours_are_read_by_a_plain_program(
    workshop: Workshop, broker: Tansu
) -> None:
    topics = [TOPIC, "hps_et.m.sparse_embedding1", "hps_et.other.sparse_embedding0"]
    row = struct.pack("<3f", 1, 2, 3)
    first = b"HCTR" + struct.pack("<I", 12) + struct.pack("<q", 1) + row + struct.pack("<q", -7) + row
    narrow = b"HCTR" + struct.pack("<I", 8) + struct.pack("<q2f", 4, 5, 6)
    gone = struct.pack("<2q", 2, 1)
    put(broker.address, (topics[0], 0, first, {}), (topics[1], 0, narrow, {}), (topics[2], 0, first, {}))
    put(broker.address, (topics[0], 0, b"HCTR" + struct.pack("<I", 12), {"hps-erased": gone, "hps-time-ms": b"5"}))
    put(broker.address, (topics[0], 0, first[:-1], {}), ("__hps_beacon", 0, b"HCTR" + bytes(4), {}))
    put(broker.address, (topics[0], 0, first, {}), key=b"k")
    models = [workshop.model((range(5), 3), (range(5), 2)), workshop.model((range(5), 3), name="other")]
    server = workshop.open(*models, update_source=section(broker.address))
    ends = {f"{topics[0]}[0]": 3, f"{topics[1]}[0]": 0, f"{topics[2]}[0]": 0}
    wait_until(lambda: server.update_stats()[0].committed == ends)
    missing = np.full(3, -7.5, np.float32)
    expected = np.array([missing, missing, [1, 2, 3]], np.float32)
    assert_same_bits(server.lookup([1, 2, -7], "m", 0), expected)
    assert_same_bits(server.lookup([4], "m", 1), np.array([[5, 6]], np.float32))
    assert_same_bits(server.lookup([1], "other", 0), np.array([[1, 2, 3]], np.float32))
    (stats,) = server.update_stats()
    assert stats.skipped == {"ragged": 1, "keyed": 1}
    wait_until(lambda: server.update_stats()[0].lag_messages == 0)

    keys = np.arange(100)
    with open_producer({"type": "kafka", "brokers": broker.address, "linger_ms": 0}) as producer:
        producer.update("n", "t", keys, rows_of(keys, 3), version=4)
        producer.erase("n", "t", [7])
        producer.flush()
    found, erased = plain_program(broker.address, "hps_et.n.t", 9)
    assert found == {int(key): bytes(rows_of([key], 3)) for key in keys}
    assert erased == [7]


def plain_program(address: str, topic: str, count: int) -> tuple[dict[int, bytes], list[int]]:
    """Reads messages with struct calls alone; each key has to be in the partition that HugeCTR's producer would choose."""
    consumer = kafka().Consumer({"bootstrap.servers": address, "group.id": "plain"})
    partitions = consumer.list_topics(topic, timeout=HANG_SECONDS).topics[topic].partitions
    assert len(partitions) == 8
    consumer.assign([kafka().TopicPartition(topic, number, 0) for number in partitions])
    rows: dict[int, bytes] = {}
    erased: list[int] = []
    for _ in range(count):
        message = consumer.poll(HANG_SECONDS)
        assert message.error() is None and message.key() is None
        value, headers = message.value(), dict(message.headers())
        magic, size = struct.unpack_from("<4sI", value)
        assert magic == b"HCTR" and int(headers["hps-time-ms"]) > 0
        erased += [key for (key,) in struct.iter_unpack("<q", headers.get("hps-erased", b""))]
        for at in range(8, len(value), 8 + size):
            (key,) = struct.unpack_from("<q", value, at)
            with np.errstate(over="ignore"):
                assert int(partition_hash(np.uint64(key))) % 8 == message.partition()
            rows[key] = value[at + 8 : at + 8 + size]
    consumer.close()
    return rows, erased


def test_u09_lookups_go_on_while_the_broker_is_away_and_updates_come_when_it_is_back(workshop: Workshop, broker: Tansu) -> None:
    broker.kill()
    server = workshop.open(workshop.model((range(9), 3)), update_source=section(broker.address))
    wait_until(lambda: "brokers are down" in server.update_stats()[0].last_problem)
    assert_same_bits(server.lookup([1], "m", 0), rows_of([1], 3))
    broker.start()
    with KafkaProducer.from_options(brokers=broker.address) as producer:
        producer.update("m", "sparse_embedding0", [1], rows_of([1], 3, 1))
        producer.flush()
        wait_until(lambda: server.update_stats()[0].committed)
    assert_same_bits(server.lookup([1], "m", 0), rows_of([1], 3, 1))


# --- groups -------------------------------------------------------------------------------------------------------------


def test_u04_groups_have_the_names_of_hugectr(opened: Callable[..., KafkaSource]) -> None:
    address, host = f"127.0.0.1:{free_port()}", platform.node()
    assert opened(address).group == f"hps.persistent.{host}"
    assert opened(address, consumer="b").group == f"hps.persistent.{host}.b"
    assert opened(address, scope="host", resume=False).group == f"hps.volatile.{host}"
    assert opened(address, scope="shared", resume=False).group == "hps.volatile"
    assert opened(address, scope="shared").group == "hps.persistent"
    assert opened(address, group="own").group == "own"
    one, two = opened(address, resume=False).group, opened(address, resume=False).group
    assert one.startswith(f"hps.volatile.{host}.{os.getpid()}-") and one != two


@pytest.mark.parametrize("mark", [",", ";", " ; "])
def test_brokers_are_separated_as_hugectr_documents_it(
    cluster: MockCluster, opened: Callable[..., KafkaSource], mark: str
) -> None:
    cluster.create_topic(TABLE, 1)
    brokers = mark.join((f"127.0.0.1:{free_port()}", cluster.address, ""))  # nobody listens at the first
    with KafkaProducer.from_options(brokers=brokers, linger_ms=0) as producer:
        producer.update("m", "a", [1], np.ones((1, 3), np.float32))
        producer.flush()
    assert len(read(opened(brokers), 1)) == 1


def test_u06_servers_whose_rows_are_their_own_get_everything_each(workshop: Workshop, cluster: MockCluster) -> None:
    servers = [
        workshop.open(workshop.model((range(9), 3), name=name), update_source=section(cluster.address)) for name in "abc"
    ]
    for partition in range(4):
        key = [100 + partition]
        put(
            cluster.address,
            *((f"hps_et.{n}.sparse_embedding0", partition, encode_rows(np.array(key), rows_of(key, 3)), {}) for n in "abc"),
        )
    keys = np.arange(100, 104)
    for name, server in zip("abc", servers):
        wait_until(lambda server=server: len(server.update_stats()[0].committed) == 12)  # type: ignore[misc]
        assert_same_bits(server.lookup(keys, name, 0), rows_of(keys, 3))


def test_two_processes_that_have_one_place_are_told(cluster: MockCluster, opened: Callable[..., KafkaSource]) -> None:
    put(cluster.address, *((TOPIC, partition, b"x", {}) for partition in range(4)))
    both = [opened(cluster.address), opened(cluster.address)]
    expected = f"{both[0].group}: expected no other member, got only a part of {TOPIC}"

    def told() -> bool:
        for source in both:
            try:
                source.poll(0.02)
            except TierError as problem:
                if expected in str(problem):
                    return True
        return False

    wait_until(told)


class Store:
    """Tables that several consumers write to: each write must be newer than what is there."""

    key_bytes, closed, outlive_the_process, dim = 8, False, True, 1

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.stamps: dict[int, float] = {}
        self.older: list[tuple[int, float, float]] = []

    def find(self, tag: str) -> Store:
        return self

    def refuses(self, version: int | None, event_ms: int) -> None:
        return None

    def apply(self, keys: np.ndarray, rows: np.ndarray, erased: np.ndarray, times: np.ndarray) -> Applied:
        with self.lock:
            for key, stamp in zip(keys.tolist(), rows[:, 0].tolist()):
                if self.stamps.get(key, -1.0) > stamp:
                    self.older.append((key, self.stamps[key], stamp))
                self.stamps[key] = stamp
        return Applied(np.zeros(len(keys) + len(erased), bool))


def test_a_rebalance_of_three_consumers_loses_nothing_and_writes_no_older_row(broker: Tansu) -> None:
    store = Store()
    topics = [f"hps_et.m.t{number}" for number in range(2)]
    for topic in topics:
        Client(broker.address, {}).create_topic(topic, 6, 1, HANG_SECONDS)
    stamp = 0

    def publish(rounds: int) -> None:
        nonlocal stamp
        messages = []
        for _ in range(rounds):
            for number, topic in enumerate(topics):
                for partition in range(6):
                    stamp += 1
                    row = np.array([[stamp]], np.float32)
                    messages.append((topic, partition, encode_rows(np.array([number * 6 + partition]), row), {}))
        put(broker.address, *messages)

    def consumer(name: str) -> Consumer:
        keys = {**section(broker.address), "scope": "shared", "max_batch_size": 5}
        keys.pop("type")
        made = Consumer(KafkaSource.from_options(**keys), store, name)  # type: ignore[arg-type]
        made.start()
        return made

    consumers = [consumer("one")]
    try:
        publish(40)
        wait_until(lambda: store.stamps)
        consumers += [consumer("two"), consumer("three")]
        wait_until(lambda: all(one.stats().committed for one in consumers) or publish(1))
        publish(40)
        consumers.pop(0).close()
        publish(40)
        expected = {key: float(stamp - 11 + key) for key in range(12)}
        wait_until(lambda: store.stamps == expected)
    finally:
        for one in consumers:
            one.close()
    assert store.older == []


# --- what the bus drops, and faults --------------------------------------------------------------------------------------


def test_a_paused_consumer_past_retention_is_told_what_it_has_lost(
    cluster: MockCluster, opened: Callable[..., KafkaSource]
) -> None:
    put(cluster.address, (TOPIC, 0, b"first", {}), (TOPIC, 0, b"second", {}))
    source = opened(cluster.address)
    first, second = read(source, 2)
    source.commit([first.position])
    source.close()
    large = bytes(900_000)
    for _ in range(12):  # 5 MB are kept
        put(cluster.address, (TOPIC, 0, large, {}))
    again = opened(cluster.address)
    items = read(again, 2)
    lost = items[0]
    assert isinstance(lost, Lost) and isinstance(items[1], Message)
    assert lost.position == items[1].position, "the first that is there again"
    assert lost.messages == lost.position.offset - second.position.offset > 1
    again.close()
    third = opened(cluster.address)
    assert read(third, 1)[0] == lost, "it was not handled"
    third.losses_handled()
    third.close()
    assert read(opened(cluster.address), 1)[0].position == lost.position


def test_offsets_beyond_the_end_mean_another_bus_and_it_is_read_from_its_start(
    cluster: MockCluster, opened: Callable[..., KafkaSource]
) -> None:
    put(cluster.address, (TOPIC, 0, b"a", {}), (TOPIC, 0, b"b", {}))
    source = opened(cluster.address)
    partition = read(source, 2)[0].position.partition
    source.commit([Position(partition, 50)])
    source.close()
    items = read(opened(cluster.address), 3)
    assert items[0] == Lost(Position(partition, 0), None, TOPIC)
    assert [item.value for item in items[1:] if isinstance(item, Message)] == [b"a", b"b"]


def test_a_broker_of_three_that_fails_and_errors_of_requests_lose_nothing(workshop: Workshop) -> None:
    with mock_cluster(3) as cluster:
        cluster.create_topic(TOPIC, 8, 3)
        server = workshop.open(workshop.model((range(9), 3)), update_source=section(cluster.address))
        keys = np.arange(500)
        with KafkaProducer.from_options(brokers=cluster.address, linger_ms=0, send_buffer_size=200) as producer:
            for stamp in range(6):
                if stamp == 2:
                    cluster.fail(FETCH, *[NOT_LEADER] * 3)
                    cluster.fail(OFFSET_COMMIT, *[COORDINATOR_LOADING] * 2)
                    for partition in range(8):
                        cluster.lead(TOPIC, partition, 1 + partition % 2)
                    cluster.down(3)
                producer.update("m", "sparse_embedding0", keys, rows_of(keys, 3, stamp))
                producer.erase("m", "sparse_embedding0", keys[stamp::50])
                producer.flush(HANG_SECONDS)
                if stamp == 4:
                    cluster.up(3)
            expected = rows_of(keys, 3, 5)
            expected[5::50] = -7.5
            wait_until(lambda: (server.lookup(keys, "m", 0) == expected).all())
        server.close()
        assert (server.update_stats()[0].lost, server.update_stats()[0].skipped) == (0, {})


def test_a_consumer_that_is_killed_goes_on_where_it_has_committed(workshop: Workshop, cluster: MockCluster) -> None:
    log = {"type": "row_log", "path": str(workshop.folder / "log"), "initialize_after_startup": False}
    source = section(cluster.address, properties={"session.timeout.ms": 2000}, max_batch_size=50)
    path = workshop.folder / "ps.json"
    path.write_text(json.dumps({"models": [workshop.model((range(9), 3))], "tiers": [COLD, log], "update_source": source}))
    cluster.create_topic(TOPIC, 4)
    expected: dict[int, bytes] = {}
    command = [sys.executable, "-m", "support.update_consumer", str(path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    numbers = np.random.default_rng(3)
    try:
        with KafkaProducer.from_options(brokers=cluster.address, linger_ms=0, send_buffer_size=300) as producer:
            for stamp in range(60):
                keys = numbers.integers(0, 300, 80)
                producer.update("m", "sparse_embedding0", keys, rows_of(keys, 3, stamp))
                producer.flush(HANG_SECONDS)
                expected.update((key, rows_of([key], 3, stamp).tobytes()) for key in keys.tolist())
                if stamp == 40:
                    wait_until(lambda: committed(cluster.address) > 0)
                    child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        child.communicate(timeout=HANG_SECONDS)
    before = committed(cluster.address)
    server = hps_numba.HPS(path)
    workshop.servers.append(server)
    wait_until(lambda: content_of(server) == expected)
    wait_until(lambda: server.update_stats()[0].lag_messages == 0)
    server.close()  # while there are brokers
    (stats,) = server.update_stats()
    assert stats.resumes and before > 0 and stats.lost == 0
    again = sum(updates.messages for updates in stats.tables.values())
    assert again == sum(offset + 1 for offset in stats.positions.values()) - before, "only what was not committed"


def committed(address: str) -> int:
    """Messages before the offsets that the default group of this host has committed."""
    consumer = kafka().Consumer({"bootstrap.servers": address, "group.id": f"hps.persistent.{platform.node()}"})
    places = consumer.committed([kafka().TopicPartition(TOPIC, number) for number in range(4)], timeout=HANG_SECONDS)
    consumer.close()
    return sum(max(0, place.offset) for place in places)


def content_of(server: hps_numba.HPS) -> dict[int, bytes]:
    with server.locked_table("m", 0) as (keys, rows_at):
        return {int(key): row.tobytes() for key, row in zip(keys, rows_at(keys))}


def test_a_commit_comes_after_the_rows_and_leaves_out_what_others_have(
    cluster: MockCluster, opened: Callable[..., KafkaSource]
) -> None:
    put(cluster.address, (TOPIC, 0, b"a", {}))
    source = opened(cluster.address)
    (item,) = read(source, 1)
    source.commit([Position(f"{TOPIC}[77]", 5)])
    cluster.fail(OFFSET_COMMIT, METADATA_TOO_LARGE)  # librdkafka does not try that again
    with pytest.raises(TierError, match="offsets: "):
        source.commit(positions_of([item]))
    source.commit(positions_of([item]))
    wait_until(lambda: source.poll(0.02) or source.lag() == {TOPIC: 0})


def test_the_lag_is_not_known_between_two_assignments(cluster: MockCluster, opened: Callable[..., KafkaSource]) -> None:
    put(cluster.address, (TOPIC, 0, b"a", {}))
    source = opened(cluster.address)
    read(source, 1)
    wait_until(lambda: source.poll(0.02) or source.lag() == {TOPIC: 0})
    source._reader._on_revoke(None, ())
    assert source.lag() is None


def test_nothing_is_read_while_too_much_waits_and_the_member_stays(
    cluster: MockCluster, opened: Callable[..., KafkaSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hps_numba.updates import kafka_message_queue

    monkeypatch.setattr(kafka_message_queue, "_HOLD_AFTER", 0.0)
    put(cluster.address, (TOPIC, 0, b"a", {}))
    source = opened(cluster.address)
    read(source, 1)
    source.keep_alive()
    put(cluster.address, (TOPIC, 0, b"b", {}), (TOPIC, 1, b"c", {}))
    for _ in range(20):
        source.keep_alive()
    assert not source._reader.ready
    assert {item.value for item in read(source, 2) if isinstance(item, Message)} == {b"b", b"c"}


# --- producer ------------------------------------------------------------------------------------------------------------


def test_what_the_brokers_do_not_take_is_kept_and_said(cluster: MockCluster) -> None:
    cluster.create_topic(TOPIC, 8)
    with KafkaProducer.from_options(brokers=cluster.address, linger_ms=0) as producer:
        producer.update("m", "sparse_embedding0", [1], rows_of([1], 3))
        producer.flush()
        cluster.down(1)
        producer.update("m", "sparse_embedding0", [1], rows_of([1], 3, 1))
        with pytest.raises(TierError, match=r"1 messages are not delivered after 0\.2 s, and are kept"):
            producer.flush(0.2)
        cluster.up(1)
        producer.flush(HANG_SECONDS)


def test_what_the_brokers_refuse_is_raised_once(cluster: MockCluster) -> None:
    cluster.create_topic(TOPIC, 8)
    with KafkaProducer.from_options(brokers=cluster.address, linger_ms=0) as producer:
        cluster.fail(PRODUCE, MESSAGE_TOO_LARGE)
        producer.update("m", "sparse_embedding0", [1], rows_of([1], 3))
        with pytest.raises(TierError, match=r"1 messages were refused and are not on the bus: hps_et\.m\."):
            producer.flush(HANG_SECONDS)
        producer.update("m", "sparse_embedding0", [1], rows_of([1], 3))
        producer.flush(HANG_SECONDS)


def test_a_forked_child_has_neither_producer_nor_source(cluster: MockCluster) -> None:
    cluster.create_topic(TOPIC, 8)
    source = KafkaSource.from_options(brokers=cluster.address)
    producer = KafkaProducer.from_options(brokers=cluster.address, linger_ms=0)

    def work() -> bool:
        producer.update("m", "a", [], np.zeros((0, 3), np.float32))
        with pytest.raises(TierUnavailable, match="got a child forked from it"):
            producer.flush()
        source.close()
        return True

    assert in_child(work) == 0
    producer.close()
    source.close()


# --- options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"properties": {"group.id": "x"}}, r"properties\.group\.id: expected a property that is not set by us"),
        ({"properties": {"no.such.thing": 1}}, 'properties: No such configuration property: "no.such.thing"'),
        ({"topics": []}, "topics: expected at least one, got none"),
        ({"scope": "planet"}, "scope: expected"),
    ],
)
def test_options_are_checked(keys: dict[str, Any], message: str) -> None:
    kafka()
    with pytest.raises(ConfigError, match=message):
        KafkaSource.from_options(**keys)


@pytest.mark.parametrize("key", ["topic_partitions", "send_timeout_ms"])
def test_options_of_the_producer_are_checked(key: str) -> None:
    kafka()
    with pytest.raises(ConfigError, match=f"{key}: expected at least 0, got -1"):
        KafkaProducer.from_options(**{key: -1})


def test_encryption_and_log_in_are_passed_through(opened: Callable[..., KafkaSource], cluster: MockCluster) -> None:
    properties = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "PLAIN", "sasl.username": "u", "sasl.password": "p"}
    source = KafkaSource.from_options(brokers=cluster.address, properties=properties)
    with pytest.raises(TierError, match=r"brokers are down|SASL|authentication"):
        read(source, 1)
    source.close()
    with pytest.raises(ConfigError, match=r"properties: .*ssl\.ca\.location failed"):
        KafkaSource.from_options(properties={"security.protocol": "ssl", "ssl.ca.location": "/no-such-file"})


def test_without_the_client_the_server_says_what_is_missing(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    with pytest.raises(TierUnavailable, match=r"needs hps-numba\[kafka\]"):
        workshop.open(workshop.model((range(5), 4)), update_source={"type": "kafka"})
