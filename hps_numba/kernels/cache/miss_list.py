"""Missed keys that the lookup only lists: for a kernel that reads host memory, or for host threads (``cache.staging``)."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.cache.ballots import clear_lowest, lane_for_tile, number_voters
from hps_numba.kernels.cache.batch import list_candidate
from hps_numba.kernels.cache.keys import load_key
from hps_numba.kernels.cache.probe import set_of
from hps_numba.kernels.cache.rows import copy_from_host, fill_answer
from hps_numba.kernels.cache.serve import count_misses
from hps_numba.kernels.layouts.cache import (
    MISSED_BYTES,
    MISSED_COUNT,
    MISSED_KEYS,
    STRIPE_BYTES,
    STRIPES,
    STRIPES_AT,
    WORKSPACE_ABSENT,
    WORKSPACE_ABSENT_LIST,
    WORKSPACE_MISSED,
    WORKSPACE_STAGE,
    WORKSPACE_STAGE_STRIDE,
)
from hps_numba.kernels.layouts.host_store import FIRST_SLOT, SLOT_MASK
from hps_numba.kernels.simt.reference import (
    add64,
    ballot,
    grid_tiles,
    is_first_lane,
    is_warp_leader,
    lane_in_warp,
    ld64,
    ld64_host,
    noinline,
    popcount,
    st64,
    tile_number,
    tiles_in_warp,
    warp_number,
)

__all__ = ["answer_missed_kernel", "list_group", "list_missed"]

# bound when specialized
FIXED = False
OUT_STRIDE = HOST_STRIDE = 4


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
    total = list_missed(missed, position, key, mine & legal)
    if is_warp_leader() and total > 0:
        count_misses(state, warp_number(), total, 0)
    illegal = ballot(mine & (not legal))
    while illegal != 0 and out != 0:
        active, lane = lane_for_tile(illegal)
        if active:
            fill_answer(out + (base + lane) * OUT_STRIDE, default)
        illegal = clear_lowest(illegal, tiles_in_warp())


def list_missed(missed, position, key, active):
    """List the keys of those lanes of a warp that have one (``active``), all lanes together.

    Returns how many there are. The order of the list is that in which warps arrive.   **Writes:** list.
    """
    votes = ballot(active)
    number = number_voters(missed + MISSED_COUNT, votes)
    entry = missed + MISSED_BYTES + 16 * number
    if active:
        st64(entry, position)
        st64(entry + 8, key)
        keys = ld64(missed + MISSED_KEYS)
        if keys != 0:
            st64(keys + 8 * number, key)
    return np.int64(popcount(votes))


def answer_missed_kernel(lines, sets, state, workspace, entries, words, rows, generation, count, out):
    """Write gathered rows to their places in the answer, and list those of the host store for the insertion.

    It leaves in the workspace what ``serve`` of ``cache.serve`` leaves. The rows are read where the host put them: contiguous
    in pinned memory they arrive as fast as by a copy, which would need memory on the device and a second read.

    Args (int64, addresses):
        lines, sets, state, workspace: of the cache and of the batch.
        entries: int64 ``[count, 2]``: position in the batch, key.
        words, rows: of the host: index word of each key, EMPTY if it has none; float32 row, else the default.
        generation: of the host store that the words belong to.
        out: of the answers, or 0.

    **Writes:** out, workspace, counters.
    """
    number = tile_number()
    while number < count:
        position, key = ld64(entries + 16 * number), ld64(entries + 16 * number + 8)
        word = ld64_host(words + 8 * number)
        target = out + position * OUT_STRIDE if out != 0 else np.int64(0)
        stage = np.int64(0)
        if not FIXED:  # whatever the word says: row and word are in flight together
            stage = ld64(workspace + WORKSPACE_STAGE) + ld64(workspace + WORKSPACE_STAGE_STRIDE) * position
        copy_from_host(target, stage, rows + number * HOST_STRIDE)
        if is_first_lane():
            if (word & SLOT_MASK) < FIRST_SLOT:
                list_absent(state, workspace, position)
            elif not FIXED:
                list_candidate(workspace, set_of(lines, sets, key), lines, key, position, word, generation)
        number += grid_tiles()


def list_absent(state, workspace, position):
    """Count a key that the host store lacks too, and list its position, if listed.   **Writes:** workspace, counters."""
    add64(state + STRIPES_AT + (position % STRIPES) * STRIPE_BYTES + 8, 1)
    absent_list = ld64(workspace + WORKSPACE_ABSENT_LIST)
    if absent_list != 0:
        st64(absent_list + 8 * add64(workspace + WORKSPACE_ABSENT, 1), position)
