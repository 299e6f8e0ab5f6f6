"""Change what a cache holds: update and erase keys, refresh or clear sets, list keys. Each set under its lock.

A key of a set marked OVERFLOW may be there twice: an insertion looks at the primary set only, and a lookup that met a writer
lists a key that is in its alternate set. So updates and erasures look at both.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.cache.probe import (
    alternate_set_of,
    find_in_host_by_tile,
    find_in_set,
    guard_enter,
    guard_leave,
    has_overflowed,
    primary_line_of,
    row_at,
    set_of,
)
from hps_numba.kernels.cache.rows import store_in_cache
from hps_numba.kernels.cache.seqlock import lock_set, unlock_set, write_begin, write_end
from hps_numba.kernels.layouts.cache import (
    BUSY,
    DESC_ROWS,
    LINE_BYTES,
    LINES_PER_SET,
    META_AT,
    OCCUPIED,
    OVERFLOW,
    SCORES_AT,
    SET_BYTES,
    STATE_CHANGES,
    STATE_COUNT,
    STATE_HOST,
    VERSION,
    WAYS_PER_LINE,
)
from hps_numba.kernels.layouts.host_store import FIRST_SLOT, SLOT_MASK
from hps_numba.kernels.simt.reference import (
    add64,
    fence,
    grid_tiles,
    is_first_lane,
    ld32,
    ld64,
    st32,
    st64,
    sync_tile,
    tile_number,
)

__all__ = ["clear_kernel", "dump_kernel", "erase_kernel", "refresh_kernel", "update_kernel"]

# bound when specialized
HOST_STRIDE = 4


def announce_change(state):
    """Announce that rows are about to change, before a set is locked for it: insertions of what was read before check again.

    By a tile; ``guard_enter`` or another fence follows.   **Writes:** state.
    """
    if is_first_lane():
        add64(state + STATE_CHANGES, 1)


def row_in_host(descriptor, key):
    """Address of the row of a key in the host store, or 0, by a tile."""
    slot = (find_in_host_by_tile(descriptor, key) & SLOT_MASK) - FIRST_SLOT
    return ld64(descriptor + DESC_ROWS) + slot * HOST_STRIDE if slot >= 0 else np.int64(0)


def refresh_row(state, key, line, way, row, drop):
    """Read the row of a way from the host store again; a key that is gone there is dropped, or keeps its row.

    The set is locked.   **Writes:** line, row.
    """
    descriptor = ld64(state + STATE_HOST)
    if descriptor == 0:
        return
    source = row_in_host(descriptor, key)
    if source == 0 and drop == 0:
        return
    write_begin(line)
    if source != 0:
        store_in_cache(row, source)
        write_end(line, 0, 0)
    else:
        write_end(line, 0, 1 << way)


def refresh_line(lines, rows, state, line, drop):
    """``refresh_row`` for all ways of a line, which readers see again when all are done.   **Writes:** line, rows."""
    descriptor = ld64(state + STATE_HOST)
    taken = ld32(line + META_AT) & OCCUPIED
    if descriptor == 0 or taken == 0:
        return
    write_begin(line)
    gone = 0
    for way in range(WAYS_PER_LINE):
        if (taken >> way) & 1:
            source = row_in_host(descriptor, ld64(line + 8 * way))
            if source != 0:
                row = row_at(lines, rows, line + 8 * way, ld32(line + SCORES_AT + 4 * way))
                store_in_cache(row, source)
            elif drop != 0:
                gone |= 1 << way
    write_end(line, 0, gone)


def update_kernel(lines, rows, sets, state, keys, n, source, stride, drop):
    """Replace the rows of those of ``n`` int64 keys that the cache has; other keys and all scores stay.

    Args:
        source: address of a float32 row for each key, ``stride`` bytes apart, or 0: take them from the host store.
        drop: 1: a key that the host store no longer has is dropped.

    **Writes:** lines, rows, state, guard.
    """
    number = tile_number()
    if number >= n:
        return
    stripe = number
    announce_change(state)
    if is_first_lane():
        guard_enter(state, stripe)
    sync_tile()
    while number < n:
        key = ld64(keys + 8 * number)
        primary = primary_line_of(key)
        set_at = set_of(lines, sets, key)
        for number_of_set in range(2):
            lock_set(set_at)
            line, way, _meta, score = find_in_set(set_at, primary, key)
            if way >= 0:
                row = row_at(lines, rows, line + 8 * way, score)
                if source == 0:
                    refresh_row(state, key, line, way, row, drop)
                else:
                    write_begin(line)
                    store_in_cache(row, source + number * stride)
                    write_end(line, 0, 0)
            overflowed = has_overflowed(set_at)
            unlock_set(set_at)
            if number_of_set == 1 or not overflowed:
                break
            set_at = alternate_set_of(lines, sets, key)
        number += grid_tiles()
    if is_first_lane():
        guard_leave(state, stripe)


def erase_kernel(lines, sets, state, keys, n):
    """Drop those of ``n`` int64 keys that the cache has; their number is added to STATE_COUNT.   **Writes:** lines, state."""
    number = tile_number()
    if number >= n:
        return
    announce_change(state)
    fence()
    while number < n:
        key = ld64(keys + 8 * number)
        primary = primary_line_of(key)
        set_at = set_of(lines, sets, key)
        for number_of_set in range(2):
            lock_set(set_at)
            line, way, _meta, _score = find_in_set(set_at, primary, key)
            if way >= 0:
                write_begin(line)
                write_end(line, 0, 1 << way)
                if is_first_lane():
                    add64(state + STATE_COUNT, 1)
            overflowed = has_overflowed(set_at)
            unlock_set(set_at)
            if number_of_set == 1 or not overflowed:
                break
            set_at = alternate_set_of(lines, sets, key)
        number += grid_tiles()


def refresh_kernel(lines, rows, state, first, stop, drop):
    """Read all rows of the sets ``first`` to ``stop`` from the host store again.   **Writes:** lines, rows, state, guard."""
    number = first + tile_number()
    if number >= stop:
        return
    stripe = number
    announce_change(state)
    if is_first_lane():
        guard_enter(state, stripe)
    sync_tile()
    while number < stop:
        set_at = lines + number * SET_BYTES
        lock_set(set_at)
        for half in range(LINES_PER_SET):
            refresh_line(lines, rows, state, set_at + half * LINE_BYTES, drop)
        unlock_set(set_at)
        number += grid_tiles()
    if is_first_lane():
        guard_leave(state, stripe)


def clear_kernel(lines, sets):
    """Drop all rows.   **Writes:** lines."""
    number = tile_number()
    while number < sets:
        set_at = lines + number * SET_BYTES
        lock_set(set_at)
        for half in range(LINES_PER_SET):
            line = set_at + half * LINE_BYTES
            if is_first_lane():
                st32(line + META_AT, (ld32(line + META_AT) & ~(OCCUPIED | OVERFLOW | BUSY)) + VERSION)
        unlock_set(set_at)
        number += grid_tiles()


def dump_kernel(lines, state, first, stop, keys):
    """List the int64 keys in the sets ``first`` to ``stop``; STATE_COUNT counts them.   **Writes:** keys, state."""
    number = first + tile_number()
    while number < stop:
        set_at = lines + number * SET_BYTES
        lock_set(set_at)
        for half in range(LINES_PER_SET):
            line = set_at + half * LINE_BYTES
            taken = ld32(line + META_AT) & OCCUPIED
            for way in range(WAYS_PER_LINE):
                if (taken >> way) & 1 and is_first_lane():
                    st64(keys + 8 * add64(state + STATE_COUNT, 1), ld64(line + 8 * way))
        unlock_set(set_at)
        number += grid_tiles()
