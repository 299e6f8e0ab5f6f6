"""Time-outs of connections: they are for nodes that do not answer, not for a process that does not look."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.oracles import assert_same_bits, rows_of
from support.redis_servers import PATIENT, Server
from support.tiers import DIM, TAG, fetch
from support.waiting import wait_until

from hps_numba.errors import TierError
from hps_numba.kernels.host import resp
from hps_numba.storage.redis import transport
from hps_numba.storage.tiers.redis_cluster import RedisClusterTier

KEYS = np.arange(100)
HOUR = 3600 * 10**9


class HastyTier(RedisClusterTier):
    limits = replace(PATIENT, reply=60.0)


@pytest.fixture
def tier(redis_server: Server) -> Iterator[HastyTier]:
    opened = HastyTier.from_options(address=redis_server.address, num_partitions=4)
    opened.insert(TAG, KEYS, rows_of(KEYS, DIM))
    yield opened
    opened.close()


def send_all(states: np.ndarray, request: np.ndarray) -> None:
    """Send what the connections have to send, and wait until replies are there."""
    for state in states:
        number = int(state[resp.SOCKET])
        with socket.socket(fileno=os.dup(number)) as connection:
            connection.sendall(request[state[resp.SEND_AT] : state[resp.SEND_END]])
        state[resp.SEND_AT] = state[resp.SEND_END]
        wait_until(lambda number=number: select.select([number], [], [], 0)[0])  # type: ignore[misc]


@pytest.mark.parametrize("sent", [False, True])
def test_a_process_that_stood_still_takes_no_node_for_dead(
    tier: HastyTier, monkeypatch: pytest.MonkeyPatch, sent: bool
) -> None:
    """Before it sent its requests, or while the replies were on their way."""
    exchange, calls = resp.exchange, []

    def an_hour_late(states: np.ndarray, request: np.ndarray, *given: Any) -> int:
        calls.append(len(states))
        if len(calls) == 1:
            if sent:
                send_all(states, request)
            states[:, resp.PROGRESS] -= HOUR
        return int(exchange(states, request, *given))

    monkeypatch.setattr(transport.resp, "exchange", an_hour_late)
    answer, rows = fetch(tier, TAG, KEYS)
    assert calls == [1] and answer.found.all() and answer.failed is None
    assert_same_bits(rows, rows_of(KEYS, DIM))


def test_a_node_that_does_not_answer_is_given_up(
    tier: HastyTier, redis_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour passes once all is sent."""
    exchange, calls = resp.exchange, []

    def an_hour_passes(states: np.ndarray, request: np.ndarray, *given: Any) -> int:
        calls.append(len(states))
        states[:, resp.SEND_AT] = states[:, resp.SEND_END]  # to nobody
        states[:, resp.PROGRESS] -= HOUR
        return int(exchange(states, request, *given))

    monkeypatch.setattr(transport.resp, "exchange", an_hour_passes)
    with pytest.raises(TierError, match=redis_server.address):
        fetch(tier, TAG, KEYS)
    assert calls == [1]
