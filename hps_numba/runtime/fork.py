"""What a forked child makes anew: threads end there, and a lock stays taken whose holder was another thread."""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet

__all__ = ["register_fork_reset"]


class _Renewable(Protocol):
    def reset_after_fork(self) -> None:
        """Make anew what does not outlive a fork."""


_renewable: WeakSet[_Renewable] = WeakSet()


def register_fork_reset(thing: _Renewable) -> None:
    """Call ``thing.reset_after_fork()`` in every forked child, as long as ``thing`` lives.

    Threads end there, and locks may stay taken.
    """
    _renewable.add(thing)


def _after_fork() -> None:
    for thing in list(_renewable):
        thing.reset_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
