"""Belady's optimum: evicts the row whose next request is furthest in the future (L. A. Belady, 1966), or does not admit it.

A row whose next request comes later than those of all resident rows is not admitted, so that no policy for a cache of the same
size has more hits, even with admission (R. L. Mattson et al., 1970, section "optimal replacement", with bypass).
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_kernel
from hps_numba.simulate.algorithms._algorithm import ADMITTED, EVICTED, RESIDENT, Algorithm
from hps_numba.simulate.algorithms._heap import NOT_IN_HEAP, sift_down, sift_up


@host_kernel
def step(ids, hits, counters, capacity, future, heap, position_of, key_of):
    """``heap``: negated positions of next requests, with the key of each and the position of each key.

    **Writes:** all but ids and future.
    """
    for i in range(len(ids)):
        key = ids[i]
        at = np.int64(position_of[key])
        if at != NOT_IN_HEAP:
            hits[i] = 1
            heap[at] = -future[i]
            sift_up(heap, position_of, key_of, at)
            continue
        hits[i] = 0
        size = counters[RESIDENT]
        if size == capacity:
            if -future[i] <= heap[0]:
                continue
            position_of[key_of[0]] = NOT_IN_HEAP
            at = np.int64(0)
            counters[EVICTED] += 1
        else:
            at = size
            counters[RESIDENT] = size + 1
        counters[ADMITTED] += 1
        heap[at], key_of[at], position_of[key] = -future[i], key, at
        sift_up(heap, position_of, key_of, at)
        sift_down(heap, position_of, key_of, np.int64(position_of[key]), counters[RESIDENT])


def state(capacity: int, keys: int, max_count: int) -> tuple[np.ndarray, ...]:
    """heap, position_of, key_of."""
    return np.zeros(capacity, np.int64), np.full(keys, NOT_IN_HEAP, np.int32), np.zeros(capacity, np.int32)


PLUGIN = Algorithm(step, state, looks_ahead=True, bound=True)
