"""Many keys at once: by partition, pipelined to all nodes together, again where the cluster says so.

A key's answer depends on its own node only. What a node refuses or does not answer is a failure of its partitions; the others
have their rows.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hps_numba.errors import TierError
from hps_numba.kernels.host import resp
from hps_numba.storage.redis.client import RedisClient
from hps_numba.storage.redis.layout import Partition
from hps_numba.storage.redis.limits import Limits
from hps_numba.storage.redis.node import Node, NodeFailure
from hps_numba.storage.redis.plain import NOT_READY
from hps_numba.storage.redis.requests import PERMISSION, Request, with_asking
from hps_numba.storage.redis.topology import Topology
from hps_numba.storage.redis.transport import CANNOT_WAIT, Exchange, compile_kernels, exchange, now_ns

__all__ = ["Batch", "BulkRunner", "Share", "Write"]

#: first words of error lines that say where the slot is
_MOVED, _ASK = "MOVED ", "ASK "


@dataclass
class Share:
    """The part of a batch that one partition has.

    Attributes:
        start, stop: its positions in ``Batch.order``.   totals: sum of the integers that each of its requests got.
        failure: what went wrong, or empty.   width: bytes of a row that does not fit, or None.
        again: another attempt may help.   node: that was asked last.
        redirect: to be asked next, because another node said so; ``asking``: for this once, with its permission.
    """

    partition: Partition
    start: int
    stop: int
    totals: list[int] = field(default_factory=list)
    failure: str = ""
    width: int | None = None
    again: bool = False
    node: Node | None = None
    redirect: Node | None = None
    asking: bool = False

    @property
    def keys(self) -> int:
        """How many keys it has."""
        return self.stop - self.start


Write = Callable[[Share], Sequence[Request]]
"""What is asked of a partition, for its share of the keys."""


class Batch:
    """Keys by partition, and where their rows go.

    Attributes:
        shares: of the partitions that have keys.   order: int64 ``[n]``, positions by partition.   found: uint8 ``[n]``.
    """

    def __init__(
        self, keys: np.ndarray, partitions: Sequence[Partition], *, wide: bool, rows: np.ndarray | None = None
    ) -> None:
        """``keys``: int64 ``[n]``.   ``rows``: float32 ``[n, dim]``, contiguous, for what is fetched.

        Raises:
            TierError: a key has more than 32 bits, and the tier's have not.
        """
        self.keys = np.ascontiguousarray(keys, np.int64)
        self.key_bytes = 8 if wide else 4
        n = len(self.keys)
        if not wide and (self.keys >> 32).any():
            key = self.keys[np.flatnonzero(self.keys >> 32)[0]]
            raise TierError(f"{partitions[0].table}: keys: expected 0 to {2**32 - 1} (supportlonglong: false), got {key}")
        self.order = np.empty(n, np.int64)
        ends = np.zeros(len(partitions), np.int64)
        resp.group_by_partition(self.keys.ctypes.data, n, len(partitions), self.order, ends)
        starts = [0, *ends.tolist()]
        self.shares = [Share(p, starts[i], starts[i + 1]) for i, p in enumerate(partitions) if starts[i] < starts[i + 1]]
        self.found = np.zeros(n, np.uint8)
        self.target = rows
        self.rows: int = 0 if rows is None else rows.ctypes.data
        self.row_bytes: int = 0 if rows is None else 4 * rows.shape[1]  # the stride of a single row may be anything

    def positions(self, share: Share) -> np.ndarray:
        """Positions of the keys of a share."""
        return self.order[share.start : share.stop]


@dataclass
class _Parcel:
    """What goes to one node: requests by share, and where each is in the table of commands."""

    node: Node
    shares: list[Share]
    requests: list[tuple[Share, Request]] = field(default_factory=list)
    first: int = 0
    connection: Any = None


class BulkRunner:
    """Runs batches.

    Thread safety: every method.
    """

    def __init__(self, client: RedisClient, topology: Topology, limits: Limits) -> None:
        self._client, self._topology, self._limits = client, topology, limits
        compile_kernels()

    def run(
        self,
        batch: Batch,
        write: Write,
        *,
        shares: Sequence[Share] | None = None,
        deadline: float | None = None,
        patient: bool = False,
    ) -> list[Share]:
        """Send ``write(share)`` for every share; returns the shares that failed.

        Args:
            shares: all of the batch by default.
            deadline: ``time.monotonic()`` at which nothing is waited for any more.
            patient: wait a little for nodes that say they are not ready yet, as writes do.

        Raises:
            ClosedError: the connections are closed, or were meanwhile and a share failed.
        """
        asked = list(batch.shares if shares is None else shares)
        left = asked
        for attempt in range(self._limits.attempts):
            self._attempt(batch, left, write, deadline)
            left = [share for share in left if share.again]
            if not left or (deadline is not None and time.monotonic() >= deadline):
                break
            left = self._prepare(left, attempt, patient)
        failed = [share for share in asked if share.failure or share.width is not None]
        if failed:
            self._topology.check_open()
        return failed

    def _prepare(self, shares: list[Share], attempt: int, patient: bool) -> list[Share]:
        """The shares that are worth another attempt, after a look at what has changed."""
        waiting = [share for share in shares if share.failure.startswith(NOT_READY)]
        moved = any(share.failure.startswith((_MOVED, "READONLY")) for share in shares)
        if moved or waiting:
            self._topology.refresh(at_once=moved)
        if not waiting:
            return shares
        if patient:
            time.sleep(self._limits.backoff * 2**attempt)
            return shares
        return [share for share in shares if share not in waiting or self._has_moved(share)]

    def _has_moved(self, share: Share) -> bool:
        return self._topology.node_of(share.partition.slot) is not share.node

    def _attempt(self, batch: Batch, shares: Sequence[Share], write: Write, deadline: float | None) -> None:
        by_node: dict[Node, list[Share]] = defaultdict(list)
        for share in shares:
            node = share.node = share.redirect or self._topology.node_of(share.partition.slot)
            share.failure, share.again, share.redirect = "", False, None
            if node is None:
                self._topology.refresh()
                share.failure = f"no node has slot {share.partition.slot}"
            else:
                by_node[node].append(share)
        parcels: list[_Parcel] = []
        unreachable: list[_Parcel] = []
        with ExitStack() as open_connections:
            for node in sorted(by_node, key=lambda node: node.name):  # in one order: no two calls wait for each other
                parcel = _Parcel(node, by_node[node])
                reached = self._connect(parcel, open_connections, deadline)
                (parcels if reached else unreachable).append(parcel)
            asked = self._written(batch, parcels, write)
            if parcels:
                exchange(asked, self._limits.reply, deadline)
            for state, parcel in zip(asked.states, parcels, strict=True):
                self._judge(state, parcel)
        # no connection is held from here on: whoever looks for changes of the cluster needs one, and may wait for it
        for state, parcel in zip(asked.states, parcels, strict=True):
            self._take(asked, parcel, int(state[resp.PROBLEM]))
        if unreachable:
            self._topology.refresh()
            for share in (share for parcel in unreachable for share in parcel.shares):
                share.again = self._has_moved(share)

    @staticmethod
    def _connect(parcel: _Parcel, open_connections: ExitStack, deadline: float | None) -> bool:
        try:
            parcel.connection = open_connections.enter_context(parcel.node.connection(deadline))
        except NodeFailure as problem:
            for share in parcel.shares:
                share.asking, share.failure = False, str(problem)
            return False
        return True

    def _written(self, batch: Batch, parcels: list[_Parcel], write: Write) -> Exchange:
        """The text of all requests, and the arrays for the replies."""
        for parcel in parcels:
            for share in parcel.shares:
                requests = with_asking(write(share)) if share.asking else write(share)
                parcel.requests += [(share, request) for request in requests]
        sizes = [sum(request.size(share.keys, batch.key_bytes) for share, request in parcel.requests) for parcel in parcels]
        text = np.empty(sum(sizes), np.uint8)
        commands = np.zeros((sum(len(parcel.requests) for parcel in parcels), resp.COMMAND_FIELDS), np.int64)
        states = np.zeros((len(parcels), resp.CONNECTION_FIELDS), np.int64)
        at = number = 0
        for state, parcel in zip(states, parcels, strict=True):
            state[resp.SEND_AT], state[resp.COMMAND], parcel.first = at, number, number
            for share, request in parcel.requests:
                commands[number, [resp.KIND, resp.START, resp.REPLIES]] = request.kind, share.start, request.replies
                at = _write(text, at, batch, share, request)
                number += 1
            state[resp.SEND_END], state[resp.COMMAND_END], state[resp.ELEMENT] = at, number, -1
        return Exchange(
            connections=[parcel.connection for parcel in parcels],
            problems=self._client.problems,
            refusal=self._client.refusal,
            states=states,
            request=text,
            commands=commands,
            order=batch.order,
            rows=batch.rows,
            row_bytes=batch.row_bytes,
            found=batch.found,
        )

    def _judge(self, state: np.ndarray, parcel: _Parcel) -> None:
        """Whether a node is alive; the connection of one with a problem is of no more use."""
        problem = state[resp.PROBLEM]
        if problem == resp.OPEN:
            parcel.node.breaker.answered()
            return
        parcel.node.drop(parcel.connection)
        if problem == resp.EXPIRED:
            if now_ns() - state[resp.PROGRESS] >= 1e9 * self._limits.reply:
                parcel.node.breaker.failed()
            else:
                parcel.node.breaker.late()

    def _take(self, asked: Exchange, parcel: _Parcel, problem: int) -> None:
        """What became of each share."""
        for share in parcel.shares:
            share.asking = False
        seen: dict[int, int] = defaultdict(int)
        for number, (share, request) in enumerate(parcel.requests, parcel.first):
            command = asked.commands[number]
            status = int(command[resp.STATUS])
            if status == resp.WIDTH:
                share.width = int(command[resp.TOTAL])
            elif request is not PERMISSION:
                place = seen[id(share)]
                seen[id(share)] += 1
                share.totals += [0] * (place + 1 - len(share.totals))
                share.totals[place] += int(command[resp.TOTAL])
            if share.failure:
                continue
            if status == resp.ERROR:
                self._take_error(share, bytes(asked.errors[number]).rstrip(b"\0").decode("utf-8", "replace"))
            elif command[resp.ANSWERED] < command[resp.REPLIES]:
                share.failure = f"{parcel.node.name}: {_PROBLEMS[problem]}"
                share.again = problem == resp.CLOSED

    def _take_error(self, share: Share, text: str) -> None:
        share.failure = text
        share.again = text.startswith((_MOVED, _ASK, *NOT_READY))
        if text.startswith((_MOVED, _ASK)):
            host, _, port = text.split()[2].rpartition(":")
            host = host or (share.node.host if share.node is not None else host)
            share.redirect = self._topology.node(host, int(port))
            share.asking = text.startswith(_ASK)


_PROBLEMS = {
    resp.CLOSED: "closed the connection",
    resp.EXPIRED: "expected an answer in time, got none",
    CANNOT_WAIT: "expected that this process can wait for its sockets, got an error of poll(2): more of them than "
    "RLIMIT_NOFILE allows (ulimit -n), or no memory",
    resp.FOREIGN: "expected replies to HMGET or HSET, got something else",
}


def _write(text: np.ndarray, at: int, batch: Batch, share: Share, request: Request) -> int:
    text[at : at + len(request.head)] = np.frombuffer(request.head, np.uint8)
    at += len(request.head)
    if not request.with_keys:
        return at
    before, middle, after = (np.frombuffer(part, np.uint8) for part in (request.before, request.middle, request.after))
    values = request.values
    keys = batch.keys.ctypes.data
    given = (batch.order, share.start, share.stop, batch.key_bytes, before, middle)
    return int(resp.write_items(text, at, keys, *given, values.address, values.size, values.stride, after))
