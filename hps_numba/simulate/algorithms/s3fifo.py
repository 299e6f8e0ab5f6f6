"""S3-FIFO (J. Yang, Y. Zhang, Z. Qiu, Y. Yue, K. V. Rashmi, "FIFO queues are all you need for cache eviction", SOSP 2023).

New rows enter the small queue, a tenth of the cache. At its end a row moves to the main queue if it was requested at least
twice meanwhile; otherwise it is evicted and its key becomes a ghost. There are as many ghosts as the main queue has rows, and a
key that is requested while it is a ghost enters the main queue. At the end of the main queue a row is reinserted once for each
request, at most three times. While the cache fills for the first time, the small queue overflows into the main one, as in
libCacheSim since 2024.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_function, host_kernel
from hps_numba.simulate.algorithms._algorithm import ADMITTED, EVICTED, OWN, RESIDENT, Algorithm
from hps_numba.simulate.algorithms._lists import PREV, cut, new_links, push

ABSENT, SMALL, MAIN, GHOST = 0, 1, 2, 3
SMALL_SIZE, MAIN_SIZE, GHOST_SIZE = OWN, OWN + 1, OWN + 2
MAX_FREQUENCY, PROMOTE_AT = 3, 2


@host_function
def evict_from_main(counters, where, frequency, links, main):
    """Evict one row.   **Writes:** all."""
    while True:
        victim = links[main, PREV]
        cut(links, victim)
        if frequency[victim] == 0:
            where[victim] = ABSENT
            counters[MAIN_SIZE] -= 1
            counters[RESIDENT] -= 1
            counters[EVICTED] += 1
            return
        frequency[victim] -= 1
        push(links, main, victim)


@host_function
def evict_from_small(counters, where, frequency, links, small, max_ghosts):
    """Evict one row, or none if all of them move to the main queue.   **Writes:** all."""
    main, ghosts = small + 1, small + 2
    while counters[SMALL_SIZE] > 0:
        victim = links[small, PREV]
        cut(links, victim)
        counters[SMALL_SIZE] -= 1
        if frequency[victim] >= PROMOTE_AT:
            frequency[victim] = 0
            where[victim] = MAIN
            push(links, main, victim)
            counters[MAIN_SIZE] += 1
            continue
        if counters[GHOST_SIZE] == max_ghosts:
            oldest = links[ghosts, PREV]
            cut(links, oldest)
            where[oldest] = ABSENT
            counters[GHOST_SIZE] -= 1
        where[victim] = GHOST
        push(links, ghosts, victim)
        counters[GHOST_SIZE] += 1
        counters[RESIDENT] -= 1
        counters[EVICTED] += 1
        return


@host_kernel
def step(ids, hits, counters, capacity, where, frequency, links):
    """Lists: small, main, ghosts.   **Writes:** all but ids."""
    small, main = len(where), len(where) + 1
    max_small = max(1, capacity // 10)
    max_main, max_ghosts = capacity - max_small, max(1, capacity * 9 // 10)
    for i in range(len(ids)):
        key = ids[i]
        queue = where[key]
        if queue in (SMALL, MAIN):
            hits[i] = 1
            if frequency[key] < MAX_FREQUENCY:
                frequency[key] += 1
            continue
        hits[i] = 0
        counters[ADMITTED] += 1
        if queue == GHOST:
            cut(links, key)
            counters[GHOST_SIZE] -= 1
        while counters[RESIDENT] == capacity:
            if counters[MAIN_SIZE] > max_main or counters[SMALL_SIZE] == 0:
                evict_from_main(counters, where, frequency, links, main)
            else:
                evict_from_small(counters, where, frequency, links, small, max_ghosts)
        frequency[key] = 0
        filling = counters[EVICTED] == 0 and counters[SMALL_SIZE] >= max_small
        if queue == GHOST or filling:
            where[key] = MAIN
            push(links, main, key)
            counters[MAIN_SIZE] += 1
        else:
            where[key] = SMALL
            push(links, small, key)
            counters[SMALL_SIZE] += 1
        counters[RESIDENT] += 1


def state(capacity: int, keys: int, max_count: int) -> tuple[np.ndarray, ...]:
    """where, frequency, links."""
    return np.zeros(keys, np.uint8), np.zeros(keys, np.uint8), new_links(keys, 3)


PLUGIN = Algorithm(step, state)
