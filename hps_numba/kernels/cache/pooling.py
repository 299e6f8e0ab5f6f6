"""Pooled lookup: the rows of each bag of keys, combined to one row, in one kernel and without the rows in between.

A tile of lanes takes a *run* of consecutive bags, whose keys lie side by side. Each lane finds the row of one key; then the
tile walks through the rows in order, several in flight whatever the ends of bags, and adds them up in registers. An element is
added by one lane, in order of position, in float32, multiplication and addition rounded apart: CPU and GPU agree bit for bit.
Rows are never split over passes, so that a pooled row is made of rows that were whole at one time.

The functions on a *part* (the elements of a row that a lane has) stand here for one lane that has the whole row, an array;
``kernels.simt.cuda_pooling`` has those for a GPU, where a part is in registers.   (spec 2.3)
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.cache.batch import list_newcomer
from hps_numba.kernels.cache.lookup import count_misses, find_entry, find_settled, load_key, read_validate, touch
from hps_numba.kernels.cache.probe import (
    alternate_set_of,
    find_in_host,
    guard_enter,
    guard_leave,
    primary_line_of,
    row_at,
    set_of,
)
from hps_numba.kernels.cache.rows import copy_from_host, element_of_row, put_answer, scale_of_row
from hps_numba.kernels.dtypes import FLOAT32
from hps_numba.kernels.layouts.cache import (
    BUSY,
    DESC_ROWS,
    LINE_BYTES,
    OVERFLOW,
    SCORES_AT,
    STATE_CALLS,
    STATE_HOST,
    STATE_KEYS,
    STATE_NOW,
    WAYS_PER_LINE,
    WORKSPACE_ASSUME,
    WORKSPACE_BUCKETS,
    WORKSPACE_STAGE,
    WORKSPACE_STAGE_STRIDE,
)
from hps_numba.kernels.layouts.host_store import FIRST_SLOT, SLOT_MASK
from hps_numba.kernels.simt.reference import (
    add64,
    any_in_warp,
    ballot,
    bits_float,
    count_in_warp,
    ctz,
    float_bits,
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
    shfl,
    sync_warp,
    tile_in_warp,
    tiles_in_warp,
    warp_number,
)

__all__ = [
    "COMBINERS",
    "EMPTY_DEFAULT",
    "EQUAL",
    "MAX_ROWS",
    "NO_ROW",
    "OFFSETS32",
    "OPEN_END",
    "PADDED",
    "fits_shared",
    "pool_blocks",
    "pool_kernel",
    "pool_lanes",
    "pool_registers",
    "pool_run",
]

#: numbers of the combiners
SUM, MEAN, SQRTN, MAX = range(4)
COMBINERS = {"sum": SUM, "mean": MEAN, "sqrtn": SQRTN, "max": MAX}

#: options: skip keys equal to ``padding``; empty bags get the default; offsets are int32; the last offset is left out; all bags
#: have as many keys, and the argument ``offsets`` says how many
PADDED, EMPTY_DEFAULT, OFFSETS32, OPEN_END, EQUAL = 1, 2, 4, 8, 16

NOWHERE = 1  # in place of the address of a row: the default
NO_ROW = -1  # in place of the number of a row, an int32 taken as unsigned
MAX_ROWS = (1 << 32) - 1  # of a cache: more than it may have

THREADS = 128  # of a block
_MOST_BLOCKS = 1 << 20
_ROWS_OF_RUN = 16  # a run is so long that a tile has so many rows to walk through, if bags are short

# bound when built
FIXED = COUNTED = False
DIM = LANES = 1
OUT_STRIDE = HOST_STRIDE = ROW_STRIDE = 4
POOL_LANES = POOL_TILES = POOL_DEPTH = 1  # lanes that share a bag, such tiles in a warp, rows in flight (1 or 4)
POOL_MANY = False  # 4 rows are in flight: a GPU


def policy_touch(score, now, count):
    """The policy's, bound when built."""
    return score


# -- launch ---------------------------------------------------------------------


def pool_lanes(dim: int) -> int:
    """Lanes that share a bag on a GPU: 16 bytes of a float32 row each, if it can be."""
    pieces = dim // 4 if dim % 4 == 0 else dim
    return min(32, max(4, 1 << (pieces - 1).bit_length()))


def fits_shared(dim: int, row_type: int) -> bool:
    """Rows in flight go to shared memory, of a GPU that can (compute capability 8.0): pieces of 16 bytes, in up to 32 KiB."""
    return row_type == FLOAT32 and dim % 4 == 0 and dim <= 256


