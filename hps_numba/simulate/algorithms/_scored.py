"""Any cache policy that scores slots, fully associative: the resident row with the smallest score leaves, whatever its set.

Of equal scores, the row that came in first leaves. Time runs as it does for a cache in batches: it moves on after each
``batch`` requests, by as many ticks as there, or with the rows that came in. Requests are told one by one, so ``count`` is 1.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from hps_numba.kernels.compiler.specialize import bind
from hps_numba.kernels.layouts.cache import TICKS_OF_A_CACHE
from hps_numba.simulate.algorithms._algorithm import ADMITTED, EVICTED, OWN, RESIDENT, Algorithm
from hps_numba.simulate.algorithms._heap import NOT_IN_HEAP, sift_down, sift_up

__all__ = ["scored"]

POSITION, NOW = OWN, OWN + 1
_ORDER = 31  # bits below the score: which row came in first
# bound when built
BATCH, ADVANCE = 1, 1
BY_INSERTIONS = False  # the clock of the policy


def policy_first(now, count):
    """The policy's, bound when built."""
    return now


def policy_touch(score, now, count):
    """The policy's, bound when built."""
    return score


def step(ids, hits, counters, capacity, heap, place, key_of):
    """**Writes:** as ``_algorithm`` says."""
    for i in range(len(ids)):
        key = ids[i]
        if counters[POSITION] % BATCH == 0:
            if BY_INSERTIONS:
                counters[NOW] = TICKS_OF_A_CACHE * counters[ADMITTED] // capacity
            else:
                counters[NOW] = counters[POSITION] // BATCH * ADVANCE
        now = np.int64(counters[NOW])
        counters[POSITION] += 1
        at = np.int64(place[key])
        if at != NOT_IN_HEAP:
            hits[i] = 1
            before = heap[at]
            score = np.int64(policy_touch(before >> _ORDER, now, np.int64(1))) & 0xFFFFFFFF
            after = (score << _ORDER) | (before & ((1 << _ORDER) - 1))
            if after < before:
                heap[at] = after
                sift_up(heap, place, key_of, at)
            elif after > before:
                heap[at] = after
                sift_down(heap, place, key_of, at, counters[RESIDENT])
            continue
        hits[i] = 0
        score = np.int64(policy_first(now, np.int64(1))) & 0xFFFFFFFF
        value = (score << _ORDER) | (counters[ADMITTED] & ((1 << _ORDER) - 1))
        counters[ADMITTED] += 1
        if counters[RESIDENT] == capacity:
            place[key_of[0]] = NOT_IN_HEAP
            heap[0], key_of[0], place[key] = value, key, 0
            sift_down(heap, place, key_of, np.int64(0), capacity)
            counters[EVICTED] += 1
        else:
            at = np.int64(counters[RESIDENT])
            counters[RESIDENT] += 1
            heap[at], key_of[at], place[key] = value, key, at
            sift_up(heap, place, key_of, at)


def _state(capacity: int, keys: int, most: int) -> tuple[np.ndarray, ...]:
    """heap, place, key_of."""
    return np.zeros(capacity, np.int64), np.full(keys, NOT_IN_HEAP, np.int32), np.zeros(capacity, np.int32)


def scored(policy: Any, batch: int, advance: int) -> Algorithm:
    """The algorithm of a ``Policy``; compiled when it first runs, once a policy and a pace of time."""
    return _scored(policy.digest, policy.first, policy.touch, policy.clock == "insertions", batch, advance)


@functools.lru_cache(maxsize=64)
def _scored(digest: str, first: Any, touch: Any, by_insertions: bool, batch: int, advance: int) -> Algorithm:
    names = {"policy_first": first, "policy_touch": touch, "BATCH": batch, "ADVANCE": advance, "BY_INSERTIONS": by_insertions}

    def compiled(function: Any) -> Any:
        return numba.njit(nogil=True, error_model="numpy")(function)

    function: Any = step
    return Algorithm(compiled(bind(function, names, compiled)), _state)
