"""A cache without end: only the first request for a key misses. The ceiling of every policy and size."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_kernel
from hps_numba.simulate.algorithms._algorithm import ADMITTED, RESIDENT, Algorithm


@host_kernel
def step(ids, hits, counters, capacity, there):
    """**Writes:** as ``_algorithm`` says."""
    for i in range(len(ids)):
        key = ids[i]
        hits[i] = there[key]
        if there[key] == 0:
            there[key] = 1
            counters[ADMITTED] += 1
            counters[RESIDENT] += 1


def state(capacity: int, keys: int, most: int) -> tuple[np.ndarray, ...]:
    """there."""
    return (np.zeros(keys, np.uint8),)


PLUGIN = Algorithm(step, state, bound=True)
