"""Pooled lookup: the rows of each bag of keys, combined to one row, in one kernel and without storing the rows in between.

A tile of lanes takes a *run* of consecutive bags, whose keys lie side by side. Each lane finds the row of one key; then the
tile walks through the rows in order, several in flight across the ends of bags, and adds them up in registers. An element is
added by one lane, in order of position, in float32, multiplication and addition rounded separately: CPU and GPU agree bit for
bit. A row is never split over passes, so that a pooled row is made of rows that were whole at one time.

``cache.parts`` has the arithmetic on the elements that a lane holds, ``cache.bags`` that on bags, ``cache.pooling_slow_path``
what is done for keys that the cache lacks.

*Why named tuples, and where not.* They bundle what passes through many functions together, and the compiler takes them apart:
for sm_90, width 32 and float32, the kernel has 2,226 instructions and 96 registers, and had 2,225 and 96 with up to 23 separate
arguments. But what the loops of ``pool_kernel`` carry from one iteration to the next stays in separate variables, and the loops
in one function: carried in tuples, rows of int8 took 200 instructions more and spilled 40 bytes; with the loop over hits in a
function of its own, kernels had 36 to 58 instructions more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hps_numba.kernels.cache.bags import (
    BagSums,
    CacheMemory,
    PoolCall,
    Run,
    add_row,
    close_bags,
    key_at,
    open_bag,
    open_run,
    weight_at,
)
from hps_numba.kernels.cache.find import touch
from hps_numba.kernels.cache.keys import load_key
from hps_numba.kernels.cache.parts import (
    add_part,
    add_rounded,
    await_four,
    await_part,
    float_of_lane,
    load_four,
    multiply_rounded,
    new_four,
    part_of,
    rows_in_flight,
    steps_of_tile,
    sum_part,
)
from hps_numba.kernels.cache.pooling_slow_path import accumulate_slow_path, inverted
from hps_numba.kernels.cache.probe import alternate_set_of, primary_line_of, set_of
from hps_numba.kernels.cache.seqlock import read_validate
from hps_numba.kernels.layouts.cache import (
    BUSY,
    LINE_BYTES,
    OVERFLOW,
    SCORES_AT,
    STATE_CALLS,
    STATE_KEYS,
    STATE_NOW,
    WAYS_PER_LINE,
)
from hps_numba.kernels.layouts.pooling import MAX, NO_ROW, SQRTN
from hps_numba.kernels.simt.reference import (
    add64,
    any_in_warp,
    ballot,
    grid_dependency_sync,
    grid_warps,
    is_grid_leader,
    lane_in_warp,
    ld32,
    ld64,
    probe_line_by_lane,
    warp_number,
)

__all__ = ["pool_kernel"]

# bound when specialized
FIXED = COUNTED = False
POOL_LANES = POOL_TILES = POOL_DEPTH = 1  # lanes that share a bag, such tiles in a warp, rows in flight (1 or 4)
POOL_MANY = False  # 4 rows are in flight: a GPU


def policy_touch(score, now, count):
    """The policy's, bound when specialized."""
    return score


