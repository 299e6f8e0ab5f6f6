"""Which node has which slot; a single plain node has all of them.

A cluster is asked through any node that answers: first those known to be alive, then the seeds of the config. A node that came
back without its memory knows of no slots: one that does not know of all is believed only if no other knows of more.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterable
from typing import Any

from hps_numba.errors import ClosedError, TierError, TierUnavailable
from hps_numba.runtime.reentry import ExclusiveLock
from hps_numba.storage.redis.client import RedisClient
from hps_numba.storage.redis.limits import Limits
from hps_numba.storage.redis.node import Node, NodeFailure

__all__ = ["SLOTS", "Topology", "seeds_of"]

log = logging.getLogger(__name__)
SLOTS = 16384
_DEFAULT_PORT = 6379
#: what a server says that has no cluster, and one that does not know the command
_PLAIN = ("cluster support disabled", "unknown command")


def seeds_of(address: str, *, who: str = "redis_cluster") -> list[tuple[str, int]]:
    """Hosts and ports of ``address``, separated by commas or semicolons; 6379 where there is no port.

    Raises:
        TierUnavailable: a port is not a number.
    """
    seeds = []
    for text in address.replace(";", ",").split(","):
        host, colon, port = text.strip().rpartition(":")
        if not colon or text.strip().endswith("]"):
            host, port = text.strip(), str(_DEFAULT_PORT)
        if not port.isdecimal() or not 0 < int(port) < 65536:
            raise TierUnavailable(f"{who}: address: expected host:port, got {text.strip()!r}")
        if host:
            seeds.append((host.strip("[]"), int(port)))
    return seeds


class Topology:
    """The nodes of a cluster, or the only node.

    Attributes:
        in_cluster: the nodes form a cluster.   slot_of: the slot of a name.

    Thread safety: every method.
    """

    def __init__(self, client: RedisClient, address: str, connections: int, limits: Limits) -> None:
        """Find the nodes.

        Raises:
            TierUnavailable: no seed answers; the message has what each said.
        """
        self._client, self._connections, self._limits = client, connections, limits
        self.slot_of = client.slot_of
        self._nodes: dict[tuple[str, int], Node] = {}
        self._left: list[weakref.ref[Node]] = []  # nodes that are needed no more; calls may still use them
        self._closed = False
        self._slots: list[Node | None] = []
        self.in_cluster = True
        self._seeds = [self._node(*seed) for seed in seeds_of(address, who=client.who)]
        self._lock = ExclusiveLock("the nodes of a Redis cluster")
        self._looked = time.monotonic()
        problems = self._read_from(self._seeds)
        if not self._slots:
            self.close()
            raise TierUnavailable(
                f"{client.who}: address: expected a node that answers, got {'; '.join(problems) or repr(address)}"
            )

    def _node(self, host: str, port: int) -> Node:
        known = self._nodes.get((host, port))
        if known is None:
            known = self._nodes[host, port] = Node(self._client, host, port, self._connections, self._limits)
            if self._closed:
                known.close()
        return known

    def node(self, host: str, port: int) -> Node:
        """The node at an address that another node named."""
        with self._lock.held():
            return self._node(host, port)

    def node_of(self, slot: int) -> Node | None:
        """The node that has a slot; None if no node has it."""
        return self._slots[slot] if self.in_cluster else self._slots[0]

    def primaries(self) -> list[Node]:
        """All nodes that have slots, each once."""
        return list(dict.fromkeys(node for node in self._slots if node is not None))

    @property
    def covered(self) -> bool:
        """Whether every slot has a node."""
        return None not in self._slots

    def refresh(self, *, at_once: bool = False) -> None:
        """Look for changes of the cluster, through the first node that knows of all slots; if none answers, all stays as it is.

        Args:
            at_once: a node said that slots have moved; else this is done only once in a while.
        """
        asked_at = time.monotonic()
        if not self.in_cluster or (not at_once and asked_at - self._looked < self._limits.refresh):
            return
        with self._lock.held():
            if self._looked > asked_at:  # by another thread, meanwhile
                return
            try:
                for problem in self._read_from(self._alive()):
                    log.debug("cannot read the slots of the cluster: %s", problem)
            finally:
                self._looked = time.monotonic()

    def _alive(self) -> list[Node]:
        candidates = dict.fromkeys([*self.primaries(), *self._seeds, *self._nodes.values()])
        return sorted(candidates, key=lambda node: node.breaker.is_open)

    def _read_from(self, nodes: Iterable[Node]) -> list[str]:
        """Ask nodes until one knows of all slots, else take what the one says that knows of most; returns what went wrong."""
        best: list[Node | None] = []
        problems = []
        for node in nodes:
            try:
                slots = self._answer_of(node)
            except TierError as problem:
                problems.append(str(problem))
                continue
            if slots is None:
                if not (best or self._slots):
                    self.in_cluster, self._slots = False, [node]
                    return problems
                problems.append(f"{node.name}: expected a node of the cluster, got a server that has none")
            elif None not in slots:
                self._slots = slots
                self._forget({*self.primaries(), *self._seeds})
                return problems
            elif not best or slots.count(None) < best.count(None):
                best = slots
        self._slots = best or self._slots
        return problems

    def _answer_of(self, node: Node) -> list[Node | None] | None:
        """Which node has which slot, as a node says; None: it has no cluster."""
        (answer,) = node.commands([("CLUSTER", "SLOTS")])
        if isinstance(answer, Exception):
            if any(text in str(answer).lower() for text in _PLAIN):
                return None
            raise NodeFailure(f"{node.name}: CLUSTER SLOTS: {answer}")
        slots: list[Node | None] = [None] * SLOTS
        for first, last, primary, *_ in answer:
            slots[first : last + 1] = [self._node(*_address(primary, node))] * (last + 1 - first)
        return slots

    def _forget(self, needed: Iterable[Node]) -> None:
        """Keep only nodes that are needed; calls that use another one go on with it."""
        kept = set(needed)
        for address, node in list(self._nodes.items()):
            if node not in kept and not node.breaker.is_open:
                self._left = [known for known in self._left if known() is not None] + [weakref.ref(node)]
                del self._nodes[address]

    def check_open(self) -> None:
        """
        Raises:
            ClosedError: after ``close``.
        """
        if self._closed:
            raise ClosedError(f"{self._client.who}: the tier is closed")

    def close(self) -> None:
        """Close all connections; calls that use one raise ClosedError, and so do later ones."""
        self._closed = True
        for node in [*self._nodes.values(), *(known() for known in self._left)]:
            if node is not None:
                node.close()


def _address(given: list[Any], asked: Node) -> tuple[str, int]:
    """Host and port of a node; one that does not know its host is where it was asked."""
    host = (given[0] or b"").decode()
    return (asked.host if host in ("", "?") else host), int(given[1])
