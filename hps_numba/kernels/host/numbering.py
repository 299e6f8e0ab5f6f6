"""Number the keys of a trace densely, in order of first occurrence, and derive what algorithms need to know beforehand."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_function, host_kernel
from hps_numba.kernels.hashing import index_hash

__all__ = ["count_batches", "count_keys", "look_ahead", "number_keys", "number_small_keys", "sample_keys", "tally"]

_hash = host_function(index_hash)
_1, _32, _40 = np.uint64(1), np.uint64(32), np.uint64(40)
_SALT = np.uint64(0x9E3779B97F4A7C15)  # so that a sample does not depend on the hash bits that decide the set of a key


@host_kernel
def number_small_keys(keys, ids, table, known):
    """``number_keys`` for keys from 0 to ``len(table) - 1``: table int32 by key, 0 or 1 + its number."""
    for i in range(len(keys)):
        at = table[keys[i]]
        if at == 0:
            known += 1
            at = table[keys[i]] = known
        ids[i] = at - 1
    return known


@host_kernel
def number_keys(keys, ids, table, numbers, known, start):
    """Number keys from ``start`` on, until the table is three quarters full.

    Args:
        keys: int64 ``[n]``.   ids: int32 ``[n]``.   known: number of keys numbered so far.
        table: int64, a power of two: keys.   numbers: int32: 1 + the number of the key there, 0 for an empty place.

    Returns ``(next position, known)``.   **Writes:** ids, table, numbers.
    """
    mask = np.uint64(len(table) - 1)
    limit = len(table) * 3 // 4
    for i in range(start, len(keys)):
        key = keys[i]
        at = (_hash(np.uint64(key)) >> _32) & mask
        while numbers[at] != 0 and table[at] != key:
            at = (at + _1) & mask
        if numbers[at] == 0:
            if known >= limit:
                return i, known
            known += 1
            table[at] = key
            numbers[at] = known
        ids[i] = numbers[at] - 1
    return len(keys), known


@host_kernel
def sample_keys(keys, kept, least, limit):
    """Keep the keys whose hash (24 bits) is ``least`` or more and below ``limit``; returns how many.   **Writes:** kept."""
    count = 0
    for i in range(len(keys)):
        hashed = np.int64(_hash(np.uint64(keys[i]) ^ _SALT) >> _40)
        if least <= hashed < limit:
            kept[count] = keys[i]
            count += 1
    return count


@host_kernel
def count_keys(ids, counts):
    """Add the number of requests for each key.   **Writes:** counts, int64 by key."""
    for i in range(len(ids)):
        counts[ids[i]] += 1


@host_kernel
def look_ahead(ids, future, next_use, start):
    """Positions of the next requests of a piece of a trace that begins at ``start``; pieces are passed last to first.

    ``next_use``: int64 by key, FOREVER before the first call.   **Writes:** future, next_use.
    """
    for i in range(len(ids) - 1, -1, -1):
        future[i] = next_use[ids[i]]
        next_use[ids[i]] = start + i


@host_kernel
def count_batches(ids, firsts, batch, latest, start):
    """Which requests of a piece that begins at ``start`` are the first of their batch for their key.

    ``latest``: int64 by key, -1 before the first piece.   **Writes:** firsts, uint8 ``[n]``; latest.
    """
    for i in range(len(ids)):
        number = (start + i) // batch
        firsts[i] = latest[ids[i]] != number
        latest[ids[i]] = number


@host_kernel
def tally(hits, firsts, start, window, skip, by_window, totals):
    """Add up a piece of a trace that begins at ``start``.

    ``by_window``: int64 by window of so many requests, hits.   ``totals``: int64 [3]: hits, keys of batches, hits of these;
    requests before ``skip`` are not in the totals.   **Writes:** by_window, totals.
    """
    for i in range(len(hits)):
        by_window[(start + i) // window] += hits[i]
        if start + i >= skip:
            totals[0] += hits[i]
            totals[1] += firsts[i]
            totals[2] += firsts[i] & hits[i]
