"""Look keys up: cache, host store, default value, in one kernel; what the cache lacked is listed for ``cache.insert``."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.cache.find import find_by_tile, find_entry, touch
from hps_numba.kernels.cache.keys import load_key
from hps_numba.kernels.cache.miss_list import list_group
from hps_numba.kernels.cache.probe import row_at
from hps_numba.kernels.cache.rows import copy_from_cache, copy_rows
from hps_numba.kernels.cache.seqlock import read_validate
from hps_numba.kernels.cache.serve import serve_group
from hps_numba.kernels.layouts.cache import BUSY, MISSED_OUT, STATE_CALLS, STATE_KEYS, STATE_NOW, WORKSPACE_MISSED
from hps_numba.kernels.simt.reference import (
    add64,
    ballot,
    grid_dependency_sync,
    grid_warps,
    is_first_lane,
    is_grid_leader,
    lane_in_warp,
    ld64,
    st64,
    tile_in_warp,
    tiles_of,
    warp_number,
)

__all__ = ["answer_batch", "list_kernel", "lookup_kernel"]

# bound when specialized
OUT_STRIDE = 4
GROUP = 1  # keys that a warp looks up at a time
BY_TILE = False  # a tile takes a key and reads both lines of its set at once: done sooner, with more to read
LISTS = False  # missing keys are only listed, for ``cache.miss_sorted`` or for threads of the host
ONE_GROUP = False  # there are as many warps as groups of keys


def lookup_kernel(lines, rows, sets, state, keys, n, out, default, workspace):
    """Write the row of each key to ``out``: from the cache, else from the host store, else ``default``.

    Small batches: a tile takes a key (BY_TILE), which is done soonest. Large ones: each lane searches for one key and a warp
    copies the rows of its lanes together, with the fewest instructions. What remains to be done for missing keys is not
    inlined: it takes many registers, and with few of them more warps hide the latency of memory.

    Args (int64, addresses in memory of the device unless said otherwise):
        lines, rows, sets: the cache.   state: of the cache.   keys: of ``n`` keys (KEY_FORM).
        out: of ``n`` rows, OUT_STRIDE bytes apart, or 0.   default: float32.   workspace: of this batch.

    **Writes:** out, scores, workspace, counters, guard.
    """
    grid_dependency_sync()
    answer_batch(lines, rows, sets, state, keys, n, out, default, workspace)


def list_kernel(lines, rows, sets, state, keys, n, out, default, workspace):
    """``lookup_kernel`` that reads no host memory: missing keys are listed (LISTS) and not answered.

    A kernel of its own, so that ``lookup_kernel`` needs no registers for it.   **Writes:** out, scores, workspace, list,
    counters.
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
            handle_missing(lines, rows, sets, state, keys, base, out, default, workspace, missing)
        if ONE_GROUP:
            break
        base += grid_warps() * GROUP


def handle_missing(lines, rows, sets, state, keys, base, out, default, workspace, missing):
    """``serve_group``, or ``list_group`` where others serve.   **Writes:** as they do."""
    if LISTS:
        list_group(state, keys, base, out, default, workspace, missing)
    else:
        serve_group(lines, rows, sets, state, keys, base, out, default, workspace, missing)


def try_cache(lines, rows, sets, state, key, target, now, workspace, active):
    """Copy rows from the cache; returns whether the key of this lane, or of its tile, was there with no writer at work on it.

    BY_TILE: a tile searches for its key and copies its row to ``target``. Else each lane searches for a key of its own, and all
    lanes of a warp copy the rows together, ``target`` being that of the first lane. A ``target`` of 0 is left out. Then the
    lines are validated.   **Writes:** target, scores.
    """
    entry, tags = np.int64(0), np.int64(0)
    if BY_TILE:
        entry, tags = find_by_tile(lines, sets, key)
    elif active:
        entry, tags = find_entry(lines, sets, key)
    if (tags & BUSY) != 0 or not active:
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
