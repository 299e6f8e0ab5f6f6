"""Connections of a node: shared by few, given back whatever happens."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from support.redis_servers import PATIENT, Server
from support.waiting import HANG_SECONDS, join_all, wait_until

from hps_numba.config import VolatileDatabaseConfig
from hps_numba.storage.redis.client import RedisClient
from hps_numba.storage.redis.node import Node, NodeFailure


@pytest.fixture
def node(redis_server: Server) -> Iterator[Node]:
    node = Node(RedisClient(VolatileDatabaseConfig(), PATIENT), "127.0.0.1", redis_server.port, 2, PATIENT)
    yield node
    node.close()


def test_a_call_waits_until_a_connection_is_free(node: Node) -> None:
    got = []
    with node.connection() as first, node.connection() as second:
        assert first is not second
        with (
            pytest.raises(NodeFailure, match="expected one of 2 connections to become free, got none"),
            node.connection(time.monotonic()),
        ):
            pass
        thread = threading.Thread(target=lambda: got.append(node.command("PING")))
        thread.start()
        assert not got
    join_all(thread)
    assert got == [b"PONG"]


def test_more_connections_than_redis_py_keeps_by_default(redis_server: Server) -> None:
    many = 120
    node = Node(RedisClient(VolatileDatabaseConfig(), PATIENT), "127.0.0.1", redis_server.port, many, PATIENT)
    with ExitStack() as held:
        for _ in range(many):
            held.enter_context(node.connection(time.monotonic() + HANG_SECONDS))
        assert not node.breaker.is_open
    node.close()


def test_no_call_waits_for_a_node_that_failed(node: Node) -> None:
    problems = []

    def wait() -> None:
        try:
            with node.connection():
                pass
        except NodeFailure as problem:
            problems.append(problem)

    with node.connection(), node.connection():
        thread = threading.Thread(target=wait)
        thread.start()
        node.breaker.failed()
        join_all(thread)
    assert len(problems) == 1


def test_a_call_that_ends_in_an_error_gives_its_connection_back_closed(node: Node, redis_server: Server) -> None:
    for _ in range(5):
        with pytest.raises(ZeroDivisionError), node.connection() as connection:
            connection.send_command("PING")  # whose answer must not be taken for that of a later command
            raise ZeroDivisionError
    assert node.commands([("ECHO", "a"), ("ECHO", "b")]) == [b"a", b"b"]
    wait_until(lambda: len(redis_server.client.client_list()) <= 3)


def test_a_right_whose_holder_is_gone_is_given_on(node: Node) -> None:
    """As after an interrupt between two lines."""
    node._lease(None)
    node._lease(None)
    with node.connection(time.monotonic() + HANG_SECONDS), node.connection(time.monotonic() + HANG_SECONDS):
        pass


def test_error_lines_are_answers_and_not_failures(node: Node) -> None:
    answers = node.commands([("GET",), ("PING",), ("NO_SUCH",)])
    assert answers[1] == b"PONG" and all(isinstance(answers[i], Exception) for i in (0, 2))
    assert not node.breaker.is_open
    with pytest.raises(NodeFailure, match=rf"{node.name}: NO_SUCH: .*unknown command"):
        node.command("NO_SUCH")
