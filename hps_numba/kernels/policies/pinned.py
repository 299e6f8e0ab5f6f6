"""Pinned keys: rows of given keys do not leave, the others leave as another policy says.

As pages are fixed in the buffer of a database (W. Effelsberg, T. Haerder, "Principles of database buffer management", ACM
Transactions on Database Systems 9(4), 1984). For rows that must be fast when they come, however rarely: a home page, a key
for all unknown users. A pinned key enters like any other, when it is first asked for or by the warming. If a set has more
pinned keys than ways, those that came first stay.

Keys are given in code: ``pinned([1, 5, 9])``, or in a file that the config names as ``my_pins.py:PINS``::

    from hps_numba.kernels.policies.pinned import pinned

    PINS = pinned(range(100), "lfu")
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hps_numba.errors import PolicyError
from hps_numba.kernels.policies._load import as_policy, load_policy, policy_with

__all__ = ["Pinned", "pinned"]

MOST = 0xFFFF_FFFF
KEYS = (0,)
COUNT = 0


def order_first(now, count):
    """``first`` of the policy for the other keys."""
    return now


def order_touch(score, now, count):
    """``touch`` of the policy for the other keys."""
    return now


def is_pinned(key):
    """Whether a key is one of the sorted KEYS."""
    low, high = 0, COUNT
    while low < high:
        middle = (low + high) // 2
        if KEYS[middle] < key:
            low = middle + 1
        else:
            high = middle
    return low < COUNT and KEYS[low] == key


class Pinned:
    """The score is the largest one for pinned keys, else that of the policy for the others, which is less."""

    def first(now, count, key):
        return MOST if is_pinned(key) else min(order_first(now, count) & MOST, MOST - 1)

    def touch(score, now, count):
        return MOST if score == MOST else min(order_touch(score, now, count) & MOST, MOST - 1)


def pinned(keys: Iterable[int], order: Any = "lru") -> type:
    """A policy under which rows of up to 4096 ``keys`` stay; of the others, ``order`` (a name or a class) says who leaves.

    Raises:
        PolicyError: there is no such policy, or it does more than score.
    """
    policy = load_policy(order) if isinstance(order, str) else as_policy(order)
    if policy.admit is not None or policy.victim is not None or policy.takes_key:
        raise PolicyError(f"pinned: {policy.name!r} does more than score rows, wanted one with first and touch alone")
    known = tuple(sorted({int(key) for key in keys}))
    functions = {"order_first": policy.first, "order_touch": policy.touch}
    return policy_with(
        Pinned, KEYS=known or (0,), COUNT=len(known), clock=policy.clock, needs_count=policy.needs_count, **functions
    )


PLUGIN = pinned(())
