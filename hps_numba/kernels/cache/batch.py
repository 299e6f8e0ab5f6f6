"""What a batch leaves for its later kernels, in its workspace: insertion candidates by set, hits and keys to count."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.hashing import index_hash
from hps_numba.kernels.layouts.cache import (
    BATCH_MASK,
    BUCKET_BYTES,
    BUCKET_POSITIONS,
    LINE_BYTES,
    POSITION_BITS,
    SCORES_AT,
    SET_BYTES,
    STATE_CAPACITY,
    STATE_CHANGES,
    STATE_INSERTED,
    STATE_NOW,
    STATE_PENDING,
    STATE_TOLD,
    TICKS_OF_A_CACHE,
    WAYS,
    WAYS_PER_LINE,
    WORKSPACE_BATCH,
    WORKSPACE_BUCKETS,
    WORKSPACE_CHANGES,
    WORKSPACE_COUNTS,
    WORKSPACE_COUNTS_MASK,
    WORKSPACE_KEYS,
    WORKSPACE_LIST,
    WORKSPACE_LISTED,
    WORKSPACE_MASK,
    WORKSPACE_TICKET,
    WORKSPACE_TOUCHED,
    WORKSPACE_TOUCHED_LIST,
    WORKSPACE_WORDS,
)
from hps_numba.kernels.simt.reference import (
    add32,
    add64,
    block_number,
    block_tiles,
    cas32,
    cas64,
    count_one,
    fence,
    grid_blocks,
    grid_dependency_sync,
    grid_tiles,
    is_block_leader,
    is_first_lane,
    ld32,
    ld64,
    max64,
    min64,
    st32,
    st64,
    sync_block,
    tile_in_warp,
    tiles_in_warp,
    warp_number,
)

__all__ = ["counted", "finish_batch", "list_candidate", "touch_batch", "touch_kernel", "touch_later"]

# bound when specialized
COUNTED = False
BY_INSERTIONS = False  # the clock of the policy


def policy_touch(score, now, count):
    """The policy's, bound when specialized."""
    return score


def touch_later(state, workspace, slot):
    """Count a hit of a way; the first of the batch lists it for ``touch_kernel``.   **Writes:** pending counts, workspace."""
    if add32(ld64(state + STATE_PENDING) + 4 * slot, 1) == 0:
        number = add64(workspace + WORKSPACE_TOUCHED, 1)
        st64(ld64(workspace + WORKSPACE_TOUCHED_LIST) + 8 * number, slot)


def list_candidate(workspace, set_at, lines, key, position, word, generation):
    """List a missing key as an insertion candidate of its set, which keeps the lowest WAYS positions.

    The word of a bucket names its batch, so that nothing has to be cleared between batches; in the positions the batch counts
    down, so that those of older batches are larger. Each displaced position moves on by one: in whatever order lanes arrive,
    the same positions stay, ascending.   **Writes:** workspace.
    """
    batch = ld64(workspace + WORKSPACE_BATCH)
    st64(ld64(workspace + WORKSPACE_KEYS) + 8 * position, key)
    words = ld64(workspace + WORKSPACE_WORDS) + 16 * position
    st64(words, word)
    st64(words + 8, generation)
    if COUNTED:
        fence()
        count_key(workspace, key, position, batch)
    number = (set_at - lines) // SET_BYTES
    buckets = ld64(workspace + WORKSPACE_BUCKETS)
    mask = ld64(workspace + WORKSPACE_MASK)
    mine = ((batch & 0x7FFFFFFF) << 32) | number
    at = number & mask
    while True:
        bucket = buckets + BUCKET_BYTES * at
        owner = ld64(bucket)
        if owner == mine:
            break
        if owner >> 32 != batch & 0x7FFFFFFF:
            owner = cas64(bucket, owner, mine)
            if owner == mine:
                break
            if owner >> 32 != batch & 0x7FFFFFFF:
                st64(ld64(workspace + WORKSPACE_LIST) + 8 * count_one(workspace + WORKSPACE_LISTED), at)
                break
        at = (at + 1) & mask
    oldest = (BATCH_MASK - (batch & BATCH_MASK)) << POSITION_BITS
    value = oldest | position
    bucket += BUCKET_POSITIONS
    if value >= ld64(bucket + 8 * (WAYS - 1)):
        return
    for i in range(WAYS):
        there = min64(bucket + 8 * i, value)
        if there > value:
            value = there
        if value >= oldest + (1 << POSITION_BITS):  # of an older batch
            return


