"""Look keys up: cache, host store, default value, in one kernel; what the cache lacked is listed for ``cache_insert``."""

from __future__ import annotations

import numpy as np

from hps_numba.cache_layout import (
    BUSY,
    CHAIN,
    DESC_ROWS,
    LINE_BYTES,
    LINES_PER_SET,
    LOCK,
    META_AT,
    SCORES_AT,
    SCRATCH_ABSENT,
    SCRATCH_ABSENT_LIST,
    SCRATCH_ASSUME,
    SCRATCH_BATCH,
    SCRATCH_REST,
    SCRATCH_REST_LIST,
    SCRATCH_STAGE,
    SCRATCH_STAGE_STRIDE,
    STATE_CALLS,
    STATE_HOST,
    STATE_KEYS,
    STATE_NOW,
    STRIPE_BYTES,
    STRIPES,
    STRIPES_AT,
    WAYS_PER_LINE,
)
from hps_numba.kernels.cache_batch import finish_batch, list_newcomer, list_rest, touch_later
from hps_numba.kernels.cache_rows import copy_from_cache, copy_from_host, copy_rows, fill_answer, fill_rows
from hps_numba.kernels.cache_search import (
    find_in_host,
    guard_enter,
    guard_leave,
    home_line_of,
    next_set,
    row_at,
    set_of,
)
from hps_numba.kernels.lanes import (
    add64,
    any_in_warp,
    count_in_warp,
    fence,
    from_lane,
    grid_tiles,
    grid_warps,
    is_first_lane,
    is_grid_leader,
    is_warp_leader,
    lane_in_warp,
    ld32,
    ld64,
    lowest_bit,
    out_of_line,
    probe_alone,
    st32,
    st64,
    sync_warp,
    tile_in_warp,
    tiles_in_warp,
    votes_of_warp,
    warp_number,
)
from hps_numba.layout import FIRST_SLOT, SLOT_MASK

__all__ = ["hits_kernel", "lookup_kernel", "rest_kernel"]

# bound when built
FIXED = COUNTED = False
KEY_FORM = 0
OUT_STRIDE = 4
HOST_STRIDE = 4
GROUP = 1  # keys that a warp looks up at a time

#: how keys lie in the caller's memory: int64; int32 sign-extended; uint32; int64 of which only 0..2**32-1 are keys
INT64, INT32, UINT32, NARROW64 = range(4)


def policy_touch(score, now, count):
    """The policy's, bound when built."""
    return score


def load_key(keys, i):
    """``(key, legal)``: the key at position ``i``; one that is not legal is nowhere."""
    if KEY_FORM in (INT64, NARROW64):
        key = ld64(keys + 8 * i)
        return key, KEY_FORM == INT64 or 0 <= key <= 0xFFFFFFFF
    key = ld32(keys + 4 * i)
    if KEY_FORM == INT32 and key > 0x7FFFFFFF:
        key -= 0x100000000
    return key, True


def find_entry(lines, sets, key):
    """``(entry, tags)`` of a key in the cache, by one lane: the address of its key and score << 32 | meta; entry 0 if none."""
    place = set_of(lines, sets, key)
    home = home_line_of(key)
    entry, tags = probe_alone(place + home, key)
    if entry == 0:
        entry, tags = probe_alone(place + LINE_BYTES - home, key)
        if entry == 0 and (tags & CHAIN) != 0:
            line = find_further(lines, sets, place, key)
            if line != 0:
                entry, tags = probe_alone(line, key)
    return entry, tags


def find_further(lines, sets, place, key):
    """Address of the line with a key that did not fit into its home set, or 0."""
    out_of_line()
    while True:
        place = next_set(lines, sets, place)
        tags = np.int64(0)
        for half in range(LINES_PER_SET):
            entry, tags = probe_alone(place + LINE_BYTES * half, key)
            if entry != 0:
                return place + LINE_BYTES * half
        if (tags & CHAIN) == 0:
            return np.int64(0)


def has_after_all(lines, sets, key):
    """The key is in the cache, as soon as writers at work on its set have ended: for caches without a host store."""
    out_of_line()
    place = set_of(lines, sets, key)
    while ld32(place + META_AT) & (LOCK | BUSY) or ld32(place + LINE_BYTES + META_AT) & BUSY:
        fence()
    fence()
    return find_entry(lines, sets, key)[0] != 0


def find_settled(lines, sets, key):
    """``(entry, tags)`` of a key as soon as no writer is at work on it, entry 0 if the cache lacks it."""
    while has_after_all(lines, sets, key):
        entry, tags = find_entry(lines, sets, key)
        if entry != 0 and (tags & BUSY) == 0:
            return entry, tags
    return np.int64(0), np.int64(0)


