"""What open caches will still take of each device: they have most of their memory from the start, but workspaces come with the
lookups that need them. So a plan that was checked stays true: nothing optional takes that memory meanwhile, and the plan of one
more model does not count it as free.
"""

from __future__ import annotations

import weakref
from typing import Protocol

__all__ = ["promise", "promised_bytes", "withdraw"]


class _Owner(Protocol):
    """A cache, as far as its memory goes."""

    @property
    def needed_bytes(self) -> int:
        """What it takes now, without the copy of the store's index."""


_promises: dict[int, tuple[int, int, weakref.ref[_Owner]]] = {}


def promise(device: int, owner: _Owner, size: int) -> None:
    """Keep ``size`` bytes of a device for a cache, those that it has taken included, until ``withdraw`` or its end."""
    number = id(owner)
    _promises[number] = device, size, weakref.ref(owner, lambda _: _promises.pop(number, None))


def withdraw(owner: _Owner) -> None:
    """The cache takes no more memory; again does nothing."""
    _promises.pop(id(owner), None)


def promised_bytes(device: int) -> int:
    """Bytes of a device that open caches were promised and have not taken yet."""
    missing = 0
    for at, size, reference in tuple(_promises.values()):
        owner = reference() if at == device else None
        if owner is not None:
            missing += max(0, size - owner.needed_bytes)
    return missing
