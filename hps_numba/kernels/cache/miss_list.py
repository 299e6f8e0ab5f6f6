"""Missed keys that the lookup only lists: for a kernel that reads host memory, or for host threads (``cache.staging``)."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.cache.batch import list_newcomer
from hps_numba.kernels.cache.probe import set_of
from hps_numba.kernels.cache.rows import copy_from_host
from hps_numba.kernels.layouts.cache import (
    MISSED_BYTES,
    MISSED_COUNT,
    MISSED_KEYS,
    STRIPE_BYTES,
    STRIPES,
    STRIPES_AT,
    WORKSPACE_ABSENT,
    WORKSPACE_ABSENT_LIST,
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
    popcount,
    shfl,
    st64,
    tile_number,
)

__all__ = ["answer_missed_kernel", "list_missed"]

# bound when built
FIXED = False
OUT_STRIDE = HOST_STRIDE = 4


def list_missed(missed, position, key, wanted):
    """Enter the keys of the lanes of a warp that have one (``wanted``), all lanes together.

    Returns how many they are, and the address of the entry of this lane's. One count a warp: all warps fight for its address.
    The order of the list is that in which warps come.   **Writes:** list.
    """
    votes = ballot(wanted)
    total = np.int64(popcount(votes))
    first = np.int64(0)
    if is_warp_leader() and total > 0:
        first = add64(missed + MISSED_COUNT, total)
    number = shfl(first, 0) + np.int64(popcount(votes & ((np.int64(1) << lane_in_warp()) - 1)))
    entry = missed + MISSED_BYTES + 16 * number
    if wanted:
        st64(entry, position)
        st64(entry + 8, key)
        keys = ld64(missed + MISSED_KEYS)
        if keys != 0:
            st64(keys + 8 * number, key)
    return total, entry


def answer_missed_kernel(lines, sets, state, workspace, entries, words, rows, content, count, out):
    """Write gathered rows to their places in the answer, and list what the host store has for the insertion.

    What is left in workspace is what ``serve`` of ``cache.lookup`` leaves. The rows are read where the host put them: side by
    side in pinned memory they come as fast as by a copy, which would need memory on the device and be read again.

    Args (int64, addresses):
        lines, sets, state, workspace: of the cache and of the batch.
        entries: int64 ``[count, 2]``: position in the batch, key.
        words, rows: of the host: index word of each key, EMPTY if it has none; float32 row, then the default.
        content: address of the rows of the host store that the words belong to.
        out: of the answers, or 0.

    **Writes:** out, workspace, counters.
    """
    number = tile_number()
    while number < count:
        position, key = ld64(entries + 16 * number), ld64(entries + 16 * number + 8)
        word = ld64_host(words + 8 * number)
        target = out + position * OUT_STRIDE if out != 0 else np.int64(0)
        stage = np.int64(0)
        if not FIXED:  # whatever the word says: row and word are on their way together
            stage = ld64(workspace + WORKSPACE_STAGE) + ld64(workspace + WORKSPACE_STAGE_STRIDE) * position
        copy_from_host(target, stage, rows + number * HOST_STRIDE)
        if is_first_lane():
            if (word & SLOT_MASK) < FIRST_SLOT:
                list_absent(state, workspace, position)
            elif not FIXED:
                list_newcomer(workspace, set_of(lines, sets, key), lines, key, position, word, content)
        number += grid_tiles()


def list_absent(state, workspace, position):
    """Count a key that the host store lacks too, and list its position if that is wanted.   **Writes:** workspace, counters."""
    add64(state + STRIPES_AT + (position % STRIPES) * STRIPE_BYTES + 8, 1)
    absent_list = ld64(workspace + WORKSPACE_ABSENT_LIST)
    if absent_list != 0:
        st64(absent_list + 8 * add64(workspace + WORKSPACE_ABSENT, 1), position)
