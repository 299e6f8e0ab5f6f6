"""2Q, the full version (T. Johnson, D. Shasha, "2Q: a low overhead high performance buffer management replacement algorithm",
VLDB 1994), with the sizes recommended there: a quarter of the rows for A1in, half as many keys in A1out as the cache has rows.

New rows enter A1in, a FIFO queue in which hits change nothing. The keys of rows evicted from it are kept in A1out; a key that
is requested while it is there enters Am, an LRU list.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_kernel
from hps_numba.simulate.algorithms._algorithm import ADMITTED, EVICTED, OWN, RESIDENT, Algorithm
from hps_numba.simulate.algorithms._lists import PREV, cut, new_links, push

ABSENT, A1IN, AM, A1OUT = 0, 1, 2, 3
A1IN_SIZE, A1OUT_SIZE = OWN, OWN + 1


@host_kernel
def step(ids, hits, counters, capacity, where, links):
    """Lists: A1in, Am, A1out.   **Writes:** all but ids."""
    keys = len(where)
    a1in, am, a1out = keys, keys + 1, keys + 2
    max_a1in, max_a1out = max(1, capacity // 4), max(1, capacity // 2)
    for i in range(len(ids)):
        key = ids[i]
        queue = where[key]
        if queue in (A1IN, AM):
            hits[i] = 1
            if queue == AM:
                cut(links, key)
                push(links, am, key)
            continue
        hits[i] = 0
        counters[ADMITTED] += 1
        if queue == A1OUT:
            cut(links, key)
            counters[A1OUT_SIZE] -= 1
        if counters[RESIDENT] == capacity:
            counters[EVICTED] += 1
            if counters[A1IN_SIZE] > max_a1in or links[am, PREV] == am:
                victim = links[a1in, PREV]
                cut(links, victim)
                counters[A1IN_SIZE] -= 1
                if counters[A1OUT_SIZE] == max_a1out:
                    oldest = links[a1out, PREV]
                    cut(links, oldest)
                    where[oldest] = ABSENT
                    counters[A1OUT_SIZE] -= 1
                where[victim] = A1OUT
                push(links, a1out, victim)
                counters[A1OUT_SIZE] += 1
            else:
                victim = links[am, PREV]
                cut(links, victim)
                where[victim] = ABSENT
        else:
            counters[RESIDENT] += 1
        if queue == A1OUT:
            where[key] = AM
            push(links, am, key)
        else:
            where[key] = A1IN
            push(links, a1in, key)
            counters[A1IN_SIZE] += 1


def state(capacity: int, keys: int, max_count: int) -> tuple[np.ndarray, ...]:
    """where, links."""
    return np.zeros(keys, np.uint8), new_links(keys, 3)


PLUGIN = Algorithm(step, state)
