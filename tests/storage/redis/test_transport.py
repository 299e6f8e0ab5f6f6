"""Time-outs of connections: they are for nodes that do not answer, not for a process that does not look."""

from __future__ import annotations

import os
import resource
import select
import socket
import time
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


def test_sockets_that_cannot_be_waited_for_are_an_error_and_no_endless_loop(
    tier: HastyTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """poll(2) refuses more sockets than the limit of open files, which may be lowered below their number."""
    in_kernel, calls, (soft, hard) = transport._in_kernel, [], resource.getrlimit(resource.RLIMIT_NOFILE)

    def limited(*given: Any) -> None:
        calls.append(1)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            in_kernel(*given)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    monkeypatch.setattr(transport, "_in_kernel", limited)
    with pytest.raises(TierError, match=r"expected that this process can wait for its sockets, got an error of poll\(2\)"):
        fetch(tier, TAG, KEYS)
    assert calls == [1]
    monkeypatch.undo()
    answer, rows = fetch(tier, TAG, KEYS)  # the next call has its rows, and no reply of the last one
    assert answer.found.all()
    assert_same_bits(rows, rows_of(KEYS, DIM))


@pytest.mark.parametrize("given", [None, 0.0])
def test_interrupts_without_end_keep_no_call_beyond_its_time(
    tier: HastyTier, monkeypatch: pytest.MonkeyPatch, given: float | None
) -> None:
    """A signal that comes again and again ends each poll before it has looked."""
    calls = []

    def interrupted(states: np.ndarray, *_: Any) -> int:
        calls.append(1)
        if len(calls) == 1:
            states[:, resp.PROGRESS] -= HOUR
        return resp.INTERRUPTED

    monkeypatch.setattr(transport.resp, "exchange", interrupted)
    rows = np.empty((len(KEYS), DIM), np.float32)
    if given is None:
        with pytest.raises(TierError, match="expected an answer in time, got none"):
            tier.fetch(TAG, KEYS, rows)
    else:
        tier.fetch(TAG, KEYS, rows, deadline=time.monotonic() + given)
    assert len(calls) < 1000
