"""SIEVE (Y. Zhang et al., "SIEVE is simpler than LRU", NSDI 2024).

Rows stand in the order in which they came, and a hit only marks. A hand goes from the oldest to the latest, takes marks away,
and the first row without one leaves; the others keep their place, and newcomers go to the front, behind the hand's back.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_kernel
from hps_numba.simulate.algorithms._algorithm import ADMITTED, EVICTED, OWN, RESIDENT, Algorithm
from hps_numba.simulate.algorithms._lists import PREV, cut, new_links, push

HAND = OWN  # 1 + the key where it stands; 0: at the oldest
ABSENT, PLAIN, MARKED = 0, 1, 2


@host_kernel
def step(ids, hits, counters, capacity, marks, links):
    """**Writes:** as ``_algorithm`` says."""
    end = len(links) - 1
    for i in range(len(ids)):
        key = ids[i]
        if marks[key] != ABSENT:
            hits[i] = 1
            marks[key] = MARKED
            continue
        hits[i] = 0
        counters[ADMITTED] += 1
        if counters[RESIDENT] == capacity:
            at = np.int64(counters[HAND] - 1) if counters[HAND] != 0 else np.int64(links[end, PREV])
            while marks[at] == MARKED:
                marks[at] = PLAIN
                at = np.int64(links[at, PREV])
                if at == end:
                    at = np.int64(links[end, PREV])
            later = np.int64(links[at, PREV])
            counters[HAND] = 0 if later == end else later + 1
            cut(links, at)
            marks[at] = ABSENT
            counters[EVICTED] += 1
        else:
            counters[RESIDENT] += 1
        marks[key] = PLAIN
        push(links, end, key)


def state(capacity: int, keys: int, most: int) -> tuple[np.ndarray, ...]:
    """marks, links."""
    return np.zeros(keys, np.uint8), new_links(keys, 1)


PLUGIN = Algorithm(step, state)
