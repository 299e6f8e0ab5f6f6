"""CLOCK, or second chance (F. J. Corbato, "A paging experiment with the Multics system", 1968).

A hand goes round the rows. A row that was asked for since the hand was there last stays, and loses its mark; the first
without a mark leaves, and the newcomer, without a mark, takes its place.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_kernel
from hps_numba.simulate.algorithms._algorithm import ADMITTED, EVICTED, OWN, RESIDENT, Algorithm

HAND = OWN
ABSENT, PLAIN, MARKED = 0, 1, 2


@host_kernel
def step(ids, hits, counters, capacity, marks, ring):
    """**Writes:** as ``_algorithm`` says."""
    for i in range(len(ids)):
        key = ids[i]
        if marks[key] != ABSENT:
            hits[i] = 1
            marks[key] = MARKED
            continue
        hits[i] = 0
        counters[ADMITTED] += 1
        hand = counters[HAND]
        if counters[RESIDENT] == capacity:
            while marks[ring[hand]] == MARKED:
                marks[ring[hand]] = PLAIN
                hand = 0 if hand + 1 == capacity else hand + 1
            marks[ring[hand]] = ABSENT
            counters[EVICTED] += 1
        else:
            counters[RESIDENT] += 1
        marks[key] = PLAIN
        ring[hand] = key
        counters[HAND] = 0 if hand + 1 == capacity else hand + 1


def state(capacity: int, keys: int, most: int) -> tuple[np.ndarray, ...]:
    """marks, ring."""
    return np.zeros(keys, np.uint8), np.zeros(capacity, np.int32)


PLUGIN = Algorithm(step, state)
