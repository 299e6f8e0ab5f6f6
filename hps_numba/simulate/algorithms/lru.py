"""Least recently used (R. L. Mattson et al., "Evaluation techniques for storage hierarchies", IBM Systems Journal, 1970)."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_kernel
from hps_numba.simulate.algorithms._algorithm import ADMITTED, EVICTED, RESIDENT, Algorithm
from hps_numba.simulate.algorithms._lists import NEXT, PREV, UNLINKED, cut, new_links, push


@host_kernel
def step(ids, hits, counters, capacity, links):
    """The front of the list is the most recently used row.   **Writes:** hits, counters, links."""
    end = len(links) - 1
    for i in range(len(ids)):
        key = ids[i]
        if links[key, PREV] != UNLINKED:
            hits[i] = 1
            if links[end, NEXT] != key:
                cut(links, key)
                push(links, end, key)
            continue
        hits[i] = 0
        counters[ADMITTED] += 1
        if counters[RESIDENT] == capacity:
            oldest = links[end, PREV]
            cut(links, oldest)
            links[oldest, PREV] = UNLINKED
            counters[EVICTED] += 1
        else:
            counters[RESIDENT] += 1
        push(links, end, key)


def state(capacity: int, keys: int, max_count: int) -> tuple[np.ndarray, ...]:
    """links."""
    return (new_links(keys, 1),)


PLUGIN = Algorithm(step, state)
