"""Find keys in a cache, as readers do: without a lock, so that what was found must be validated (``cache.seqlock``).

An ``entry`` is the address of a key in its line, 0 if it is not there; ``tags`` is score << 32 | meta of the line.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.cache.batch import touch_later
from hps_numba.kernels.cache.probe import alternate_set_of, primary_line_of, set_of
from hps_numba.kernels.layouts.cache import BUSY, LINE_BYTES, LOCK, META_AT, OVERFLOW, SCORES_AT, WAYS_PER_LINE
from hps_numba.kernels.simt.reference import any_in_warp, fence, ld32, noinline, probe_line_by_lane, probe_two_lines, st32

__all__ = ["find_by_tile", "find_entry", "find_settled", "touch"]

# bound when specialized
FIXED = COUNTED = False


def policy_touch(score, now, count):
    """The policy's, bound when specialized."""
    return score


def find_entry(lines, sets, key):
    """``(entry, tags)`` of a key, by one lane."""
    set_at = set_of(lines, sets, key)
    primary = primary_line_of(key)
    entry, tags = probe_line_by_lane(set_at + primary, key)
    if entry == 0:
        entry, tags = probe_line_by_lane(set_at + LINE_BYTES - primary, key)
    if entry == 0 and (tags & OVERFLOW) != 0:
        entry, tags = find_in_alternate(lines, sets, key)
    return entry, tags


def find_by_tile(lines, sets, key):
    """``find_entry`` by a tile, all tiles of a warp together."""
    set_at = set_of(lines, sets, key)
    primary = primary_line_of(key)
    entry, tags = probe_two_lines(set_at + primary, set_at + LINE_BYTES - primary, key)
    overflowed = entry == 0 and (tags & OVERFLOW) != 0
    if any_in_warp(overflowed):
        found, found_tags = find_in_alternate_by_tile(lines, sets, key)
        if overflowed:
            entry, tags = found, found_tags
    return entry, tags


def find_in_alternate(lines, sets, key):
    """``find_entry`` in the alternate set of a key."""
    noinline()
    line = alternate_set_of(lines, sets, key) + primary_line_of(key)
    entry, tags = probe_line_by_lane(line, key)
    if entry == 0:
        entry, tags = probe_line_by_lane(line ^ LINE_BYTES, key)
    return entry, tags


def find_in_alternate_by_tile(lines, sets, key):
    """``find_in_alternate`` by a tile, all tiles of a warp together."""
    noinline()
    line = alternate_set_of(lines, sets, key)
    return probe_two_lines(line, line + LINE_BYTES, key)


def present_after_writers(lines, sets, key):
    """Wait for the writers at work on the set of a key, then tell whether the key is there: for caches without a host store."""
    noinline()
    set_at = set_of(lines, sets, key)
    while ld32(set_at + META_AT) & (LOCK | BUSY) or ld32(set_at + LINE_BYTES + META_AT) & BUSY:
        fence()
    fence()
    return find_entry(lines, sets, key)[0] != 0


def find_settled(lines, sets, key):
    """``(entry, tags)`` of a key as soon as no writer is at work on it, entry 0 if the cache lacks it."""
    while present_after_writers(lines, sets, key):
        entry, tags = find_entry(lines, sets, key)
        if entry != 0 and (tags & BUSY) == 0:
            return entry, tags
    return np.int64(0), np.int64(0)


def touch(lines, state, workspace, entry, tags, now):
    """Count a hit.   **Writes:** score, or pending counts and workspace if the policy needs counts."""
    if not FIXED:
        line = entry & ~63
        way = (entry & 63) >> 3
        if COUNTED:
            touch_later(state, workspace, (line - lines) // LINE_BYTES * WAYS_PER_LINE + way)
        else:
            score = (tags >> 32) & 0xFFFFFFFF
            fresh = np.int64(policy_touch(score, now, 1)) & 0xFFFFFFFF
            if fresh != score:
                st32(line + SCORES_AT + 4 * way, fresh)
