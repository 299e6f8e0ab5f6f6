"""W-TinyLFU (G. Einziger, R. Friedman, B. Manes, "TinyLFU: a highly efficient cache admission policy", ACM ToS 13(4), 2017).

A hundredth of the rows is the window, an LRU list. A row evicted from it enters the main part only if it was requested more
often than the row that would be evicted there. The main part is a segmented LRU: a fifth is on probation, the rest is
protected; a row becomes protected when it is requested while on probation. Frequencies are estimated by a count-min sketch of
4 rows of 4-bit counters, which are halved after ten requests for each row of the cache; every request counts. The doorkeeper of
the paper is omitted.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_function, host_kernel
from hps_numba.kernels.hashing import index_hash
from hps_numba.simulate.algorithms._algorithm import ADMITTED, EVICTED, OWN, RESIDENT, Algorithm
from hps_numba.simulate.algorithms._lists import PREV, cut, new_links, push

ABSENT, WINDOW, PROBATION, PROTECTED = 0, 1, 2, 3
WINDOW_SIZE, PROTECTED_SIZE, COUNTED = OWN, OWN + 1, OWN + 2
ROWS, MAX_COUNT = 4, 15
SAMPLE = 10  # requests between two halvings, for each row of the cache
WIDTH = 4  # counters in a row of the sketch, for each row of the cache
_hash = host_function(index_hash)
_16, _0xFFFFFFFF = np.uint64(16), np.uint64(0xFFFFFFFF)


@host_function
def count(sketch, hashed):
    """Count a request: increment the smallest of its counters.   **Writes:** sketch."""
    mask = np.uint64(sketch.shape[1] - 1)
    low, step_of = hashed, (hashed >> np.uint64(32)) | np.uint64(1)
    smallest = MAX_COUNT
    for row in range(ROWS):
        smallest = min(smallest, np.int64(sketch[row, (low + np.uint64(row) * step_of) & mask]))
    if smallest < MAX_COUNT:
        for row in range(ROWS):
            at = (low + np.uint64(row) * step_of) & mask
            if sketch[row, at] == smallest:
                sketch[row, at] = smallest + 1


@host_function
def estimate(sketch, hashed):
    """Estimated number of requests for a key."""
    mask = np.uint64(sketch.shape[1] - 1)
    step_of = (hashed >> np.uint64(32)) | np.uint64(1)
    smallest = MAX_COUNT
    for row in range(ROWS):
        smallest = min(smallest, np.int64(sketch[row, (hashed + np.uint64(row) * step_of) & mask]))
    return smallest


@host_kernel
def step(ids, hits, counters, capacity, where, links, sketch):
    """Lists: window, probation, protected.   **Writes:** all but ids."""
    window, probation, protected = len(where), len(where) + 1, len(where) + 2
    max_window = max(1, capacity // 100)
    max_protected = (capacity - max_window) * 4 // 5
    for i in range(len(ids)):
        key = ids[i]
        count(sketch, _hash(np.uint64(key) + np.uint64(1)))
        counters[COUNTED] += 1
        if counters[COUNTED] >= SAMPLE * capacity:
            counters[COUNTED] //= 2
            for row in range(ROWS):
                for at in range(sketch.shape[1]):
                    sketch[row, at] >>= 1
        segment = where[key]
        if segment != ABSENT:
            hits[i] = 1
            cut(links, key)
            if segment == WINDOW:
                push(links, window, key)
                continue
            push(links, protected, key)
            if segment == PROBATION:
                where[key] = PROTECTED
                counters[PROTECTED_SIZE] += 1
                if counters[PROTECTED_SIZE] > max_protected:
                    demoted = links[protected, PREV]
                    cut(links, demoted)
                    where[demoted] = PROBATION
                    push(links, probation, demoted)
                    counters[PROTECTED_SIZE] -= 1
            continue
        hits[i] = 0
        counters[ADMITTED] += 1
        where[key] = WINDOW
        push(links, window, key)
        counters[WINDOW_SIZE] += 1
        full = counters[RESIDENT] == capacity
        if not full:
            counters[RESIDENT] += 1
        if counters[WINDOW_SIZE] > max_window:
            candidate = links[window, PREV]
            cut(links, candidate)
            counters[WINDOW_SIZE] -= 1
            if full:
                counters[EVICTED] += 1
                end = probation if links[probation, PREV] != probation else protected
                victim = links[end, PREV]
                if victim == end:  # a cache of one row has no main part
                    where[candidate] = ABSENT
                    continue
                frequency = estimate(sketch, _hash(np.uint64(candidate) + np.uint64(1)))
                if frequency <= estimate(sketch, _hash(np.uint64(victim) + np.uint64(1))):
                    where[candidate] = ABSENT
                    continue
                cut(links, victim)
                where[victim] = ABSENT
                if end == protected:
                    counters[PROTECTED_SIZE] -= 1
            where[candidate] = PROBATION
            push(links, probation, candidate)


def state(capacity: int, keys: int, max_count: int) -> tuple[np.ndarray, ...]:
    """where, links, sketch."""
    width = 1 << max(4, (capacity * WIDTH - 1).bit_length())
    return np.zeros(keys, np.uint8), new_links(keys, 3), np.zeros((ROWS, width), np.uint8)


PLUGIN = Algorithm(step, state)
