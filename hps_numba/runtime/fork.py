"""What a forked child makes anew: threads end there, and a lock stays taken whose holder was another thread."""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet

__all__ = ["renew_after_fork"]


class _Renewable(Protocol):
    def renew(self) -> None:
        """Make anew what does not outlive a fork."""


_renewable: WeakSet[_Renewable] = WeakSet()


def renew_after_fork(thing: _Renewable) -> None:
    """Call ``thing.renew()`` in every forked child, as long as ``thing`` lives: threads end there and locks may stay taken."""
    _renewable.add(thing)


def _after_fork() -> None:
    for thing in list(_renewable):
        thing.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
