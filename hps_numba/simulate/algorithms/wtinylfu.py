"""W-TinyLFU (G. Einziger, R. Friedman, B. Manes, "TinyLFU: a highly efficient cache admission policy", ACM ToS 13(4), 2017).

A hundredth of the rows is a window, least recently used. What leaves it enters the main part only if it was asked for more
often than what would leave there. The main part is segmented: a fifth on probation, the rest protected, which a row enters
when it is asked for while on probation. Frequencies are estimated by a count-min sketch of 4 rows of 4-bit counters, halved
after ten requests a row of the cache; every request counts. The paper's doorkeeper is left out.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_function, host_kernel
from hps_numba.kernels.hashing import index_hash
from hps_numba.simulate.algorithms._algorithm import ADMITTED, EVICTED, OWN, RESIDENT, Algorithm
from hps_numba.simulate.algorithms._lists import PREV, cut, new_links, push

ABSENT, WINDOW, PROBATION, PROTECTED = 0, 1, 2, 3
WINDOWS, PROTECTEDS, COUNTED = OWN, OWN + 1, OWN + 2
ROWS, MOST = 4, 15
SAMPLE = 10  # requests a row of the cache
WIDTH = 4  # counters of a row of the sketch, a row of the cache
_hash = host_function(index_hash)
_16, _0xFFFFFFFF = np.uint64(16), np.uint64(0xFFFFFFFF)


@host_function
def count(sketch, hashed):
    """Count a request: the smallest of its counters grow.   **Writes:** sketch."""
    mask = np.uint64(sketch.shape[1] - 1)
    low, step_of = hashed, (hashed >> np.uint64(32)) | np.uint64(1)
    least = MOST
    for row in range(ROWS):
        least = min(least, np.int64(sketch[row, (low + np.uint64(row) * step_of) & mask]))
    if least < MOST:
        for row in range(ROWS):
            at = (low + np.uint64(row) * step_of) & mask
            if sketch[row, at] == least:
                sketch[row, at] = least + 1


@host_function
def estimate(sketch, hashed):
    """How often a key was asked for, about."""
    mask = np.uint64(sketch.shape[1] - 1)
    step_of = (hashed >> np.uint64(32)) | np.uint64(1)
    least = MOST
    for row in range(ROWS):
        least = min(least, np.int64(sketch[row, (hashed + np.uint64(row) * step_of) & mask]))
    return least


@host_kernel
def step(ids, hits, counters, capacity, where, links, sketch):
    """Lists: window, probation, protected.   **Writes:** as ``_algorithm`` says."""
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
        place = where[key]
        if place != ABSENT:
            hits[i] = 1
            cut(links, key)
            if place == WINDOW:
                push(links, window, key)
                continue
            push(links, protected, key)
            if place == PROBATION:
                where[key] = PROTECTED
                counters[PROTECTEDS] += 1
                if counters[PROTECTEDS] > max_protected:
                    moved = links[protected, PREV]
                    cut(links, moved)
                    where[moved] = PROBATION
                    push(links, probation, moved)
                    counters[PROTECTEDS] -= 1
            continue
        hits[i] = 0
        counters[ADMITTED] += 1
        where[key] = WINDOW
        push(links, window, key)
        counters[WINDOWS] += 1
        full = counters[RESIDENT] == capacity
        if not full:
            counters[RESIDENT] += 1
        if counters[WINDOWS] > max_window:
            candidate = links[window, PREV]
            cut(links, candidate)
            counters[WINDOWS] -= 1
            if full:
                counters[EVICTED] += 1
                end = probation if links[probation, PREV] != probation else protected
                victim = links[end, PREV]
                if victim == end:  # a cache of one row has no main part
                    where[candidate] = ABSENT
                    continue
                mine = estimate(sketch, _hash(np.uint64(candidate) + np.uint64(1)))
                if mine <= estimate(sketch, _hash(np.uint64(victim) + np.uint64(1))):
                    where[candidate] = ABSENT
                    continue
                cut(links, victim)
                where[victim] = ABSENT
                if end == protected:
                    counters[PROTECTEDS] -= 1
            where[candidate] = PROBATION
            push(links, probation, candidate)


def state(capacity: int, keys: int, most: int) -> tuple[np.ndarray, ...]:
    """where, links, sketch."""
    width = 1 << max(4, (capacity * WIDTH - 1).bit_length())
    return np.zeros(keys, np.uint8), new_links(keys, 3), np.zeros((ROWS, width), np.uint8)


PLUGIN = Algorithm(step, state)
