"""Look keys up: cache, host store, default value, in one kernel; what the cache lacked is listed for ``cache.insert``."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.cache.batch import list_newcomer, touch_later
from hps_numba.kernels.cache.miss_list import list_missed
from hps_numba.kernels.cache.probe import (
    alternate_set_of,
    find_in_host,
    guard_enter,
    guard_leave,
    primary_line_of,
    row_at,
    set_of,
)
from hps_numba.kernels.cache.rows import copy_from_cache, copy_from_host, copy_rows, fill_answer
from hps_numba.kernels.layouts.cache import (
    BUSY,
    DESC_ROWS,
    DESC_SHIFT,
    LINE_BYTES,
    LOCK,
    META_AT,
    MISSED_COUNTS,
    MISSED_OUT,
    OVERFLOW,
    PLACE_RANK,
    PLACE_REGION,
    REGIONS,
    SCORES_AT,
    STATE_CALLS,
    STATE_HOST,
    STATE_KEYS,
    STATE_NOW,
    STRIPE_BYTES,
    STRIPES,
    STRIPES_AT,
    WAYS_PER_LINE,
    WORKSPACE_ABSENT,
    WORKSPACE_ABSENT_LIST,
    WORKSPACE_ASSUME,
    WORKSPACE_BUCKETS,
    WORKSPACE_MISSED,
    WORKSPACE_STAGE,
    WORKSPACE_STAGE_STRIDE,
)
from hps_numba.kernels.layouts.host_store import FIRST_SLOT, SLOT_MASK
from hps_numba.kernels.simt.reference import (
    add64,
    any_in_warp,
    ballot,
    count_in_warp,
    ctz,
    fence,
    grid_dependency_sync,
    grid_warps,
    is_first_lane,
    is_grid_leader,
    is_warp_leader,
    lane_in_warp,
    ld32,
    ld64,
    noinline,
    popcount,
    probe_alone,
    probe_both,
    shfl,
    st32,
    st64,
    sync_warp,
    tile_in_warp,
    tiles_in_warp,
    tiles_of,
    warp_number,
)

__all__ = ["answer_batch", "count_misses", "list_by_region_kernel", "list_kernel", "lookup_kernel", "serve", "wait_and_copy"]

# bound when built
FIXED = COUNTED = False
KEY_FORM = 0
OUT_STRIDE = 4
HOST_STRIDE = 4
GROUP = 1  # keys that a warp looks up at a time
BY_TILE = False  # a tile takes a key, and reads both lines of its set at once: sooner done, more to read
LISTS = (
    False  # keys that the cache lacks are only listed, for ``kernels.cache.miss_sorted`` or for the host to gather their rows
)
BY_REGION = False  # with the region of the host store's rows where each has its row
ONE_GROUP = False  # there are as many warps as groups of keys

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
    home = primary_line_of(key)
    entry, tags = probe_alone(place + home, key)
    if entry == 0:
        entry, tags = probe_alone(place + LINE_BYTES - home, key)
    if entry == 0 and (tags & OVERFLOW) != 0:
        entry, tags = look_further(lines, sets, key)
    return entry, tags


def find_by_tile(lines, sets, key):
    """``find_entry`` by a tile, all tiles of a warp together."""
    place = set_of(lines, sets, key)
    home = primary_line_of(key)
    entry, tags = probe_both(place + home, place + LINE_BYTES - home, key)
    further = entry == 0 and (tags & OVERFLOW) != 0
    if any_in_warp(further):
        found, found_tags = look_further_by_tile(lines, sets, key)
        if further:
            entry, tags = found, found_tags
    return entry, tags


def look_further(lines, sets, key):
    """``find_entry`` in the other set of a key."""
    noinline()
    line = alternate_set_of(lines, sets, key) + primary_line_of(key)
    entry, tags = probe_alone(line, key)
    if entry == 0:
        entry, tags = probe_alone(line ^ LINE_BYTES, key)
    return entry, tags


def look_further_by_tile(lines, sets, key):
    """``look_further`` by a tile, all tiles of a warp together."""
    noinline()
    line = alternate_set_of(lines, sets, key)
    return probe_both(line, line + LINE_BYTES, key)


def has_after_all(lines, sets, key):
    """The key is in the cache, as soon as writers at work on its set have ended: for caches without a host store."""
    noinline()
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


def read_validate(entry, tags, key):
    """The line of ``entry`` is no longer as it was when the key was found there."""
    there, meta = ld64(entry), ld32((entry & ~63) + META_AT)  # both on their way before either is looked at
    return (there != key) | ((meta | LOCK) != ((tags & 0xFFFFFFFF) | LOCK))


def touch(lines, state, workspace, entry, tags, now):
    """Count a hit.   **Writes:** score, or workspace."""
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


def try_cache(lines, rows, sets, state, key, target, now, workspace, wanted):
    """Copy rows from the cache; whether the key of this lane, or of its tile, was there with no writer at work on it.

    BY_TILE: a tile searches for its key and copies its row to ``target``. Else each lane searches for a key of its own, and all
    lanes of a warp copy the rows together, ``target`` being that of the first lane. A ``target`` of 0 is left out. Then the
    lines are looked at again.   **Writes:** target, scores.
    """
    entry, tags = np.int64(0), np.int64(0)
    if BY_TILE:
        entry, tags = find_by_tile(lines, sets, key)
    elif wanted:
        entry, tags = find_entry(lines, sets, key)
    if (tags & BUSY) != 0 or not wanted:
        entry = np.int64(0)
    row = row_at(lines, rows, entry, tags >> 32) if entry != 0 else np.int64(0)
    if target != 0:
        if not BY_TILE:
            copy_rows(target, row)
        elif row != 0:
            copy_from_cache(target, row)
    if entry == 0:
        return False
    if read_validate(entry, tags, key):
        return False
    if not BY_TILE or is_first_lane():
        touch(lines, state, workspace, entry, tags, now)
    return True


def serve(lines, sets, state, key, i, target, default, workspace, wanted):
    """Answer a key that the cache lacks from the host store, one for each tile of a warp; returns whether it has it.

    **Writes:** target, workspace.
    """
    descriptor = shfl(ld64(state + STATE_HOST), 0)  # it may change: one lane looks, for all of the warp
    content = np.int64(0)
    slot = np.int64(-1)
    word = np.int64(0)
    if descriptor != 0:
        content = ld64(descriptor + DESC_ROWS)
        word = find_in_host(descriptor, key, wanted)
        slot = (word & SLOT_MASK) - FIRST_SLOT
    present = wanted & (slot >= 0)
    if present:
        stage = ld64(workspace + WORKSPACE_STAGE)
        if stage != 0:
            stage += ld64(workspace + WORKSPACE_STAGE_STRIDE) * i
        copy_from_host(target, stage, content + slot * HOST_STRIDE)
    elif wanted and target != 0:
        fill_answer(target, default)
    if is_first_lane() and wanted:
        lists = (not FIXED) and ld64(workspace + WORKSPACE_BUCKETS) != 0
        if lists and (present or ld64(workspace + WORKSPACE_ASSUME) != 0):
            list_newcomer(workspace, set_of(lines, sets, key), lines, key, i, word, content)
        elif not present:
            absent_list = ld64(workspace + WORKSPACE_ABSENT_LIST)
            if absent_list != 0:
                st64(absent_list + 8 * add64(workspace + WORKSPACE_ABSENT, 1), i)
    sync_warp()
    return present


def lookup_kernel(lines, rows, sets, state, keys, n, out, default, workspace):
    """Write the row of each key to ``out``: from the cache, else from the host store, else ``default``.

    Small batches: a tile takes a key (BY_TILE), which is soonest done. Large ones: each lane searches for one key and a warp
    copies the rows of its lanes together, with the fewest instructions. What is left to do for keys that the cache lacks stands
    out of line: it takes many registers, and with few of them more warps hide the time that memory takes.

    Args (int64, addresses in memory of the device unless said otherwise):
        lines, rows, sets: the cache.   state: of the cache.   keys: of ``n`` keys (KEY_FORM).
        out: of ``n`` rows, OUT_STRIDE bytes apart, or 0.   default: float32.   workspace: of this batch.

    **Writes:** out, scores, workspace, counters.
    """
    grid_dependency_sync()
    answer_batch(lines, rows, sets, state, keys, n, out, default, workspace)


def list_kernel(lines, rows, sets, state, keys, n, out, default, workspace):
    """``lookup_kernel`` that reads no memory of the host: keys that the cache lacks are listed (LISTS) and not answered.

    A kernel of its own, so that the other one has no more registers to save for it.   **Writes:** out, scores, workspace, list,
    counters.
    """
    grid_dependency_sync()
    answer_batch(lines, rows, sets, state, keys, n, out, default, workspace)


def list_by_region_kernel(lines, rows, sets, state, keys, n, out, default, workspace):
    """``list_kernel`` that also tells of each key where in the rows of the host store its row is, roughly (BY_REGION).

    **Writes:** as it does.
    """
    grid_dependency_sync()
    answer_batch(lines, rows, sets, state, keys, n, out, default, workspace)


def answer_batch(lines, rows, sets, state, keys, n, out, default, workspace):
    """``lookup_kernel`` for a table.   **Writes:** as it does."""
    now = ld64(state + STATE_NOW)
    if is_grid_leader():
        add64(state + STATE_KEYS, n)
        add64(state + STATE_CALLS, 1)
        if LISTS:
            st64(ld64(workspace + WORKSPACE_MISSED) + MISSED_OUT, out)
    base = warp_number() * GROUP
    while base < n:
        number = tile_in_warp() if BY_TILE else lane_in_warp()
        active = (number < GROUP) & (base + number < n)
        key, legal = np.int64(0), False
        if active:
            key, legal = load_key(keys, base + number)
        target = out + (base + number if BY_TILE else base) * OUT_STRIDE if out != 0 else np.int64(0)
        found = try_cache(lines, rows, sets, state, key, target, now, workspace, active & legal)
        missing = ballot(active & (not found))
        if BY_TILE and missing != 0:
            missing = tiles_of(missing)
        if missing != 0:
            serve_missing(lines, rows, sets, state, keys, base, out, default, workspace, missing)
        if ONE_GROUP:
            break
        base += grid_warps() * GROUP


def serve_missing(lines, rows, sets, state, keys, base, out, default, workspace, missing):
    """``serve_group``, or ``list_group`` if that is left to others.   **Writes:** as they do."""
    if LISTS:
        list_group(state, keys, base, out, default, workspace, missing)
    else:
        serve_group(lines, rows, sets, state, keys, base, out, default, workspace, missing)


def list_group(state, keys, base, out, default, workspace, missing):
    """List the keys of a warp that are in ``missing`` (bits, from position ``base``).

    A position without a legal key gets the default now.   **Writes:** list, target, counters.
    """
    noinline()
    mine = (missing >> lane_in_warp()) & 1 != 0
    position = base + lane_in_warp()
    key, legal = np.int64(0), False
    if mine:
        key, legal = load_key(keys, position)
    missed = ld64(workspace + WORKSPACE_MISSED)
    total, entry = list_missed(missed, position, key, mine & legal)
    if is_warp_leader() and total > 0:
        count_misses(state, warp_number(), total, 0)
    if BY_REGION and total > 0:
        tell_regions(state, missed, position, key, entry, ballot(mine & legal))
    illegal = ballot(mine & (not legal))
    while illegal != 0 and out != 0:
        bits = illegal
        for _ in range(tile_in_warp()):
            bits &= bits - 1
        if bits != 0:
            fill_answer(out + (base + ctz(bits)) * OUT_STRIDE, default)
        for _ in range(tiles_in_warp()):
            illegal &= illegal - 1


def tell_regions(state, missed, position, key, entry, listed):
    """Tell of the keys that a warp listed (bits) the regions of their rows, and their numbers among those of a region.

    Only if the index is where the cache is: elsewhere it would be read over the bus once more. Then, as for keys without a row,
    all are of the first region.   **Writes:** list, guard.
    """
    stripe = warp_number()
    if is_warp_leader():
        guard_enter(state, stripe)
    sync_warp()
    descriptor = shfl(ld64(state + STATE_HOST), 0)  # it may change: one lane looks, for all
    shift = ld64(descriptor + DESC_SHIFT) if descriptor != 0 else np.int64(-1)
    if shift < 0:
        first = np.int64(0)
        if is_warp_leader():
            first = add64(missed + MISSED_COUNTS, np.int64(popcount(listed)))
        rank = shfl(first, 0) + np.int64(popcount(listed & ((np.int64(1) << lane_in_warp()) - 1)))
        if (listed >> lane_in_warp()) & 1 != 0:
            st64(entry, position | rank << PLACE_RANK)
        listed = np.int64(0)
    while listed != 0:
        mine = listed
        for _ in range(tile_in_warp()):
            mine &= mine - 1
        wanted = mine != 0
        lane = ctz(mine) if wanted else np.int64(0)
        wanted_key, at, to = shfl(key, lane), shfl(position, lane), shfl(entry, lane)
        region = np.int64(0)
        slot = (find_in_host(descriptor, wanted_key, wanted) & SLOT_MASK) - FIRST_SLOT
        if slot >= 0:
            region = min(slot >> shift, np.int64(REGIONS - 1))
        if is_first_lane() and wanted:
            rank = add64(missed + MISSED_COUNTS + 8 * region, 1)
            st64(to, at | region << PLACE_REGION | rank << PLACE_RANK)
        for _ in range(tiles_in_warp()):
            listed &= listed - 1
    if is_warp_leader():
        guard_leave(state, stripe)


def serve_group(lines, rows, sets, state, keys, base, out, default, workspace, missing):
    """Serve the keys of a warp that are in ``missing`` (bits, from position ``base``), as many at a time as it has tiles.

    **Writes:** as ``serve``, counters.
    """
    noinline()
    stripe = warp_number()
    if is_warp_leader():
        guard_enter(state, stripe)
    sync_warp()
    total = np.int64(0)
    absent = np.int64(0)
    while missing != 0:
        mine = missing
        for _ in range(tile_in_warp()):
            mine &= mine - 1
        wanted = mine != 0
        position = base + (ctz(mine) if wanted else np.int64(0))
        key, legal = load_key(keys, position)
        target = out + position * OUT_STRIDE if out != 0 else np.int64(0)
        if wanted and not legal and out != 0:
            fill_answer(target, default)
        wanted = wanted & legal
        if wanted and ld64(state + STATE_HOST) == 0:  # nobody else has a row that a writer is at work on
            wanted = not wait_and_copy(lines, rows, sets, key, target)
        present = serve(lines, sets, state, key, position, target, default, workspace, wanted)
        total += count_in_warp(wanted)
        absent += count_in_warp(wanted & (not present))
        for _ in range(tiles_in_warp()):
            missing &= missing - 1
    if is_warp_leader():
        guard_leave(state, stripe)
        count_misses(state, stripe, total, absent)


def count_misses(state, stripe, missing, absent):
    """Add to the counters of a stripe.   **Writes:** counters."""
    counters = state + STRIPES_AT + (stripe % STRIPES) * STRIPE_BYTES
    add64(counters, missing)
    if absent > 0:
        add64(counters + 8, absent)


def wait_and_copy(lines, rows, sets, key, target):
    """Copy a row from the cache by a tile, waiting for writers at work on it; False if the key is not there.

    **Writes:** target.
    """
    noinline()
    while True:
        entry, tags = find_settled(lines, sets, key)
        if entry == 0:
            return False
        if target != 0:
            copy_from_cache(target, row_at(lines, rows, entry, tags >> 32))
        fence()
        if not read_validate(entry, tags, key):
            return True
