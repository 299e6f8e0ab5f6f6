"""Serve the keys that a large lookup missed by two ways at once: threads of the host gather rows, and the device reads others.

*Why.* What limits a device that reads rows of a large table is the translation of their addresses: on an H200 in a virtual
machine some 30 million a second, however small the reads. Threads of the host have no such limit, and a copy of what they have
put together needs few translations. So a first kernel lists the missed keys, a second finds the addresses of their rows
(``locate_missed_kernel``), a third sorts them by region and chooses the first of them for the host, a fourth reads the others
in place. Meanwhile, on a stream of their own, the list is copied to the host, the host is asked, and copies bring what it has
gathered, group by group; a last kernel writes that to its places. ``layouts.gathering`` has the words.

In the last kernel each lane lists a key for the insertion, and then a tile copies a row at a time: with a key a tile, 186,000
rows of 128 bytes took 368 us on an H200, as each tile waited for the list.

Turned down: kernels that read the gathered rows themselves, and that write the list to host memory. Small reads and writes over
the bus wait for the same translations: 160,000 addresses took a millisecond, and take 30 microseconds as a copy.

*Why nothing can stand still.* Streams wait for marks of the host's threads only, and these for nothing: no lock, no call of the
driver, no GIL. A wait is put on a stream after the kernels that it needs.

*Why rows stay.* From before the first kernel until ``BATCHES_DONE`` says that it is over, the batch counts as a reader of the
host store (``cache.gathering``), so that no address that was listed is used for another row.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.cache.miss_sorted import serve_sorted, sort_listed
from hps_numba.kernels.cache.rows import copy_from_host, fill_answer
from hps_numba.kernels.cache.serve import count_misses, list_served, stage_of
from hps_numba.kernels.layouts.cache import (
    MISSED_COUNT,
    MISSED_COUNTS,
    MISSED_GATHERING,
    MISSED_OUT,
    MISSED_SORTED,
    REGIONS,
    WORKSPACE_OWN_LIST,
)
from hps_numba.kernels.layouts.gathering import (
    ASKED,
    BATCHES_DONE,
    DIRECT_ENDED_NS,
    DIRECT_NS,
    DIRECT_ROWS,
    FOUND,
    GATHERED,
    HOST_ENDED_NS,
    HOST_NS,
    HOST_ROWS,
    LANDING,
    READY,
    SHARED,
    STARTED_NS,
    TICKET,
    UNRESOLVED,
)
from hps_numba.kernels.layouts.host_store import FIRST_SLOT, SLOT_MASK
from hps_numba.kernels.simt.reference import (
    add64,
    ballot,
    clock_ns,
    fence,
    fence_host,
    grid_blocks,
    grid_dependency_sync,
    grid_warps,
    is_block_leader,
    is_grid_leader,
    is_warp_leader,
    lane_in_warp,
    ld64,
    max64,
    popcount,
    shfl,
    st64,
    st64_host,
    sync_block,
    tile_in_warp,
    tiles_in_warp,
    warp_number,
)

__all__ = ["ask_host_kernel", "place_gathered_kernel", "serve_rest_kernel", "share_missed_kernel", "time_copies_kernel"]

# bound when specialized
LANES = 1
OUT_STRIDE = HOST_STRIDE = 4


def share_missed_kernel(workspace, share, least, most):
    """Sort what is listed by regions, and choose the first rows of it for the host.

    Args:
        share: of the listed keys, in 1/65,536, that the host gathers.   least: rows for which the host is asked, or for none.
        most: rows for which it is asked.

    **Writes:** list, words of the gathering.
    """
    grid_dependency_sync()
    missed = ld64(workspace + WORKSPACE_OWN_LIST)
    gathering = ld64(missed + MISSED_GATHERING)
    count = ld64(missed + MISSED_COUNT)
    rows = min(count * share >> 16, most)
    if rows < least or ld64(gathering + UNRESOLVED) != 0:
        rows = np.int64(0)
    if is_grid_leader():
        st64(gathering + GATHERED, rows)
        now = clock_ns()
        for word in (STARTED_NS, HOST_ENDED_NS, DIRECT_ENDED_NS):
            st64(gathering + word, now)
    sort_listed(missed, count, rows)


def ask_host_kernel(gathering, batch, groups, group_rows):
    """Ask the host for the rows that ``share_missed_kernel`` chose; their list has been copied to it.

    Args:
        batch: its number.   groups: that a copy waits for, of ``group_rows`` rows each; those without rows are marked here.

    **Writes:** words of the gathering.
    """
    if is_grid_leader():
        rows, shared = ld64(gathering + GATHERED), ld64(gathering + SHARED)
        if rows > 0:
            st64_host(shared + ASKED, batch << 32 | rows)
        for group in range(groups):
            if group * group_rows >= rows:
                st64_host(shared + READY + 8 * group, batch)


def serve_rest_kernel(lines, rows, sets, state, default, workspace):
    """Answer those of the listed keys that the host was not asked for, from the host store.

    Args (int64, addresses in memory of the device):
        lines, rows, sets, state: of the cache.   default: float32.   workspace: of the batch.

    **Writes:** answers, workspace, counters, guard, words of the gathering.
    """
    grid_dependency_sync()
    missed = ld64(workspace + WORKSPACE_OWN_LIST)
    gathering = ld64(missed + MISSED_GATHERING)
    count, gathered = ld64(missed + MISSED_COUNT), ld64(gathering + GATHERED)
    base, step = gathered + warp_number() * tiles_in_warp(), grid_warps() * tiles_in_warp()
    if base < count:
        serve_sorted(lines, rows, sets, state, default, workspace, missed, base, count, step)
        if is_warp_leader():
            max64(gathering + DIRECT_ENDED_NS, clock_ns())


def time_copies_kernel(gathering):
    """Note that the copies of a batch have ended.   **Writes:** words of the gathering."""
    if is_grid_leader():
        max64(gathering + HOST_ENDED_NS, clock_ns())


def place_gathered_kernel(lines, sets, state, default, workspace, batch):
    """Answer the keys whose rows the host has gathered, and end the batch.

    Args:
        lines, sets, state, default, workspace: as for ``serve_rest_kernel``.   batch: its number.

    **Writes:** answers, workspace, list, counters, words of the gathering.
    """
    grid_dependency_sync()
    missed = ld64(workspace + WORKSPACE_OWN_LIST)
    gathering = ld64(missed + MISSED_GATHERING)
    gathered, found, landing = ld64(gathering + GATHERED), ld64(gathering + FOUND), ld64(gathering + LANDING)
    out, entries = ld64(missed + MISSED_OUT), ld64(missed + MISSED_SORTED)
    absent = np.int64(0)
    lanes = tiles_in_warp() * LANES
    base = warp_number() * lanes
    while base < gathered:
        active = base + lane_in_warp() < gathered
        position, present = np.int64(0), False
        if active:
            at = base + lane_in_warp()
            position, key = ld64(entries + 16 * at), ld64(entries + 16 * at + 8)
            word, generation = ld64(found + 16 * at), ld64(found + 16 * at + 8)
            present = (word & SLOT_MASK) >= FIRST_SLOT
            list_served(lines, sets, workspace, key, position, word, generation, present)
        here = ballot(present)
        absent += popcount(ballot(active)) - popcount(here)
        place_rows(out, workspace, default, landing, base, gathered, position, here)
        base += grid_warps() * lanes
    if is_warp_leader() and absent > 0:
        count_misses(state, warp_number(), 0, absent)
    sync_block()
    if is_block_leader():
        fence()
        if add64(gathering + TICKET, 1) == grid_blocks() - 1:
            end_gathering(missed, gathering, gathered, batch)


def place_rows(out, workspace, default, landing, base, gathered, position, here):
    """Write the answers of a warp's keys, from number ``base`` of the list on: a tile copies a row at a time.

    ``position``: in the batch, of each lane's key.   ``here``: bits of the lanes whose key has a row.

    **Writes:** answers, stage.
    """
    for first in range(0, tiles_in_warp() * LANES, tiles_in_warp()):
        lane = first + tile_in_warp()
        to = shfl(position, lane)
        if base + lane < gathered:
            target = out + to * OUT_STRIDE if out != 0 else np.int64(0)
            if (here >> lane) & 1 != 0:
                copy_from_host(target, stage_of(workspace, to), landing + (base + lane) * ((HOST_STRIDE + 63) & ~63))
            elif target != 0:
                fill_answer(target, default)


def end_gathering(missed, gathering, gathered, batch):
    """Empty the list, and tell the host that the batch is over.   **Writes:** list, words of the gathering."""
    count = ld64(missed + MISSED_COUNT)
    for region in range(REGIONS):
        st64(missed + MISSED_COUNTS + 8 * region, 0)
    st64(missed + MISSED_COUNT, 0)
    st64(gathering + TICKET, 0)
    st64(gathering + UNRESOLVED, 0)
    shared, started = ld64(gathering + SHARED), ld64(gathering + STARTED_NS)
    st64_host(shared + HOST_ROWS, gathered)
    st64_host(shared + HOST_NS, ld64(gathering + HOST_ENDED_NS) - started)
    st64_host(shared + DIRECT_ROWS, count - gathered)
    st64_host(shared + DIRECT_NS, ld64(gathering + DIRECT_ENDED_NS) - started)
    fence_host()
    st64_host(shared + BATCHES_DONE, batch)