def count_key(workspace, key, position, batch):
    """Count a missing key of the batch, for a policy that needs counts.   **Writes:** counts: (tag | position, tag | count)."""
    table = ld64(workspace + WORKSPACE_COUNTS)
    mask = ld64(workspace + WORKSPACE_COUNTS_MASK)
    keys = ld64(workspace + WORKSPACE_KEYS)
    tag = (batch & BATCH_MASK) << POSITION_BITS
    entry = np.int64(index_hash(np.uint64(np.int64(key))) >> np.uint64(20)) & mask
    while True:
        place = table + 16 * entry
        word = ld64(place)
        if word >> POSITION_BITS != tag >> POSITION_BITS:
            if cas64(place, word, tag | position) != word:
                continue
            word = tag | position
        if ld64(keys + 8 * (word & ((1 << POSITION_BITS) - 1))) == key:
            max64(place + 8, tag)
            add64(place + 8, 1)
            return
        entry = (entry + 1) & mask


def counted(workspace, key, batch):
    """How often ``count_key`` counted a key in this batch, at least 1."""
    table = ld64(workspace + WORKSPACE_COUNTS)
    if table == 0:
        return 1
    mask = ld64(workspace + WORKSPACE_COUNTS_MASK)
    keys = ld64(workspace + WORKSPACE_KEYS)
    entry = np.int64(index_hash(np.uint64(np.int64(key))) >> np.uint64(20)) & mask
    while True:
        word = ld64(table + 16 * entry)
        if word >> POSITION_BITS != batch & BATCH_MASK:
            return 1
        if ld64(keys + 8 * (word & ((1 << POSITION_BITS) - 1))) == key:
            return ld64(table + 16 * entry + 8) & ((1 << POSITION_BITS) - 1)
        entry = (entry + 1) & mask


def finish_batch(state, workspace, batch, listed, advance):
    """The last block to end prepares the workspace for the next batch.   **Writes:** workspace, clock.

    Only blocks that had some of the ``listed`` sets count, or the first if there were none: most blocks of most batches have
    nothing to do, and end at once. One fence a block, by its leader after all threads of the block have met. After a batch
    that listed nothing there is nothing to do at all if the clock does not move.
    """
    if BY_INSERTIONS and not COUNTED and listed == 0:
        return
    if block_number() > 0 and block_number() * block_tiles() >= listed:
        return
    sync_block()
    if not is_block_leader():
        return
    fence()
    blocks = min(grid_blocks(), (listed + block_tiles() - 1) // block_tiles()) if listed > 0 else 1
    if blocks == 1 or add64(workspace + WORKSPACE_TICKET, 1) == blocks - 1:
        st64(workspace + WORKSPACE_TICKET, 0)
        st64(workspace + WORKSPACE_LISTED, 0)
        st64(workspace + WORKSPACE_TOUCHED, 0)
        st64(workspace + WORKSPACE_BATCH, batch + 1)
        st64(workspace + WORKSPACE_CHANGES, -ld64(state + STATE_CHANGES))  # before any row of the next batch is read
        move_clock(state, advance)
        fence()


def move_clock(state, advance):
    """Advance the clock by ``advance`` ticks, or by the insertions since (BY_INSERTIONS).   **Writes:** clock."""
    if not BY_INSERTIONS:
        add64(state + STATE_NOW, advance)
        return
    told = ld64(state + STATE_TOLD)
    capacity = ld64(state + STATE_CAPACITY)
    ticks = (TICKS_OF_A_CACHE * ld64(state + STATE_INSERTED) - told) // capacity
    if ticks > 0 and cas64(state + STATE_TOLD, told, told + ticks * capacity) == told:  # else a batch of another stream does it
        add64(state + STATE_NOW, ticks)


def touch_kernel(lines, sets, state, workspace):
    """Touch the ways that the batch hit, each once with its count.   **Writes:** scores, pending counts.

    For policies that need counts; between the lookup and the insertion of a batch.
    """
    grid_dependency_sync()
    touch_batch(lines, state, workspace)


def touch_batch(lines, state, workspace):
    """``touch_kernel`` for a table.   **Writes:** as it does."""
    now = ld64(state + STATE_NOW)
    pending = ld64(state + STATE_PENDING)
    touched = ld64(workspace + WORKSPACE_TOUCHED)
    i = warp_number() * tiles_in_warp() + tile_in_warp()
    while i < touched:
        slot = ld64(ld64(workspace + WORKSPACE_TOUCHED_LIST) + 8 * i)
        score_at = lines + slot // WAYS_PER_LINE * LINE_BYTES + SCORES_AT + slot % WAYS_PER_LINE * 4
        if is_first_lane():
            count = ld32(pending + 4 * slot)
            while cas32(pending + 4 * slot, count, 0) != count:  # a batch of another stream counts on
                count = ld32(pending + 4 * slot)
            st32(score_at, np.int64(policy_touch(ld32(score_at), now, count)) & 0xFFFFFFFF)
        i += grid_tiles()
