"""Insert the candidates that a lookup listed: a set by one tile, in the order of their positions, victims by the policy."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.cache.batch import counted, finish_batch
from hps_numba.kernels.cache.probe import (
    find_in_host_by_tile,
    find_in_set,
    guard_enter,
    guard_leave,
    primary_line_of,
    row_at,
)
from hps_numba.kernels.cache.rows import store_in_cache
from hps_numba.kernels.cache.seqlock import lock_set, unlock_set, write_begin, write_end
from hps_numba.kernels.cache.sketch import estimate
from hps_numba.kernels.layouts.cache import (
    BATCH_MASK,
    BUCKET_BYTES,
    BUCKET_POSITIONS,
    DESC_GENERATION,
    LINE_BYTES,
    LINES_PER_SET,
    META_AT,
    OCCUPIED,
    POSITION_BITS,
    SCORES_AT,
    SET_BYTES,
    STATE_CHANGES,
    STATE_EVICTED,
    STATE_HOST,
    STATE_INSERTED,
    STATE_NOW,
    STATE_REFUSED,
    STATE_STALE_DROPPED,
    WAYS,
    WAYS_PER_LINE,
    WORKSPACE_BATCH,
    WORKSPACE_BUCKETS,
    WORKSPACE_CHANGES,
    WORKSPACE_KEYS,
    WORKSPACE_LIST,
    WORKSPACE_LISTED,
    WORKSPACE_SET_STATES,
    WORKSPACE_WORDS,
)
from hps_numba.kernels.simt.reference import (
    add64,
    from_first_lane,
    grid_dependency_sync,
    grid_tiles,
    is_first_lane,
    ld32,
    ld64,
    local_words,
    popcount,
    st32,
    st64,
    sync_tile,
    tile_in_warp,
    tile_number,
    tiles_in_warp,
    warp_number,
)

__all__ = [
    "first_score",
    "insert_batch",
    "insert_kernel",
    "line_of_way",
    "score_of_way",
]

# bound when specialized
COUNTED = ADMITS = HAS_VICTIM = KEYED = False
SET_STATE = 0
UINT32_MASK = 0xFFFFFFFF


def policy_first(now, count):
    """The policy's, bound when specialized, as are those that follow."""
    return now


def policy_admit(key, count, sketch):
    """Whether an insertion candidate may replace another row."""
    return True


def policy_victim(scores, state):
    """The way of a full set that is evicted."""
    return 0


def first_score(now, count, key):
    """``policy_first`` of a policy that does not look at the key."""
    return policy_first(now, count)


def victim_way(scores, state, now):
    """``policy_victim`` of a policy that does not look at the time."""
    return policy_victim(scores, state)


