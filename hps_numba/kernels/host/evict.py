"""Evict from a host store: erase the rows with the lowest scores, without a copy of the scores."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_function, host_kernel
from hps_numba.kernels.hashing import index_hash
from hps_numba.kernels.host.atomics import load_word, store_word_release
from hps_numba.kernels.host.probe import slot_of
from hps_numba.kernels.host.write import STATE_LIVE, STATE_RETIRED
from hps_numba.kernels.layouts.host_store import (
    ENTRIES_PER_LINE,
    ENTRY_BYTES,
    ERASED,
    META_BYTES,
    META_LINES,
    META_RECENCY,
    META_RECENCY_MODE,
    RECENCY_NONE,
)

__all__ = ["HISTOGRAM", "host_evict"]

HISTOGRAM = 1 << 16

_hash = host_function(index_hash)


@host_function
def _score(entry, slot, mode, recency, seed):
    """What decides which row is evicted: the recency word, or a random number determined by the key and ``seed``."""
    if mode == RECENCY_NONE:
        return np.int64(_hash(np.uint64(load_word(entry) ^ seed)) >> np.uint64(32))
    return load_word(recency + 8 * slot)


@host_function
def _lowest_bucket(histogram, rank):
    """Bucket of the ``rank``-th lowest score, and the number of scores in the buckets below."""
    below = 0
    for bucket in range(HISTOGRAM):
        if below + histogram[bucket] >= rank:
            return bucket, below
        below += histogram[bucket]
    return HISTOGRAM - 1, below


@host_kernel
def host_evict(block, excess, by_recency, seed, histogram, state, retired):
    """Erase ``excess`` live entries: with ``by_recency`` those with the lowest recency words, else at random.

    The score of the last victim is found by narrowing a range in passes over the index, each with a histogram of 2**16
    buckets, so that no score is copied and nothing is sorted. Lookups may raise scores meanwhile: then fewer rows are erased,
    never more. Random scores do not change.

    Returns how many were erased.   **Writes:** index words, histogram, state, retired.
    """
    mode = load_word(block + META_RECENCY_MODE) if by_recency else RECENCY_NONE
    recency = load_word(block + META_RECENCY)
    entries = load_word(block + META_LINES) * ENTRIES_PER_LINE
    low, width, ties = np.int64(0), np.int64(63), excess
    while True:  # the victims' limit is in low .. low + 2**width - 1; ``ties`` of the scores in there are evicted
        shift = max(width - 16, 0)
        histogram[:] = 0
        for number in range(entries):
            entry = block + META_BYTES + number * ENTRY_BYTES
            slot = slot_of(load_word(entry + 8))
            if slot >= 0:
                distance = _score(entry, slot, mode, recency, seed) - low
                if distance >= 0 and (width == 63 or distance >> width == 0):
                    histogram[distance >> shift] += 1
        bucket, below = _lowest_bucket(histogram, ties)
        low += np.int64(bucket) << shift
        ties -= below
        width = shift
        if width == 0:
            break
    erased = 0
    for number in range(entries):
        entry = block + META_BYTES + number * ENTRY_BYTES
        word = load_word(entry + 8)
        slot = slot_of(word)
        if slot < 0 or erased == excess:
            continue
        score = _score(entry, slot, mode, recency, seed)
        if score < low or (score == low and ties > 0):
            ties -= np.int64(score == low)
            store_word_release(entry + 8, ERASED)
            retired[state[STATE_RETIRED]] = word
            state[STATE_RETIRED] += 1
            erased += 1
    state[STATE_LIVE] -= erased
    return erased
