"""Look keys up in a host store: the rows of a batch of keys, copied to the caller's output."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compile import host_kernel
from hps_numba.kernels.host_probe import end_of, enter_epoch, find_entry, home_address, leave_epoch, slot_of
from hps_numba.kernels.memory_words import (
    add_word,
    copy_row,
    fill_row,
    load_word,
    load_word_acquire,
    prefetch,
    store_word,
)
from hps_numba.layout import (
    COUNTER_CALLS,
    COUNTER_KEYS,
    COUNTER_MISSES,
    META_LINES,
    META_RECENCY,
    META_RECENCY_MODE,
    META_ROW_BYTES,
    META_ROWS,
    RECENCY_COUNT,
    RECENCY_NONE,
)

__all__ = ["host_contains", "host_lookup"]

# keys in flight between the three stages of a lookup; found by measurement, flat from 8 to 24
_AHEAD = 16
_RING = 64
_IN_RING = _RING - 1
_PREFETCHED_BYTES = 512


@host_kernel
def host_lookup(header, keys, start, stop, out, default, misses, epoch, record, now, counters):
    """Copy the rows of ``keys[start:stop]`` to ``out[start:stop]``; a key without a row gets ``default``.

    Three stages run 16 keys apart, so that the two cache misses of a key (index line, row) overlap with those of its
    neighbours: ask for the line; search it and ask for the row; copy the row.

    Args (addresses and counts are int64):
        header: address of the store's header.   keys: of int64 keys.   out: of float32 rows, row_bytes apart.
        misses: address of int64 positions, as many as keys, or 0.   epoch, record: of the reader's epoch (storage/epochs.py).
        now: tick for the recency words; negative leaves them as they are.   counters: of the words COUNTER_*, or 0.

    Returns the number of keys without a row, or -1 if the store is closed.   **Writes:** out, misses, recency words, counters.
    """
    enter_epoch(epoch, record)
    block = load_word_acquire(header)
    if block == 0:
        leave_epoch(record)
        return -1
    lines = load_word(block + META_LINES)
    rows = load_word(block + META_ROWS)
    row_bytes = load_word(block + META_ROW_BYTES)
    recency = load_word(block + META_RECENCY)
    mode = load_word(block + META_RECENCY_MODE) if now >= 0 else RECENCY_NONE
    end = end_of(block)
    prefetched = min(row_bytes, _PREFETCHED_BYTES)
    homes = np.empty(_RING, np.int64)
    slots = np.empty(_RING, np.int64)
    missing = 0
    for i in range(start, stop + 2 * _AHEAD):
        if i < stop:
            home = home_address(block, lines, load_word(keys + 8 * i))
            homes[i & _IN_RING] = home
            prefetch(home)
        j = i - _AHEAD
        if start <= j < stop:
            slot = slot_of(find_entry(block, end, homes[j & _IN_RING], load_word(keys + 8 * j))[1])
            slots[j & _IN_RING] = slot
            if slot >= 0:
                for offset in range(0, prefetched, 64):
                    prefetch(rows + slot * row_bytes + offset)
        j = i - 2 * _AHEAD
        if j >= start:
            slot = slots[j & _IN_RING]
            if slot >= 0:
                copy_row(out + j * row_bytes, rows + slot * row_bytes, row_bytes)
                if mode != RECENCY_NONE:
                    place = recency + 8 * slot
                    store_word(place, load_word(place) + 1 if mode == RECENCY_COUNT else now)
            else:
                fill_row(out + j * row_bytes, np.float32(default), row_bytes)
                if misses != 0:
                    store_word(misses + 8 * missing, j)
                missing += 1
    leave_epoch(record)
    if counters != 0:
        add_word(counters + COUNTER_KEYS, stop - start)
        add_word(counters + COUNTER_MISSES, missing)
        add_word(counters + COUNTER_CALLS, np.int64(start == 0))
    return missing


@host_kernel
def host_contains(header, keys, n, found, epoch, record):
    """Set ``found[i]`` (int64) to 1 where ``keys[i]`` has a row, else to 0. Returns n, or -1 if the store is closed.

    **Writes:** found.
    """
    enter_epoch(epoch, record)
    block = load_word_acquire(header)
    if block == 0:
        leave_epoch(record)
        return -1
    lines = load_word(block + META_LINES)
    end = end_of(block)
    for i in range(n + _AHEAD):
        if i < n:
            prefetch(home_address(block, lines, load_word(keys + 8 * i)))
        j = i - _AHEAD
        if j >= 0:
            key = load_word(keys + 8 * j)
            word = find_entry(block, end, home_address(block, lines, key), key)[1]
            store_word(found + 8 * j, np.int64(slot_of(word) >= 0))
    leave_epoch(record)
    return n
