"""Serve the keys that a large lookup missed and only listed, by kernels of their own, in the order of their rows in memory.

*Why.* A device reads random rows of a large table as fast as it can translate their addresses, which is far slower than the
bus, and its TLB covers little (on an H200 some 0.7 GiB of host memory). In the order of addresses most rows are near one that
was just read: 131,072 rows of 128 bytes take 346 us from 1 GiB instead of 1,230, and 1,096 us from 4 GiB instead of 2,838. So
the lookup only lists missed keys; a second kernel looks for the region of the row of each, a third sorts the keys by region (a
counting sort: the second counted them), and a fourth serves them in that order.

*Why the second is a kernel of its own.* A lookup that looks for regions itself has few of its lanes at work on that, and all of
them wait: a million keys of which 186,000 miss took 333 us instead of 110 on an H200.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.cache.probe import find_in_host_by_lane, guard_enter, guard_leave
from hps_numba.kernels.cache.serve import count_misses, serve, wait_and_copy
from hps_numba.kernels.layouts.cache import (
    DESC_GENERATION,
    DESC_ROWS,
    DESC_SHIFT,
    MISSED_BYTES,
    MISSED_COUNT,
    MISSED_COUNTS,
    MISSED_GATHERING,
    MISSED_OUT,
    MISSED_SORTED,
    MISSED_TICKET,
    PLACE_RANK,
    PLACE_REGION,
    REGIONS,
    STATE_HOST,
    WORKSPACE_OWN_LIST,
)
from hps_numba.kernels.layouts.gathering import FOUND, LISTED, RESOLVED, UNRESOLVED
from hps_numba.kernels.layouts.host_store import FIRST_SLOT, SLOT_MASK
from hps_numba.kernels.simt.reference import (
    add64,
    block_number,
    block_tiles,
    count_in_warp,
    count_one,
    fence,
    grid_blocks,
    grid_dependency_sync,
    grid_warps,
    is_block_leader,
    is_warp_leader,
    lane_in_warp,
    ld64,
    shfl,
    st64,
    sync_block,
    sync_warp,
    tile_in_warp,
    tiles_in_warp,
    warp_number,
)

__all__ = ["locate_missed_kernel", "serve_missed_kernel", "serve_sorted", "sort_listed", "sort_missed_kernel"]

# bound when specialized
LANES = 1
RESOLVES = False  # keys are listed with the addresses of their rows, and the first of them go to threads of the host
OUT_STRIDE = 4


def locate_missed_kernel(state, workspace, row_bytes):
    """Find for each key that ``list_kernel`` listed in the workspace in which region of the host store's rows its row is.

    That is recorded in the list, with the number of the key among those of its region. A key without a row is of the first.

    Only if the index is in the memory of the device: elsewhere it would be read over the bus once more, and all keys are of the
    first region.

    Args:
        row_bytes: of the host store's rows, to also record their addresses and the words of the index by which they were found,
            in the words of the gathering; or 0.

    **Writes:** list, words of the gathering, guard.
    """
    grid_dependency_sync()
    missed = ld64(workspace + WORKSPACE_OWN_LIST)
    count = ld64(missed + MISSED_COUNT)
    lanes = tiles_in_warp() * LANES
    base = warp_number() * lanes
    if base >= count:
        return
    stripe = warp_number()
    if is_warp_leader():
        guard_enter(state, stripe)
    sync_warp()
    descriptor = shfl(ld64(state + STATE_HOST), 0)  # it may change: one lane reads it for the whole warp
    shift = ld64(descriptor + DESC_SHIFT) if descriptor != 0 else np.int64(-1)
    resolved = ld64(ld64(missed + MISSED_GATHERING) + RESOLVED) if row_bytes != 0 else np.int64(0)
    if row_bytes != 0 and shift < 0 and is_warp_leader():
        add64(ld64(missed + MISSED_GATHERING) + UNRESOLVED, 1)
    while base < count:
        number = base + lane_in_warp()
        if number < count:
            if shift < 0:
                record_region(missed, number, np.int64(0))
            else:
                locate(missed, descriptor, shift, number, resolved, row_bytes)
        base += grid_warps() * lanes
    sync_warp()
    if is_warp_leader():
        guard_leave(state, stripe)


def locate(missed, descriptor, shift, number, resolved, row_bytes):
    """``locate_missed_kernel`` for entry ``number`` of the list, by one lane.   **Writes:** list, words of the gathering."""
    generation = ld64(descriptor + DESC_GENERATION)  # before the word
    word = find_in_host_by_lane(descriptor, ld64(missed + MISSED_BYTES + 16 * number + 8))
    slot = (word & SLOT_MASK) - FIRST_SLOT
    record_region(missed, number, min(slot >> shift, np.int64(REGIONS - 1)) if slot >= 0 else np.int64(0))
    if row_bytes != 0:
        row = ld64(descriptor + DESC_ROWS) + slot * row_bytes if slot >= 0 else np.int64(0)
        st64(resolved + 24 * number, row)
        st64(resolved + 24 * number + 8, word)
        st64(resolved + 24 * number + 16, generation)


def record_region(missed, number, region):
    """Record the region of entry ``number`` of the list, and count it.   **Writes:** list."""
    entry = missed + MISSED_BYTES + 16 * number
    counter = missed + MISSED_COUNTS + 8 * region
    rank = count_one(counter) if region == 0 else add64(counter, 1)
    st64(entry, ld64(entry) | region << PLACE_REGION | rank << PLACE_RANK)


def sort_missed_kernel(workspace):
    """Sort what is listed in the workspace by regions.   **Writes:** list."""
    grid_dependency_sync()
    missed = ld64(workspace + WORKSPACE_OWN_LIST)
    sort_listed(missed, ld64(missed + MISSED_COUNT), 0)


def sort_listed(missed, count, gathered):
    """Sort a list of ``count`` keys by regions. The first ``gathered`` of them are for threads of the host (RESOLVES).

    **Writes:** list, words of the gathering.
    """
    lanes = tiles_in_warp() * LANES
    base = warp_number() * lanes
    if base >= count:
        return
    target = ld64(missed + MISSED_SORTED)
    before, first = scan_counts(missed)
    while base < count:
        active = base + lane_in_warp() < count
        place, key = np.int64(0), np.int64(0)
        if active:
            entry = missed + MISSED_BYTES + 16 * (base + lane_in_warp())
            place, key = ld64(entry), ld64(entry + 8)
        region = (place >> PLACE_REGION) & (REGIONS - 1)
        number = start_of(missed, before, first, region) + (place >> PLACE_RANK)
        if active:
            st64(target + 16 * number, place & ((1 << PLACE_REGION) - 1))
            st64(target + 16 * number + 8, key)
            if RESOLVES and number < gathered:
                sort_resolved(missed, base + lane_in_warp(), number)
        base += grid_warps() * lanes


def sort_resolved(missed, listed, number):
    """Keep what is known of a key that was listed, as that of ``number``.   **Writes:** words of the gathering."""
    gathering = ld64(missed + MISSED_GATHERING)
    resolved, found = ld64(gathering + RESOLVED) + 24 * listed, ld64(gathering + FOUND) + 16 * number
    st64(ld64(gathering + LISTED) + 8 * number, ld64(resolved))
    st64(found, ld64(resolved + 8))
    st64(found + 8, ld64(resolved + 16))


def scan_counts(missed):
    """``(before, first)`` for each lane of a warp: it has two regions; how many keys are of those before, and of its first."""
    if LANES == 1:
        return np.int64(0), np.int64(0)
    lane = lane_in_warp()
    counts = missed + MISSED_COUNTS + 16 * lane
    first = ld64(counts)
    both = first + ld64(counts + 8)
    through = both
    for step in (1, 2, 4, 8, 16):
        below = shfl(through, max(lane - step, 0))
        if lane >= step:
            through += below
    return through - both, first


def start_of(missed, before, first, region):
    """How many keys are of the regions before ``region``; all lanes of a warp together, each with a region of its own."""
    if LANES == 1:
        start = np.int64(0)
        for other in range(region):
            start += ld64(missed + MISSED_COUNTS + 8 * other)
        return start
    start, half = shfl(before, region >> 1), shfl(first, region >> 1)
    return start + half if region & 1 else start


def serve_missed_kernel(lines, rows, sets, state, default, workspace):
    """Answer what was listed and sorted in the workspace, from the host store, and list candidates for the insertion.

    Args (int64, addresses in memory of the device):
        lines, rows, sets, state: of the cache.   default: float32.   workspace: of the batch, whose list is empty afterwards.

    **Writes:** answers, workspace, counters, guard.
    """
    grid_dependency_sync()
    missed = ld64(workspace + WORKSPACE_OWN_LIST)
    count = ld64(missed + MISSED_COUNT)
    if block_number() * block_tiles() >= count:
        return
    step = grid_warps() * tiles_in_warp()
    serve_sorted(lines, rows, sets, state, default, workspace, missed, warp_number() * tiles_in_warp(), count, step)
    sync_block()
    if is_block_leader():
        fence()
        blocks = min(grid_blocks(), (count + block_tiles() - 1) // block_tiles())
        if blocks == 1 or add64(missed + MISSED_TICKET, 1) == blocks - 1:
            for region in range(REGIONS):
                st64(missed + MISSED_COUNTS + 8 * region, 0)
            st64(missed + MISSED_TICKET, 0)
            st64(missed + MISSED_COUNT, 0)
            fence()


def serve_sorted(lines, rows, sets, state, default, workspace, missed, base, count, step):
    """The share of a warp in the ``count`` keys that were sorted: those of a tile each from ``base`` on, in steps.

    **Writes:** as ``serve``, counters, guard.
    """
    out, entries = ld64(missed + MISSED_OUT), ld64(missed + MISSED_SORTED)
    if base >= count:
        return
    stripe = warp_number()
    if is_warp_leader():
        guard_enter(state, stripe)
    sync_warp()
    absent = np.int64(0)
    while base < count:
        active = base + tile_in_warp() < count
        entry = entries + 16 * (base + tile_in_warp() if active else base)
        position, key = ld64(entry), ld64(entry + 8)
        target = out + position * OUT_STRIDE if out != 0 else np.int64(0)
        if active and ld64(state + STATE_HOST) == 0:  # only the cache has the row that a writer is at work on
            active = not wait_and_copy(lines, rows, sets, key, target)
        present = serve(lines, sets, state, key, position, target, default, workspace, active)
        absent += count_in_warp(active & (not present))
        base += step
    if is_warp_leader():
        guard_leave(state, stripe)
        if absent > 0:
            count_misses(state, stripe, 0, absent)
