"""Where a key is: in the sets of a cache, and in the index of the host store."""

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
from hps_numba.kernels.simt.reference import (
    add32,
    any_in_warp,
    fence,
    ld32,
    ld64,
    probe_host_line,
    probe_host_line_by_lane,
    probe_line,
)

__all__ = [
    "alternate_set_of",
    "find_in_host",
    "find_in_host_by_lane",
    "find_in_host_by_tile",
    "find_in_set",
    "guard_enter",
    "guard_leave",
    "has_overflowed",
    "primary_line_of",
    "row_at",
    "set_of",
    "start_in_host",
]

# bound when specialized
FIXED = False  # the cache is static or uvm: scores are row numbers
ROW_STRIDE = 4


def set_of(lines, sets, key):
    """Address of the primary set of a key."""
    hashed = index_hash(np.uint64(np.int64(key)))
    return lines + np.int64(((hashed >> np.uint64(32)) * np.uint64(sets)) >> np.uint64(32)) * SET_BYTES


def primary_line_of(key):
    """Offset in bytes of the primary line of a key in its set."""
    return np.int64(index_hash(np.uint64(np.int64(key))) & np.uint64(1)) * LINE_BYTES


def alternate_set_of(lines, sets, key):
    """Address of the set for a key that does not fit into its primary set: another one, if there are 2 sets or more."""
    hashed = index_hash(np.uint64(np.int64(key)))
    primary = np.int64(((hashed >> np.uint64(32)) * np.uint64(sets)) >> np.uint64(32))
    alternate = np.int64(((hashed & np.uint64(0xFFFFFFFF)) * np.uint64(sets)) >> np.uint64(32))
    if alternate == primary:
        alternate = primary + 1 if primary + 1 < sets else np.int64(0)
    return lines + alternate * SET_BYTES


def row_at(lines, rows, entry, score):
    """Address of the row of the key at ``entry``."""
    if FIXED:
        return rows + (score & 0xFFFFFFFF) * ROW_STRIDE
    from_start = np.uint64(entry - lines)
    number = (from_start >> np.uint64(6)) * np.uint64(WAYS_PER_LINE) + ((from_start & np.uint64(63)) >> np.uint64(3))
    return rows + np.int64(number) * ROW_STRIDE


def find_in_set(set_at, primary, key):
    """``(line, way, meta, score)`` of a key in the set at ``set_at``, primary line first; way -1 if it is not there."""
    line = set_at + primary
    way, meta, score = probe_line(line, key)
    if way < 0:
        line = set_at + LINE_BYTES - primary
        way, meta, score = probe_line(line, key)
    return line, way, meta, score


def has_overflowed(set_at):
    """A key whose primary set is at ``set_at`` may be in its alternate set."""
    return (ld32(set_at + META_AT) & OVERFLOW) != 0


def guard_enter(state, stripe):
    """Announce that host memory is being read: none of it is freed before ``guard_leave``.   **Writes:** guard."""
    add32(state + GUARD_ENTERED + 4 * (stripe % GUARD_STRIPES), 1)
    fence()


def guard_leave(state, stripe):
    """End what ``guard_enter`` announced.   **Writes:** guard."""
    fence()
    add32(state + GUARD_LEFT + 4 * (stripe % GUARD_STRIPES), 1)


def start_in_host(descriptor, key):
    """``(line, first, end)``: where the search for a key starts in the host store's index, its first line, and its end."""
    count = ld64(descriptor + DESC_LINES)
    first = ld64(descriptor + DESC_BLOCK) + META_BYTES
    hashed = index_hash(np.uint64(np.int64(key))) >> np.uint64(32)
    line = first + np.int64((hashed * np.uint64(count)) >> np.uint64(32)) * LINE_BYTES
    return line, first, first + count * LINE_BYTES


def find_in_host(descriptor, key, active):
    """Index word of a key in the host store, EMPTY if it has none; inside a guard, by all tiles of a warp together.

    Args:
        descriptor: of the index in force, see ``kernels.layouts.cache``; its entries do not change while it is read.
        active: this tile searches.
    """
    line, first, end = start_in_host(descriptor, key)
    found = np.int64(EMPTY)
    searching = active
    while any_in_warp(searching):
        word, settled = probe_host_line(line, key, searching)
        if searching:
            found = word
            searching = not settled
        line += LINE_BYTES
        if line == end:
            line = first
    return found


def find_in_host_by_tile(descriptor, key):
    """``find_in_host`` by a tile on its own, not by the whole warp."""
    line, first, end = start_in_host(descriptor, key)
    while True:
        word, settled = probe_host_line(line, key, True)
        if settled:
            return word
        line += LINE_BYTES
        if line == end:
            line = first


def find_in_host_by_lane(descriptor, key):
    """``find_in_host`` by one lane, where the index is in the memory of the device."""
    line, first, end = start_in_host(descriptor, key)
    while True:
        word, settled = probe_host_line_by_lane(line, key)
        if settled:
            return word
        line += LINE_BYTES
        if line == end:
            line = first
