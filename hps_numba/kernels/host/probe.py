"""Where a key is in the index of a host store: the search that all host kernels share.

Addresses and words are int64 throughout; only hashes are uint64 (numba makes a float of a sum of the two).
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_function
from hps_numba.kernels.hashing import primary_line
from hps_numba.kernels.host.atomics import exchange_word, full_fence, load_word, load_word_acquire, store_word_release
from hps_numba.kernels.layouts.host_store import (
    EMPTY,
    ENTRIES_PER_LINE,
    ENTRY_BYTES,
    FIRST_SLOT,
    LINE_BYTES,
    META_BYTES,
    META_LINES,
    SLOT_MASK,
)

__all__ = [
    "UNSETTLED",
    "end_of",
    "enter_epoch",
    "find_entry",
    "leave_epoch",
    "line_after",
    "primary_address",
    "primary_word",
    "slot_of",
]

#: ``primary_word`` of a key that may be in a later line; no index word is negative
UNSETTLED = -1

_primary_line = host_function(primary_line)


@host_function
def primary_address(block, lines, key):
    """Address of the line where the search for ``key`` starts."""
    return block + META_BYTES + np.int64(_primary_line(np.uint64(key), np.uint64(lines))) * LINE_BYTES


@host_function
def end_of(block):
    """Address after the last entry of an index block."""
    return block + META_BYTES + load_word(block + META_LINES) * LINE_BYTES


@host_function
def find_entry(block, end, primary, key):
    """``(address of the entry, its word)`` of ``key``, else of the empty entry where it would go; the index is never full.

    The word is loaded before the key: a key is written before its word and never changes in one index block, so the key of a
    word that is not empty is valid. Use the word returned here: loaded again, the word of an entry that was empty may be that
    of another key.
    """
    entry = primary
    while True:
        word = load_word_acquire(entry + 8)
        if word == EMPTY or load_word(entry) == key:
            return entry, word
        entry += ENTRY_BYTES
        if entry == end:
            entry = block + META_BYTES


@host_function
def primary_word(primary, key):
    """Index word of ``key`` as far as its primary line tells: EMPTY if it has none, UNSETTLED if it may be in a later line.

    All entries of the line are compared without a branch: the position of a key in its line cannot be predicted. A key has one
    entry at most, and the word is loaded before the key, as in ``find_entry``.
    """
    found = np.int64(EMPTY)
    word = np.int64(EMPTY)
    for entry in range(ENTRIES_PER_LINE):
        word = load_word_acquire(primary + ENTRY_BYTES * entry + 8)
        found |= word if load_word(primary + ENTRY_BYTES * entry) == key else EMPTY
    return found if found != EMPTY or word == EMPTY else UNSETTLED


@host_function
def line_after(block, end, line):
    """Address of the next line of an index block; the first one follows the last."""
    after = line + LINE_BYTES
    return block + META_BYTES if after == end else after


@host_function
def slot_of(word):
    """Slot of an index word; negative where there is no row."""
    return (word & SLOT_MASK) - FIRST_SLOT


@host_function
def enter_epoch(epoch, record):
    """Announce a reader: nothing retired from now on is reused before it leaves.

    The record must be visible to the writer before the index is read, which only a full fence ensures on every processor.
    """
    exchange_word(record, load_word_acquire(epoch))
    full_fence()


@host_function
def leave_epoch(record):
    """End what ``enter_epoch`` announced."""
    store_word_release(record, 0)
