"""Write many rows of a host store in steps that threads share: find the keys, take slots, write the rows, publish them.

Nothing that a reader can see changes before the last step. Each step goes through a range of positions, but for
``host_publish``, which goes through all positions for a range of index entries: so every entry has one thread that writes it,
equal keys are written in the order of their positions, and the table does not depend on the number of threads.
"""

from __future__ import annotations

from hps_numba.kernels.compiler.njit import host_kernel
from hps_numba.kernels.host.atomics import (
    copy_row,
    full_fence,
    load_word,
    prefetch,
    store_word,
    store_word_release,
    stream_row,
)
from hps_numba.kernels.host.probe import end_of, find_entry, primary_address, slot_of
from hps_numba.kernels.host.write import (
    STATE_FREE,
    STATE_LIVE,
    STATE_NEXT_SLOT,
    STATE_RETIRED,
    STATE_USED,
    STATE_WRITES,
    next_use,
    start_recency,
)
from hps_numba.kernels.layouts.host_store import EMPTY, FIRST_SLOT, META_LINES, META_ROW_BYTES, META_ROWS

__all__ = ["host_addresses_of", "host_enter", "host_locate", "host_place", "host_publish", "host_retire", "host_take"]

_AHEAD = 16


@host_kernel
def host_locate(block, keys, start, stop, entries, words):
    """Find ``keys[start:stop]``: the addresses of their index entries, and the words in them; EMPTY: there is no entry yet.

    Args: the address of the index block; int64 arrays ``[n]``.

    Returns how many have no entry.   **Writes:** entries, words.
    """
    lines = load_word(block + META_LINES)
    end = end_of(block)
    without = 0
    for i in range(start - _AHEAD, stop):
        ahead = i + _AHEAD
        if ahead < stop:
            entries[ahead] = primary_address(block, lines, keys[ahead])
            prefetch(entries[ahead])
        if i >= start:
            entries[i], words[i] = find_entry(block, end, entries[i], keys[i])
            without += 1 if words[i] == EMPTY else 0
    return without


@host_kernel
def host_take(words, only_present, state, free, fresh):
    """Take a slot for each position, or with ``only_present`` for those that have a row; there are enough of them.

    ``fresh``: int64 ``[n]``, the new index words; 0 where none was taken.   **Writes:** state, free, fresh.
    """
    spare, slot = state[STATE_FREE], state[STATE_NEXT_SLOT]
    for i in range(len(words)):
        if only_present and slot_of(words[i]) < 0:
            fresh[i] = 0
        elif spare > 0:
            spare -= 1
            fresh[i] = next_use(free[spare])
        else:
            fresh[i] = slot + FIRST_SLOT
            slot += 1
    state[STATE_FREE], state[STATE_NEXT_SLOT] = spare, slot


@host_kernel
def host_addresses_of(block, words, start, stop, addresses):
    """Addresses of the rows that ``words[start:stop]`` lead to, or 0.   **Writes:** addresses, int64 ``[n]``."""
    rows = load_word(block + META_ROWS)
    row_bytes = load_word(block + META_ROW_BYTES)
    for i in range(start, stop):
        slot = slot_of(words[i])
        addresses[i] = rows + slot * row_bytes if slot >= 0 else 0


@host_kernel
def host_place(block, rows, fresh, start, stop, streamed):
    """Copy ``rows[start:stop]`` to the slots of ``fresh``, where there is one.

    Args:
        rows: address of float32 rows.   streamed: past the caches; then slots are multiples of 64 bytes.

    **Writes:** rows of the store that no reader can find.
    """
    target = load_word(block + META_ROWS)
    row_bytes = load_word(block + META_ROW_BYTES)
    for i in range(start, stop):
        if fresh[i] == 0:
            continue
        if streamed:
            stream_row(target + slot_of(fresh[i]) * row_bytes, rows + i * row_bytes, row_bytes)
        else:
            copy_row(target + slot_of(fresh[i]) * row_bytes, rows + i * row_bytes, row_bytes)
    if streamed:
        full_fence()


@host_kernel
def host_publish(block, entries, words, fresh, low, high, now):
    """Point the entries at addresses from ``low`` to ``high`` to their new rows; keys without an entry are left out.

    Returns how many of them had no row.   **Writes:** index words, recency; words: what was in the entry.
    """
    n = len(entries)
    added = 0
    for i in range(n):
        ahead = i + _AHEAD
        if ahead < n and low <= entries[ahead] < high:
            prefetch(entries[ahead])
        if entries[i] < low or entries[i] >= high or words[i] == EMPTY or fresh[i] == 0:
            continue
        words[i] = load_word(entries[i] + 8)  # equal keys: the word of the one before
        start_recency(block, slot_of(fresh[i]), slot_of(words[i]), now)
        store_word_release(entries[i] + 8, fresh[i])
        added += 1 if slot_of(words[i]) < 0 else 0
    return added


@host_kernel
def host_enter(block, keys, words, fresh, state, now):
    """Give the keys that have no entry one that leads to their new rows; the index has space for them.

    Returns how many had no row.   **Writes:** index entries, recency, state; words: what was in the entry.
    """
    lines = load_word(block + META_LINES)
    end = end_of(block)
    n = len(keys)
    added = 0
    for i in range(n):
        ahead = i + _AHEAD
        if ahead < n and words[ahead] == EMPTY:
            prefetch(primary_address(block, lines, keys[ahead]))
        if words[i] != EMPTY or fresh[i] == 0:
            continue
        entry, word = find_entry(block, end, primary_address(block, lines, keys[i]), keys[i])
        start_recency(block, slot_of(fresh[i]), slot_of(word), now)
        if word == EMPTY:
            store_word(entry, keys[i])
            state[STATE_USED] += 1
            added += 1
        store_word_release(entry + 8, fresh[i])
        words[i] = word
    return added


@host_kernel
def host_retire(words, fresh, added, state, retired):
    """List the slots that ``words`` led to as retired, after all entries lead to the rows of ``fresh``.

    ``added``: how many keys had no row before. Returns how many rows were written.   **Writes:** state, retired.
    """
    written = 0
    for i in range(len(words)):
        written += 1 if fresh[i] != 0 else 0
        if fresh[i] != 0 and slot_of(words[i]) >= 0:
            retired[state[STATE_RETIRED]] = words[i]
            state[STATE_RETIRED] += 1
    state[STATE_LIVE] += added
    state[STATE_WRITES] += written
    return written
