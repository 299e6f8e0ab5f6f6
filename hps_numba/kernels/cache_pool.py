"""Pooled lookup: the rows of each bag of keys, combined to one row, in one kernel and without the rows in between.

A tile of lanes takes a *run* of consecutive bags, whose keys lie side by side. Each lane finds the row of one key; then the
tile walks through the rows in order, several in flight whatever the ends of bags, and adds them up in registers. An element is
added by one lane, in order of position, in float32, multiplication and addition rounded apart: CPU and GPU agree bit for bit.
Rows are never split over passes, so that a pooled row is made of rows that were whole at one time.

The functions on a *part* (the elements of a row that a lane has) stand here for one lane that has the whole row, an array;
``lanes_cuda_pool`` has those for a GPU, where a part is in registers.   (spec 2.3)
"""

from __future__ import annotations

import numpy as np

from hps_numba.cache_layout import (
    BUSY,
    DESC_ROWS,
    SCRATCH_ASSUME,
    SCRATCH_BUCKETS,
    SCRATCH_STAGE,
    SCRATCH_STAGE_STRIDE,
    STATE_CALLS,
    STATE_HOST,
    STATE_KEYS,
    STATE_NOW,
)
from hps_numba.kernels.cache_batch import list_newcomer
from hps_numba.kernels.cache_lookup import count_misses, find_entry, find_settled, is_changed, load_key, touch
from hps_numba.kernels.cache_rows import copy_from_host, element_of_row, put_answer, scale_of_row
from hps_numba.kernels.cache_search import find_in_host, guard_enter, guard_leave, row_at, set_of
from hps_numba.kernels.lanes import (
    add64,
    after_former,
    any_in_warp,
    bits_float,
    bits_set,
    count_in_warp,
    from_lane,
    grid_warps,
    is_first_lane,
    is_grid_leader,
    is_warp_leader,
    lane_in_warp,
    ld32,
    ld64,
    lowest_bit,
    out_of_line,
    sync_warp,
    tile_in_warp,
    tiles_in_warp,
    votes_of_warp,
    warp_number,
)
from hps_numba.layout import FIRST_SLOT, SLOT_MASK

__all__ = [
    "COMBINERS",
    "EMPTY_DEFAULT",
    "EQUAL",
    "OFFSETS32",
    "OPEN_END",
    "PADDED",
    "pool_blocks",
    "pool_kernel",
    "pool_lanes",
    "pool_run",
]

#: numbers of the combiners
SUM, MEAN, SQRTN, MAX = range(4)
COMBINERS = {"sum": SUM, "mean": MEAN, "sqrtn": SQRTN, "max": MAX}

#: options: skip keys equal to ``padding``; empty bags get the default; offsets are int32; the last offset is left out; all bags
#: have as many keys, and the argument ``offsets`` says how many
PADDED, EMPTY_DEFAULT, OFFSETS32, OPEN_END, EQUAL = 1, 2, 4, 8, 16

NOWHERE = 1  # in place of the address of a row: the default
ONE_BITS = 0x3F800000  # of the float32 1

THREADS = 128  # of a block
_MOST_BLOCKS = 1 << 20
_ROWS_OF_RUN = 16  # a run is so long that a tile has so many rows to walk through, if bags are short

# bound when built
FIXED = False
DIM = LANES = 1
OUT_STRIDE = HOST_STRIDE = 4
POOL_LANES = POOL_TILES = POOL_DEPTH = 1  # lanes that share a bag, such tiles in a warp, rows in flight (1 or 4)
POOL_MANY = False  # 4 rows are in flight: a GPU


# -- launch ---------------------------------------------------------------------


def pool_lanes(dim: int) -> int:
    """Lanes that share a bag on a GPU: 16 bytes of a float32 row each, if it can be."""
    pieces = dim // 4 if dim % 4 == 0 else dim
    return min(32, max(4, 1 << (pieces - 1).bit_length()))


