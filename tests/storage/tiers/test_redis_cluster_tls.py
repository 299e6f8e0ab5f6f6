"""A cluster whose nodes speak TLS only, to clients and to each other, and ask clients for a certificate and a login."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.oracles import assert_same_bits, rows_of
from support.redis_servers import PATIENT, Cluster, Server, authority, cluster_of, signed
from support.tiers import DIM, TAG, fetch, ints
from support.waiting import wait_until

from hps_numba.errors import TierError, TierUnavailable
from hps_numba.storage.tiers.redis_cluster import RedisClusterTier
from hps_numba.testing import TierContract

PARTS = 16
KEYS = ints(*range(3000))
LOGIN = {"user_name": "reader", "password": "secret"}


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RedisClusterTier, "limits", PATIENT)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """The authority, and certificates with keys by name."""
    folder = tmp_path_factory.mktemp("certificates")
    trusted = authority(folder)
    pairs = {name: signed(folder, name, trusted) for name in ("redis.localhost", "client")}
    return trusted, {f"{name}.{kind}": file for name, pair in pairs.items() for kind, file in zip(("crt", "key"), pair)}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, certificates: tuple[Path, dict[str, Path]]) -> Iterator[Cluster]:
    """Three nodes, and a replica of the first."""
    trusted, files = certificates
    own = ("--tls-cert-file", files["redis.localhost.crt"], "--tls-key-file", files["redis.localhost.key"])
    options = (*own, "--tls-ca-cert-file", trusted, "--tls-cluster", "yes", "--tls-replication", "yes")
    admin = {
        "ssl_ca_certs": str(trusted),
        "ssl_certfile": str(files["client.crt"]),
        "ssl_keyfile": str(files["client.key"]),
        "ssl_check_hostname": False,
    }
    folder = tmp_path_factory.mktemp("encrypted")
    with cluster_of(folder, replicas=1, options=tuple(map(str, options)), tls=admin) as cluster:
        for server in cluster.servers:
            let_in(server)
        yield cluster


def let_in(server: Server) -> None:
    """Give a node the user of the tests: each node has users of its own."""
    server.client.acl_setuser(LOGIN["user_name"], enabled=True, passwords=["+secret"], commands=["+@all"], keys=["*"])


@pytest.fixture
def cluster(three: Cluster) -> Iterator[Cluster]:
    yield three
    three.flush()


@pytest.fixture
def options(cluster: Cluster, certificates: tuple[Path, dict[str, Path]]) -> dict[str, Any]:
    """What a config says of the cluster."""
    trusted, files = certificates
    return {
        "address": cluster.address,
        "num_partitions": PARTS,
        **LOGIN,
        "enable_tls": True,
        "tls_ca_certificate": str(trusted),
        "tls_client_certificate": str(files["client.crt"]),
        "tls_client_key": str(files["client.key"]),
        "tls_server_name_identification": "redis.localhost",
    }


class TestEncryptedCluster(TierContract):  # D05, D06, D16
    tier = RedisClusterTier

    @pytest.fixture(autouse=True)
    def served(self, options: dict[str, Any]) -> None:
        self.given = options

    def options(self, folder: Path) -> dict[str, Any]:
        return self.given


@pytest.fixture
def tier(options: dict[str, Any]) -> Iterator[RedisClusterTier]:
    tier = RedisClusterTier.from_options(**options)
    tier.insert(TAG, KEYS, rows_of(KEYS, DIM))
    yield tier
    tier.close()


def whole(tier: RedisClusterTier) -> bool:
    """Whether all keys are found; what is found has to be right."""
    try:
        answer, rows = fetch(tier, TAG, KEYS)
    except TierError:
        return False
    assert_same_bits(rows[answer.found], rows_of(KEYS[answer.found], DIM))
    return bool(answer.found.all())


def answers(tier: RedisClusterTier) -> bool:
    """Whether every node does."""
    try:
        tier.contains(TAG, KEYS)
    except TierError:
        return False
    return True


def test_all_nodes_are_asked_by_tls_and_with_the_login(cluster: Cluster, tier: RedisClusterTier) -> None:  # D16
    assert whole(tier)
    primaries = cluster.servers[: cluster.primaries]
    assert all(server.client.dbsize() for server in primaries), "each node has a part of the rows"
    for server in primaries:
        users = [one["user"] for one in server.client.client_list() if one["user"] != "default"]
        assert users and set(users) == {LOGIN["user_name"]}


@pytest.mark.parametrize("lacking", ["password", "tls_client_certificate", "tls_ca_certificate", "enable_tls"])
def test_a_node_lets_nobody_in_without(lacking: str, options: dict[str, Any]) -> None:  # D16
    given = {key: value for key, value in options.items() if key != lacking}
    if lacking == "tls_client_certificate":
        del given["tls_client_key"]
    with pytest.raises(TierUnavailable, match=r"127\.0\.0\.1:\d+"):
        RedisClusterTier.from_options(**given)


def test_a_node_that_was_down_is_asked_by_tls_again(cluster: Cluster, tier: RedisClusterTier) -> None:  # D16, D19
    victim = cluster.servers[1]
    victim.kill()
    answer, rows = fetch(tier, TAG, KEYS)
    assert 0 < answer.found.sum() < len(KEYS)
    assert_same_bits(rows[answer.found], rows_of(KEYS[answer.found], DIM))
    victim.start()  # it has lost its rows and its users
    let_in(victim)
    wait_until(lambda: answers(tier))
    tier.insert(TAG, KEYS, rows_of(KEYS, DIM))
    assert whole(tier)


def test_a_replica_that_takes_over_is_asked_by_tls(cluster: Cluster, tier: RedisClusterTier) -> None:  # D16, D19
    first, replica = cluster.servers[0], cluster.servers[cluster.primaries]
    for old, new in ((first, replica), (replica, first)):
        take_over(old, new)
        wait_until(lambda: whole(tier))


def take_over(old: Server, new: Server) -> None:
    """Make a replica the primary, and the primary its replica."""
    wait_until(lambda: old.client.execute_command("WAIT", 1, 100) == 1)
    new.client.execute_command("CLUSTER", "FAILOVER", "TAKEOVER")  # others vote for one shard once in two node time-outs only
    wait_until(lambda: new.client.info("replication")["role"] == "master")
    wait_until(lambda: old.client.info("replication").get("master_link_status") == "up")
