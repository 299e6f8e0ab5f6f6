"""Build the lines of a cache on the CPU, to be copied to the device: for warming, and for caches that hold a whole table."""

from __future__ import annotations

from hps_numba.kernels.cache.probe import alternate_set_of, primary_line_of, set_of
from hps_numba.kernels.compiler.njit import host_function, host_kernel
from hps_numba.kernels.host.atomics import load_word, store_word
from hps_numba.kernels.layouts.cache import (
    LINE_BYTES,
    LINES_PER_SET,
    META_AT,
    OCCUPIED,
    OVERFLOW,
    SCORES_AT,
    SET_BYTES,
    VERSION,
    WAYS_PER_LINE,
)
from hps_numba.kernels.simt.cpu import NAMES

__all__ = ["keys_twice", "place_keys"]

_set_of = host_function(set_of)
_primary_line_of = host_function(primary_line_of)
_alternate_set_of = host_function(alternate_set_of)
_MAX_MOVES = 500
_ld32, _st32 = NAMES["ld32"], NAMES["st32"]


@host_function
def _free_way(set_at, primary):
    """``(line, way)`` of a free way of a set, primary line first; way -1 if it is full."""
    for half in range(2):
        line = set_at + (primary ^ (half * LINE_BYTES))
        taken = _ld32(line + META_AT) & OCCUPIED
        for way in range(WAYS_PER_LINE):
            if (taken >> way) & 1 == 0:
                return line, way
    return set_at, -1


@host_function
def _mark_overflow(set_at):
    """Mark that a key whose primary set is at ``set_at`` is in its alternate set.   **Writes:** meta."""
    for half in range(2):
        meta = set_at + half * LINE_BYTES + META_AT
        _st32(meta, _ld32(meta) | OVERFLOW)


@host_function
def _put(line, way, key, score):
    """Put a key into a free way.   **Writes:** line."""
    store_word(line + 8 * way, key)
    _st32(line + SCORES_AT + 4 * way, score)
    _st32(line + META_AT, (_ld32(line + META_AT) | (1 << way)) + VERSION)


@host_function
def _set_away_from(lines, sets, set_at, key):
    """The one of the two sets of a key that is not at ``set_at``."""
    primary = _set_of(lines, sets, key)
    return _alternate_set_of(lines, sets, key) if primary == set_at else primary


@host_function
def _make_room(lines, sets, set_at):
    """``(line, way)`` of a full set whose key was moved to its other set; way -1 if all of those are full too.

    **Writes:** lines.
    """
    for half in range(2):
        line = set_at + half * LINE_BYTES
        for way in range(WAYS_PER_LINE):
            key = load_word(line + 8 * way)
            away = _set_away_from(lines, sets, set_at, key)
            to_line, to_way = _free_way(away, _primary_line_of(key))
            if to_way >= 0:
                _put(to_line, to_way, key, _ld32(line + SCORES_AT + 4 * way))
                if _set_of(lines, sets, key) == set_at:
                    _mark_overflow(set_at)
                return line, way
    return set_at, -1


@host_function
def _is_in_set(set_at, key):
    """The set at ``set_at`` has the key."""
    for at in range(LINES_PER_SET * WAYS_PER_LINE):
        line, way = set_at + at // WAYS_PER_LINE * LINE_BYTES, at % WAYS_PER_LINE
        if (_ld32(line + META_AT) >> way) & 1 and load_word(line + 8 * way) == key:
            return True
    return False


@host_kernel
def keys_twice(lines, sets):
    """How many keys are in both of their sets.

    A key in its alternate set, at which a writer was at work, was missed and inserted once more.
    """
    twice = 0
    for number in range(sets):
        set_at = lines + number * SET_BYTES
        for at in range(LINES_PER_SET * WAYS_PER_LINE):
            line, way = set_at + at // WAYS_PER_LINE * LINE_BYTES, at % WAYS_PER_LINE
            if (_ld32(line + META_AT) >> way) & 1:
                key = load_word(line + 8 * way)
                primary = _set_of(lines, sets, key)
                if primary != set_at and _is_in_set(primary, key):
                    twice += 1
    return twice


@host_kernel
def place_keys(lines, sets, keys, n, score, numbered, chains):
    """Give each of ``n`` distinct int64 keys a way, in its primary or its alternate set.

    Where both are full, a key in one of them that has room in its own other set moves there; if there is none, keys displace
    each other in turn for a while (cuckoo hashing with buckets; M. Dietzfelbinger, C. Weidling, "Balanced allocation and
    dictionaries with tightly packed constant size bins", Theoretical Computer Science 380, 2007: sets of ten ways fill to over
    99 % in this way).

    Args:
        score: uint32 of all keys, or, if ``numbered``, of the first key, the next counting on (row numbers).
        chains: keys may go to their alternate set; their primary set is then marked OVERFLOW.

    Returns how many got one; none of the others is in the cache.   **Writes:** lines.
    """
    placed = 0
    for i in range(n):
        key = load_word(keys + 8 * i)
        mine = score + i if numbered else score
        set_at = _set_of(lines, sets, key)
        line, way = _free_way(set_at, _primary_line_of(key))
        turn = 0
        while way < 0 and chains and turn < _MAX_MOVES:
            away = _set_away_from(lines, sets, set_at, key)
            line, way = _free_way(away, _primary_line_of(key))
            if way < 0:
                line, way = _make_room(lines, sets, away)
            if way >= 0:
                set_at = away
                break
            if turn == 0:
                line, way = _make_room(lines, sets, set_at)
                if way >= 0:
                    break
            # take the way of a key in the other set, and look for another way for that key
            line = away + (turn & 1) * LINE_BYTES
            way = (turn >> 1) % WAYS_PER_LINE
            displaced, displaced_score = load_word(line + 8 * way), _ld32(line + SCORES_AT + 4 * way)
            _put(line, way, key, mine)
            if _set_of(lines, sets, key) != away:
                _mark_overflow(_set_of(lines, sets, key))
            key, mine, set_at, way = displaced, displaced_score, away, -1
            turn += 1
        if way >= 0:
            _put(line, way, key, mine)
            if _set_of(lines, sets, key) != set_at:
                _mark_overflow(_set_of(lines, sets, key))
            placed += 1
    return placed
