"""Change a host store: upsert, update and erase of a batch, and the fill of a new table. One writer at a time.

A row is never overwritten where a reader could see it: an upsert writes a slot that no reader can hold and then swings the
index word to it; the old slot is reported as retired and is reused after an epoch.
"""

from __future__ import annotations

from hps_numba.kernels.compiler.njit import host_function, host_kernel
from hps_numba.kernels.host.atomics import copy_row, load_word, prefetch, store_word, store_word_release
from hps_numba.kernels.host.probe import end_of, find_entry, primary_address, slot_of
from hps_numba.kernels.layouts.host_store import (
    EMPTY,
    ENTRY_BYTES,
    ERASED,
    FIRST_SLOT,
    META_BYTES,
    META_LINES,
    META_RECENCY,
    META_RECENCY_MODE,
    META_ROW_BYTES,
    META_ROWS,
    RECENCY_COUNT,
    RECENCY_NONE,
    SLOT_BITS,
    SLOT_MASK,
)

__all__ = [
    "STATE_FREE",
    "STATE_LIVE",
    "STATE_MAX_USED",
    "STATE_NEXT_SLOT",
    "STATE_RETIRED",
    "STATE_SLOT_LIMIT",
    "STATE_USED",
    "STATE_WORDS",
    "STATE_WRITES",
    "host_census",
    "host_erase",
    "host_fill",
    "host_reindex",
    "host_upsert",
    "next_use",
    "start_recency",
]

# The writer's own words, one array a table: live rows, entries in use (live or erased), entries that may be in use,
# free slots on the stack, first slot never used, end of the committed slots, slots on the list of retired ones, writes so far.
# Slots are listed as the index words that last led to them: they know how often the slot was used.
(
    STATE_LIVE,
    STATE_USED,
    STATE_MAX_USED,
    STATE_FREE,
    STATE_NEXT_SLOT,
    STATE_SLOT_LIMIT,
    STATE_RETIRED,
    STATE_WRITES,
) = range(8)
STATE_WORDS = 8

_AHEAD = 16
_USE_MASK = (1 << (63 - SLOT_BITS)) - 1  # keeps an index word positive


@host_function
def next_use(word):
    """The index word for the next use of the slot that ``word`` led to."""
    use = ((word >> SLOT_BITS) + 1) & _USE_MASK
    return (use << SLOT_BITS) | (word & SLOT_MASK)


@host_function
def start_recency(block, slot, old_slot, now):
    """Recency of a row that was just written: a count moves along with an updated row, a time is now."""
    mode = load_word(block + META_RECENCY_MODE)
    if mode == RECENCY_NONE:
        return
    recency = load_word(block + META_RECENCY)
    value = now
    if mode == RECENCY_COUNT:
        value = load_word(recency + 8 * old_slot) if old_slot >= 0 else 0
    store_word(recency + 8 * slot, value)


@host_function
def _entry_of(block, lines, end, keys, i, n):
    """``(key, entry, word)`` of the i-th of n keys; prefetches the line of a later one."""
    if i + _AHEAD < n:
        prefetch(primary_address(block, lines, load_word(keys + 8 * (i + _AHEAD))))
    key = load_word(keys + 8 * i)
    entry, word = find_entry(block, end, primary_address(block, lines, key), key)
    return key, entry, word


