"""An infinite cache: only the first request for a key misses. An upper bound for every policy and size."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_kernel
from hps_numba.simulate.algorithms._algorithm import ADMITTED, RESIDENT, Algorithm


@host_kernel
def step(ids, hits, counters, capacity, resident):
    """**Writes:** hits, counters, resident."""
    for i in range(len(ids)):
        key = ids[i]
        hits[i] = resident[key]
        if resident[key] == 0:
            resident[key] = 1
            counters[ADMITTED] += 1
            counters[RESIDENT] += 1


def state(capacity: int, keys: int, max_count: int) -> tuple[np.ndarray, ...]:
    """resident."""
    return (np.zeros(keys, np.uint8),)


PLUGIN = Algorithm(step, state, bound=True)
