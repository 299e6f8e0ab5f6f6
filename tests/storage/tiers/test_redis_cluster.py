"""Rows in Redis: the contract, HugeCTR's bytes, logins, certificates, seeds, evictions, and a server on top."""

from __future__ import annotations

import re
import shlex
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.internals import slower_tier, wait_for_background
from support.oracles import assert_same_bits, partition_of, rows_of
from support.processes import ROOT
from support.redis_servers import PATIENT, Cluster, Server, authority, cluster_of, one_server, signed
from support.servers import free_port
from support.tiers import DIM, TAG, content_of, fetch, ints
from support.waiting import join_all, wait_until

from hps_numba.errors import ClosedError, TierError, TierUnavailable
from hps_numba.storage.tiers.redis_cluster import RedisClusterTier
from hps_numba.testing import TierContract

PARTS = 4


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RedisClusterTier, "limits", PATIENT)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(tmp_path_factory.mktemp("three")) as cluster:
        yield cluster


@pytest.fixture
def node(redis_server: Server) -> Iterator[Server]:
    yield redis_server
    redis_server.client.flushall()


@pytest.fixture
def cluster(three: Cluster) -> Iterator[Cluster]:
    yield three
    three.flush()


class Opener:
    """Opens tiers, which are closed at the end of the test."""

    def __init__(self) -> None:
        self.tiers: list[RedisClusterTier] = []

    def __call__(
        self, address: str, *, wide_keys: bool = True, kind: type[RedisClusterTier] = RedisClusterTier, **keys: Any
    ) -> RedisClusterTier:
        self.tiers.append(kind.from_options(wide_keys=wide_keys, address=address, **{"num_partitions": PARTS, **keys}))
        return self.tiers[-1]


@pytest.fixture
def tier_at() -> Iterator[Opener]:
    opener = Opener()
    yield opener
    for tier in opener.tiers:
        tier.close()


class Resp3Tier(RedisClusterTier):
    limits = replace(PATIENT, protocol=3)


class TestOneServer(TierContract):  # D05, D06, D15
    tier = RedisClusterTier

    @pytest.fixture(autouse=True)
    def served(self, node: Server) -> None:
        self.address = node.address

    def options(self, folder: Path) -> dict[str, Any]:
        return {"address": self.address, "num_partitions": PARTS}


class TestCluster(TestOneServer):  # D05, D06, D15
    @pytest.fixture(autouse=True)
    def served(self, cluster: Cluster) -> None:  # type: ignore[override]
        self.address = cluster.address


class TestResp3(TestOneServer):
    tier = Resp3Tier


# -- HugeCTR's layout ---------------------------------------------------------------------


@pytest.mark.parametrize("wide", [True, False])
def test_rows_that_another_program_wrote_by_bytes_are_served(  # D08, D15
    node: Server, tier_at: Opener, wide: bool
) -> None:
    keys = [0, 1, 2, 12345, 2**31, 2**32 - 1, *([2**40 + 7, -1, -(2**63)] if wide else [])]
    for key in keys:
        field = struct.pack("<q", key) if wide else struct.pack("<I", key)
        row = struct.pack(f"<{DIM}f", *rows_of([key], DIM)[0])
        node.client.hset(f"hps_et{{{TAG}/p{partition_of(key, PARTS)}}}v", field, row)
    tier = tier_at(node.address, wide_keys=wide)
    answer, rows = fetch(tier, TAG, ints(*keys, 99))
    assert answer.found.tolist() == [True] * len(keys) + [False]
    assert_same_bits(rows[:-1], rows_of(keys, DIM))
    assert tier.tables() == [TAG] and tier.size(TAG) == len(keys)