def pool_kernel(
    lines, rows, sets, state, keys, n, offsets, bags, run, weights, out, combiner, default, options, padding, workspace
):
    """Write the pooled row of each bag to ``out``: its rows from the cache, else from the host store, else ``default``.

    Args (int64, addresses in memory of the device unless said otherwise):
        lines, rows, sets: the cache.   state: of the cache.   keys: of ``n`` keys (KEY_FORM).
        offsets: of ``bags`` + 1 int64 (``options``: int32, or without the last, which is ``n``), ascending: where bags begin.
            EQUAL: the number of keys of each bag.
        run: bags that a tile takes at a time.   weights: of ``n`` float32, or 0.   combiner: SUM, MEAN, SQRTN or MAX.
        out: of ``bags`` rows, OUT_STRIDE bytes apart.   default: float32.   padding: key to skip, if ``options`` say so.
        workspace: of this batch; positions are those of ``keys``.

    **Writes:** out, scores, workspace, counters, guard.
    """
    grid_dependency_sync()
    now = ld64(state + STATE_NOW)
    if is_grid_leader():
        add64(state + STATE_KEYS, n)
        add64(state + STATE_CALLS, 1)
    cache = CacheMemory(lines, rows, sets, state, workspace)
    call = PoolCall(keys, weights, out, combiner, default, options, padding)
    run = min(run, POOL_LANES)
    lane = lane_in_warp() % POOL_LANES
    first = (warp_number() * POOL_TILES + lane_in_warp() // POOL_LANES) * run
    while any_in_warp(first < bags):
        i, end, count, stops = open_run(offsets, first, run, bags, n, options)
        sums, total, filled, bag, stop = open_bag(combiner, stops)
        while any_in_warp(i < end):
            mine = Run(first, count, stops, end)
            if POOL_MANY and combiner != MAX:
                four, spare = new_four(0), new_four(1)
                row, entry, meta, stale, missing, weight = find_in_cache(cache, call, np.int32(i + lane), end, now)
                await_four(0)
                four = load_four(four, rows, row, 0)
                settled = not any_in_warp(missing)
                while settled:
                    then, then_total, then_filled, then_bag, then_stop = sums, total, filled, bag, stop
                    have = ballot(row != NO_ROW) >> (lane_in_warp() // POOL_LANES * POOL_LANES)
                    final = steps_of_tile() - POOL_DEPTH
                    for j in range(0, final, POOL_DEPTH):
                        if any_in_warp(i + j < end):
                            later = load_four(spare, rows, row, j + POOL_DEPTH)
                            await_four(1)
                            so_far = BagSums(then, then_total, then_filled, then_bag, then_stop)
                            then, then_total, then_filled, then_bag, then_stop = add_four(
                                mine, call, so_far, four, np.int32(i + j), j, have, weight
                            )
                            four, spare = later, four
                    ahead = find_in_cache(cache, call, np.int32(i + POOL_LANES + lane), end, now)
                    later = load_four(spare, rows, ahead.row, 0)
                    await_four(1)
                    so_far = BagSums(then, then_total, then_filled, then_bag, then_stop)
                    then, then_total, then_filled, then_bag, then_stop = add_four(
                        mine, call, so_far, four, np.int32(i + final), final, have, weight
                    )
                    four, spare = later, four
                    await_part(then)
                    entry = entry_of(lines, row, entry)
                    settled = not any_in_warp(has_changed(call, np.int64(i) + lane, row, entry, meta))
                    if settled:  # else these keys are looked up again, on the slow path
                        sums, total, filled, bag, stop = then, then_total, then_filled, then_bag, then_stop
                        if (row != NO_ROW) & stale:
                            touch_hit(cache, entry, now)
                        row, entry, meta, stale, missing, weight = ahead
                        i = np.int32(i + POOL_LANES)
                        settled = any_in_warp(i < end) and not any_in_warp(missing)
            if any_in_warp(i < end):
                away = inverted(mine, BagSums(sums, total, filled, bag, stop), i)
                sums, total, filled, bag, stop, i, end, count, stops, first, now = accumulate_slow_path(cache, call, away, now)
        close_bags(Run(first, count, stops, end), call, BagSums(sums, total, filled, bag, stop), max(i, end))
        first += grid_warps() * POOL_TILES * run


class Hit(NamedTuple):
    """Where a lane found the key at its position in the cache.

    Attributes:
        row: number of its row, or NO_ROW; an int32 with the bits of a uint32, as is ``meta``: a cache has fewer rows.
        entry: address of the key.   meta: of its line.
        stale: a hit changes its score.
        missing: there is a key to be added, and it has no row here, or a writer is at work on it.
        weight: of the key, 1 if there are none.
    """

    row: Any
    entry: Any
    meta: Any
    stale: Any
    missing: Any
    weight: Any


def find_in_cache(cache, call, position, end, now):
    """The Hit of the key at a position, without a call that is not inlined."""
    key, active, legal = key_at(call, position, end)
    entry, tags, row, stale = np.int64(0), np.int64(0), np.int32(NO_ROW), False
    if active & legal:
        line = set_of(cache.lines, cache.sets, key) + primary_line_of(key)
        entry, tags = probe_line_by_lane(line, key)
        probed = 1
        while entry == 0 and probed < 4 and (probed != 2 or tags & OVERFLOW != 0):
            line = alternate_set_of(cache.lines, cache.sets, key) + primary_line_of(key) if probed == 2 else line ^ LINE_BYTES
            entry, tags = probe_line_by_lane(line, key)
            probed += 1
        if entry != 0 and tags & BUSY == 0:
            if FIXED:
                row = as_word(tags >> 32)
            else:
                line = np.int64(np.uint64(entry - cache.lines) >> np.uint64(6))
                row = as_word(line * WAYS_PER_LINE + ((entry & 63) >> 3))
                score = (tags >> 32) & 0xFFFFFFFF
                stale = COUNTED or np.int64(policy_touch(score, now, 1)) & 0xFFFFFFFF != score
    return Hit(row, entry, as_word(tags), stale, active & (row == NO_ROW), weight_at(call, position, end))


def as_word(value):
    """The lower 32 bits as int32."""
    return np.int32((value & 0xFFFFFFFF) - ((value & 0x80000000) << 1))


def entry_of(lines, row, entry):
    """The ``entry`` of a row: computed from its number where possible, so that it takes no registers in the meantime."""
    if FIXED:
        return entry
    number = np.uint32(row)
    line = number // np.uint32(WAYS_PER_LINE)
    return lines + np.int64(line) * LINE_BYTES + np.int64(np.uint32(number - line * np.uint32(WAYS_PER_LINE))) * 8


def has_changed(call, position, row, entry, meta):
    """Whether the line of the key at a position, which had a row, has changed since it was found.   ``entry``: of the key."""
    if row == NO_ROW:
        return False
    key, _legal = load_key(call.keys, position)
    return read_validate(entry, np.int64(meta), key)


def touch_hit(cache, entry, now):
    """Count a hit of the key at ``entry``.   **Writes:** score, or workspace."""
    score = np.int64(0) if COUNTED else ld32((entry & ~63) + SCORES_AT + ((entry & 63) >> 1))
    touch(cache.lines, cache.state, cache.workspace, entry, score << 32, now)


def add_four(run, call, bags, four, at, number, have, weight):
    """``bags`` with the rows at positions ``at`` to ``at + 3``, of lane ``number`` and the next three.

    ``have``: bits of the lanes of the tile that have a row.   ``weight``: of each lane. Mostly all four have one, and no bag
    ends among them.   **Writes:** out.
    """
    sums, total, filled, bag, stop = close_bags(run, call, bags, at)
    busy = at < run.end
    if any_in_warp(busy & (((have >> number) & 15 != 15) | (stop < at + 4))):
        for d in range(rows_in_flight()):
            then = close_bags(run, call, BagSums(sums, total, filled, bag, stop), np.int32(at + d))
            sums, total, filled, bag, stop = add_row(then, part_of(four, d), weight, have, number + d, call.combiner)
    elif call.weights != 0:
        factor0, factor1 = float_of_lane(weight, number), float_of_lane(weight, number + 1)
        factor2, factor3 = float_of_lane(weight, number + 2), float_of_lane(weight, number + 3)
        if busy:
            sums = add_part(add_part(sums, part_of(four, 0), factor0), part_of(four, 1), factor1)
            sums = add_part(add_part(sums, part_of(four, 2), factor2), part_of(four, 3), factor3)
            if call.combiner == SQRTN:
                factor0, factor1 = multiply_rounded(factor0, factor0), multiply_rounded(factor1, factor1)
                factor2, factor3 = multiply_rounded(factor2, factor2), multiply_rounded(factor3, factor3)
            total = add_rounded(add_rounded(add_rounded(add_rounded(total, factor0), factor1), factor2), factor3)
            filled = True
    elif busy:
        sums = sum_part(sum_part(sums, part_of(four, 0)), part_of(four, 1))
        sums = sum_part(sum_part(sums, part_of(four, 2)), part_of(four, 3))
        total = add_rounded(total, np.float32(4.0))  # as 1 four times: a bag has at most MAX_BATCH keys, 2**24
        filled = True
    return BagSums(sums, total, filled, bag, stop)
