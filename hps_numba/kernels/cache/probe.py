"""Where a key stands: in the sets of a cache, and in the index of the host store behind it."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.hashing import index_hash
from hps_numba.kernels.layouts.cache import (
    DESC_BLOCK,
    DESC_LINES,
    GUARD_ENTERED,
    GUARD_LEFT,
    GUARD_STRIPES,
    LINE_BYTES,
    META_AT,
    OVERFLOW,
    SET_BYTES,
    WAYS_PER_LINE,
)
from hps_numba.kernels.layouts.host_store import EMPTY, META_BYTES
from hps_numba.kernels.simt.reference import add32, any_in_warp, fence, ld32, ld64, probe_host_line, probe_line

__all__ = [
    "alternate_set_of",
    "find_in_host",
    "find_in_set",
    "guard_enter",
    "guard_leave",
    "home_in_host",
    "primary_line_of",
    "row_at",
    "set_of",
]

#: bound when built: the cache is fixed (static, uvm), scores are row numbers
FIXED = False
ROW_STRIDE = 4


def set_of(lines, sets, key):
    """Address of the home set of a key."""
    hashed = index_hash(np.uint64(np.int64(key)))
    return lines + np.int64(((hashed >> np.uint64(32)) * np.uint64(sets)) >> np.uint64(32)) * SET_BYTES


def primary_line_of(key):
    """Byte of the home line of a key in its set."""
    return np.int64(index_hash(np.uint64(np.int64(key))) & np.uint64(1)) * LINE_BYTES


def alternate_set_of(lines, sets, key):
    """Address of the set where a key stands that did not fit into its home set: never the home set, of 2 or more."""
    hashed = index_hash(np.uint64(np.int64(key)))
    home = np.int64(((hashed >> np.uint64(32)) * np.uint64(sets)) >> np.uint64(32))
    other = np.int64(((hashed & np.uint64(0xFFFFFFFF)) * np.uint64(sets)) >> np.uint64(32))
    if other == home:
        other = home + 1 if home + 1 < sets else np.int64(0)
    return lines + other * SET_BYTES


def row_at(lines, rows, entry, score):
    """Address of the row of the key at ``entry``."""
    if FIXED:
        return rows + (score & 0xFFFFFFFF) * ROW_STRIDE
    from_start = np.uint64(entry - lines)
    number = (from_start >> np.uint64(6)) * np.uint64(WAYS_PER_LINE) + ((from_start & np.uint64(63)) >> np.uint64(3))
    return rows + np.int64(number) * ROW_STRIDE


def find_in_set(place, home, key):
    """``(line, way, meta, score)`` of a key in the set at ``place``, home line first; way -1 if it is not there."""
    line = place + home
    way, meta, score = probe_line(line, key)
    if way < 0:
        line = place + LINE_BYTES - home
        way, meta, score = probe_line(line, key)
    return line, way, meta, score


def has_chain(place):
    """A key whose home set is at ``place`` may stand in its other set."""
    return (ld32(place + META_AT) & OVERFLOW) != 0


def guard_enter(state, stripe):
    """Say that host memory is being read: no range of it is given back until ``guard_leave``.   **Writes:** guard."""
    add32(state + GUARD_ENTERED + 4 * (stripe % GUARD_STRIPES), 1)
    fence()


def guard_leave(state, stripe):
    """Take back what ``guard_enter`` said.   **Writes:** guard."""
    fence()
    add32(state + GUARD_LEFT + 4 * (stripe % GUARD_STRIPES), 1)


def home_in_host(descriptor, key):
    """``(line, first, end)``: where the search for a key starts in the host store's index, its first line, and its end."""
    count = ld64(descriptor + DESC_LINES)
    first = ld64(descriptor + DESC_BLOCK) + META_BYTES
    hashed = index_hash(np.uint64(np.int64(key))) >> np.uint64(32)
    line = first + np.int64((hashed * np.uint64(count)) >> np.uint64(32)) * LINE_BYTES
    return line, first, first + count * LINE_BYTES


def find_in_host(descriptor, key, wanted):
    """Index word of a key in the host store, EMPTY if it has none; inside a guard, by all tiles of a warp together.

    Args:
        descriptor: of the index in force, see ``kernels.layouts.cache``; its entries do not change while it is read.
        wanted: this tile searches.
    """
    line, first, end = home_in_host(descriptor, key)
    found = np.int64(EMPTY)
    searching = wanted
    while any_in_warp(searching):
        word, settled = probe_host_line(line, key, searching)
        if searching:
            found = word
            searching = not settled
        line += LINE_BYTES
        if line == end:
            line = first
    return found
