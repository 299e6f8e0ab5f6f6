"""S3-FIFO (J. Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023): a small queue, a main one, ghosts.

A tenth of the rows is the small queue, where newcomers go. What leaves it goes to the main queue if it was asked for twice or
more meanwhile, else it becomes a ghost; ghosts are as many keys as the main queue has rows, and who is asked for while a
ghost enters the main queue. There a row goes round once more for each request, at most three times. While the cache fills up
for the first time, the small queue overflows into the main one: the form in which libCacheSim has it since 2024.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_function, host_kernel
from hps_numba.simulate.algorithms._algorithm import ADMITTED, EVICTED, OWN, RESIDENT, Algorithm
from hps_numba.simulate.algorithms._lists import PREV, cut, new_links, push

ABSENT, SMALL, MAIN, GHOST = 0, 1, 2, 3
SMALLS, MAINS, GHOSTS = OWN, OWN + 1, OWN + 2
MOST, TO_MAIN = 3, 2


@host_function
def evict_from_main(counters, where, asked, links, main):
    """**Writes:** all."""
    while True:
        victim = links[main, PREV]
        cut(links, victim)
        if asked[victim] == 0:
            where[victim] = ABSENT
            counters[MAINS] -= 1
            counters[RESIDENT] -= 1
            counters[EVICTED] += 1
            return
        asked[victim] -= 1
        push(links, main, victim)


@host_function
def evict_from_small(counters, where, asked, links, small, max_ghosts):
    """Evicts one row, or none if all of them went to the main queue.   **Writes:** all."""
    main, ghosts = small + 1, small + 2
    while counters[SMALLS] > 0:
        victim = links[small, PREV]
        cut(links, victim)
        counters[SMALLS] -= 1
        if asked[victim] >= TO_MAIN:
            asked[victim] = 0
            where[victim] = MAIN
            push(links, main, victim)
            counters[MAINS] += 1
            continue
        if counters[GHOSTS] == max_ghosts:
            oldest = links[ghosts, PREV]
            cut(links, oldest)
            where[oldest] = ABSENT
            counters[GHOSTS] -= 1
        where[victim] = GHOST
        push(links, ghosts, victim)
        counters[GHOSTS] += 1
        counters[RESIDENT] -= 1
        counters[EVICTED] += 1
        return


@host_kernel
def step(ids, hits, counters, capacity, where, asked, links):
    """Lists: small, main, ghosts.   **Writes:** as ``_algorithm`` says."""
    small, main = len(where), len(where) + 1
    max_small = max(1, capacity // 10)
    max_main, max_ghosts = capacity - max_small, max(1, capacity * 9 // 10)
    for i in range(len(ids)):
        key = ids[i]
        place = where[key]
        if place in (SMALL, MAIN):
            hits[i] = 1
            if asked[key] < MOST:
                asked[key] += 1
            continue
        hits[i] = 0
        counters[ADMITTED] += 1
        if place == GHOST:
            cut(links, key)
            counters[GHOSTS] -= 1
        while counters[RESIDENT] == capacity:
            if counters[MAINS] > max_main or counters[SMALLS] == 0:
                evict_from_main(counters, where, asked, links, main)
            else:
                evict_from_small(counters, where, asked, links, small, max_ghosts)
        asked[key] = 0
        filling = counters[EVICTED] == 0 and counters[SMALLS] >= max_small
        if place == GHOST or filling:
            where[key] = MAIN
            push(links, main, key)
            counters[MAINS] += 1
        else:
            where[key] = SMALL
            push(links, small, key)
            counters[SMALLS] += 1
        counters[RESIDENT] += 1


def state(capacity: int, keys: int, most: int) -> tuple[np.ndarray, ...]:
    """where, asked, links."""
    return np.zeros(keys, np.uint8), np.zeros(keys, np.uint8), new_links(keys, 3)


PLUGIN = Algorithm(step, state)
