"""Pinned keys: rows of given keys are never evicted, the others as another policy says.

As pages are fixed in the buffer of a database (W. Effelsberg, T. Haerder, "Principles of database buffer management", ACM
Transactions on Database Systems 9(4), 1984). For rows that must be fast however rarely they are requested: a home page, a key
for all unknown users. A pinned key is inserted like any other, when it is first requested or by warming. If a set has more
pinned keys than ways, those inserted first stay.

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

MAX_SCORE = 0xFFFF_FFFF
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
        return MAX_SCORE if is_pinned(key) else min(order_first(now, count) & MAX_SCORE, MAX_SCORE - 1)

    def touch(score, now, count):
        return MAX_SCORE if score == MAX_SCORE else min(order_touch(score, now, count) & MAX_SCORE, MAX_SCORE - 1)


def pinned(keys: Iterable[int], order: Any = "lru") -> type:
    """A policy under which rows of up to 4096 ``keys`` stay; ``order`` (a name or a class) says which of the others is evicted.

    Raises:
        PolicyError: there is no such policy, or it does more than score.
    """
    policy = load_policy(order) if isinstance(order, str) else as_policy(order)
    if policy.admit is not None or policy.victim is not None or policy.takes_key:
        raise PolicyError(f"pinned: expected a policy with first and touch only, got {policy.name!r}, which has more")
    known = tuple(sorted({int(key) for key in keys}))
    functions = {"order_first": policy.first, "order_touch": policy.touch}
    return policy_with(
        Pinned, KEYS=known or (0,), COUNT=len(known), clock=policy.clock, needs_count=policy.needs_count, **functions
    )


PLUGIN = pinned(())
