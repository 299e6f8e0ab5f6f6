"""Any cache policy that scores rows, fully associative: the resident row with the smallest score is evicted.

Among equal scores, the row that was inserted first is evicted. The clock runs as in a cache that works in batches: it advances
after each ``batch`` requests, by as many ticks as there, or with the number of inserted rows. The policy sees the requests one
by one, so ``count`` is 1.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from hps_numba.kernels.compiler.njit import safe_dispatcher
from hps_numba.kernels.compiler.specialize import bind
from hps_numba.kernels.layouts.cache import TICKS_OF_A_CACHE
from hps_numba.simulate.algorithms._algorithm import ADMITTED, EVICTED, OWN, RESIDENT, Algorithm
from hps_numba.simulate.algorithms._heap import NOT_IN_HEAP, sift_down, sift_up

__all__ = ["scored"]

LEFT, CALLS, NOW = OWN, OWN + 1, OWN + 2  # requests left in the current batch, batches so far, time in ticks
_ORDER = 31  # bits below the score: order of insertion
BY_INSERTIONS = False  # the clock of the policy; replaced by ``bind``


def policy_first(now, count):
    """Replaced by the policy's function."""
    return now


def policy_touch(score, now, count):
    """Replaced by the policy's function."""
    return score


def step(ids, hits, counters, capacity, pace, heap, position_of, key_of):
    """``pace``: int64 ``[2]``, requests in a batch and ticks for each batch.   **Writes:** all but ids and pace."""
    for i in range(len(ids)):
        key = ids[i]
        if counters[LEFT] == 0:
            if BY_INSERTIONS:
                counters[NOW] = TICKS_OF_A_CACHE * counters[ADMITTED] // capacity
            else:
                counters[NOW] = counters[CALLS] * pace[1]
            counters[LEFT] = pace[0]
            counters[CALLS] += 1
        now = np.int64(counters[NOW])
        counters[LEFT] -= 1
        at = np.int64(position_of[key])
        if at != NOT_IN_HEAP:
            hits[i] = 1
            before = heap[at]
            score = np.int64(policy_touch(before >> _ORDER, now, np.int64(1))) & 0xFFFFFFFF
            after = (score << _ORDER) | (before & ((1 << _ORDER) - 1))
            if after < before:
                heap[at] = after
                sift_up(heap, position_of, key_of, at)
            elif after > before:
                heap[at] = after
                sift_down(heap, position_of, key_of, at, counters[RESIDENT])
            continue
        hits[i] = 0
        score = np.int64(policy_first(now, np.int64(1))) & 0xFFFFFFFF
        value = (score << _ORDER) | (counters[ADMITTED] & ((1 << _ORDER) - 1))
        counters[ADMITTED] += 1
        if counters[RESIDENT] == capacity:
            position_of[key_of[0]] = NOT_IN_HEAP
            heap[0], key_of[0], position_of[key] = value, key, 0
            sift_down(heap, position_of, key_of, np.int64(0), capacity)
            counters[EVICTED] += 1
        else:
            at = np.int64(counters[RESIDENT])
            counters[RESIDENT] += 1
            heap[at], key_of[at], position_of[key] = value, key, at
            sift_up(heap, position_of, key_of, at)


def scored(policy: Any, batch: int, advance: int) -> Algorithm:
    """The algorithm of a ``Policy``, whose clock advances by ``advance`` ticks after each ``batch`` requests.

    It is compiled once a policy, when it first runs.
    """

    def state(capacity: int, keys: int, max_count: int) -> tuple[np.ndarray, ...]:
        """pace, heap, position_of, key_of."""
        pace = np.array([batch, advance], np.int64)
        return pace, np.zeros(capacity, np.int64), np.full(keys, NOT_IN_HEAP, np.int32), np.zeros(capacity, np.int32)

    return Algorithm(_compiled(policy.digest, policy.first, policy.touch, policy.clock == "insertions"), state)


@functools.lru_cache(maxsize=64)
def _compiled(digest: str, first: Any, touch: Any, by_insertions: bool) -> Any:
    names = {"policy_first": first, "policy_touch": touch, "BY_INSERTIONS": by_insertions}

    def compiled(function: Any) -> Any:
        return safe_dispatcher(numba.njit(nogil=True, error_model="numpy")(function))

    function: Any = step
    return compiled(bind(function, names, compiled))
