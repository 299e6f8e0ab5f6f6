"""What a forked child must reset: it has no threads but one, and a lock stays taken if another thread held it."""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet

from hps_numba.runtime.weak import members

__all__ = ["register_fork_reset"]


class _Resettable(Protocol):
    def reset_after_fork(self) -> None:
        """Recreate what does not survive a fork."""


_resettable: WeakSet[_Resettable] = WeakSet()


def register_fork_reset(thing: _Resettable) -> None:
    """Call ``thing.reset_after_fork()`` in every forked child, as long as ``thing`` lives."""
    _resettable.add(thing)


def _after_fork() -> None:
    for thing in members(_resettable):
        thing.reset_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
