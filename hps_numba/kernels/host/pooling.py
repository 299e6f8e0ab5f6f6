"""Pool rows of a host store: the rows of each bag of keys, combined to one row, without storing the rows in between."""

from __future__ import annotations

import numba
import numpy as np

from hps_numba.kernels.compiler.njit import host_function, host_kernel
from hps_numba.kernels.host.atomics import float_pointer, load_word, load_word_acquire, prefetch_row, store_word
from hps_numba.kernels.host.lookup import count_lookup, find_words, touch_recency
from hps_numba.kernels.host.probe import enter_epoch, leave_epoch, slot_of
from hps_numba.kernels.layouts.host_store import (
    META_RECENCY,
    META_RECENCY_MODE,
    META_ROWS,
    RECENCY_NONE,
)
from hps_numba.kernels.layouts.pooling import MAX, MEAN, SQRTN

__all__ = ["bag_starts", "host_pool"]

_AHEAD = 16  # keys between the prefetch of a row and its use
_BATCH = 1024  # keys whose index words are found before their rows are read


@host_function
def _clip_factor(row, bound):
    """What brings the Euclidean norm of a row down to ``bound``; NaN for a row of zeros and a bound of 0, as in TensorFlow."""
    squares = 0.0
    for element in row:
        squares += np.float64(element) * np.float64(element)
    return np.float32(bound / max(np.sqrt(squares), np.float64(bound)))


@host_function
def _add_row(sums, row, factor, combiner):
    """Add a row times ``factor``, or take the larger elements.   **Writes:** sums."""
    if combiner == MAX:
        for j in range(len(sums)):
            scaled = row[j] * factor
            sums[j] = scaled if scaled > sums[j] else sums[j]
    elif factor == np.float32(1.0):
        for j in range(len(sums)):
            sums[j] += row[j]
    else:
        for j in range(len(sums)):
            sums[j] += row[j] * factor


@host_function
def _end_bag(sums, total, filled, combiner):
    """Divide the sums of a bag by what its combiner says, 0 if that is 0 or the bag is empty.   **Writes:** sums."""
    divisor = np.float32(np.sqrt(total)) if combiner == SQRTN else total
    if not filled or (combiner in (MEAN, SQRTN) and divisor == np.float32(0.0)):
        sums[:] = np.float32(0.0)
    elif combiner in (MEAN, SQRTN):
        for j in range(len(sums)):
            sums[j] /= divisor


@host_function
def _begin_bag(out, bag, dim, combiner):
    """The sums of a bag, where its answer is, with what they begin with.   **Writes:** out."""
    sums = numba.carray(float_pointer(out + 4 * dim * bag), dim)
    sums[:] = np.float32(-np.inf if combiner == MAX else 0.0)
    return sums


@host_kernel
def host_pool(
    header, keys, offsets, weights, first, stop, dim, out, combiner, default, bound, side, side_rows, misses, epoch, record,
    now, counters,
):  # fmt: skip
    """Write the pooled row of each of the bags ``first`` to ``stop``.

    Elements are added in order of position, in float32, multiplication and addition rounded separately (``cache.pooling``).

    Args (addresses and counts are int64):
        header: of the store, or 0: there is none.   keys: int64 keys.   offsets: int64, where bags begin, one more than bags.
        weights: float32, one a key, or 0: all are 1.   out: float32 rows of ``dim``, one a bag.
        combiner: SUM, MEAN, SQRTN or MAX of ``layouts.pooling``.
        default: float32 that fills the row of a key that is in no tier.
        bound: float32; rows are clipped to this norm before they are weighted; negative leaves them.
        side, side_rows: where a key that the store lacks has a row: int64 row numbers, one a key, -1 for none; or 0.
        misses: int64, as many as keys: positions of keys that the store lacks, from that of the first key on; or 0.
        epoch, record, now, counters: as in ``kernels.host.lookup``.

    Returns the number of keys that the store lacks, or -1 if it is closed.   **Writes:** out, misses, recency words, counters.
    """
    begin, end = load_word(offsets + 8 * first), load_word(offsets + 8 * stop)
    row_bytes = 4 * dim
    block, rows, recency, mode = np.int64(0), np.int64(0), np.int64(0), np.int64(RECENCY_NONE)
    if header != 0:
        enter_epoch(epoch, record)
        block = load_word_acquire(header)
        if block == 0:
            leave_epoch(record)
            return -1
        rows, recency = load_word(block + META_ROWS), load_word(block + META_RECENCY)
        mode = load_word(block + META_RECENCY_MODE) if now >= 0 else np.int64(RECENCY_NONE)
    room = max(1, min(_BATCH, end - begin))
    words, late = np.zeros(room, np.int64), np.empty(room, np.int64)
    absent = np.full(dim, default, np.float32)
    factors = numba.carray(float_pointer(weights), max(end, 1))
    missing, bag = 0, first
    sums = _begin_bag(out, bag, dim, combiner)
    total, filled = np.float32(0.0), False
    bag_end = load_word(offsets + 8 * (bag + 1))
    for start in range(begin, end, _BATCH):
        n = min(_BATCH, end - start)
        if header != 0:
            find_words(block, keys + 8 * start, n, words, late)
        for i in range(-_AHEAD, n):
            if header != 0 and i + _AHEAD < n:
                prefetch_row(rows + slot_of(words[i + _AHEAD]) * row_bytes, row_bytes)
            if i < 0:
                continue
            position = start + i
            while position >= bag_end:
                _end_bag(sums, total, filled, combiner)
                bag += 1
                sums = _begin_bag(out, bag, dim, combiner)
                total, filled = np.float32(0.0), False
                bag_end = load_word(offsets + 8 * (bag + 1))
            slot = slot_of(words[i]) if header != 0 else np.int64(-1)
            row = absent
            if slot >= 0:
                row = numba.carray(float_pointer(rows + slot * row_bytes), dim)
                touch_recency(recency, mode, slot, now)
            else:
                if misses != 0:
                    store_word(misses + 8 * (begin + missing), position)
                missing += 1
                number = load_word(side + 8 * position) if side != 0 else np.int64(-1)
                if number >= 0:
                    row = numba.carray(float_pointer(side_rows + number * row_bytes), dim)
            weight = factors[position] if weights != 0 else np.float32(1.0)
            clip = _clip_factor(row, bound) if bound >= 0 else np.float32(1.0)
            _add_row(sums, row, clip if combiner == MAX else weight * clip, combiner)
            total += weight * weight if combiner == SQRTN else weight
            filled = True
    _end_bag(sums, total, filled, combiner)
    for empty in range(bag + 1, stop):
        _end_bag(_begin_bag(out, empty, dim, combiner), np.float32(0.0), False, combiner)
    if header != 0:
        leave_epoch(record)
    count_lookup(counters, end - begin, missing, first == 0)
    return missing


@host_kernel
def bag_starts(bags, n, offsets):
    """Where each bag begins, from the number of the bag of each of ``n`` keys, ascending.

    Args:
        bags: int64 array of any stride: the number of the bag of each key.
        offsets: int64, one more than there are bags.

    Returns -1, or the first position whose bag does not exist or is less than the one before.   **Writes:** offsets.
    """
    last = len(offsets) - 1
    bag = -1
    for i in range(n):
        number = bags[i]
        if number < max(bag, 0) or number >= last:
            return i
        while bag < number:
            bag += 1
            offsets[bag] = i
    while bag < last:
        bag += 1
        offsets[bag] = n
    return -1
