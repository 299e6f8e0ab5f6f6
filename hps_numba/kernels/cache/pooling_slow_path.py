"""The slow path of a pooled lookup: keys that the cache lacks, maxima, and rows that a writer is at work on."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.cache.bags import BagSums, Run, add_row, close_bags, key_at, weight_at
from hps_numba.kernels.cache.ballots import clear_lowest, lane_for_tile, rank_of_lane
from hps_numba.kernels.cache.batch import list_candidate
from hps_numba.kernels.cache.find import find_entry, find_settled, touch
from hps_numba.kernels.cache.parts import (
    await_parts,
    host_part,
    inverted_part,
    load_part,
    new_part,
    pick_part,
    rows_in_flight,
)
from hps_numba.kernels.cache.probe import guard_enter, guard_leave, row_at, set_of
from hps_numba.kernels.cache.rows import copy_from_host
from hps_numba.kernels.cache.seqlock import read_validate
from hps_numba.kernels.cache.serve import count_misses, find_in_store, lists_candidates, stage_of
from hps_numba.kernels.layouts.cache import BUSY, STATE_HOST, WORKSPACE_ASSUME
from hps_numba.kernels.layouts.pooling import DEFAULT_ROW
from hps_numba.kernels.simt.reference import (
    any_in_warp,
    ballot,
    bits_float,
    count_in_warp,
    float_bits,
    is_first_lane,
    is_warp_leader,
    lane_in_warp,
    ld64,
    noinline,
    popcount,
    shfl,
    sync_warp,
    tiles_in_warp,
    warp_number,
)

__all__ = ["accumulate_slow_path", "inverted"]

# bound when specialized
LANES = 1
HOST_STRIDE = 4
POOL_LANES = POOL_DEPTH = 1  # lanes that share a bag, rows in flight (1 or 4)
POOL_MANY = False  # 4 rows are in flight: a GPU


def inverted(run, bags, i):
    """``(run, bags, i)`` with all bits inverted, as ``accumulate_slow_path`` takes them."""
    run = Run(~run.first, np.int32(~run.count), np.int32(~run.stops), np.int32(~run.end))
    sums, total = inverted_part(bags.sums), ~float_bits(bags.total)
    return run, BagSums(sums, total, not bags.filled, np.int32(~bags.bag), np.int32(~bags.stop)), np.int32(~i)


def restored(away):
    """``(run, bags, i)`` as they were before ``inverted``."""
    run, bags, i = away
    run = Run(~run.first, np.int32(~run.count), np.int32(~run.stops), np.int32(~run.end))
    sums, total = inverted_part(bags.sums), bits_float(~bags.total & 0xFFFFFFFF)
    return run, BagSums(sums, total, not bags.filled, np.int32(~bags.bag), np.int32(~bags.stop)), np.int32(~i)


def accumulate_slow_path(cache, call, away, now):
    """Add the rows of the keys of a tile from position ``i`` on to its bags, wherever they are.

    ``away``: ``inverted(run, bags, i)``. As they are, the compiler would keep one location for each, here and in the caller,
    and that would be local memory, as there are too few registers here. Returns the elements of ``bags``, ``i``, those of
    ``run``, and ``now``: what is returned unchanged takes no register in the caller meanwhile.

    Not inlined, so that its many registers are not those of every pooled lookup.

    **Writes:** out, scores, workspace, counters, guard.
    """
    noinline()
    run, bags, i = restored(away)
    sums, total, filled, bag, stop = bags
    lines, rows, sets, state, workspace = cache
    base = lane_in_warp() // POOL_LANES * POOL_LANES
    part0, part1, part2, part3 = new_part(), new_part(), new_part(), new_part()
    lane = lane_in_warp() % POOL_LANES
    position = np.int64(i) + lane
    key, entry, tags, row, host_row, guarded = find_rows(cache, call, position, np.int64(run.end))
    weight = weight_at(call, position, run.end)
    for j in range(0, POOL_LANES, POOL_DEPTH):
        if any_in_warp(i + j < run.end):
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
                    new_entry, new_tags, new_host_row = settle_missing(
                        lines, sets, state, key, position, workspace, changed, np.int64(guarded)
                    )
                    guarded = True
                    if changed:
                        entry, tags, host_row = new_entry, new_tags, new_host_row
                        row = row_at(lines, rows, entry, tags >> 32) if entry != 0 else np.int64(0)
            if mine & (row != 0):
                touch(lines, state, workspace, entry, tags, now)
            some = any_in_warp(host_row != 0)
            used = ballot((row != 0) | (host_row != 0)) >> base
            for d in range(rows_in_flight()):
                bags = close_bags(run, call, BagSums(sums, total, filled, bag, stop), np.int32(i + j + d))
                part = pick_part(part0, part1, part2, part3, d)
                if some:
                    part = host_part(part, shfl(host_row, base + j + d), call.default)
                sums, total, filled, bag, stop = add_row(bags, part, weight, used, j + d, call.combiner)
    if guarded:
        sync_warp()
        if is_warp_leader():
            guard_leave(state, warp_number())
    return sums, total, filled, bag, stop, np.int32(i + POOL_LANES), run.end, run.count, run.stops, run.first, now


def find_rows(cache, call, position, end):
    """``(key, entry, tags, row, host_row, guarded)``: where each lane finds the row of the key at its position.

    ``row`` is its address in the cache, or 0; then ``host_row`` is that of float32 elements, or DEFAULT_ROW, or 0 if there is
    no key to be added.   **Writes:** workspace, counters, guard.
    """
    lines, rows, sets, state, workspace = cache
    key, active, legal = key_at(call, position, end)
    entry, tags = np.int64(0), np.int64(0)
    host_row = np.int64(DEFAULT_ROW) if active & (not legal) else np.int64(0)
    active = active & legal
    if active:
        entry, tags = find_entry(lines, sets, key)
        if tags & BUSY:
            entry = np.int64(0)
    missing = active & (entry == 0)
    guarded = any_in_warp(missing)
    if guarded:
        new_entry, new_tags, new_host_row = settle_missing(lines, sets, state, key, position, workspace, missing, np.int64(0))
        if missing:
            entry, tags, host_row = new_entry, new_tags, new_host_row
    row = row_at(lines, rows, entry, tags >> 32) if entry != 0 else np.int64(0)
    return key, entry, tags, row, host_row, guarded


def settle_missing(lines, sets, state, key, position, workspace, active, guarded):
    """``(entry, tags, host_row)`` of the keys of those lanes of a warp that found none, or a writer at work.

    ``guarded``: 1 if the warp is inside a guard; when this returns it is.   **Writes:** workspace, counters, guard.
    """
    noinline()
    entry, tags, host_row = np.int64(0), np.int64(0), np.int64(0)
    if ld64(state + STATE_HOST) == 0 and active:  # only the cache has the row that a writer is at work on
        entry, tags = find_settled(lines, sets, key)
    missing = ballot(active and entry == 0)
    stripe = warp_number()
    if is_warp_leader() and guarded == 0:
        guard_enter(state, stripe)
    sync_warp()
    absent = np.int64(0)
    total = popcount(missing)
    while missing != 0:
        searching, lane = lane_for_tile(missing)
        found = find_host_row(lines, sets, state, shfl(key, lane), shfl(position, lane), workspace, searching)
        absent += count_in_warp(searching & (found == DEFAULT_ROW))
        rank = rank_of_lane(missing)
        answer = shfl(found, min(rank, tiles_in_warp() - 1) * LANES)
        if (missing >> lane_in_warp()) & 1 and rank < tiles_in_warp():
            host_row = answer
        missing = clear_lowest(missing, tiles_in_warp())
    if is_warp_leader():
        count_misses(state, stripe, total, absent)
    return entry, tags, host_row


def find_host_row(lines, sets, state, key, i, workspace, active):
    """Address of the row of a key that the cache lacks, or DEFAULT_ROW; one key for each tile of a warp, inside a guard.

    A row of the host store is staged, and the key listed for insertion, as a lookup does.   **Writes:** workspace.
    """
    rows, generation, word, slot = find_in_store(state, key, active)
    present = active & (slot >= 0)
    found = np.int64(DEFAULT_ROW)
    if present:
        found = rows + slot * HOST_STRIDE
        stage = stage_of(workspace, i)
        if stage != 0:
            copy_from_host(np.int64(0), stage, found)
            found = stage
    if lists_candidates(workspace) and is_first_lane() and active and (present or ld64(workspace + WORKSPACE_ASSUME) != 0):
        list_candidate(workspace, set_of(lines, sets, key), lines, key, i, word, generation)
    sync_warp()
    return found
