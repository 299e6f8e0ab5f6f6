"""Build the lines of a cache at once on the CPU, to be copied to the device: warming, and caches that hold a whole table."""

from __future__ import annotations

import numpy as np

from hps_numba.cache_layout import CHAIN, LINE_BYTES, META_AT, OCCUPIED, SCORES_AT, VERSION, WAYS_PER_LINE
from hps_numba.kernels.cache_search import home_line_of, next_set, set_of
from hps_numba.kernels.compile import host_function, host_kernel
from hps_numba.kernels.lanes_host import NAMES
from hps_numba.kernels.memory_words import load_word, store_word

__all__ = ["place_keys"]

_set_of = host_function(set_of)
_home_line_of = host_function(home_line_of)
_next_set = host_function(next_set)
_ld32, _st32 = NAMES["ld32"], NAMES["st32"]


@host_function
def _empty_way(place, home):
    """``(line, way)`` of an empty way of a set, home line first; way -1 if it is full."""
    for half in range(2):
        line = place + (home ^ (half * LINE_BYTES))
        taken = _ld32(line + META_AT) & OCCUPIED
        for way in range(WAYS_PER_LINE):
            if (taken >> way) & 1 == 0:
                return line, way
    return place, -1


@host_kernel
def place_keys(lines, sets, keys, n, score, numbered, chains, slots):
    """Give each of ``n`` distinct int64 keys a way; the rows go to the ``slots`` (int64, -1: no room).

    Args:
        score: uint32 of all keys, or, if ``numbered``, of the first key, the next counting on (row numbers).
        chains: a key whose set is full goes to the next set with room, and sets on the way are marked CHAIN.

    Returns how many found a place.   **Writes:** lines, slots.
    """
    placed = 0
    for i in range(n):
        key = load_word(keys + 8 * i)
        home = _home_line_of(key)
        place = _set_of(lines, sets, key)
        line, way = _empty_way(place, home)
        visited = 1
        while way < 0 and chains and visited < sets:
            for half in range(2):
                meta = place + half * LINE_BYTES + META_AT
                _st32(meta, _ld32(meta) | CHAIN)
            place = _next_set(lines, sets, place)
            line, way = _empty_way(place, np.int64(0))
            visited += 1
        if way < 0:
            store_word(slots + 8 * i, -1)
            continue
        store_word(line + 8 * way, key)
        _st32(line + SCORES_AT + 4 * way, score + i if numbered else score)
        _st32(line + META_AT, (_ld32(line + META_AT) | (1 << way)) + VERSION)
        store_word(slots + 8 * i, (line - lines) // LINE_BYTES * WAYS_PER_LINE + way)
        placed += 1
    return placed