def pool_run(bags: int, n: int, dim: int) -> int:
    """Bags that a tile takes at a time (the argument ``run``), for ``bags`` bags of together ``n`` keys."""
    return max(1, min(pool_lanes(dim), _ROWS_OF_RUN * bags // max(n, 1), bags // 16384))


def pool_blocks(bags: int, dim: int, run: int = 1) -> int:
    """Blocks of ``THREADS`` threads for a launch of ``pool_kernel``."""
    return max(1, min(-(-bags // (run * (THREADS // pool_lanes(dim)))), _MOST_BLOCKS))


# -- parts: the share that a lane has of a row ---------------------------------------------------------------------


def new_part():
    """A part, all 0."""
    return np.zeros(DIM, np.float32)


def load_part(part, source):
    """The part of a row of the cache; anything if ``source`` is 0."""
    if source != 0:
        scale = scale_of_row(source)
        for element in range(DIM):
            part[element] = bits_float(element_of_row(source, element, scale))
    return part


def pick_part(first, second, third, fourth, number):
    """One of the parts in flight."""
    return first


def rows_in_flight():
    """POOL_DEPTH, but no constant to a compiler: a loop over the rows in flight stays a loop."""
    return POOL_DEPTH


def steps_of_tile():
    """POOL_LANES, but no constant to a compiler, as ``rows_in_flight``."""
    return POOL_LANES


def await_part(part):
    """``await_parts`` of one: of sums, all that was added."""


def await_parts(first, second, third, fourth):
    """What is loaded after this is loaded after these parts."""


def behind_part(part, source, default):
    """The part of a float32 row, of ``default`` if ``source`` is NOWHERE; the same part if it is 0."""
    if source > NOWHERE:
        for element in range(DIM):
            part[element] = bits_float(ld32(source + 4 * element))
    elif source == NOWHERE:
        part[:] = np.float32(default)
    return part


def fill_part(part, value):
    """A part of equal elements."""
    part[:] = np.float32(value)
    return part


def add_part(sums, part, weight):
    """``sums + part * weight``, both operations rounded."""
    for element in range(DIM):
        sums[element] = add_rounded(sums[element], multiply_rounded(part[element], weight))
    return sums


def max_part(sums, part):
    """The larger of each two elements; what is no number stays."""
    for element in range(DIM):
        value = part[element]
        if value > sums[element] or value != value:
            sums[element] = value
    return sums


def divide_part(sums, divisor):
    """Each element by ``divisor``."""
    for element in range(DIM):
        sums[element] = divide_rounded(sums[element], divisor)
    return sums


def put_part(target, sums):
    """Write a part of an answer.   **Writes:** target."""
    bits = sums.view(np.uint32)
    for element in range(DIM):
        put_answer(target, element, np.int64(bits[element]))


def multiply_rounded(a, b):
    """``a * b`` in float32, never joined with an addition."""
    return np.float32(a) * np.float32(b)


def add_rounded(a, b):
    """``a + b`` in float32."""
    return np.float32(a) + np.float32(b)


def divide_rounded(a, b):
    """``a / b`` in float32."""
    return np.float32(a) / np.float32(b)


def root_rounded(a):
    """The square root in float32."""
    return np.sqrt(np.float32(a))


# -- one key a lane ---------------------------------------------------------------------


def find_behind(lines, sets, state, key, i, scratch, wanted):
    """Address of the row of a key that the cache lacks, or NOWHERE; one key for each tile of a warp, inside a guard.

    A row of the host store is staged, and the key listed for insertion, as a lookup does.   **Writes:** scratch.
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
    found = np.int64(NOWHERE)
    if present:
        found = content + slot * HOST_STRIDE
        stage = ld64(scratch + SCRATCH_STAGE)
        if stage != 0:
            stage += ld64(scratch + SCRATCH_STAGE_STRIDE) * i
            copy_from_host(np.int64(0), stage, found)
            found = stage
    lists = (not FIXED) and ld64(scratch + SCRATCH_BUCKETS) != 0
    if lists and is_first_lane() and wanted and (present or ld64(scratch + SCRATCH_ASSUME) != 0):
        list_newcomer(scratch, set_of(lines, sets, key), lines, key, i, word, content)
    sync_warp()
    return found


def settle_missing(lines, sets, state, key, position, scratch, wanted, guarded):
    """``(entry, tags, behind)`` of the keys of those lanes of a warp that found none, or a writer at work.

    ``guarded``: 1 if the warp is inside a guard; when this returns it is.   **Writes:** scratch, counters, guard.
    """
    out_of_line()
    entry, tags, behind = np.int64(0), np.int64(0), np.int64(0)
    if ld64(state + STATE_HOST) == 0 and wanted:  # nobody else has a row that a writer is at work on
        entry, tags = find_settled(lines, sets, key)
    missing = votes_of_warp(wanted and entry == 0)
    stripe = warp_number()
    if is_warp_leader() and guarded == 0:
        guard_enter(state, stripe)
    sync_warp()
    absent = np.int64(0)
    total = bits_set(missing)
    while missing != 0:
        mine = missing
        for _ in range(tile_in_warp()):
            mine &= mine - 1
        searching = mine != 0
        place = lowest_bit(mine) if searching else np.int64(0)
        wanted_key = from_lane(key, place)
        at = from_lane(position, place)
        found = find_behind(lines, sets, state, wanted_key, at, scratch, searching)
        absent += count_in_warp(searching & (found == NOWHERE))
        rank = bits_set(missing & ((1 << lane_in_warp()) - 1))
        answer = from_lane(found, min(rank, tiles_in_warp() - 1) * LANES)
        if (missing >> lane_in_warp()) & 1 and rank < tiles_in_warp():
            behind = answer
        for _ in range(tiles_in_warp()):
            missing &= missing - 1
    if is_warp_leader():
        count_misses(state, stripe, total, absent)
    return entry, tags, behind


# -- bags ---------------------------------------------------------------------


def bag_start(offsets, bag, bags, n, options):
    """Position of the first key of a bag, within 0..n; that of bag ``bags`` is the end of the last one."""
    if options & EQUAL:
        return min(bag * offsets, np.int64(n))
    if bag == bags and options & OPEN_END:
        return np.int64(n)
    if options & OFFSETS32:
        start = ld32(offsets + 4 * bag)
    else:
        start = ld64(offsets + 8 * bag)
    return min(max(start, np.int64(0)), np.int64(n))


def answer_bag(target, sums, total, filled, combiner, default, options):
    """Write the pooled row of a bag.   **Writes:** target."""
    out_of_line()
    if not filled:
        sums = fill_part(sums, default if options & EMPTY_DEFAULT else np.float32(0.0))
    elif combiner in (MEAN, SQRTN):
        divisor = root_rounded(total) if combiner == SQRTN else total
        if divisor == np.float32(0.0):
            sums = fill_part(sums, np.float32(0.0))
        else:
            sums = divide_part(sums, divisor)
    put_part(target, sums)


def start_of(combiner):
    """What sums, or maxima, begin with."""
    return np.float32(-np.inf) if combiner == MAX else np.float32(0.0)


def close_bags(at, last, first, stops, base, out, combiner, default, options, sums, total, filled, bag, stop):
    """Write the bags that end at or before position ``at``; ``(sums, total, filled, bag, stop)`` of the one that goes on.

    **Writes:** out.
    """
    while any_in_warp((at >= stop) & (bag < last)):
        if (at >= stop) & (bag < last):
            answer_bag(out + bag * OUT_STRIDE, sums, total, filled, combiner, default, options)
            sums = fill_part(sums, start_of(combiner))
            total = np.float32(0.0)
            filled = False
            bag += 1
        stop = from_lane(stops, base + min(bag - first, POOL_LANES - 1))
    return sums, total, filled, bag, stop


def use_row(sums, total, filled, part, behind, some_behind, weight, used, number, combiner, default):
    """``(sums, total, filled)`` with the row of lane ``number``, if that is among the ``used`` ones (bits).

    ``part``: of that row in the cache, if it has one there. ``behind``, ``weight``: of each lane.
    """
    if some_behind:
        part = behind_part(part, from_lane(behind, number), default)
    factor = bits_float(from_lane(weight, number))
    there = (used >> number) & 1 != 0
    if there:
        if combiner == MAX:
            sums = max_part(sums, part)
        else:
            sums = add_part(sums, part, factor)
            total = add_rounded(total, multiply_rounded(factor, factor) if combiner == SQRTN else factor)
    return sums, total, filled | there


def use_four(
    sums, total, filled, bag, stop, part0, part1, part2, part3, at, number, end, have, weight, last, first, stops, base, out,
    combiner, default, options,
):  # fmt: skip
    """``(sums, total, filled, bag, stop)`` with the rows at positions ``at`` to ``at + 3``, of lane ``number`` and the next.

    ``have``: bits of the lanes that have a row.   ``weight``: of each lane. Mostly all four are there, no bag ends among them.

    **Writes:** out.
    """
    sums, total, filled, bag, stop = close_bags(
        at, last, first, stops, base, out, combiner, default, options, sums, total, filled, bag, stop
    )
    busy = at < end
    if any_in_warp(busy & (((have >> number) & 15 != 15) | (stop < at + 4))):
        for d in range(rows_in_flight()):
            sums, total, filled, bag, stop = close_bags(
                at + d, last, first, stops, base, out, combiner, default, options, sums, total, filled, bag, stop
            )
            part = pick_part(part0, part1, part2, part3, d)
            sums, total, filled = use_row(
                sums, total, filled, part, np.int64(0), False, weight, have, number + d, combiner, default
            )
    else:
        factor0, factor1 = bits_float(from_lane(weight, number)), bits_float(from_lane(weight, number + 1))
        factor2, factor3 = bits_float(from_lane(weight, number + 2)), bits_float(from_lane(weight, number + 3))
        if busy:
            sums = add_part(add_part(sums, part0, factor0), part1, factor1)
            sums = add_part(add_part(sums, part2, factor2), part3, factor3)
            if combiner == SQRTN:
                factor0, factor1 = multiply_rounded(factor0, factor0), multiply_rounded(factor1, factor1)
                factor2, factor3 = multiply_rounded(factor2, factor2), multiply_rounded(factor3, factor3)
            total = add_rounded(add_rounded(add_rounded(add_rounded(total, factor0), factor1), factor2), factor3)
            filled = True
    return sums, total, filled, bag, stop


def load_four(part0, part1, part2, part3, row, number):
    """The parts of the rows that lane ``number`` and the next found."""
    part0 = load_part(part0, from_lane(row, number))
    part1 = load_part(part1, from_lane(row, number + 1))
    part2 = load_part(part2, from_lane(row, number + 2))
    part3 = load_part(part3, from_lane(row, number + 3))
    return part0, part1, part2, part3


def use_keys(
    sums, total, filled, bag, stop, part0, part1, part2, part3, i, row, weight, end, last, first, stops, base, out, combiner,
    default, options,
):  # fmt: skip
    """``(sums, total, filled, bag, stop)`` with the rows of the keys that the lanes of a tile found, the first at ``i``.

    Whether their lines were still the same afterwards is for the caller to see.   **Writes:** out.
    """
    have = votes_of_warp(row != 0)
    part0, part1, part2, part3 = load_four(part0, part1, part2, part3, row, base)
    for j in range(0, steps_of_tile(), POOL_DEPTH):
        if any_in_warp(i + j < end):
            next0, next1, next2, next3 = part0, part1, part2, part3
            if POOL_LANES > POOL_DEPTH:  # the next four are on their way while these are added
                after = row if j + POOL_DEPTH < POOL_LANES else np.int64(0)
                next0, next1, next2, next3 = load_four(part0, part1, part2, part3, after, base + (j + POOL_DEPTH) % POOL_LANES)
            sums, total, filled, bag, stop = use_four(
                sums, total, filled, bag, stop, part0, part1, part2, part3, i + j, base + j, end, have, weight, last, first,
                stops, base, out, combiner, default, options,
            )  # fmt: skip
            part0, part1, part2, part3 = next0, next1, next2, next3
    return sums, total, filled, bag, stop


def use_with_care(
    lines, rows, sets, state, scratch, sums, total, filled, bag, stop, part0, part1, part2, part3, i, key, entry, tags, row,
    behind, weight, now, guarded, end, last, first, stops, base, out, combiner, default, options,
):  # fmt: skip
    """``(sums, total, filled, bag, stop, guarded)`` with the rows of the keys of a tile, whatever there is: rows from behind
    the cache, maxima, and writers at work, for which each row is seen to be still the same before it is used.

    Out of line, so that its many registers are not those of every pooled lookup.   **Writes:** out, scores, scratch, counters.
    """
    out_of_line()
    lane = lane_in_warp() % POOL_LANES
    for j in range(0, POOL_LANES, POOL_DEPTH):
        if any_in_warp(i + j < end):
            mine = (lane >= j) & (lane < j + POOL_DEPTH)
            again = True
            while again:
                part0 = load_part(part0, from_lane(row, base + j))
                if POOL_MANY:
                    part1 = load_part(part1, from_lane(row, base + j + 1))
                    part2 = load_part(part2, from_lane(row, base + j + 2))
                    part3 = load_part(part3, from_lane(row, base + j + 3))
                await_parts(part0, part1, part2, part3)
                changed = mine & (row != 0) and is_changed(entry, tags, key)
                again = any_in_warp(changed)
                if again:
                    late, late_tags, late_behind = settle_missing(
                        lines, sets, state, key, i + lane, scratch, changed, np.int64(guarded)
                    )
                    guarded = True
                    if changed:
                        entry, tags, behind = late, late_tags, late_behind
                        row = row_at(lines, rows, entry, tags >> 32) if entry != 0 else np.int64(0)
            if mine & (row != 0):
                touch(lines, state, scratch, entry, tags, now)
            some = any_in_warp(behind != 0)
            used = votes_of_warp((row != 0) | (behind != 0))
            for d in range(rows_in_flight()):
                sums, total, filled, bag, stop = close_bags(
                    i + j + d, last, first, stops, base, out, combiner, default, options, sums, total, filled, bag, stop
                )
                part = pick_part(part0, part1, part2, part3, d)
                sums, total, filled = use_row(
                    sums, total, filled, part, behind, some, weight, used, base + j + d, combiner, default
                )
    return sums, total, filled, bag, stop, guarded


def find_rows(lines, rows, sets, state, keys, position, end, options, padding, scratch):
    """``(key, entry, tags, row, behind, guarded)``: where each lane finds the row of the key at its position.

    ``row`` is its address in the cache, or 0; then ``behind`` is that of float32 elements, or NOWHERE, or 0 if there is no key
    to be added.   **Writes:** scratch, counters, guard.
    """
    wanted = position < end
    key, legal = load_key(keys, position if wanted else np.int64(0))
    wanted = wanted & (not ((options & PADDED) != 0 and key == padding))
    entry, tags = np.int64(0), np.int64(0)
    behind = np.int64(NOWHERE) if wanted & (not legal) else np.int64(0)
    wanted = wanted & legal
    if wanted:
        entry, tags = find_entry(lines, sets, key)
        if tags & BUSY:
            entry = np.int64(0)
    missing = wanted & (entry == 0)
    guarded = any_in_warp(missing)
    if guarded:
        late, late_tags, late_behind = settle_missing(lines, sets, state, key, position, scratch, missing, np.int64(0))
        if missing:
            entry, tags, behind = late, late_tags, late_behind
    row = row_at(lines, rows, entry, tags >> 32) if entry != 0 else np.int64(0)
    return key, entry, tags, row, behind, guarded


def pool_kernel(
    lines, rows, sets, state, keys, n, offsets, bags, run, weights, out, combiner, default, options, padding, scratch
):
    """Write the pooled row of each bag to ``out``: its rows from the cache, else from the host store, else ``default``.

    Args (int64, addresses in memory of the device unless said otherwise):
        lines, rows, sets: the cache.   state: of the cache.   keys: of ``n`` keys (KEY_FORM).
        offsets: of ``bags`` + 1 int64 (``options``: int32, or without the last, which is ``n``), ascending: where bags begin.
            EQUAL: the number of keys of each bag.
        run: bags that a tile takes at a time.   weights: of ``n`` float32, or 0.   combiner: SUM, MEAN, SQRTN or MAX.
        out: of ``bags`` rows, OUT_STRIDE bytes apart.   default: float32.   padding: key to skip, if ``options`` say so.
        scratch: of this batch; positions are those of ``keys``.

    **Writes:** out, scores, scratch, counters, guard.
    """
    after_former()
    now = ld64(state + STATE_NOW)
    if is_grid_leader():
        add64(state + STATE_KEYS, n)
        add64(state + STATE_CALLS, 1)
    run = min(run, POOL_LANES)
    lane = lane_in_warp() % POOL_LANES
    base = lane_in_warp() - lane
    sums, part0, part1, part2, part3 = new_part(), new_part(), new_part(), new_part(), new_part()
    number = (warp_number() * POOL_TILES + lane_in_warp() // POOL_LANES) * run
    while any_in_warp(number < bags):
        first, last = min(number, bags), min(number + run, bags)
        bag = first
        stops = bag_start(offsets, min(first + 1 + lane, last), bags, n, options)
        i = bag_start(offsets, first, bags, n, options)
        stop = from_lane(stops, base)
        end = from_lane(stops, base + run - 1)
        sums = fill_part(sums, start_of(combiner))
        total, filled = np.float32(0.0), False
        while any_in_warp(i < end):
            position = i + lane
            key, entry, tags, row, behind, guarded = find_rows(
                lines, rows, sets, state, keys, position, end, options, padding, scratch
            )
            weight = ld32(weights + 4 * position) if (weights != 0) & (position < end) else np.int64(ONE_BITS)
            settled = False
            if POOL_MANY and combiner != MAX and not any_in_warp(behind != 0):  # nearly always
                then, then_total, then_filled, then_bag, then_stop = use_keys(
                    sums, total, filled, bag, stop, part0, part1, part2, part3, i, row, weight, end, last, first, stops, base,
                    out, combiner, default, options,
                )  # fmt: skip
                await_part(then)
                settled = not any_in_warp(row != 0 and is_changed(entry, tags, key))
                if settled:
                    sums, total, filled, bag, stop = then, then_total, then_filled, then_bag, then_stop
                    if row != 0:
                        touch(lines, state, scratch, entry, tags, now)
            if not settled:
                sums, total, filled, bag, stop, guarded = use_with_care(
                    lines, rows, sets, state, scratch, sums, total, filled, bag, stop, part0, part1, part2, part3, i, key,
                    entry, tags, row, behind, weight, now, guarded, end, last, first, stops, base, out, combiner, default,
                    options,
                )  # fmt: skip
            if guarded:
                sync_warp()
                if is_warp_leader():
                    guard_leave(state, warp_number())
            i += POOL_LANES
        sums, total, filled, bag, stop = close_bags(
            max(i, end), last, first, stops, base, out, combiner, default, options, sums, total, filled, bag, stop
        )
        number += grid_warps() * POOL_TILES * run
