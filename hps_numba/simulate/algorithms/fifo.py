"""First in, first out (L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", 1966)."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_kernel
from hps_numba.simulate.algorithms._algorithm import ADMITTED, EVICTED, OWN, RESIDENT, Algorithm

HAND = OWN


@host_kernel
def step(ids, hits, counters, capacity, resident, ring):
    """``ring``: keys in order of insertion; the hand is at the oldest.   **Writes:** hits, counters, resident, ring."""
    for i in range(len(ids)):
        key = ids[i]
        if resident[key]:
            hits[i] = 1
            continue
        hits[i] = 0
        counters[ADMITTED] += 1
        hand = counters[HAND]
        if counters[RESIDENT] == capacity:
            resident[ring[hand]] = 0
            counters[EVICTED] += 1
        else:
            counters[RESIDENT] += 1
        resident[key] = 1
        ring[hand] = key
        counters[HAND] = 0 if hand + 1 == capacity else hand + 1


def state(capacity: int, keys: int, max_count: int) -> tuple[np.ndarray, ...]:
    """resident, ring."""
    return np.zeros(keys, np.uint8), np.zeros(capacity, np.int32)


PLUGIN = Algorithm(step, state)
