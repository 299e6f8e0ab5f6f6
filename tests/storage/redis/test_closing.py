"""A tier that is closed while others use it: their calls end at once, and no file descriptor changes hands under them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.oracles import rows_of
from support.redis_servers import PATIENT, Server, authority, one_server, signed
from support.tiers import DIM, TAG, fetch
from support.waiting import HANG_SECONDS, join_all, wait_until

from hps_numba.errors import ClosedError
from hps_numba.kernels.host import resp
from hps_numba.storage.redis import transport
from hps_numba.storage.redis.node import Node
from hps_numba.storage.tiers.redis_cluster import RedisClusterTier

KEYS = np.arange(100)


class PatientTier(RedisClusterTier):
    limits = replace(PATIENT, first_pause=HANG_SECONDS)


@pytest.fixture
def tier(redis_server: Server) -> Iterator[PatientTier]:
    opened = PatientTier.from_options(address=redis_server.address, num_partitions=4)
    opened.insert(TAG, KEYS, rows_of(KEYS, DIM))
    opened.fetch(TAG, KEYS, np.empty((len(KEYS), DIM), np.float32))
    yield opened
    redis_server.go_on()
    opened.close()
    redis_server.client.flushall()


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """A thread that makes a call, and what that returned or raised."""
    got: list[object] = []

    def run() -> None:
        try:
            got.append(call())
        except Exception as problem:
            got.append(problem)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, got


def test_a_descriptor_is_closed_by_the_call_that_uses_it(tier: PatientTier, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange, waits, closed, seen = resp.exchange, threading.Event(), threading.Event(), []

    def closed_meanwhile(states: np.ndarray, *given: Any) -> int:
        number = int(states[0, resp.SOCKET])
        before = os.fstat(number).st_ino
        waits.set()
        assert closed.wait(HANG_SECONDS)
        seen.append(os.fstat(number).st_ino == before)
        return int(exchange(states, *given))

    monkeypatch.setattr(transport.resp, "exchange", closed_meanwhile)
    thread, got = in_thread(lambda: fetch(tier, TAG, KEYS))
    assert waits.wait(HANG_SECONDS)
    tier.close()
    closed.set()
    join_all(thread)
    assert isinstance(got[0], ClosedError), got
    assert seen == [True]
    assert not _is_open(tier), "its user closed it"


def _is_open(tier: PatientTier) -> bool:
    nodes = tier._topology._nodes.values()
    return any(connection._sock is not None for node in nodes for connection in node._pool._available_connections)


CALLS: dict[str, Callable[[RedisClusterTier], object]] = {
    "fetch": lambda tier: fetch(tier, TAG, KEYS),
    "insert": lambda tier: tier.insert(TAG, KEYS, rows_of(KEYS, DIM)),
    "erase": lambda tier: tier.erase(TAG, KEYS),
    "erase all": lambda tier: tier.erase(TAG),
    "contains": lambda tier: tier.contains(TAG, KEYS),
    "size": lambda tier: tier.size(TAG),
    "tables": lambda tier: tier.tables(),
    "scan": lambda tier: list(tier.scan(TAG)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_waits_ends_as_closed(
    tier: PatientTier, redis_server: Server, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of a node that does not answer: it would wait for as long as a node may take."""
    began, begin = threading.Event(), Node._lease

    def seen(node: Node, deadline: float | None) -> Any:
        lease = begin(node, deadline)
        began.set()
        return lease

    redis_server.stop()
    monkeypatch.setattr(Node, "_lease", seen)
    thread, got = in_thread(lambda: CALLS[name](tier))
    assert began.wait(HANG_SECONDS)
    tier.close()
    join_all(thread)
    redis_server.go_on()
    assert isinstance(got[0], ClosedError), repr(got)
    with pytest.raises(ClosedError):
        CALLS[name](tier)
    assert not _is_open(tier)


def test_calls_that_wait_for_a_connection_end_as_closed(redis_server: Server) -> None:
    tier = PatientTier.from_options(address=redis_server.address, num_partitions=4, num_node_connections=1)
    tier.insert(TAG, KEYS, rows_of(KEYS, DIM))
    redis_server.stop()
    calls = [in_thread(lambda: fetch(tier, TAG, KEYS)) for _ in range(4)]
    (node,) = tier._topology._nodes.values()
    wait_until(lambda: len(node._leases) > 0)
    tier.close()
    join_all(*(thread for thread, _ in calls))
    redis_server.go_on()
    assert all(isinstance(got[0], ClosedError) for _, got in calls), calls


def test_closes_beside_calls_give_rows_or_say_closed(redis_server: Server) -> None:
    """Sockets of others come and go meanwhile."""
    for _ in range(30):
        tier = PatientTier.from_options(address=redis_server.address, num_partitions=4)
        tier.insert(TAG, KEYS, rows_of(KEYS, DIM))
        begun = threading.Barrier(4, timeout=HANG_SECONDS)

        def look_up(tier: PatientTier = tier, begun: threading.Barrier = begun) -> None:
            begun.wait()
            while True:
                answer, rows = fetch(tier, TAG, KEYS)
                assert answer.found.all() and answer.failed is None
                assert np.array_equal(rows, rows_of(KEYS, DIM))

        calls = [in_thread(look_up) for _ in range(3)]
        begun.wait()
        tier.close()
        join_all(*(thread for thread, _ in calls))
        assert all(isinstance(got[0], ClosedError) for _, got in calls), calls
        assert not _is_open(tier)
    redis_server.client.flushall()


def test_an_encrypted_call_ends_as_closed(tmp_path: Path) -> None:
    trusted = authority(tmp_path)
    (certificate, key), (own, own_key) = (signed(tmp_path, name, trusted) for name in ("redis.localhost", "client"))
    needed = ("--tls-cert-file", certificate, "--tls-key-file", key, "--tls-ca-cert-file", trusted)
    admin = {"ssl_ca_certs": trusted, "ssl_certfile": own, "ssl_keyfile": own_key, "ssl_check_hostname": False}
    login: Any = {name: value if value is False else str(value) for name, value in admin.items()}
    with one_server(tmp_path / "server", *map(str, needed), tls=login) as server:
        mine = {"tls_ca_certificate": str(trusted), "tls_client_certificate": str(own), "tls_client_key": str(own_key)}
        tier = PatientTier.from_options(address=server.address, num_partitions=4, enable_tls=True, **mine)
        tier.insert(TAG, KEYS, rows_of(KEYS, DIM))
        fetch(tier, TAG, KEYS)
        server.stop()
        thread, got = in_thread(lambda: fetch(tier, TAG, KEYS))
        (node,) = tier._topology._nodes.values()
        wait_until(lambda: len(node._leases) > 0)
        tier.close()
        join_all(thread)
        server.go_on()
    assert isinstance(got[0], ClosedError), got
    assert not _is_open(tier)
