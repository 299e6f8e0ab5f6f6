"""Least frequently used; among equal counts, the least recently used row is evicted.

Requests are counted from the insertion of a row, so an evicted row starts again. A list of rows for each count makes every step
take constant time (K. Shah, A. Mitra, D. Matani, "An O(1) algorithm for implementing the LFU cache eviction scheme", 2010).
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_kernel
from hps_numba.simulate.algorithms._algorithm import ADMITTED, EVICTED, OWN, RESIDENT, Algorithm
from hps_numba.simulate.algorithms._lists import PREV, cut, new_links, push

MIN_COUNT = OWN


@host_kernel
def step(ids, hits, counters, capacity, counts, links):
    """``counts`` of absent keys are 0; the sentinel of list c is ``len(counts) + c``.   **Writes:** all but ids."""
    ends = len(counts)
    for i in range(len(ids)):
        key = ids[i]
        count = np.int64(counts[key])
        if count != 0:
            hits[i] = 1
            cut(links, key)
            end = ends + count
            if counters[MIN_COUNT] == count and links[end, PREV] == end:
                counters[MIN_COUNT] = count + 1
            counts[key] = count + 1
            push(links, end + 1, key)
            continue
        hits[i] = 0
        counters[ADMITTED] += 1
        if counters[RESIDENT] == capacity:
            victim = links[ends + counters[MIN_COUNT], PREV]
            cut(links, victim)
            counts[victim] = 0
            counters[EVICTED] += 1
        else:
            counters[RESIDENT] += 1
        counts[key] = 1
        counters[MIN_COUNT] = 1
        push(links, ends + 1, key)


def state(capacity: int, keys: int, max_count: int) -> tuple[np.ndarray, ...]:
    """counts, links."""
    return np.zeros(keys, np.int32), new_links(keys, max_count + 2)


PLUGIN = Algorithm(step, state)
