"""How long a node may take, and what happens when it takes longer."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """Times in seconds. A tier has those of its class attribute ``limits``: a subclass may set others.

    Attributes:
        connect: to connect to a node.
        reply: without any progress, after which a node counts as dead.
        queue: that a call waits for a free connection to a node that answers others.
        probe: to connect to a dead node and get its answer to a PING, the only price of asking again.
        first_pause: after which a dead node is probed.   longest_pause: each failure doubles the pause up to this.
        refresh: at least between two looks at the slots of a cluster because of nodes that fail.
        backoff: between two attempts at a command that the cluster cannot answer yet.
        attempts: for a command whose slot moved, whose connection was closed or whose node is loading.
        protocol: version of RESP, 2 or 3.
    """

    connect: float = 1.0
    reply: float = 2.0
    queue: float = 30.0
    probe: float = 0.25
    first_pause: float = 0.5
    longest_pause: float = 4.0
    refresh: float = 0.5
    backoff: float = 0.05
    attempts: int = 4
    protocol: int = 2
