"""Redis Streams as a bus: the contract suite; groups, replays, take-overs; what is trimmed is counted; faults."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.children import in_child
from support.factories import Workshop
from support.oracles import assert_same_bits, rows_of
from support.processes import environment
from support.redis_servers import Server, authority, cluster_of, one_server, signed
from support.updates import wait_for
from support.waiting import HANG_SECONDS, wait_until

from hps_numba.errors import ConfigError, TierError
from hps_numba.storage.redis.limits import Limits
from hps_numba.testing import SourceContract
from hps_numba.updates import Lost, Message, Outgoing, Update
from hps_numba.updates._redis_streams import connecting
from hps_numba.updates._redis_streams.entries import offset_of
from hps_numba.updates._wire.messages import encode_erasures, encode_rows, headers_of
from hps_numba.updates.redis_streams import RedisStreamsProducer, RedisStreamsSource

TAG = "hps_et.m.sparse_embedding0"
LEASE_MS = int(1000 * HANG_SECONDS)  # none expires but where a test wants it
_numbers = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with one_server(tmp_path_factory.mktemp("redis"), "--stream-node-max-entries", "1") as one:
        yield one


class Bus:
    """A stream of its own on a server; what it opened is closed in the end.

    Attributes:
        keys: of the config, for both sides.
    """

    def __init__(self, address: str, **keys: Any) -> None:
        self.keys = {"address": address, "stream": f"bus-{next(_numbers)}", **keys}
        self.made: list[Any] = []

    def source(self, *, resume: bool = True, **keys: Any) -> RedisStreamsSource:
        source = RedisStreamsSource.from_options(resume=resume, **{"lease_ms": LEASE_MS, **self.keys, **keys})
        self.made.append(source)
        return source

    def producer(self, **keys: Any) -> RedisStreamsProducer:
        producer = RedisStreamsProducer.from_options(**{"linger_ms": 0, **self.keys, **keys})
        self.made.append(producer)
        return producer

    def close(self) -> None:
        for one in reversed(self.made):
            one.close()


@pytest.fixture
def bus(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bus]:
    """On a server that is given all the time it takes: nothing fails here but what a test lets fail."""
    monkeypatch.setattr(connecting, "Limits", partial(Limits, connect=HANG_SECONDS, reply=HANG_SECONDS))
    made = Bus(server.address)
    yield made
    made.close()


class TestRedisStreamsSource(SourceContract):
    patience = HANG_SECONDS

    @pytest.fixture
    def open_source(self, bus: Bus) -> Callable[..., RedisStreamsSource]:
        return bus.source

    @pytest.fixture
    def publish(self, bus: Bus) -> Callable[[Sequence[Update]], None]:
        producer = bus.producer()

        def publish(updates: Sequence[Update]) -> None:
            for one in updates:
                if one.rows is None:
                    value, headers = encode_erasures(one.keys, 3)
                else:
                    value, headers = encode_rows(one.keys, one.rows), {}
                more = headers_of(event_time_ms=one.event_time_ms, version=one.version)
                assert producer._send([Outgoing(one.table, 0, value, {**headers, **more})]) == 1

        return publish


def put(producer: RedisStreamsProducer, *versions: int, partition: int = 0) -> None:
    """Entries that hold a version each."""
    some = [Outgoing(TAG, partition, b"x", {"hps-version": b"%d" % version}) for version in versions]
    assert producer._send(some) == len(some)


def versions_of(items: Sequence[Message | Lost]) -> list[int | None]:
    """Versions of messages; None for a gap."""
    return [int(item.headers["hps-version"]) if isinstance(item, Message) else None for item in items]


def read(source: RedisStreamsSource, count: int) -> list[Message | Lost]:
    """Poll until so much has come."""
    items: list[Message | Lost] = []

    def enough() -> bool:
        items.extend(source.poll(0.05))
        return len(items) >= count

    wait_until(enough)
    return items


def lost_in(items: Sequence[Message | Lost]) -> list[int | None]:
    return [item.messages for item in items if isinstance(item, Lost)]


def last_of(items: Sequence[Message | Lost]) -> Message:
    last = items[-1]
    assert isinstance(last, Message)
    return last


def test_ids_become_offsets_that_ascend_like_them() -> None:
    ids = [b"0-1", b"0-2", b"1-0", b"1700000000000-0", b"1700000000000-4294967295", b"1700000000001-0"]
    offsets = [offset_of(one) for one in ids]
    assert offsets == sorted(set(offsets))
    with pytest.raises(TierError, match="expected an entry whose id the server chose, got 1-4294967296"):
        offset_of(b"1-4294967296")


@pytest.mark.parametrize("resume", [True, False])
def test_a_poll_waits_for_an_entry_and_a_wake_ends_it(bus: Bus, resume: bool) -> None:
    source, producer = bus.source(resume=resume), bus.producer()
    assert list(source.poll(0.01)) == []
    put(producer, 1)
    assert versions_of(source.poll(HANG_SECONDS)) == [1]
    source.wake()
    assert list(source.poll(HANG_SECONDS)) == []


def test_a_group_has_one_reader_and_others_stand_by(bus: Bus) -> None:
    producer = bus.producer()
    put(producer, 1, 2, 3)
    first, second, other = bus.source(group="g"), bus.source(group="g"), bus.source(group="h")
    items = read(first, 3)
    with pytest.raises(
        TierError, match=r"redis_streams: bus-\d+: expected one reader of group 'g', got another one, .* process"
    ):
        second.poll(0)
    assert versions_of(read(other, 3)) == [1, 2, 3], "another group gets everything too"
    one = items[0]
    assert isinstance(one, Message)
    first.commit([one.position])
    first.close()
    assert versions_of(read(second, 2)) == [2, 3], "what was handed out and not acknowledged comes first"
    put(producer, 4)
    assert versions_of(read(second, 1)) == [4]


def test_a_lease_that_expired_is_taken_over_and_who_comes_back_stands_by(bus: Bus, server: Server) -> None:
    producer = bus.producer()
    put(producer, 1, 2)
    first, second = bus.source(group="g"), bus.source(group="g")
    read(first, 2)
    lease = f"{{{bus.keys['stream']}}}.reader.g"
    assert 0 < server.client.pttl(lease) <= LEASE_MS
    server.client.pexpire(lease, LEASE_MS // 2)
    first.keep_alive()
    assert server.client.pttl(lease) > LEASE_MS // 2, "renewed while nothing is polled"
    server.client.delete(lease)
    assert versions_of(read(second, 2)) == [1, 2]
    first.keep_alive()
    with pytest.raises(TierError, match="expected one reader of group 'g'"):
        first.poll(0)
    second.close()
    assert versions_of(read(first, 2)) == [1, 2]


def test_a_reader_whose_process_is_gone_is_replaced_at_once(bus: Bus) -> None:
    put(bus.producer(), 1, 2)

    def work() -> bool:
        read(bus.source(), 2)
        os.kill(os.getpid(), signal.SIGKILL)
        return True

    assert in_child(work) != 0
    source = bus.source()
    assert versions_of(source.poll(0)) == [1, 2]


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("how", [{"max_messages": 3}, {"max_age_ms": 1}])
def test_entries_that_were_trimmed_before_they_were_read_are_counted(bus: Bus, resume: bool, how: dict[str, int]) -> None:
    keeps = bus.producer()
    source = bus.source(resume=resume)
    put(keeps, 0)
    items = read(source, 1)
    source.commit([last_of(items).position])
    put(keeps, *range(1, 8))
    wait_until(lambda: bus_time(bus) > keeps._newest_ms[keeps._connector.streams[0]] + 2)  # type: ignore[union-attr]
    trims = bus.producer(**how)
    put(trims, 8)
    wait_until(lambda: bus_time(bus) > trims._newest_ms[trims._connector.streams[0]] + 2)  # type: ignore[union-attr]
    put(trims, 9)
    kept = list(range(oldest_version(bus), 10))
    items = read(source, 1 + len(kept))
    assert versions_of(items) == [None, *kept]
    assert lost_in(items) == [kept[0] - 1] and kept[0] > 1
    assert isinstance(items[0], Lost) and items[0].position == items[1].position  # type: ignore[union-attr]
    assert versions_of(read(bus.source(resume=resume, group="new"), len(kept))) == kept, "who begins there has lost nothing"
    put(keeps, 10)
    assert versions_of(read(source, 1)) == [10], "it is said once"


def bus_time(bus: Bus) -> int:
    """The clock of the server, in ms."""
    connector = bus.made[0]._connector
    seconds, micros = connector.run(connector.streams[0], "TIME")
    return int(seconds) * 1000 + int(micros) // 1000


def oldest_version(bus: Bus) -> int:
    """Version of the oldest entry."""
    connector = bus.made[0]._connector
    ((_, flat),) = connector.run(connector.streams[0], "XRANGE", connector.streams[0].name, "-", "+", "COUNT", 1)
    return int(flat[flat.index(b"hps-version") + 1])


def test_trimmed_entries_are_counted_after_a_restart_too(bus: Bus, server: Server) -> None:
    producer = bus.producer()
    put(producer, *range(5))
    source = bus.source()
    items = read(source, 5)
    source.commit([items[1].position])  # type: ignore[union-attr]
    source.close()
    put(producer, *range(5, 9))
    server.client.xtrim(bus.keys["stream"], maxlen=2, approximate=False)
    again = bus.source()
    items = read(again, 4)
    assert versions_of(items) == [None, None, 7, 8]
    assert lost_in(items) == [3, 2], "2 to 4 were handed out and not acknowledged, 5 and 6 were never read"


@pytest.mark.parametrize("resume", [True, False])
def test_a_stream_that_is_gone_is_said_and_the_new_one_is_read_from_its_start(bus: Bus, server: Server, resume: bool) -> None:
    producer, source = bus.producer(), bus.source(resume=resume)
    put(producer, 1, 2)
    read(source, 2)
    server.client.delete(bus.keys["stream"])
    put(producer, 3)

    def arrives() -> bool:
        try:
            items.extend(source.poll(0.05))
        except TierError:
            return False  # the first poll finds that the group is gone
        return len(items) >= 2

    items: list[Message | Lost] = []
    wait_until(arrives)
    assert versions_of(items) == [None, 3] and lost_in(items) == [None]


def test_what_a_broken_connection_swallowed_comes_again(bus: Bus, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    put(bus.producer(), 1, 2)
    source = bus.source()
    assert list(source._connector.streams)
    run = source._connector.run

    def answers_and_breaks(*command: Any) -> Any:
        run(*command)
        raise TierError("the connection broke")

    source._readers[bus.keys["stream"]]._begin(False, False)  # type: ignore[attr-defined]
    source.keep_alive()
    monkeypatch.setattr(source._connector, "run", answers_and_breaks)
    for _ in range(3):
        with pytest.raises(TierError, match="the connection broke"):
            source.poll(0)
    monkeypatch.setattr(source._connector, "run", run)
    assert versions_of(read(source, 2)) == [1, 2]


def test_entries_that_are_no_messages_are_handed_on_to_be_counted(workshop: Workshop, bus: Bus, server: Server) -> None:
    hps = workshop.open(
        workshop.model((range(9), 3)), update_source={"type": "redis_streams", **bus.keys, "poll_timeout_ms": 20}
    )
    server.client.xadd(bus.keys["stream"], {"something": "else"})
    server.client.xadd(bus.keys["stream"], {"table": b"\xff", "value": "y"})
    server.client.xadd(bus.keys["stream"], {"table": TAG, "value": "y"})
    producer = bus.producer()
    producer.update("m", "sparse_embedding0", [1, 50], rows_of([1, 50], 3, 1))
    producer.erase("m", "sparse_embedding0", [2])
    producer.flush()
    newest = server.client.xinfo_stream(bus.keys["stream"])["last-generated-id"]
    stats = wait_for(hps, offset_of(newest), partition=bus.keys["stream"])
    assert sum(stats.skipped.values()) == 3 and stats.skipped["short"] == 1
    expected = np.concatenate([rows_of([1], 3, 1), np.full((1, 3), -7.5, np.float32), rows_of([50], 3, 1)])
    assert_same_bits(hps.lookup([1, 2, 50], "m", 0), expected)
    wait_until(lambda: hps.update_stats()[0].lag_messages == 0)


def test_a_redis_that_is_full_takes_all_of_a_call_or_nothing(tmp_path: Path) -> None:
    with one_server(tmp_path, "--maxmemory", "4mb", "--maxmemory-policy", "noeviction") as full:
        bus = Bus(full.address)
        producer = bus.producer()
        big = [Outgoing(TAG, 0, bytes(400_000), {"hps-version": b"%d" % number}) for number in range(20)]
        sent = 0
        with pytest.raises(TierError, match=r"redis_streams: bus-\d+: OOM "):
            while True:
                sent += producer._send(big[sent : sent + 3])
        assert full.client.xlen(bus.keys["stream"]) == sent < 20
        full.client.config_set("maxmemory", "0")
        while sent < 20:
            sent += producer._send(big[sent : sent + 3])
        assert versions_of(read(bus.source(), 20)) == list(range(20))
        bus.close()


def test_streams_of_a_cluster_and_a_node_that_fails(tmp_path: Path) -> None:
    with cluster_of(tmp_path, 2) as cluster:
        bus = Bus(cluster.address, num_streams=8)
        producer, source = bus.producer(), bus.source()
        keys = np.arange(4000)
        producer.update("m", "sparse_embedding0", keys, rows_of(keys, 3))
        producer.flush()
        first = read(source, 8)
        assert len({message.position.partition for message in first if isinstance(message, Message)}) == 8
        source.commit([item.position for item in first])
        slot = source._connector.streams[0].slot
        down = cluster.owner_of(slot)
        up = next(one for one in cluster.servers if one is not down)
        down.stop()
        for number in range(3):
            with pytest.raises(TierError):
                while True:
                    producer.update("m", "sparse_embedding0", keys, rows_of(keys, 3, number))
                    producer.flush()
        down.go_on()

        def delivered() -> bool:
            try:
                producer.flush()
            except TierError:
                return False
            return True

        wait_until(delivered)
        counts = {name: owner.client.xlen(name) for name, owner in owners(cluster, source).items()}
        assert any(owner is up for owner in owners(cluster, source).values())
        arrived: list[Message | Lost] = []

        def all_arrived() -> bool:
            try:
                arrived.extend(source.poll(0.05))
            except TierError:
                return False
            return len(arrived) >= sum(counts.values()) - 8

        wait_until(all_arrived)
        assert lost_in(arrived) == []
        bus.close()


def owners(cluster: Any, source: RedisStreamsSource) -> dict[str, Server]:
    return {stream.name: cluster.owner_of(stream.slot) for stream in source._connector.streams}


def test_a_login_with_encryption(tmp_path: Path) -> None:
    trusted = authority(tmp_path)
    certificate, key = signed(tmp_path, "redis.localhost", trusted)
    needed = ("--tls-cert-file", certificate, "--tls-key-file", key, "--tls-ca-cert-file", trusted, "--tls-auth-clients", "no")
    admin = {"ssl_ca_certs": str(trusted), "ssl_check_hostname": False}
    with one_server(tmp_path / "server", *map(str, needed), tls=admin) as secure:
        rights = ("on", ">secret", "~bus-*", "~{bus-*", "+@stream", "+@scripting", "+@transaction", "+@connection", "+cluster")
        more = ("+get", "+set", "+del", "+exists", "+pexpire", "+hello")
        secure.client.execute_command("ACL", "SETUSER", "trainer", *rights, *more)
        login = {"user_name": "trainer", "password": "secret", "enable_tls": True, "tls_ca_certificate": str(trusted)}
        bus = Bus(secure.address, **login)
        put(bus.producer(), 1)
        assert versions_of(read(bus.source(), 1)) == [1]
        assert versions_of(read(bus.source(resume=False), 1)) == [1]
        wrong = Bus(secure.address, **{**login, "password": "wrong"})
        with pytest.raises(TierError, match=r"redis_streams: address: expected a node that answers, got .*(WRONGPASS|invalid)"):
            wrong.source().poll(0)
        assert "secret" not in repr(bus.made[0].options)
        bus.close()


def test_options_are_checked(bus: Bus) -> None:
    for keys, text in (
        ({"stream": "a{b}"}, "stream: expected 1 to 120 of the characters"),
        ({"num_streams": 0}, "num_streams: expected 1 to 64, got 0"),
        ({"address": "x:y"}, "address: expected host:port, got 'x:y'"),
        ({"address": ","}, "address: expected host:port of one or more nodes, got ','"),
    ):
        with pytest.raises(ConfigError, match=text):
            RedisStreamsSource.from_options(**keys)
        with pytest.raises(ConfigError, match=text):
            RedisStreamsProducer.from_options(**keys)
    for keys, text in (
        ({"group": "a b"}, "group: expected at most 200 of the characters"),
        ({"lease_ms": 10}, "lease_ms: expected at least 3000, got 10"),
        ({"poll_interval_ms": 0}, "poll_interval_ms: expected at least 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=text):
            RedisStreamsSource.from_options(**keys)
    with pytest.raises(ConfigError, match="max_messages: expected at least 0, got -1"):
        RedisStreamsProducer.from_options(max_messages=-1)


def test_a_bus_that_is_not_there_is_tried_again(tmp_path: Path) -> None:
    with one_server(tmp_path) as server:
        bus = Bus(server.address)
        server.kill()
        source, producer = bus.source(), bus.producer()
        with pytest.raises(TierError, match="expected a node that answers"):
            source.poll(0)
        assert source.lag() is None
        producer.update("m", "sparse_embedding0", [1], rows_of([1], 3))
        with pytest.raises(TierError, match="expected a node that answers"):
            producer.flush()
        server.start()
        producer.flush()
        assert len(read(source, 1)) == 1
        bus.close()


def test_importing_the_bus_needs_no_client() -> None:
    code = "import sys, hps_numba.updates.redis_streams; assert not {'redis', 'hiredis'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), timeout=HANG_SECONDS)
