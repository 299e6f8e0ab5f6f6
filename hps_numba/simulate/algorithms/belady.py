"""Belady's optimum: the row that is asked for furthest in the future leaves (L. A. Belady, 1966), or does not come in at all.

A newcomer that is asked for later than every resident row is not kept, so that no policy of a cache of as many rows has more
hits, be it one with admission (R. L. Mattson et al., 1970, section "optimal replacement", with bypass).
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_kernel
from hps_numba.simulate.algorithms._algorithm import ADMITTED, EVICTED, RESIDENT, Algorithm
from hps_numba.simulate.algorithms._heap import NOT_IN_HEAP, sift_down, sift_up


@host_kernel
def step(ids, hits, counters, capacity, future, heap, place, key_of):
    """``heap``: next uses negated, the furthest first; ``place`` of each key in it.   **Writes:** as ``_algorithm`` says."""
    for i in range(len(ids)):
        key = ids[i]
        at = np.int64(place[key])
        if at != NOT_IN_HEAP:
            hits[i] = 1
            heap[at] = -future[i]
            sift_up(heap, place, key_of, at)
            continue
        hits[i] = 0
        size = counters[RESIDENT]
        if size == capacity:
            if -future[i] <= heap[0]:
                continue
            place[key_of[0]] = NOT_IN_HEAP
            at = np.int64(0)
            counters[EVICTED] += 1
        else:
            at = size
            counters[RESIDENT] = size + 1
        counters[ADMITTED] += 1
        heap[at], key_of[at], place[key] = -future[i], key, at
        sift_up(heap, place, key_of, at)
        sift_down(heap, place, key_of, np.int64(place[key]), counters[RESIDENT])


def state(capacity: int, keys: int, most: int) -> tuple[np.ndarray, ...]:
    """heap, place, key_of."""
    return np.zeros(capacity, np.int64), np.full(keys, NOT_IN_HEAP, np.int32), np.zeros(capacity, np.int32)


PLUGIN = Algorithm(step, state, looks_ahead=True, bound=True)
