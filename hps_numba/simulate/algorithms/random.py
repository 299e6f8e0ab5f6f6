"""Random replacement: evicts a row chosen uniformly at random (L. A. Belady, 1966), reproducible from run to run.

The generator is xorshift64* (S. Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled",
ACM TOMS 42(4), 2016).
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_kernel
from hps_numba.simulate.algorithms._algorithm import ADMITTED, EVICTED, RESIDENT, Algorithm

SEED = 0x9E3779B97F4A7C15
_12, _25, _27, _32 = np.uint64(12), np.uint64(25), np.uint64(27), np.uint64(32)
_STAR = np.uint64(0x2545F4914F6CDD1D)


@host_kernel
def step(ids, hits, counters, capacity, resident, rows, source):
    """``rows``: the resident keys, unordered; ``source``: state of the generator.   **Writes:** all but ids."""
    for i in range(len(ids)):
        key = ids[i]
        if resident[key]:
            hits[i] = 1
            continue
        hits[i] = 0
        counters[ADMITTED] += 1
        at = counters[RESIDENT]
        if at == capacity:
            x = source[0]
            x ^= x >> _12
            x ^= x << _25
            x ^= x >> _27
            source[0] = x
            at = np.int64((((x * _STAR) >> _32) * np.uint64(capacity)) >> _32)
            resident[rows[at]] = 0
            counters[EVICTED] += 1
        else:
            counters[RESIDENT] += 1
        resident[key] = 1
        rows[at] = key


def state(capacity: int, keys: int, max_count: int) -> tuple[np.ndarray, ...]:
    """resident, rows, source."""
    return np.zeros(keys, np.uint8), np.zeros(capacity, np.int32), np.array([SEED], np.uint64)


PLUGIN = Algorithm(step, state)