@pytest.mark.parametrize("policy", ["evict_random", "evict_least_used", "evict_oldest"])
@pytest.mark.parametrize("wide", [True, False])
def test_rows_are_written_as_hugectr_writes_them(  # D15
    node: Server, tier_at: Opener, wide: bool, policy: str
) -> None:
    keys = [0, 1, 2, 12345, 2**32 - 1]
    tier = tier_at(node.address, wide_keys=wide, overflow_policy=policy)
    tier.insert(TAG, ints(*keys, 0), rows_of([*keys, 0], DIM))
    expected: dict[bytes, dict[bytes, bytes]] = {}
    for key in keys:
        name = f"hps_et{{{TAG}/p{partition_of(key, PARTS)}}}v".encode()
        field = struct.pack("<q", key) if wide else struct.pack("<I", key)
        expected.setdefault(name, {})[field] = struct.pack(f"<{DIM}f", *rows_of([key], DIM)[0])
    values = [name for name in node.client.keys("*") if name.endswith(b"v")]
    assert {name: node.client.hgetall(name) for name in values} == expected
    uses = {name[:-1]: node.client.hgetall(name) for name in node.client.keys("*") if name.endswith(b"t")}
    if policy == "evict_random":
        assert uses == {}
        return
    assert {name: set(of) for name, of in uses.items()} == {name[:-1]: set(of) for name, of in expected.items()}
    times = {field: value for of in uses.values() for field, value in of.items()}
    if policy == "evict_least_used":
        zero = struct.pack("<q" if wide else "<I", 0)
        assert times == {field: (b"2" if field == zero else b"1") for field in times}
    else:
        now = int(node.client.time()[0])
        assert all(now - 3600 < struct.unpack("<q", value)[0] <= now + 1 for value in times.values())


def test_partitions_are_hugectrs(node: Server, tier_at: Opener) -> None:  # D08
    vectors = {0: 0, 1: 3, 2: 14, 12345: 11, 2**40 + 7: 10, -1: 12}
    tier = tier_at(node.address, num_partitions=16)
    tier.insert(TAG, ints(*vectors), rows_of(list(vectors), DIM))
    for key, number in vectors.items():
        assert node.client.hexists(f"hps_et{{{TAG}/p{number}}}v", struct.pack("<q", key))


def test_rows_of_another_number_of_partitions_are_an_error_and_not_absent(node: Server, tier_at: Opener) -> None:
    keys = ints(*range(50))
    tier_at(node.address, num_partitions=3).insert(TAG, keys, rows_of(keys, DIM))
    other = tier_at(node.address, num_partitions=5)
    for call in (lambda: fetch(other, TAG, keys), lambda: other.insert(TAG, keys, rows_of(keys, DIM))):
        with pytest.raises(TierError, match=r"partition \d: expected keys of this partition, .* another num_partitions"):
            call()
    with pytest.raises(TierError, match=r"expected keys of 4 bytes \(supportlonglong\), got 8"):
        fetch(tier_at(node.address, num_partitions=3, wide_keys=False), TAG, keys)
    assert other.erase(TAG) == 50 and other.tables() == []


OTHER_NUMBER = "another num_partitions"


@pytest.mark.parametrize(("written", "read"), [(16, 8), (24, 8), (64, 1), (8, 16), (2, 6)])
def test_a_multiple_of_the_number_of_partitions_is_an_error_in_every_call(  # a key in place does not prove that all are
    node: Server, tier_at: Opener, tmp_path: Path, written: int, read: int
) -> None:
    keys = ints(*range(100))
    tier_at(node.address, num_partitions=written).insert(TAG, keys, rows_of(keys, DIM))
    calls: list[Callable[[RedisClusterTier], Any]] = [
        lambda tier: fetch(tier, TAG, keys),
        lambda tier: tier.insert(TAG, keys, rows_of(keys, DIM)),
        lambda tier: tier.contains(TAG, keys),
        lambda tier: tier.erase(TAG, keys),
        lambda tier: tier.size(TAG),
        lambda tier: list(tier.scan(TAG)),
        lambda tier: tier.dump(TAG, tmp_path / "x.bin"),
    ]
    other = tier_at(node.address, num_partitions=read)
    for call in calls:
        for _ in range(2):
            with pytest.raises(TierError, match=OTHER_NUMBER):
                call(other)
    assert not (tmp_path / "x.bin").exists()
    assert other.erase(TAG) == 100 and other.tables() == []