def bit_of(set_at, line, way):
    """The bit of a way among those of its set."""
    return np.int64(1) << ((line - set_at) // LINE_BYTES * WAYS_PER_LINE + way)


def choose_way(set_at, primary, inserted):
    """``(line, way, evicts)``: a free way, primary line first, else the one with the smallest score, but none ``inserted``."""
    for number in range(LINES_PER_SET):
        line = set_at + (primary ^ (number * LINE_BYTES))
        taken = ld32(line + META_AT) & OCCUPIED
        for way in range(WAYS_PER_LINE):
            if (taken >> way) & 1 == 0:
                return line, way, False
    best_line, best_way, best = set_at + primary, 0, UINT32_MASK + 1
    for number in range(LINES_PER_SET):
        line = set_at + (primary ^ (number * LINE_BYTES))
        for way in range(WAYS_PER_LINE):
            score = ld32(line + SCORES_AT + 4 * way)
            if score < best and inserted & bit_of(set_at, line, way) == 0:
                best_line, best_way, best = line, way, score
    return best_line, best_way, True


def ask_policy(lines, workspace, set_at, inserted, now):
    """``(line, way)`` of a full set that the policy evicts, or the next one that is not ``inserted``.

    **Writes:** scores, state of the set.
    """
    chosen = np.int64(0)
    if is_first_lane():
        scores = local_words(WAYS)
        state = local_words(SET_STATE)
        kept = ld64(workspace + WORKSPACE_SET_STATES) + (set_at - lines) // SET_BYTES * (4 * SET_STATE)
        for way in range(WAYS):
            scores[way] = ld32(score_of_way(set_at, way))
        for i in range(SET_STATE):
            state[i] = ld32(kept + 4 * i)
        chosen = np.int64(victim_way(scores, state, now)) % WAYS
        for way in range(WAYS):
            st32(score_of_way(set_at, way), np.int64(scores[way]) & UINT32_MASK)
        for i in range(SET_STATE):
            st32(kept + 4 * i, np.int64(state[i]) & UINT32_MASK)
    chosen = from_first_lane(chosen)
    while (inserted >> chosen) & 1:
        chosen = (chosen + 1) % WAYS
    return line_of_way(set_at, chosen), chosen % WAYS_PER_LINE


def line_of_way(set_at, way):
    """Address of the line with a way of a set, 0 to WAYS - 1."""
    return set_at + way // WAYS_PER_LINE * LINE_BYTES


def score_of_way(set_at, way):
    """Address of the score of a way of a set, 0 to WAYS - 1."""
    return line_of_way(set_at, way) + SCORES_AT + 4 * (way % WAYS_PER_LINE)


def is_admitted(state, workspace, key, count, entry):
    """Whether the policy lets a key replace that at ``entry``.   **Writes:** counters."""
    admitted = np.int64(0)
    if is_first_lane():  # another batch may be counting: one lane reads for all
        admitted = np.int64(
            policy_admit(key, count, (estimate(state, workspace, key), estimate(state, workspace, ld64(entry))))
        )
        if admitted == 0:
            add64(state + STATE_REFUSED, 1)
    return from_first_lane(admitted) != 0


def still_current(state, workspace, key, word, generation):
    """Whether the host store still has the row that the lookup read; always, where there is no host store.

    Words recur, though not while the generation is the same: it is read after the word, as the lookup read it before.

    The set is locked. If the batch knows how many changes there had been before its rows were read, and there are no more, the
    bus need not be crossed: a writer of the store announces its change, then waits for the lock, and finds what was inserted.
    """
    if generation == 0:
        return True
    before = ld64(workspace + WORKSPACE_CHANGES)
    if before != 0:
        changes = ld64(state + STATE_CHANGES)  # another kernel may be counting: one lane reads for all
        changes = from_first_lane(changes & UINT32_MASK) | from_first_lane(changes >> 32) << 32
        if changes == abs(before):
            return True
        if before > 0 and changes >> 32 != before >> 32:  # CLEARED
            return False
    descriptor = ld64(state + STATE_HOST)
    if descriptor == 0 or find_in_host_by_tile(descriptor, key) != word:
        return False
    descriptor = ld64(state + STATE_HOST)
    return descriptor != 0 and ld64(descriptor + DESC_GENERATION) == generation


def insert_candidate(lines, rows, state, workspace, set_at, position, source, now, batch, inserted):
    """Insert the row of a missing position into its set, which is locked.   **Writes:** line, row, counters.

    ``source``: address of the row.   ``inserted``: bits of the ways that this batch has filled, which it does not evict again.
    Returns these bits, and whether another row was evicted (0, 1).

    Before the row becomes visible, the host store is asked whether it is still the row of the key. A later change finds the
    row in the cache, as it waits for the lock; so no old row is ever visible after a change.
    """
    key = ld64(ld64(workspace + WORKSPACE_KEYS) + 8 * position)
    primary = primary_line_of(key)
    if find_in_set(set_at, primary, key)[1] >= 0:
        return inserted, 0
    words = ld64(workspace + WORKSPACE_WORDS) + 16 * position
    if not still_current(state, workspace, key, ld64(words), ld64(words + 8)):
        if is_first_lane():
            add64(state + STATE_STALE_DROPPED, 1)
        return inserted, 0
    count = counted(workspace, key, batch) if COUNTED else 1
    line, way, evicts = choose_way(set_at, primary, inserted)
    if HAS_VICTIM and evicts:
        line, way = ask_policy(lines, workspace, set_at, inserted, now)
    if KEYED and evicts and ld32(line + SCORES_AT + 4 * way) == UINT32_MASK:
        if is_first_lane():
            add64(state + STATE_REFUSED, 1)
        return inserted, 0
    if ADMITS and evicts and not is_admitted(state, workspace, key, count, line + 8 * way):
        return inserted, 0
    write_begin(line)
    store_in_cache(row_at(lines, rows, line + 8 * way, 0), source)
    if is_first_lane():
        st64(line + 8 * way, key)
        st32(line + SCORES_AT + 4 * way, np.int64(first_score(now, count, key)) & UINT32_MASK)
    write_end(line, 1 << way, 0)
    return inserted | bit_of(set_at, line, way), 1 if evicts else 0


def insert_kernel(lines, rows, state, source, stride, workspace, advance):
    """Insert the candidates of a batch; then begin the next batch.

    Args:
        source: address of float32 rows by position in the batch, ``stride`` bytes apart: the stage, or given rows.
        advance: what is added to the clock of the policy.

    **Writes:** lines, rows, counters, workspace, clock, guard.
    """
    grid_dependency_sync()
    insert_batch(lines, rows, state, source, stride, workspace, advance)


def insert_batch(lines, rows, state, source, stride, workspace, advance):
    """``insert_kernel`` for a table.   **Writes:** as it does."""
    now = ld64(state + STATE_NOW)
    batch = ld64(workspace + WORKSPACE_BATCH)
    listed = ld64(workspace + WORKSPACE_LISTED)
    oldest = (BATCH_MASK - (batch & BATCH_MASK)) << POSITION_BITS
    number = tile_number()
    if number < listed:
        stripe = warp_number() * tiles_in_warp() + tile_in_warp()
        if is_first_lane():
            guard_enter(state, stripe)
        sync_tile()
        total = evicted = np.int64(0)  # added once: all tiles contend for the two counters
        while number < listed:
            bucket = ld64(workspace + WORKSPACE_BUCKETS) + BUCKET_BYTES * ld64(ld64(workspace + WORKSPACE_LIST) + 8 * number)
            set_at = lines + (ld64(bucket) & UINT32_MASK) * SET_BYTES
            lock_set(set_at)
            inserted = np.int64(0)
            for i in range(WAYS):
                value = ld64(bucket + BUCKET_POSITIONS + 8 * i)
                if value >= oldest + (1 << POSITION_BITS):
                    break
                position = value - oldest
                row = source + position * stride
                inserted, evicts = insert_candidate(lines, rows, state, workspace, set_at, position, row, now, batch, inserted)
                evicted += evicts
            total += popcount(inserted)
            unlock_set(set_at)
            number += grid_tiles()
        if is_first_lane():
            add64(state + STATE_INSERTED, total)
            if evicted > 0:
                add64(state + STATE_EVICTED, evicted)
            guard_leave(state, stripe)
    finish_batch(state, workspace, batch, listed, advance)
