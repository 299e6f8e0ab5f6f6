"""CLOCK, or second chance (F. J. Corbato, "A paging experiment with the Multics system", 1968).

A hand moves around the rows. A row that was requested since the hand last passed it stays, and its reference bit is cleared;
the first row without a reference bit is evicted, and the new row, without a reference bit, takes its slot.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_kernel
from hps_numba.simulate.algorithms._algorithm import ADMITTED, EVICTED, OWN, RESIDENT, Algorithm

HAND = OWN
ABSENT, UNREFERENCED, REFERENCED = 0, 1, 2


@host_kernel
def step(ids, hits, counters, capacity, bits, ring):
    """**Writes:** hits, counters, bits, ring."""
    for i in range(len(ids)):
        key = ids[i]
        if bits[key] != ABSENT:
            hits[i] = 1
            bits[key] = REFERENCED
            continue
        hits[i] = 0
        counters[ADMITTED] += 1
        hand = counters[HAND]
        if counters[RESIDENT] == capacity:
            while bits[ring[hand]] == REFERENCED:
                bits[ring[hand]] = UNREFERENCED
                hand = 0 if hand + 1 == capacity else hand + 1
            bits[ring[hand]] = ABSENT
            counters[EVICTED] += 1
        else:
            counters[RESIDENT] += 1
        bits[key] = UNREFERENCED
        ring[hand] = key
        counters[HAND] = 0 if hand + 1 == capacity else hand + 1


def state(capacity: int, keys: int, max_count: int) -> tuple[np.ndarray, ...]:
    """bits, ring."""
    return np.zeros(keys, np.uint8), np.zeros(capacity, np.int32)


PLUGIN = Algorithm(step, state)
