"""Single commands about a partition or about all nodes, by redis-py: what is not asked for many keys at once."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from hps_numba.errors import TierError
from hps_numba.storage.redis.client import error_line
from hps_numba.storage.redis.layout import Partition, read_name, table_pattern
from hps_numba.storage.redis.limits import Limits
from hps_numba.storage.redis.node import Node, NodeFailure
from hps_numba.storage.redis.topology import Topology

__all__ = ["NOT_READY", "PlainCommands"]

#: names looked at in one SCAN
_NAMES = 1000
#: first words of error lines of a node that is not ready, or was demoted
NOT_READY = ("TRYAGAIN", "LOADING", "CLUSTERDOWN", "MASTERDOWN", "BUSY", "READONLY")


class _Placed(Protocol):
    """Something in one slot, which its text names: a partition, or another key."""

    @property
    def slot(self) -> int:
        """Of a cluster."""


class PlainCommands:
    """Commands that go where their partition is, also while it moves.

    Thread safety: every method.
    """

    def __init__(self, topology: Topology, limits: Limits) -> None:
        self._topology, self._limits = topology, limits

    def run(self, part: _Placed, command: Sequence[Any]) -> Any:
        """The answer to a command.

        Raises:
            TierError: its node failed or refused it; the message names the partition.
        """
        return self.run_all(part, [command])[0]

    def run_all(self, part: _Placed, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """The answers to pipelined commands, which are sent again if the slot moves: they must bear that.

        Raises:
            TierError: as ``run``.
        """
        return self._answers(part, commands)[1]

    def _answers(self, part: _Placed, commands: Sequence[Sequence[Any]]) -> tuple[Node, list[Any]]:
        """The node that answered, and its answers."""
        redirect: Node | None = None
        permission: list[Sequence[Any]] = []
        problem = ""
        for attempt in range(self._limits.attempts):
            node = redirect or self._topology.node_of(part.slot)
            if node is None:
                problem = f"no node has slot {part.slot}"
                self._topology.refresh()
                continue
            try:
                answers = node.commands([tuple(words) for command in commands for words in [*permission, command]])
            except NodeFailure as failure:
                problem = str(failure)
                self._topology.refresh()
                redirect, permission = None, []
                if self._topology.node_of(part.slot) is node:
                    break
                continue
            refused = [error_line(answer) for answer in answers if isinstance(answer, Exception)]
            if not refused:
                return node, answers[len(permission) :: 1 + len(permission)]
            problem, redirect, permission = refused[0], None, []
            if problem.startswith(("MOVED ", "ASK ")):
                host, _, port = problem.split()[2].rpartition(":")
                redirect = self._topology.node(host or node.host, int(port))
                permission = [("ASKING",)] if problem.startswith("ASK ") else []
                self._topology.refresh(at_once=not permission)
            elif problem.startswith(NOT_READY):
                self._topology.refresh(at_once=problem.startswith("READONLY"))
                time.sleep(self._limits.backoff * 2**attempt)
            else:
                break
        raise TierError(f"{part}: {problem}")

    def run_each(self, parts: Sequence[Partition], command: Callable[[Partition], Sequence[Any]]) -> list[Any]:
        """The answer to one command about each partition, pipelined to each node.

        Raises:
            TierError: as ``run``.
        """
        by_node: dict[Node | None, list[int]] = defaultdict(list)
        for i, part in enumerate(parts):
            by_node[self._topology.node_of(part.slot)].append(i)
        answers: list[Any] = [None] * len(parts)
        for node, numbers in by_node.items():
            given = self._pipelined(node, [command(parts[i]) for i in numbers])
            for i, answer in zip(numbers, given, strict=True):
                answers[i] = self.run(parts[i], command(parts[i])) if isinstance(answer, Exception) else answer
        return answers

    @staticmethod
    def _pipelined(node: Node | None, commands: list[Sequence[Any]]) -> list[Any]:
        """Answers, or exceptions."""
        try:
            if node is None:
                raise NodeFailure("no node")
            return node.commands([tuple(words) for words in commands])
        except NodeFailure as failure:
            return [failure] * len(commands)

    def scan_hash(self, part: Partition, name: bytes, count: int) -> Iterator[tuple[list[bytes], list[bytes]]]:
        """Fields and values of a hash, about ``count`` at a time; some may come twice."""
        cursor: Any = b"0"
        walked: Node | None = None
        while True:
            node, ((after, flat),) = self._answers(part, [("HSCAN", name, cursor, "COUNT", count)])
            if flat:
                yield flat[::2], flat[1::2]
            if walked not in (None, node):  # the cursor was another node's, which orders fields in its own way
                after = b"0"
            elif int(after) == 0:
                return
            cursor, walked = after, node

    def partitions(self, table: str | None = None) -> list[Partition]:
        """All partitions, on all nodes, of a table or of every table, also those that another ``num_partitions`` made.

        Raises:
            TierError: a node failed, or part of the cluster has none.
        """
        if not self._topology.covered:
            self._topology.refresh()
        if not self._topology.covered:
            raise TierError("redis_cluster: expected a node for each slot, got slots without one")
        found: dict[bytes, Partition] = {}
        for node in self._topology.primaries():
            cursor: Any = b"0"
            while True:
                cursor, names = node.command("SCAN", cursor, "MATCH", table_pattern(table), "COUNT", _NAMES)
                for name in names:
                    part = read_name(name, self._topology.slot_of)
                    if part is not None and (table is None or part.table == table):
                        found[name] = part
                if int(cursor) == 0:
                    break
        return sorted(found.values(), key=lambda part: (part.table, part.number))
