"""SIEVE (Y. Zhang, J. Yang, Y. Yue, Y. Vigfusson, K. V. Rashmi, "SIEVE is simpler than LRU", NSDI 2024).

Rows are queued in order of insertion, and a hit only sets the visited bit. A hand moves from the oldest row to the newest and
clears these bits; the first row without one is evicted. The other rows keep their positions, and new rows go to the front.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_kernel
from hps_numba.simulate.algorithms._algorithm import ADMITTED, EVICTED, OWN, RESIDENT, Algorithm
from hps_numba.simulate.algorithms._lists import PREV, cut, new_links, push

HAND = OWN  # 1 + the key that it points to; 0: the oldest
ABSENT, UNVISITED, VISITED = 0, 1, 2


@host_kernel
def step(ids, hits, counters, capacity, bits, links):
    """**Writes:** hits, counters, bits, links."""
    end = len(links) - 1
    for i in range(len(ids)):
        key = ids[i]
        if bits[key] != ABSENT:
            hits[i] = 1
            bits[key] = VISITED
            continue
        hits[i] = 0
        counters[ADMITTED] += 1
        if counters[RESIDENT] == capacity:
            at = np.int64(counters[HAND] - 1) if counters[HAND] != 0 else np.int64(links[end, PREV])
            while bits[at] == VISITED:
                bits[at] = UNVISITED
                at = np.int64(links[at, PREV])
                if at == end:
                    at = np.int64(links[end, PREV])
            later = np.int64(links[at, PREV])
            counters[HAND] = 0 if later == end else later + 1
            cut(links, at)
            bits[at] = ABSENT
            counters[EVICTED] += 1
        else:
            counters[RESIDENT] += 1
        bits[key] = UNVISITED
        push(links, end, key)


def state(capacity: int, keys: int, max_count: int) -> tuple[np.ndarray, ...]:
    """bits, links."""
    return np.zeros(keys, np.uint8), new_links(keys, 1)


PLUGIN = Algorithm(step, state)