@pytest.mark.parametrize("number", [8, 15])
def test_a_single_row_beyond_the_partitions_is_found(cluster: Cluster, tier_at: Opener, number: int) -> None:
    key = next(key for key in range(1000) if partition_of(key, 16) == number)
    tier_at(cluster.address, num_partitions=16).insert(TAG, ints(key), rows_of([key], DIM))
    with pytest.raises(TierError, match=rf"{TAG}: partition {number}: expected 8 partitions .*{OTHER_NUMBER}"):
        fetch(tier_at(cluster.address, num_partitions=8), TAG, ints(key))


def test_a_table_that_was_empty_is_looked_at_again(node: Server, tier_at: Opener) -> None:
    """A server that starts before its rows are loaded."""
    keys = ints(*range(100))
    first, second = tier_at(node.address, num_partitions=8), tier_at(node.address, num_partitions=8)
    assert not fetch(first, TAG, keys)[0].found.any() and first.size(TAG) == 0
    second.insert(TAG, ints(1), rows_of([1], DIM))
    second.erase(TAG)
    tier_at(node.address, num_partitions=16).insert(TAG, keys, rows_of(keys, DIM))
    with pytest.raises(TierError, match=OTHER_NUMBER):
        fetch(first, TAG, keys)
    with pytest.raises(TierError, match=OTHER_NUMBER):
        second.insert(TAG, keys, rows_of(keys, DIM))


def test_rows_that_nobody_finds_are_noticed_before_long(node: Server, tier_at: Opener) -> None:
    """Where no key that is asked for is in place."""
    key = next(key for key in range(1000) if partition_of(key, 16) == 9)
    tier = tier_at(node.address, num_partitions=8)
    assert not fetch(tier, TAG, ints(key))[0].found.any()
    tier_at(node.address, num_partitions=16).insert(TAG, ints(key), rows_of([key], DIM))

    def noticed() -> bool:
        try:
            return bool(fetch(tier, TAG, ints(key))[0].found.any())
        except TierError as problem:
            return OTHER_NUMBER in str(problem)

    wait_until(noticed)


def test_a_proven_table_is_not_looked_at_again(node: Server, tier_at: Opener) -> None:
    keys = ints(*range(100))
    tier_at(node.address).insert(TAG, keys, rows_of(keys, DIM))
    tier = tier_at(node.address)
    for _ in range(3):
        assert fetch(tier, TAG, keys)[0].found.all() and tier.size(TAG) == 100
        tier.insert(TAG, keys, rows_of(keys, DIM))
    stats = node.client.info("commandstats")
    before = stats["cmdstat_scan"]["calls"], stats["cmdstat_hrandfield"]["calls"]
    assert fetch(tier, TAG, keys)[0].found.all() and tier.size(TAG) == len(list(tier.scan(TAG, 1))) == 100
    tier.insert(TAG, keys, rows_of(keys, DIM))
    stats = node.client.info("commandstats")
    assert (stats["cmdstat_scan"]["calls"], stats["cmdstat_hrandfield"]["calls"]) == before


@pytest.mark.parametrize("key", [2**32, -1])
def test_keys_that_are_too_wide_are_refused(node: Server, tier_at: Opener, key: int) -> None:
    tier = tier_at(node.address, wide_keys=False)
    for call in (lambda: fetch(tier, TAG, ints(1, key)), lambda: tier.insert(TAG, ints(key), rows_of([key], DIM))):
        with pytest.raises(TierError, match=rf"{TAG}: keys: expected 0 to 4294967295 \(supportlonglong: false\), got {key}"):
            call()


