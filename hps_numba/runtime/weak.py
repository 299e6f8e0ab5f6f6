"""The members of a WeakSet while other threads add theirs and garbage is collected."""

from __future__ import annotations

from typing import TypeVar
from weakref import WeakSet

__all__ = ["members"]

T = TypeVar("T")


def members(weak: WeakSet[T]) -> list[T]:
    """Those that live. Its references are copied in one step: iterating over a WeakSet raises if another thread adds one."""
    found = [reference() for reference in list(weak.data)]  # type: ignore[attr-defined]
    return [member for member in found if member is not None]
