"""2Q, the full version (T. Johnson, D. Shasha, "2Q: a low overhead high performance buffer management replacement algorithm",
VLDB 1994), with the sizes that the paper advises: a quarter of the rows for newcomers, ghosts of half as many keys as rows.

Newcomers queue first in, first out; a hit there changes nothing. One that left and is asked for again while its ghost lasts
enters the main list, which is least recently used.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_kernel
from hps_numba.simulate.algorithms._algorithm import ADMITTED, EVICTED, OWN, RESIDENT, Algorithm
from hps_numba.simulate.algorithms._lists import PREV, cut, new_links, push

ABSENT, NEW, MAIN, GHOST = 0, 1, 2, 3
NEWS, GHOSTS = OWN, OWN + 1


@host_kernel
def step(ids, hits, counters, capacity, where, links):
    """Lists: newcomers, main, ghosts.   **Writes:** as ``_algorithm`` says."""
    keys = len(where)
    news, main, ghosts = keys, keys + 1, keys + 2
    max_news, max_ghosts = max(1, capacity // 4), max(1, capacity // 2)
    for i in range(len(ids)):
        key = ids[i]
        place = where[key]
        if place in (NEW, MAIN):
            hits[i] = 1
            if place == MAIN:
                cut(links, key)
                push(links, main, key)
            continue
        hits[i] = 0
        counters[ADMITTED] += 1
        if place == GHOST:
            cut(links, key)
            counters[GHOSTS] -= 1
        if counters[RESIDENT] == capacity:
            counters[EVICTED] += 1
            if counters[NEWS] > max_news or links[main, PREV] == main:
                victim = links[news, PREV]
                cut(links, victim)
                counters[NEWS] -= 1
                if counters[GHOSTS] == max_ghosts:
                    oldest = links[ghosts, PREV]
                    cut(links, oldest)
                    where[oldest] = ABSENT
                    counters[GHOSTS] -= 1
                where[victim] = GHOST
                push(links, ghosts, victim)
                counters[GHOSTS] += 1
            else:
                victim = links[main, PREV]
                cut(links, victim)
                where[victim] = ABSENT
        else:
            counters[RESIDENT] += 1
        if place == GHOST:
            where[key] = MAIN
            push(links, main, key)
        else:
            where[key] = NEW
            push(links, news, key)
            counters[NEWS] += 1


def state(capacity: int, keys: int, most: int) -> tuple[np.ndarray, ...]:
    """where, links."""
    return np.zeros(keys, np.uint8), new_links(keys, 3)


PLUGIN = Algorithm(step, state)