def test_a_table_may_have_more_partitions_than_rows(cluster: Cluster, tier_at: Opener) -> None:
    tier = tier_at(cluster.address, num_partitions=3000)
    tier.insert(TAG, ints(5), rows_of([5], DIM))
    assert fetch(tier, TAG, ints(5, 6))[0].found.tolist() == [True, False]
    with pytest.raises(TierError, match=f"expected rows of width {DIM}, got 9"):
        tier_at(cluster.address, num_partitions=3000).insert(TAG, ints(7), rows_of([7], 9))
    assert (tier.size(TAG), tier.erase(TAG), tier.size(TAG)) == (1, 1, 0)


def test_rows_of_another_width_are_an_error(node: Server, tier_at: Opener) -> None:
    tier = tier_at(node.address)
    tier.insert(TAG, ints(1, 2), rows_of([1, 2], DIM))
    with pytest.raises(TierError, match=rf"{TAG}: partition \d: expected rows of width 9, got {DIM}"):
        fetch(tier, TAG, ints(1, 2), 9)
    assert fetch(tier, TAG, ints(1, 2))[0].found.all(), "the connection is in step"


def test_what_is_not_a_hash_is_an_error_that_names_the_partition(node: Server, tier_at: Opener) -> None:
    node.client.set(f"hps_et{{{TAG}/p3}}v", "x")
    tier = tier_at(node.address)
    with pytest.raises(TierError, match=rf"redis_cluster: {TAG}: partition 3: WRONGTYPE"):
        fetch(tier, TAG, ints(1))  # of partition 3
    keys = ints(*range(20))
    answer, _ = fetch(tier, TAG, keys)
    of_3 = [partition_of(int(key), PARTS) == 3 for key in keys]
    assert answer.failed is not None and answer.failed.tolist() == of_3 and not answer.found.any()
    for call in (tier.contains, tier.erase):
        with pytest.raises(TierError, match="WRONGTYPE"):
            call(TAG, keys)


def test_tables_are_found_by_names_with_characters_of_patterns(cluster: Cluster, tier_at: Opener) -> None:  # D18
    tier = tier_at(cluster.address)
    tags = ["hps_et.m.a", "hps_et.m.a*", "hps_et.m.[a]", "hps_et.m.a?", "hps_et.m.{a}", r"hps_et.m.\a"]
    for tag in tags:
        tier.insert(tag, ints(*range(9)), rows_of(range(9), DIM))
    cluster.servers[0].client.execute_command("SET", own_slot(cluster.servers[0]), "not a table")
    assert tier.find_tables("m") == sorted(tags)
    for i, tag in enumerate(sorted(tags)):
        assert tier.erase(tag) == 9
        assert tier.tables() == sorted(tags)[i + 1 :]


def own_slot(server: Server) -> str:
    """A name whose slot a node has."""
    for i in range(10_000):
        slot = server.client.execute_command("CLUSTER", "KEYSLOT", f"x{i}")
        if slot < 16384 // 3:
            return f"x{i}"
    raise AssertionError("no such name")


@pytest.mark.parametrize("dim", [1, 32, 700])
def test_many_keys_in_batches(cluster: Cluster, tier_at: Opener, dim: int) -> None:
    """Longer than any buffer on the way, with absent keys between."""
    tier = tier_at(cluster.address, max_batch_size=3000, num_partitions=7)
    keys = np.random.default_rng(dim).permutation(np.arange(-5000, 5000, dtype=np.int64))
    assert tier.insert(TAG, keys[::2], rows_of(keys[::2], dim)) == 5000
    answer, rows = fetch(tier, TAG, keys, dim)
    assert answer.found.tolist() == [True, False] * 5000 and answer.failed is None
    assert_same_bits(rows[::2], rows_of(keys[::2], dim))
    assert np.isnan(rows[1::2]).all()
    assert tier.contains(TAG, keys).tolist() == [True, False] * 5000
    assert content_of(tier, TAG, 999) == {int(key): rows_of([key], dim)[0].tobytes() for key in keys[::2]}