@host_kernel
def host_upsert(block, keys, rows, n, only_present, state, free, retired, now):
    """Write the rows of ``keys``; with ``only_present``, of those that have one already.

    Args: addresses of the index block, of int64 keys and of float32 rows; state, free, retired: int64 arrays of the writer.

    Returns ``(done, changed)``: keys processed, which is less than ``n`` when the index or the slots must grow first, and
    how many of them were new (upsert) or present (update).   **Writes:** rows, index entries, recency, state, free, retired.
    """
    lines = load_word(block + META_LINES)
    row_bytes = load_word(block + META_ROW_BYTES)
    target = load_word(block + META_ROWS)
    end = end_of(block)
    spare, next_slot = state[STATE_FREE], state[STATE_NEXT_SLOT]  # in registers: an array that goes to a function costs 10 ns
    used, replaced = state[STATE_USED], state[STATE_RETIRED]
    done = written = added = 0
    while done < n:
        key, entry, word = _entry_of(block, lines, end, keys, done, n)
        old_slot = slot_of(word)
        if old_slot < 0 and only_present:
            done += 1
            continue
        if word == EMPTY and used >= state[STATE_MAX_USED]:
            break
        if spare > 0:
            spare -= 1
            new_word = next_use(free[spare])
        elif next_slot < state[STATE_SLOT_LIMIT]:
            new_word = next_slot + FIRST_SLOT
            next_slot += 1
        else:
            break
        slot = slot_of(new_word)
        copy_row(target + slot * row_bytes, rows + done * row_bytes, row_bytes)
        start_recency(block, slot, old_slot, now)
        if word == EMPTY:
            store_word(entry, key)
            used += 1
        store_word_release(entry + 8, new_word)
        if old_slot >= 0:
            retired[replaced] = word
            replaced += 1
        else:
            added += 1
        written += 1
        done += 1
    state[STATE_FREE], state[STATE_NEXT_SLOT], state[STATE_USED], state[STATE_RETIRED] = spare, next_slot, used, replaced
    state[STATE_LIVE] += added
    state[STATE_WRITES] += written
    return done, written if only_present else added


@host_kernel
def host_erase(block, keys, n, state, retired):
    """Erase the rows of ``keys``; returns how many there were.   **Writes:** index words, state, retired."""
    lines = load_word(block + META_LINES)
    end = end_of(block)
    erased = 0
    for i in range(n):
        _, entry, word = _entry_of(block, lines, end, keys, i, n)
        if slot_of(word) >= 0:
            store_word_release(entry + 8, ERASED)
            retired[state[STATE_RETIRED]] = word
            state[STATE_RETIRED] += 1
            erased += 1
    state[STATE_LIVE] -= erased
    return erased


@host_kernel
def host_fill(block, keys, n, first_slot, state, free, now):
    """Index rows that are already in the slots from ``first_slot`` on, of a table that has no readers yet.

    A duplicate key takes the later row (last wins); the slot of the earlier one is free at once.
    **Writes:** index entries, recency, state, free.
    """
    lines = load_word(block + META_LINES)
    end = end_of(block)
    for i in range(n):
        key, entry, word = _entry_of(block, lines, end, keys, i, n)
        if slot_of(word) >= 0:
            free[state[STATE_FREE]] = word
            state[STATE_FREE] += 1
        else:
            store_word(entry, key)
            state[STATE_USED] += 1
            state[STATE_LIVE] += 1
        start_recency(block, first_slot + i, -1, now)
        store_word(entry + 8, first_slot + i + FIRST_SLOT)


@host_kernel
def host_reindex(old, new):
    """Enter every live entry of the index block ``old`` in the empty block ``new``; returns their number.

    **Writes:** new.
    """
    lines = load_word(new + META_LINES)
    end = end_of(new)
    live = 0
    old_end = end_of(old)
    for entry in range(old + META_BYTES, old_end, ENTRY_BYTES):
        ahead = entry + _AHEAD * ENTRY_BYTES
        if ahead < old_end:
            prefetch(primary_address(new, lines, load_word(ahead)))
        word = load_word(entry + 8)
        if slot_of(word) >= 0:
            key = load_word(entry)
            place, _ = find_entry(new, end, primary_address(new, lines, key), key)
            store_word(place, key)
            store_word(place + 8, word)
            live += 1
    return live


@host_kernel
def host_census(block, taken, state):
    """Count live rows and entries in use in an index, after a writer was interrupted.

    ``taken`` (uint8, one a slot, zeros) gets 1 where a live entry names the slot.   **Writes:** taken, state.
    """
    live = 0
    used = 0
    for entry in range(block + META_BYTES, end_of(block), ENTRY_BYTES):
        word = load_word(entry + 8)
        used += 1 if word != EMPTY else 0
        if slot_of(word) >= 0:
            taken[slot_of(word)] = 1
            live += 1
    state[STATE_LIVE] = live
    state[STATE_USED] = used
