"""Answer the keys that a cache lacks: from the host store, else with the default, and list them for the insertion."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.cache.ballots import clear_lowest, lane_for_tile
from hps_numba.kernels.cache.batch import list_candidate
from hps_numba.kernels.cache.find import find_settled
from hps_numba.kernels.cache.keys import load_key
from hps_numba.kernels.cache.probe import find_in_host, guard_enter, guard_leave, row_at, set_of
from hps_numba.kernels.cache.rows import copy_from_cache, copy_from_host, fill_answer
from hps_numba.kernels.cache.seqlock import read_validate
from hps_numba.kernels.layouts.cache import (
    DESC_GENERATION,
    DESC_ROWS,
    STATE_HOST,
    STRIPE_BYTES,
    STRIPES,
    STRIPES_AT,
    WORKSPACE_ABSENT,
    WORKSPACE_ABSENT_LIST,
    WORKSPACE_ASSUME,
    WORKSPACE_BUCKETS,
    WORKSPACE_STAGE,
    WORKSPACE_STAGE_STRIDE,
)
from hps_numba.kernels.layouts.host_store import FIRST_SLOT, SLOT_MASK
from hps_numba.kernels.simt.reference import (
    add64,
    count_in_warp,
    fence,
    is_first_lane,
    is_warp_leader,
    ld64,
    noinline,
    shfl,
    st64,
    sync_warp,
    tiles_in_warp,
    warp_number,
)

__all__ = [
    "count_misses",
    "find_in_store",
    "list_served",
    "lists_candidates",
    "serve",
    "serve_group",
    "stage_of",
    "wait_and_copy",
]

# bound when specialized
FIXED = False
OUT_STRIDE = HOST_STRIDE = 4


def find_in_store(state, key, active):
    """``(rows, generation, word, slot)`` of a key in the host store, by all tiles of a warp together, inside a guard.

    ``rows`` is the address of the store's rows; ``slot`` is negative if there is no row.   ``active``: this tile has a key.
    """
    descriptor = shfl(ld64(state + STATE_HOST), 0)  # it may change: one lane reads it for the whole warp
    rows = np.int64(0)
    generation = np.int64(0)
    slot = np.int64(-1)
    word = np.int64(0)
    if descriptor != 0:
        rows = ld64(descriptor + DESC_ROWS)
        generation = ld64(descriptor + DESC_GENERATION)  # before the word
        word = find_in_host(descriptor, key, active)
        slot = (word & SLOT_MASK) - FIRST_SLOT
    return rows, generation, word, slot


def stage_of(workspace, position):
    """Address where the row of a position is staged for the insertion, 0 if there is no stage."""
    stage = ld64(workspace + WORKSPACE_STAGE)
    if stage != 0:
        stage += ld64(workspace + WORKSPACE_STAGE_STRIDE) * position
    return stage


def lists_candidates(workspace):
    """Whether missing keys are listed for the insertion."""
    return (not FIXED) and ld64(workspace + WORKSPACE_BUCKETS) != 0


def serve(lines, sets, state, key, i, target, default, workspace, active):
    """Answer a key that the cache lacks, one for each tile of a warp; returns whether the host store has it.

    ``active``: this tile has a key, at position ``i`` of the batch.   **Writes:** target, workspace.
    """
    rows, generation, word, slot = find_in_store(state, key, active)
    present = active & (slot >= 0)
    if present:
        copy_from_host(target, stage_of(workspace, i), rows + slot * HOST_STRIDE)
    elif active and target != 0:
        fill_answer(target, default)
    if is_first_lane() and active:
        list_served(lines, sets, workspace, key, i, word, generation, present)
    sync_warp()
    return present


def list_served(lines, sets, workspace, key, i, word, generation, present):
    """List a key that was answered for the insertion, or as one that no tier has; by one lane.   **Writes:** workspace."""
    if lists_candidates(workspace) and (present or ld64(workspace + WORKSPACE_ASSUME) != 0):
        list_candidate(workspace, set_of(lines, sets, key), lines, key, i, word, generation)
    elif not present:
        absent_list = ld64(workspace + WORKSPACE_ABSENT_LIST)
        if absent_list != 0:
            st64(absent_list + 8 * add64(workspace + WORKSPACE_ABSENT, 1), i)


def serve_group(lines, rows, sets, state, keys, base, out, default, workspace, missing):
    """Serve the keys of a warp that are in ``missing`` (bits, from position ``base``), as many at a time as it has tiles.

    **Writes:** as ``serve``, counters, guard.
    """
    noinline()
    stripe = warp_number()
    if is_warp_leader():
        guard_enter(state, stripe)
    sync_warp()
    total = np.int64(0)
    absent = np.int64(0)
    while missing != 0:
        active, lane = lane_for_tile(missing)
        position = base + lane
        key, legal = load_key(keys, position)
        target = out + position * OUT_STRIDE if out != 0 else np.int64(0)
        if active and not legal and out != 0:
            fill_answer(target, default)
        active = active & legal
        if active and ld64(state + STATE_HOST) == 0:  # only the cache has the row that a writer is at work on
            active = not wait_and_copy(lines, rows, sets, key, target)
        present = serve(lines, sets, state, key, position, target, default, workspace, active)
        total += count_in_warp(active)
        absent += count_in_warp(active & (not present))
        missing = clear_lowest(missing, tiles_in_warp())
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