def is_changed(entry, tags, key):
    """The line of ``entry`` is no longer as it was when the key was found there."""
    return ld64(entry) != key or (ld32((entry & ~63) + META_AT) | LOCK) != ((tags & 0xFFFFFFFF) | LOCK)


def touch(lines, state, scratch, entry, tags, now):
    """Count a hit.   **Writes:** score, or scratch."""
    if not FIXED:
        line = entry & ~63
        way = (entry & 63) >> 3
        if COUNTED:
            touch_later(state, scratch, (line - lines) // LINE_BYTES * WAYS_PER_LINE + way)
        else:
            score = (tags >> 32) & 0xFFFFFFFF
            fresh = np.int64(policy_touch(score, now, 1)) & 0xFFFFFFFF
            if fresh != score:
                st32(line + SCORES_AT + 4 * way, fresh)


def try_cache(lines, rows, sets, state, key, target, now, scratch, wanted):
    """Copy the rows of the keys of a warp's lanes from the cache; which lanes' were there, with no writer at work on them.

    ``target``: of the row of the warp's first lane, or 0. Each lane searches for its key, all copy the rows together, then
    each looks whether its line is as it was.   **Writes:** target, scores.
    """
    entry, tags = np.int64(0), np.int64(0)
    if wanted:
        entry, tags = find_entry(lines, sets, key)
        if tags & BUSY:
            entry = np.int64(0)
    if target != 0:
        copy_rows(target, row_at(lines, rows, entry, tags >> 32) if entry != 0 else np.int64(0))
    if entry == 0:
        return False
    if is_changed(entry, tags, key):
        return False
    touch(lines, state, scratch, entry, tags, now)
    return True


def serve(lines, sets, state, key, i, target, default, scratch, wanted):
    """Answer a key that the cache lacks from the host store, one for each tile of a warp; returns whether it has it.

    **Writes:** target, scratch.
    """
    descriptor = ld64(state + STATE_HOST)
    content = np.int64(0)
    slot = np.int64(-1)
    word = np.int64(0)
    if descriptor != 0:
        content = ld64(descriptor + DESC_ROWS)
        word = find_in_host(descriptor, key, wanted)
        slot = (word & SLOT_MASK) - FIRST_SLOT
    present = wanted & (slot >= 0)
    if present:
        stage = ld64(scratch + SCRATCH_STAGE)
        if stage != 0:
            stage += ld64(scratch + SCRATCH_STAGE_STRIDE) * i
        copy_from_host(target, stage, content + slot * HOST_STRIDE)
    elif wanted and target != 0:
        fill_answer(target, default)
    if is_first_lane() and wanted:
        if (present or ld64(scratch + SCRATCH_ASSUME) != 0) and not FIXED:
            list_newcomer(scratch, set_of(lines, sets, key), lines, key, i, word, content)
        elif not present:
            absent_list = ld64(scratch + SCRATCH_ABSENT_LIST)
            if absent_list != 0:
                st64(absent_list + 8 * add64(scratch + SCRATCH_ABSENT, 1), i)
    sync_warp()
    return present


def lookup_kernel(lines, rows, sets, state, keys, n, out, default, scratch):
    """Write the row of each key to ``out``: from the cache, else from the host store, else ``default``.

    Each lane searches the cache for one key; what it lacks is served by tiles, one key each.

    Args (int64, addresses in memory of the device unless said otherwise):
        lines, rows, sets: the cache.   state: of the cache.   keys: of ``n`` keys (KEY_FORM).
        out: of ``n`` rows, OUT_STRIDE bytes apart, or 0.   default: float32.   scratch: of this batch.

    **Writes:** out, scores, scratch, counters.
    """
    now = ld64(state + STATE_NOW)
    if is_grid_leader():
        add64(state + STATE_KEYS, n)
        add64(state + STATE_CALLS, 1)
    base = warp_number() * GROUP
    while base < n:
        i = base + lane_in_warp()
        active = (lane_in_warp() < GROUP) & (i < n)
        key, legal = load_key(keys, i if active else base)
        target = out + base * OUT_STRIDE if out != 0 else np.int64(0)
        pending = active & legal
        missing = np.int64(1)
        again = True
        while again:
            pending = pending & (not try_cache(lines, rows, sets, state, key, target, now, scratch, pending))
            missing = votes_of_warp(pending)
            again = False
            if missing != 0 and ld64(state + STATE_HOST) == 0:  # nobody else has the rows that a writer is at work on
                again = any_in_warp(pending and has_after_all(lines, sets, key))
        if missing != 0:
            serve_group(lines, sets, state, key, base, out, default, scratch, missing)
        if any_in_warp(active & (not legal)) and out != 0:
            fill_rows(target, default, active & (not legal))
        base += grid_warps() * GROUP


def serve_group(lines, sets, state, key, base, out, default, scratch, missing):
    """Serve the lanes of a warp that are in ``missing`` (bits), as many at a time as it has tiles.

    **Writes:** as ``serve``.
    """
    out_of_line()
    stripe = warp_number()
    if is_warp_leader():
        guard_enter(state, stripe)
    sync_warp()
    absent = np.int64(0)
    total = np.int64(0)
    while missing != 0:
        mine = missing
        for _ in range(tile_in_warp()):
            mine &= mine - 1
        wanted = mine != 0
        place = lowest_bit(mine) if wanted else np.int64(0)
        wanted_key = from_lane(key, place)
        target = out + (base + place) * OUT_STRIDE if out != 0 else np.int64(0)
        present = serve(lines, sets, state, wanted_key, base + place, target, default, scratch, wanted)
        total += count_in_warp(wanted)
        absent += count_in_warp(wanted & (not present))
        for _ in range(tiles_in_warp()):
            missing &= missing - 1
    if is_warp_leader():
        guard_leave(state, stripe)
        count_misses(state, stripe, total, absent)


def hits_kernel(lines, rows, sets, state, keys, n, out, scratch):
    """Copy the rows of the keys that the cache has to ``out``; list the positions of all others.

    The part of ``lookup_kernel`` that is worth most, without the part that takes most registers: with few registers many warps
    hide the time that memory takes. For large batches, followed by ``rest_kernel``.   **Writes:** out, scores, scratch.
    """
    base = warp_number() * GROUP
    active = (lane_in_warp() < GROUP) & (base + lane_in_warp() < n)
    now = ld64(state + STATE_NOW)
    if is_grid_leader():
        add64(state + STATE_KEYS, n)
        add64(state + STATE_CALLS, 1)
    key, legal = np.int64(0), False
    if active:
        key, legal = load_key(keys, base + lane_in_warp())
    found = try_cache(lines, rows, sets, state, key, out + base * OUT_STRIDE, now, scratch, active & legal)
    list_rest(scratch, base + lane_in_warp(), active & (not found))


def rest_kernel(lines, rows, sets, state, keys, out, default, scratch):
    """Serve the positions that ``hits_kernel`` listed, a tile each.   **Writes:** out, scratch, counters."""
    rest = ld64(scratch + SCRATCH_REST)
    first = warp_number() * tiles_in_warp()
    if first < rest:
        stripe = warp_number()
        if is_warp_leader():
            guard_enter(state, stripe)
        sync_warp()
        served = np.int64(0)
        absent = np.int64(0)
        while first < rest:
            number = first + tile_in_warp()
            wanted = number < rest
            position = ld64(ld64(scratch + SCRATCH_REST_LIST) + 8 * (number if wanted else first))
            key, legal = load_key(keys, position)
            target = out + position * OUT_STRIDE
            if wanted and not legal:
                fill_answer(target, default)
            wanted = wanted & legal
            if wanted and ld64(state + STATE_HOST) == 0:  # nobody else has a row that a writer is at work on
                wanted = not copy_after_all(lines, rows, sets, key, target)
            present = serve(lines, sets, state, key, position, target, default, scratch, wanted)
            served += count_in_warp(wanted)
            absent += count_in_warp(wanted & (not present))
            first += grid_tiles()
        if is_warp_leader():
            guard_leave(state, stripe)
            count_misses(state, stripe, served, absent)
    if FIXED:
        finish_batch(state, scratch, ld64(scratch + SCRATCH_BATCH), 0)


def count_misses(state, stripe, missing, absent):
    """Add to the counters of a stripe.   **Writes:** counters."""
    counters = state + STRIPES_AT + (stripe % STRIPES) * STRIPE_BYTES
    add64(counters, missing)
    if absent > 0:
        add64(counters + 8, absent)


def copy_after_all(lines, rows, sets, key, target):
    """Copy a row from the cache by a tile, waiting for writers at work on it; False if the key is not there.

    **Writes:** target.
    """
    out_of_line()
    while True:
        entry, tags = find_settled(lines, sets, key)
        if entry == 0:
            return False
        copy_from_cache(target, row_at(lines, rows, entry, tags >> 32))
        fence()
        if not is_changed(entry, tags, key):
            return True