def pool_registers(dim: int, row_type: int, *, copies: bool = True) -> int:
    """Most registers of a thread: 20 warps on a multiprocessor, 12 if rows in flight need registers too.

    ``copies``: the chip copies to shared memory by itself (sm_80 and later).
    """
    return 96 if copies and fits_shared(dim, row_type) else 168


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


def new_four(number):
    """Room for four rows in flight: there is room ``number`` 0 and 1."""
    return np.zeros((4, DIM), np.float32)


def load_four(four, rows, row, number):
    """Four rows on their way: ``row`` is the number of the row that each lane found (int32, taken as unsigned) or NO_ROW; those
    of lane ``number`` of the tile and the next three."""
    for d in range(4):
        if row != NO_ROW:
            load_part(four[d], rows + np.int64(np.uint32(row)) * ROW_STRIDE)
    return four


def await_four(later):
    """Four rows are there, if no more than ``later`` times four, 0 or 1, were asked for after them."""


def part_of(four, d):
    """The part of one of four rows."""
    return four[d]


def word_of_lane(value, number):
    """The int32 that lane ``number`` of the tile has, of those that share a bag."""
    return value


def float_of_lane(value, number):
    """The float32 that lane ``number`` of the tile has."""
    return value


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


def turned_part(part):
    """Another part that gives this one if it is turned again."""
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


def sum_part(sums, part):
    """``add_part`` with a weight of 1."""
    return add_part(sums, part, np.float32(1.0))


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


