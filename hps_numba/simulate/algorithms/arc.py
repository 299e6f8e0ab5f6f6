"""ARC (N. Megiddo, D. S. Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003).

Two lists in order of recency: rows requested once (T1) and more often (T2), each with ghosts, the keys recently evicted from it
(B1, B2). A request for a ghost shifts the target size of T1 in favour of the list that it was evicted from.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_function, host_kernel
from hps_numba.simulate.algorithms._algorithm import ADMITTED, EVICTED, RESIDENT, Algorithm
from hps_numba.simulate.algorithms._lists import PREV, cut, new_links, push

ABSENT, T1, T2, B1, B2 = 0, 1, 2, 3, 4  # the sentinel of list L is keys + L - 1


@host_function
def drop_last(sizes, where, links, name):
    """Remove the oldest key of a list.   **Writes:** all."""
    victim = links[len(where) + name - 1, PREV]
    cut(links, victim)
    where[victim] = ABSENT
    sizes[name] -= 1


@host_function
def replace(sizes, where, links, target, ghost_of_t2):
    """Evict the oldest row of T1 or T2, which becomes a ghost (REPLACE in the paper).   **Writes:** all."""
    over = sizes[T1] > target or (ghost_of_t2 and sizes[T1] == target)
    name = T1 if (sizes[T1] > 0 and over) or sizes[T2] == 0 else T2
    victim = links[len(where) + name - 1, PREV]
    cut(links, victim)
    sizes[name] -= 1
    where[victim] = name + 2
    push(links, len(where) + name + 1, victim)
    sizes[name + 2] += 1


@host_kernel
def step(ids, hits, counters, capacity, where, links, sizes, target):
    """``sizes`` of lists; ``target``: float64 ``[1]``, size of T1 (p in the paper).   **Writes:** all but ids."""
    keys = len(where)
    for i in range(len(ids)):
        key = ids[i]
        queue = where[key]
        if queue in (T1, T2):
            hits[i] = 1
            cut(links, key)
            sizes[queue] -= 1
            where[key] = T2
            push(links, keys + T2 - 1, key)
            sizes[T2] += 1
            continue
        hits[i] = 0
        counters[ADMITTED] += 1
        full = counters[RESIDENT] == capacity
        if queue == ABSENT:
            if full:
                if sizes[T1] + sizes[B1] == capacity:
                    if sizes[T1] < capacity:
                        drop_last(sizes, where, links, B1)
                        replace(sizes, where, links, target[0], False)
                    else:
                        drop_last(sizes, where, links, T1)
                else:
                    if sizes[T1] + sizes[T2] + sizes[B1] + sizes[B2] == 2 * capacity:
                        drop_last(sizes, where, links, B2)
                    replace(sizes, where, links, target[0], False)
            where[key] = T1
            push(links, keys + T1 - 1, key)
            sizes[T1] += 1
        else:
            if queue == B1:
                target[0] = min(target[0] + max(sizes[B2] / sizes[B1], 1.0), float(capacity))
            else:
                target[0] = max(target[0] - max(sizes[B1] / sizes[B2], 1.0), 0.0)
            cut(links, key)
            sizes[queue] -= 1
            if full:
                replace(sizes, where, links, target[0], queue == B2)
            where[key] = T2
            push(links, keys + T2 - 1, key)
            sizes[T2] += 1
        if full:
            counters[EVICTED] += 1
        else:
            counters[RESIDENT] += 1


def state(capacity: int, keys: int, max_count: int) -> tuple[np.ndarray, ...]:
    """where, links, sizes, target."""
    return np.zeros(keys, np.uint8), new_links(keys, 4), np.zeros(5, np.int64), np.zeros(1)


PLUGIN = Algorithm(step, state)