def test_many_threads_share_few_connections(cluster: Cluster, tier_at: Opener) -> None:
    tier = tier_at(cluster.address, num_node_connections=2, max_batch_size=100)
    keys = ints(*range(500))
    tier.insert(TAG, keys, rows_of(keys, DIM))
    wrong: list[Any] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(20):
            some = random.integers(0, 1000, 250)
            answer, rows = fetch(tier, TAG, some)
            if answer.found.tolist() != (some < 500).tolist() or answer.failed is not None:
                wrong.append(answer)
            elif rows[answer.found].tobytes() != rows_of(some[answer.found], DIM).tobytes():
                wrong.append(rows)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    join_all(*threads)
    assert not wrong

    def connected() -> int:
        return max(server.client.info("clients")["connected_clients"] for server in cluster.servers)

    wait_until(lambda: connected() <= 2 + 1)  # the tier's, and the test's: those of former tests may still be closing


def test_a_closed_tier_refuses(node: Server, tier_at: Opener) -> None:
    tier = tier_at(node.address)
    tier.close()
    for call in (lambda: fetch(tier, TAG, ints(1)), lambda: tier.insert(TAG, ints(1), rows_of([1], DIM)), tier.tables):
        with pytest.raises(ClosedError):
            call()


def test_without_the_socket_of_the_client_rows_come_by_hiredis(
    node: Server, tier_at: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a version of redis-py that keeps its socket elsewhere."""
    from hps_numba.storage.redis import transport

    by_client = []
    monkeypatch.setattr(transport, "socket_of", lambda connection: by_client.append(connection))
    tier = tier_at(node.address, overflow_policy="evict_least_used")
    keys = ints(*range(30))
    assert tier.insert(TAG, keys, rows_of(keys, DIM)) == 30
    answer, rows = fetch(tier, TAG, ints(7, 99, 7))
    assert answer.found.tolist() == [True, False, True] and by_client
    assert_same_bits(rows[::2], rows_of([7, 7], DIM))
    assert tier.contains(TAG, ints(7, 99)).tolist() == [True, False]
    with pytest.raises(TierError, match="expected rows of width 9"):
        fetch(tier, TAG, ints(7), 9)
    node.client.set(f"hps_et{{{TAG}2/p3}}v", "x")
    with pytest.raises(TierError, match="WRONGTYPE"):
        fetch(tier, TAG + "2", ints(1))


# -- who may connect ---------------------------------------------------------------------


def test_users_and_passwords(tmp_path: Path, tier_at: Opener) -> None:  # D16
    with one_server(tmp_path, "--requirepass", "root", password="root") as server:
        page = (ROOT / "docs" / "tiers" / "redis.md").read_text()
        granted = re.search(r"ACL SETUSER hps on '>secret' (.*?)```", page, re.DOTALL)
        assert granted is not None
        rights = shlex.split(granted[1].replace("\\\n", " "))
        server.client.execute_command("ACL", "SETUSER", "reader", "on", ">secret", *rights)
        server.client.acl_setuser("other", enabled=True, passwords=["+secret"], commands=["+@all"], keys=["x*"])
        for policy in ("evict_random", "evict_oldest", "evict_least_used"):
            login = {"user_name": "reader", "password": "secret"}
            tier = tier_at(server.address, **login, overflow_policy=policy, overflow_margin=10, num_partitions=1)
            tier.insert(TAG, ints(*range(9)), rows_of(range(9), DIM))
            tier.insert(TAG, ints(10, 11), rows_of([10, 11], DIM))
            assert fetch(tier, TAG, ints(*range(12)))[0].found.sum() == 8
            assert tier.erase(TAG, ints(*range(12))) == 8
            tier.insert(TAG, ints(1), rows_of([1], DIM))
            assert tier.contains(TAG, ints(1)).all() and content_of(tier, TAG) and tier.erase(TAG) == 1
        tier.insert(TAG, ints(1), rows_of([1], DIM))
        assert tier_at(server.address, password="root").tables() == [TAG]
        for wrong in ({}, {"password": "guess"}, {"user_name": "nobody", "password": "secret"}):
            with pytest.raises(TierUnavailable, match=rf"{server.address}.*(Authentication|username|password)"):
                tier_at(server.address, **wrong)
        forbidden = tier_at(server.address, user_name="other", password="secret")
        with pytest.raises(TierError, match=r"partition 3: NOPERM"):
            fetch(forbidden, TAG, ints(1))
        with pytest.raises(TierError, match=r"partition \d: .*NOPERM"):
            forbidden.insert(TAG, ints(1), rows_of([1], DIM))


def test_encrypted_connections(tmp_path: Path, tier_at: Opener) -> None:  # D16
    trusted = authority(tmp_path)
    files = [signed(tmp_path, name, trusted) for name in ("redis.localhost", "client")]
    (certificate, key), (own, own_key) = files
    needed = ("--tls-cert-file", certificate, "--tls-key-file", key, "--tls-ca-cert-file", trusted)
    admin = {"ssl_ca_certs": trusted, "ssl_certfile": own, "ssl_keyfile": own_key, "ssl_check_hostname": False}
    with one_server(
        tmp_path / "server", *map(str, needed), tls={k: v if v is False else str(v) for k, v in admin.items()}
    ) as server:
        mine = {"enable_tls": True, "tls_client_certificate": str(own), "tls_client_key": str(own_key)}
        keys = ints(*range(3000))
        for place in (trusted, trusted.parent):  # a file, and a folder
            tier = tier_at(server.address, **mine, tls_ca_certificate=str(place))
            tier.insert(TAG, keys, rows_of(keys, 70))
            answer, rows = fetch(tier, TAG, keys, 70)
            assert answer.found.all()
            assert_same_bits(rows, rows_of(keys, 70))
        named = {**mine, "tls_ca_certificate": str(trusted)}
        assert tier_at(server.address, **named, tls_server_name_identification="redis.localhost").size(TAG) == 3000
        with pytest.raises(TierUnavailable, match=r"127\.0\.0\.1:\d+: .*other\.localhost"):
            tier_at(server.address, **named, tls_server_name_identification="other.localhost")
        with pytest.raises(TierUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            tier_at(server.address, **mine)  # the authorities of the system do not know this one
        with pytest.raises(TierUnavailable, match=server.address):
            tier_at(server.address, enable_tls=True, tls_ca_certificate=str(trusted))  # without a certificate of its own
        with pytest.raises(TierUnavailable, match=server.address):
            tier_at(server.address)
        for name in ("tls_ca_certificate", "tls_client_certificate"):
            with pytest.raises(TierUnavailable, match=f"redis_cluster: {name}: expected .*/missing.pem"):
                tier_at(server.address, **{**named, name: "/missing.pem"})


# -- seeds ---------------------------------------------------------------------


@pytest.mark.parametrize("mark", [",", ";", ", "])
def test_a_seed_that_is_down_is_passed_over(cluster: Cluster, tier_at: Opener, mark: str) -> None:  # D17
    down = f"127.0.0.1:{free_port()}"
    tier = tier_at(mark.join([down, cluster.servers[2].address]))
    keys = ints(*range(100))
    tier.insert(TAG, keys, rows_of(keys, DIM))
    assert all(server.client.dbsize() for server in cluster.servers), "the other nodes were found"
    with pytest.raises(TierUnavailable, match=rf"redis_cluster: address: expected a node that answers, got {down}: .*refused"):
        tier_at(down)


# -- evictions ---------------------------------------------------------------------

MARGIN, TARGET = 100, 60  # of one partition, so that counts are exact
BOUND = {"num_partitions": 1, "overflow_margin": MARGIN, "overflow_resolution_target": 0.6}


def test_random_evictions_leave_the_target(node: Server, tier_at: Opener) -> None:  # D12, D13, D18
    tier = tier_at(node.address, **BOUND)
    assert tier.capacity(TAG) == MARGIN
    keys = ints(*range(MARGIN + 1))
    tier.insert(TAG, keys[:-1], rows_of(keys[:-1], DIM))
    assert tier.size(TAG) == MARGIN, "not more than the margin"
    tier.insert(TAG, keys[-1:], rows_of(keys[-1:], DIM))
    assert tier.size(TAG) == TARGET
    answer, rows = fetch(tier, TAG, keys)
    assert answer.found.sum() == TARGET
    assert_same_bits(rows[answer.found], rows_of(keys[answer.found], DIM))
    assert not np.array_equal(answer.found, np.sort(answer.found)), "neither the first nor the last ones"
    assert node.client.keys("*t") == []


def test_the_least_used_are_evicted(node: Server, tier_at: Opener) -> None:  # D13, D18
    tier = tier_at(node.address, overflow_policy="evict_least_used", **BOUND)
    keys = ints(*range(MARGIN))
    tier.insert(TAG, keys, rows_of(keys, DIM))
    popular = keys[::2]
    for _ in range(3):
        fetch(tier, TAG, popular)
    uses = f"hps_et{{{TAG}/p0}}t"
    wait_until(lambda: node.client.hget(uses, struct.pack("<q", 0)) == b"4")
    tier.insert(TAG, ints(1000, 1000), rows_of([1000, 1000], DIM))
    assert tier.size(TAG) == TARGET
    answer, _ = fetch(tier, TAG, ints(*popular, 1000))
    assert answer.found.all(), "used four times and twice"
    left = node.client.hgetall(uses)
    assert len(left) == TARGET
    wait_until(lambda: node.client.hget(uses, struct.pack("<q", 0)) == b"3")  # halved, and fetched once more


def test_the_oldest_are_evicted(node: Server, tier_at: Opener, monkeypatch: pytest.MonkeyPatch) -> None:  # D13, D18
    from hps_numba.storage.tiers import redis_cluster

    clock = [1_700_000_000.0]
    monkeypatch.setattr(redis_cluster.time, "time", lambda: clock[0])
    tier = tier_at(node.address, overflow_policy="evict_oldest", **BOUND)
    for key in range(MARGIN):
        clock[0] += 1
        tier.insert(TAG, ints(key), rows_of([key], DIM))
    clock[0] += 1
    fetch(tier, TAG, ints(0, 1, 2))  # used just now
    uses = f"hps_et{{{TAG}/p0}}t"
    wait_until(lambda: node.client.hget(uses, struct.pack("<q", 2)) == struct.pack("<q", int(clock[0])))
    tier.insert(TAG, ints(1000), rows_of([1000], DIM))
    expected = {0, 1, 2, 1000, *range(MARGIN - TARGET + 4, MARGIN)}
    assert content_of(tier, TAG).keys() == expected
    assert len(node.client.hgetall(uses)) == TARGET


@pytest.mark.parametrize("then", ["evict_least_used", "evict_oldest", "evict_random"])
@pytest.mark.parametrize("first", ["evict_least_used", "evict_oldest"])
def test_the_policy_may_change(node: Server, tier_at: Opener, first: str, then: str) -> None:
    """What the former one noted is of another form."""
    keys = ints(*range(MARGIN))
    tier_at(node.address, overflow_policy=first, **BOUND).insert(TAG, keys, rows_of(keys, DIM))
    tier = tier_at(node.address, overflow_policy=then, **BOUND)
    assert tier.insert(TAG, keys[:50], rows_of(keys[:50], DIM, 1)) == 0
    assert tier.insert(TAG, ints(1000), rows_of([1000], DIM)) == 1
    assert tier.size(TAG) == TARGET
    answer, rows = fetch(tier, TAG, keys)
    stamps = np.where(keys < 50, 1, 0)[answer.found]
    expected = [rows_of([key], DIM, int(stamp))[0] for key, stamp in zip(keys[answer.found], stamps, strict=True)]
    assert_same_bits(rows[answer.found], np.array(expected))


@pytest.mark.parametrize("policy", ["evict_least_used", "evict_oldest"])
def test_rows_whose_uses_are_unknown_are_evicted_too(node: Server, tier_at: Opener, policy: str) -> None:
    keys = ints(*range(2 * MARGIN))
    tier_at(node.address, num_partitions=1).insert(TAG, keys, rows_of(keys, DIM))
    node.client.hset(f"hps_et{{{TAG}/p0}}t", b"not a key", b"not a number")
    tier = tier_at(node.address, overflow_policy=policy, **BOUND)
    tier.insert(TAG, keys[:10], rows_of(keys[:10], DIM, 1))
    assert tier.size(TAG) == TARGET
    assert node.client.hlen(f"hps_et{{{TAG}/p0}}t") <= TARGET


def test_evictions_in_batches(node: Server, tier_at: Opener) -> None:  # D11
    """More than one command takes, whatever is inserted meanwhile."""
    tier = tier_at(node.address, num_partitions=2, overflow_margin=3000, overflow_resolution_target=0.5)
    keys = np.arange(20_000, dtype=np.int64)
    before = node.client.info("commandstats").get("cmdstat_hdel", {"calls": 0})["calls"]
    tier.insert(TAG, keys, rows_of(keys, DIM))
    assert tier.size(TAG) == 3000
    assert node.client.info("commandstats")["cmdstat_hdel"]["calls"] - before >= 17_000 / 1024


# -- a server ---------------------------------------------------------------------


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    made = Workshop(tmp_path)
    yield made
    for server in made.servers:
        server.close()


def test_a_server_fills_redis_at_start_and_serves_its_rows(cluster: Cluster, workshop: Workshop) -> None:  # D15
    redis = {"type": "redis_cluster", "address": cluster.address, "num_partitions": PARTS}
    server = workshop.open(workshop.model((range(50), DIM)), volatile_db=redis)
    assert slower_tier(server).size("hps_et.m.sparse_embedding0") == 50
    asked = np.array([3, 49, 3, 1234, 0])
    rows = server.lookup(asked, "m", 0)
    assert_same_bits(rows[[0, 1, 2, 4]], rows_of(asked[[0, 1, 2, 4]], DIM))
    assert (rows[3] == -7.5).all()
    wait_for_background(server)
    stats = server.stats()["m"]["sparse_embedding0"]
    assert (stats.tier_hits, stats.absent, stats.unanswered, stats.tier_errors) == (4, 1, 0, 0)
    server.insert([1234], rows_of([1234], DIM), "m", 0)
    assert_same_bits(server.lookup([1234], "m", 0), rows_of([1234], DIM))
    assert server.erase([3], "m", 0) == 1
    other = workshop.open(workshop.model((range(50), DIM)), volatile_db={**redis, "initialize_after_startup": False})
    assert_same_bits(other.lookup([1234, 4], "m", 0), rows_of([1234, 4], DIM))
    assert (other.lookup([3], "m", 0) == -7.5).all()


def test_a_server_keeps_its_model_file_beside_redis(node: Server, workshop: Workshop) -> None:  # D03, D04
    """Redis behind host memory, as the third tier of a list."""
    server = workshop.open(
        workshop.model((range(20), DIM)),
        tiers=[
            {"type": "hash_map", "initialize_after_startup": False, "cache_missed_embeddings": True},
            {"type": "redis_cluster", "address": node.address, "num_partitions": PARTS},
        ],
    )
    assert_same_bits(server.lookup([3, 19], "m", 0), rows_of([3, 19], DIM))
    wait_for_background(server)
    assert_same_bits(server.lookup([3, 19], "m", 0), rows_of([3, 19], DIM))
    stats = server.stats()["m"]["sparse_embedding0"]
    assert (stats.tier_hits, stats.host_hits) == (2, 2)