def find_behind(lines, sets, state, key, i, workspace, wanted):
    """Address of the row of a key that the cache lacks, or NOWHERE; one key for each tile of a warp, inside a guard.

    A row of the host store is staged, and the key listed for insertion, as a lookup does.   **Writes:** workspace.
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
    found = np.int64(NOWHERE)
    if present:
        found = content + slot * HOST_STRIDE
        stage = ld64(workspace + WORKSPACE_STAGE)
        if stage != 0:
            stage += ld64(workspace + WORKSPACE_STAGE_STRIDE) * i
            copy_from_host(np.int64(0), stage, found)
            found = stage
    lists = (not FIXED) and ld64(workspace + WORKSPACE_BUCKETS) != 0
    if lists and is_first_lane() and wanted and (present or ld64(workspace + WORKSPACE_ASSUME) != 0):
        list_newcomer(workspace, set_of(lines, sets, key), lines, key, i, word, content)
    sync_warp()
    return found


def settle_missing(lines, sets, state, key, position, workspace, wanted, guarded):
    """``(entry, tags, behind)`` of the keys of those lanes of a warp that found none, or a writer at work.

    ``guarded``: 1 if the warp is inside a guard; when this returns it is.   **Writes:** workspace, counters, guard.
    """
    noinline()
    entry, tags, behind = np.int64(0), np.int64(0), np.int64(0)
    if ld64(state + STATE_HOST) == 0 and wanted:  # nobody else has a row that a writer is at work on
        entry, tags = find_settled(lines, sets, key)
    missing = ballot(wanted and entry == 0)
    stripe = warp_number()
    if is_warp_leader() and guarded == 0:
        guard_enter(state, stripe)
    sync_warp()
    absent = np.int64(0)
    total = popcount(missing)
    while missing != 0:
        mine = missing
        for _ in range(tile_in_warp()):
            mine &= mine - 1
        searching = mine != 0
        place = ctz(mine) if searching else np.int64(0)
        wanted_key = shfl(key, place)
        at = shfl(position, place)
        found = find_behind(lines, sets, state, wanted_key, at, workspace, searching)
        absent += count_in_warp(searching & (found == NOWHERE))
        rank = popcount(missing & ((1 << lane_in_warp()) - 1))
        answer = shfl(found, min(rank, tiles_in_warp() - 1) * LANES)
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
    noinline()
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


def close_bags(
    at, stops, first, out, count, combiner, default, options, sums, total, filled, bag, stop
):  # fmt: skip
    """Write the bags that end at or before position ``at``; ``(sums, total, filled, bag, stop)`` of the one that goes on.

    **Writes:** out.
    """
    while any_in_warp((at >= stop) & (bag < count)):
        if (at >= stop) & (bag < count):
            answer_bag(out + (first + np.int64(bag)) * OUT_STRIDE, sums, total, filled, combiner, default, options)
            sums = fill_part(sums, start_of(combiner))
            total = np.float32(0.0)
            filled = False
            bag = np.int32(bag + 1)
        stop = word_of_lane(stops, min(bag, POOL_LANES - 1))
    return sums, total, filled, bag, stop


def use_row(sums, total, filled, part, weight, used, number, combiner):
    """``(sums, total, filled)`` with the row of lane ``number``, if that is among the ``used`` ones (bits).

    ``part``: of that row.   ``weight``: of each lane.
    """
    factor = float_of_lane(weight, number)
    there = (used >> number) & 1 != 0
    if there:
        if combiner == MAX:
            sums = max_part(sums, part)
        else:
            sums = add_part(sums, part, factor)
            total = add_rounded(total, multiply_rounded(factor, factor) if combiner == SQRTN else factor)
    return sums, total, filled | there


def use_four(
    sums, total, filled, bag, stop, four, at, number, end, have, weight, weighted, stops, first, out, count, combiner, default,
    options,
):  # fmt: skip
    """``(sums, total, filled, bag, stop)`` with the rows at positions ``at`` to ``at + 3``, of lane ``number`` and the next.

    ``have``: bits of the lanes of the tile that have a row.   ``weight``: of each lane, 1 if not ``weighted``. Mostly all
    four are there, no bag ends among them.

    **Writes:** out.
    """
    sums, total, filled, bag, stop = close_bags(
        at, stops, first, out, count, combiner, default, options, sums, total, filled, bag, stop
    )
    busy = at < end
    if any_in_warp(busy & (((have >> number) & 15 != 15) | (stop < at + 4))):
        for d in range(rows_in_flight()):
            sums, total, filled, bag, stop = close_bags(
                np.int32(at + d), stops, first, out, count, combiner, default, options, sums, total, filled, bag, stop
            )
            part = part_of(four, d)
            sums, total, filled = use_row(sums, total, filled, part, weight, have, number + d, combiner)
    elif weighted:
        factor0, factor1 = float_of_lane(weight, number), float_of_lane(weight, number + 1)
        factor2, factor3 = float_of_lane(weight, number + 2), float_of_lane(weight, number + 3)
        if busy:
            sums = add_part(add_part(sums, part_of(four, 0), factor0), part_of(four, 1), factor1)
            sums = add_part(add_part(sums, part_of(four, 2), factor2), part_of(four, 3), factor3)
            if combiner == SQRTN:
                factor0, factor1 = multiply_rounded(factor0, factor0), multiply_rounded(factor1, factor1)
                factor2, factor3 = multiply_rounded(factor2, factor2), multiply_rounded(factor3, factor3)
            total = add_rounded(add_rounded(add_rounded(add_rounded(total, factor0), factor1), factor2), factor3)
            filled = True
    elif busy:
        sums = sum_part(sum_part(sums, part_of(four, 0)), part_of(four, 1))
        sums = sum_part(sum_part(sums, part_of(four, 2)), part_of(four, 3))
        total = add_rounded(total, np.float32(4.0))  # as 1 four times: no bag has more than MAX_BATCH keys, 2**24
        filled = True
    return sums, total, filled, bag, stop


def accumulate_slow_path(
    lines, rows, sets, state, keys, workspace, sums, total, filled, bag, stop, i, end, count, stops, first, weights, now, out,
    combiner, default, options, padding,
):  # fmt: skip
    """``(sums, total, filled, bag, stop, i, end, count, stops, first, now)`` with the rows of the keys of a tile from position
    ``i`` on, whatever there is: rows from behind the cache, maxima, and writers at work, for which each row is seen to be still
    the same before it is used.

    Out of line, so that its many registers are not those of every pooled lookup. What it returns as it was takes no register
    meanwhile where it is called. ``sums`` to ``first`` are given with all bits turned: as they are, the compiler would have one
    place for each, there and here, and that would be in memory, as there are too few registers here.

    **Writes:** out, scores, workspace, counters, guard.
    """
    noinline()
    sums, total, filled = turned_part(sums), bits_float(~total & 0xFFFFFFFF), not filled
    bag, stop, i, end = np.int32(~bag), np.int32(~stop), np.int32(~i), np.int32(~end)
    count, stops, first = np.int32(~count), np.int32(~stops), ~first
    base = lane_in_warp() // POOL_LANES * POOL_LANES
    part0, part1, part2, part3 = new_part(), new_part(), new_part(), new_part()
    lane = lane_in_warp() % POOL_LANES
    position = np.int64(i) + lane
    key, entry, tags, row, behind, guarded = find_rows(
        lines, rows, sets, state, keys, position, np.int64(end), options, padding, workspace
    )
    weight = weight_at(weights, position, end)
    for j in range(0, POOL_LANES, POOL_DEPTH):
        if any_in_warp(i + j < end):
            mine = (lane >= j) & (lane < j + POOL_DEPTH)
            again = True
            while again:
                part0 = load_part(part0, shfl(row, base + j))
                if POOL_MANY:
                    part1 = load_part(part1, shfl(row, base + j + 1))
                    part2 = load_part(part2, shfl(row, base + j + 2))
                    part3 = load_part(part3, shfl(row, base + j + 3))
                await_parts(part0, part1, part2, part3)
                changed = mine & (row != 0) and read_validate(entry, tags, key)
                again = any_in_warp(changed)
                if again:
                    late, late_tags, late_behind = settle_missing(
                        lines, sets, state, key, position, workspace, changed, np.int64(guarded)
                    )
                    guarded = True
                    if changed:
                        entry, tags, behind = late, late_tags, late_behind
                        row = row_at(lines, rows, entry, tags >> 32) if entry != 0 else np.int64(0)
            if mine & (row != 0):
                touch(lines, state, workspace, entry, tags, now)
            some = any_in_warp(behind != 0)
            used = ballot((row != 0) | (behind != 0)) >> base
            for d in range(rows_in_flight()):
                sums, total, filled, bag, stop = close_bags(
                    np.int32(i + j + d),
                    stops,
                    first,
                    out,
                    count,
                    combiner,
                    default,
                    options,
                    sums,
                    total,
                    filled,
                    bag,
                    stop,
                )
                part = pick_part(part0, part1, part2, part3, d)
                if some:
                    part = behind_part(part, shfl(behind, base + j + d), default)
                sums, total, filled = use_row(sums, total, filled, part, weight, used, j + d, combiner)
    if guarded:
        sync_warp()
        if is_warp_leader():
            guard_leave(state, warp_number())
    return sums, total, filled, bag, stop, np.int32(i + POOL_LANES), end, count, stops, first, now


def key_at(keys, position, end, options, padding):
    """``(key, wanted, legal)``: the key at a position, wanted if that is before ``end`` and the key no padding."""
    wanted = position < end
    key, legal = load_key(keys, np.int64(position) if wanted else np.int64(0))
    return key, wanted & (not ((options & PADDED) != 0 and key == padding)), legal


def weight_at(weights, position, end):
    """The weight of a key, 1 if there are none."""
    return bits_float(ld32(weights + 4 * np.int64(position))) if (weights != 0) & (position < end) else np.float32(1.0)


def find_rows(lines, rows, sets, state, keys, position, end, options, padding, workspace):
    """``(key, entry, tags, row, behind, guarded)``: where each lane finds the row of the key at its position.

    ``row`` is its address in the cache, or 0; then ``behind`` is that of float32 elements, or NOWHERE, or 0 if there is no key
    to be added.   **Writes:** workspace, counters, guard.
    """
    key, wanted, legal = key_at(keys, position, end, options, padding)
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
        late, late_tags, late_behind = settle_missing(lines, sets, state, key, position, workspace, missing, np.int64(0))
        if missing:
            entry, tags, behind = late, late_tags, late_behind
    row = row_at(lines, rows, entry, tags >> 32) if entry != 0 else np.int64(0)
    return key, entry, tags, row, behind, guarded


def find_here(lines, sets, keys, position, end, options, padding, now):
    """``(row, entry, meta, stale, lacks)``: where each lane finds the key at its position in the cache; calls nothing.

    ``row`` is the number of its row, or NO_ROW; ``meta`` that of its line (int32 both, the bits of a uint32: a cache has less
    than 2**32 - 1 rows).   ``stale``: a hit changes its score.   ``lacks``: there is a key to be added and it has no row here,
    or a writer is at work on it.
    """
    key, wanted, legal = key_at(keys, position, end, options, padding)
    entry, tags, row, stale = np.int64(0), np.int64(0), np.int32(NO_ROW), False
    if wanted & legal:
        line = set_of(lines, sets, key) + primary_line_of(key)
        entry, tags = probe_alone(line, key)
        looked = 1
        while entry == 0 and looked < 4 and (looked != 2 or tags & OVERFLOW != 0):
            line = alternate_set_of(lines, sets, key) + primary_line_of(key) if looked == 2 else line ^ LINE_BYTES
            entry, tags = probe_alone(line, key)
            looked += 1
        if entry != 0 and tags & BUSY == 0:
            if FIXED:
                row = as_word(tags >> 32)
            else:
                line = np.int64(np.uint64(entry - lines) >> np.uint64(6))
                row = as_word(line * WAYS_PER_LINE + ((entry & 63) >> 3))
                score = (tags >> 32) & 0xFFFFFFFF
                stale = COUNTED or np.int64(policy_touch(score, now, 1)) & 0xFFFFFFFF != score
    return row, entry, as_word(tags), stale, wanted & (row == NO_ROW)


def as_word(value):
    """The lower 32 bits as int32."""
    return np.int32((value & 0xFFFFFFFF) - ((value & 0x80000000) << 1))


def entry_of(lines, row, entry):
    """The ``entry`` of a row: made of its number if it can be, which takes no registers in the meantime."""
    if FIXED:
        return entry
    number = np.uint32(row)
    line = number // np.uint32(WAYS_PER_LINE)
    return lines + np.int64(line) * LINE_BYTES + np.int64(np.uint32(number - line * np.uint32(WAYS_PER_LINE))) * 8


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
    run = min(run, POOL_LANES)
    lane = lane_in_warp() % POOL_LANES
    first = (warp_number() * POOL_TILES + lane_in_warp() // POOL_LANES) * run
    while any_in_warp(first < bags):
        begin, last = min(first, bags), min(first + run, bags)
        stops = np.int32(bag_start(offsets, min(begin + 1 + lane, last), bags, n, options))
        i = np.int32(bag_start(offsets, begin, bags, n, options))
        count = np.int32(last - begin)
        bag, filled, total = np.int32(0), False, np.float32(0.0)
        stop = word_of_lane(stops, 0)
        end = word_of_lane(stops, run - 1)
        sums = fill_part(new_part(), start_of(combiner))
        while any_in_warp(i < end):
            if POOL_MANY and combiner != MAX:
                four, spare = new_four(0), new_four(1)
                position = np.int32(i + lane)
                row, entry, meta, stale, lacks = find_here(lines, sets, keys, position, end, options, padding, now)
                weight = weight_at(weights, position, end)
                await_four(0)
                four = load_four(four, rows, row, 0)
                settled = not any_in_warp(lacks)
                while settled:
                    then, then_total, then_filled, then_bag, then_stop = sums, total, filled, bag, stop
                    have = ballot(row != NO_ROW) >> (lane_in_warp() // POOL_LANES * POOL_LANES)
                    final = steps_of_tile() - POOL_DEPTH
                    for j in range(0, final, POOL_DEPTH):
                        if any_in_warp(i + j < end):
                            later = load_four(spare, rows, row, j + POOL_DEPTH)
                            await_four(1)
                            then, then_total, then_filled, then_bag, then_stop = use_four(
                                then, then_total, then_filled, then_bag, then_stop, four, np.int32(i + j), j, end, have,
                                weight, weights != 0, stops, first, out, count, combiner, default, options,
                            )  # fmt: skip
                            four, spare = later, four
                    position = np.int32(i + POOL_LANES + lane)
                    next_row, next_entry, next_meta, next_stale, lacks = find_here(
                        lines, sets, keys, position, end, options, padding, now
                    )
                    next_weight = weight_at(weights, position, end)
                    later = load_four(spare, rows, next_row, 0)
                    await_four(1)
                    then, then_total, then_filled, then_bag, then_stop = use_four(
                        then, then_total, then_filled, then_bag, then_stop, four, np.int32(i + final), final, end, have,
                        weight, weights != 0, stops, first, out, count, combiner, default, options,
                    )  # fmt: skip
                    four, spare = later, four
                    await_part(then)
                    entry, changed = entry_of(lines, row, entry), False
                    if row != NO_ROW:
                        key, _legal = load_key(keys, np.int64(i) + lane)
                        changed = read_validate(entry, np.int64(meta), key)
                    settled = not any_in_warp(changed)
                    if settled:
                        sums, total, filled, bag, stop = then, then_total, then_filled, then_bag, then_stop
                        if (row != NO_ROW) & stale:
                            score = np.int64(0) if COUNTED else ld32((entry & ~63) + SCORES_AT + ((entry & 63) >> 1))
                            touch(lines, state, workspace, entry, score << 32, now)
                        row, entry, meta, stale, weight = next_row, next_entry, next_meta, next_stale, next_weight
                        i = np.int32(i + POOL_LANES)
                        settled = any_in_warp(i < end) and not any_in_warp(lacks)
            if any_in_warp(i < end):
                sums, total, filled, bag, stop, i, end, count, stops, first, now = accumulate_slow_path(
                    lines, rows, sets, state, keys, workspace, turned_part(sums), ~float_bits(total), not filled,
                    np.int32(~bag), np.int32(~stop), np.int32(~i), np.int32(~end), np.int32(~count), np.int32(~stops), ~first,
                    weights, now, out, combiner, default, options, padding,
                )  # fmt: skip
        close_bags(max(i, end), stops, first, out, count, combiner, default, options, sums, total, filled, bag, stop)
        first += grid_warps() * POOL_TILES * run
