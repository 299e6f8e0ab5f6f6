"""Look keys up in a host store: the rows of a batch of keys, copied to the caller's output."""

from __future__ import annotations

import numba
import numpy as np

from hps_numba.kernels.compiler.njit import host_function, host_kernel
from hps_numba.kernels.host.atomics import (
    add_word,
    array_address,
    copy_row,
    fill_row,
    float_pointer,
    full_fence,
    load_word,
    load_word_acquire,
    prefetch,
    prefetch_row,
    store_word,
    stream_row,
)
from hps_numba.kernels.host.histogram import begin_sample, end_sample
from hps_numba.kernels.host.probe import (
    UNSETTLED,
    end_of,
    enter_epoch,
    find_entry,
    leave_epoch,
    line_after,
    primary_address,
    primary_word,
    slot_of,
)
from hps_numba.kernels.layouts.host_store import (
    COUNTER_ABSENT,
    COUNTER_CALLS,
    COUNTER_KEYS,
    COUNTER_MISSES,
    META_LINES,
    META_RECENCY,
    META_RECENCY_MODE,
    META_ROW_BYTES,
    META_ROWS,
    RECENCY_COUNT,
    RECENCY_NONE,
)

__all__ = [
    "NOT_PLAIN",
    "PLAIN_WORDS",
    "copy_rows_of",
    "count_lookup",
    "find_words",
    "host_addresses",
    "host_contains",
    "host_lookup",
    "host_lookup_plain",
    "touch_recency",
]

# keys between the prefetch of a cache line and its use: measured, equally fast from 8 to 32
_AHEAD = 16
# keys whose index words are found before their rows are copied: the words stay in the first-level cache
_BATCH = 1024
#: words of a table for ``host_lookup_plain``, int64 each: addresses as for ``host_lookup``, elements of a row, keys of the
#: largest batch, and the bits of the default, float32
PLAIN_WORDS = ("header", "epoch", "counters", "dim", "limit", "default")
_HEADER, _EPOCH, _COUNTERS, _DIM, _LIMIT, _DEFAULT = (8 * i for i in range(len(PLAIN_WORDS)))
#: instead of a number of keys: nothing was done
NOT_PLAIN = -2


@host_function
def find_words(block, keys, n, words, late):
    """Put the index words of ``n`` keys in ``words``.   **Writes:** words, late.

    A key that its primary line does not settle (the line is full, one key in twenty) waits in ``late`` until the others are
    done, while the next line is prefetched.
    """
    lines = load_word(block + META_LINES)
    end = end_of(block)
    unsettled = 0
    for i in range(-_AHEAD, n):
        if i + _AHEAD < n:
            line = primary_address(block, lines, load_word(keys + 8 * (i + _AHEAD)))
            prefetch(line)
            words[i + _AHEAD] = line
        if i < 0:
            continue
        word = primary_word(words[i], load_word(keys + 8 * i))
        if word == UNSETTLED:
            word = line_after(block, end, words[i])
            prefetch(word)
            late[unsettled] = i
            unsettled += 1
        words[i] = word
    for number in range(unsettled):
        i = late[number]
        words[i] = find_entry(block, end, words[i], load_word(keys + 8 * i))[1]


@host_function
def touch_recency(recency, mode, slot, now):
    """Count a use of a row, or note its time, as the mode says.   **Writes:** recency words."""
    if mode != RECENCY_NONE:
        word = recency + 8 * slot
        store_word(word, load_word(word) + 1 if mode == RECENCY_COUNT else now)


@host_function
def count_lookup(counters, keys, missing, starts_call):
    """Add a part of a lookup to the counters of a table, unless ``counters`` is 0.   **Writes:** counters."""
    if counters != 0:
        add_word(counters + COUNTER_KEYS, keys)
        add_word(counters + COUNTER_MISSES, missing)
        add_word(counters + COUNTER_CALLS, np.int64(starts_call))


@host_function
def copy_found_rows(block, words, n, first, out, default, misses, now, streamed):
    """Copy the rows that ``words`` lead to, or the default, to ``out``; positions of missing keys count from ``first``.

    Returns how many are missing.   **Writes:** out, misses, recency words.
    """
    rows = load_word(block + META_ROWS)
    row_bytes = load_word(block + META_ROW_BYTES)
    recency = load_word(block + META_RECENCY)
    mode = load_word(block + META_RECENCY_MODE) if now >= 0 else RECENCY_NONE
    missing = 0
    for i in range(-_AHEAD, n):
        if i + _AHEAD < n:
            prefetch_row(rows + slot_of(words[i + _AHEAD]) * row_bytes, row_bytes)
        if i < 0:
            continue
        slot = slot_of(words[i])
        target = out + i * row_bytes
        if slot < 0:
            fill_row(target, np.float32(default), row_bytes)
            if misses != 0:
                store_word(misses + 8 * missing, first + i)
            missing += 1
            continue
        if streamed:
            stream_row(target, rows + slot * row_bytes, row_bytes)
        else:
            copy_row(target, rows + slot * row_bytes, row_bytes)
        touch_recency(recency, mode, slot, now)
    return missing


@host_function
def copy_rows_of(block, keys, start, stop, out, default, misses, words, now, streamed):
    """The rows of ``keys[start:stop]``, or the default, to ``out[start:stop]``; inside an epoch of the caller's.

    Two passes over 1024 keys at a time, each prefetching for the keys ahead: find the index words, copy the rows. One pass for
    both is slower: a row is many cache lines, which evict the prefetched lines of the index.

    ``words``: address of int64, as many as keys, for the index words under which rows were read, or 0; the rest as for
    ``kernels.host.lookup``. Returns how many are missing.   **Writes:** out, misses, words, recency words.
    """
    row_bytes = load_word(block + META_ROW_BYTES)
    room = min(_BATCH, stop - start)
    found = np.empty(room, np.int64)
    late = np.empty(room, np.int64)
    missing = 0
    for first in range(start, stop, _BATCH):
        n = min(_BATCH, stop - first)
        find_words(block, keys + 8 * first, n, found, late)
        if words != 0:
            for i in range(n):
                store_word(words + 8 * (first + i), found[i])
        to = misses + 8 * missing if misses != 0 else 0
        missing += copy_found_rows(block, found, n, first, out + first * row_bytes, default, to, now, streamed)
    if streamed:
        full_fence()
    return missing


@host_kernel
def host_lookup(header, keys, start, stop, out, default, misses, epoch, record, now, counters, timed, streamed):
    """Copy the rows of ``keys[start:stop]`` to ``out[start:stop]``; a key without a row gets ``default``.

    Args (addresses and counts are int64):
        header: address of the store's header.   keys: of int64 keys.   out: of float32 rows, row_bytes apart.
        misses: address of int64 positions, as many as keys, or 0.   epoch, record: of the reader's epoch (``storage.host``).
        now: tick for the recency words; negative leaves them as they are.   counters: of the words COUNTER_*, or 0.
        timed: this is a whole lookup, whose time counts.
        streamed: write rows past the caches; ``out`` and rows must be multiples of 64 bytes.

    Returns the number of keys without a row, or -1 if the store is closed.   **Writes:** out, misses, recency words, counters.
    """
    since = begin_sample(counters) if timed else np.int64(0)
    missing = _look_up(header, keys, start, stop, out, default, misses, epoch, record, now, streamed)
    if missing >= 0:
        end_sample(counters, since)
        count_lookup(counters, stop - start, missing, start == 0)
    return missing


@host_function
def _look_up(header, keys, start, stop, out, default, misses, epoch, record, now, streamed):
    """``host_lookup`` without counting and timing.   **Writes:** out, misses, recency words."""
    enter_epoch(epoch, record)
    block = load_word_acquire(header)
    if block == 0:
        leave_epoch(record)
        return -1
    missing = copy_rows_of(block, keys, start, stop, out, default, misses, 0, now, streamed)
    leave_epoch(record)
    return missing


@host_kernel
def host_lookup_plain(keys, out, words, record, now):
    """``host_lookup`` of a small batch as it comes, for a table that no slower tier follows: one call out of Python does all.

    Args:
        keys: int64 ``[n]``, contiguous.   out: float32 of two dimensions, contiguous.
        words: address of ``PLAIN_WORDS``.   record, now: as for ``host_lookup``.

    Returns as ``host_lookup``; NOT_PLAIN, with nothing done, if there is no key, or more than the limit, or if ``out`` is not
    ``[n, dim]`` or shares memory with the keys.   **Writes:** out, recency words, counters.
    """
    n, dim = keys.size, load_word(words + _DIM)
    if n == 0 or n > load_word(words + _LIMIT) or out.shape[0] != n or out.shape[1] != dim:
        return NOT_PLAIN
    at, to, shared = _addresses(keys, out)
    if shared:
        return NOT_PLAIN
    header, epoch, counters = load_word(words + _HEADER), load_word(words + _EPOCH), load_word(words + _COUNTERS)
    default = numba.carray(float_pointer(words + _DEFAULT), 1)[0]
    since = begin_sample(counters)
    missing = _look_up(header, at, 0, n, to, default, 0, epoch, record, now, False)
    if missing >= 0:
        end_sample(counters, since)
        count_lookup(counters, n, missing, True)
    if missing > 0 and counters != 0:
        add_word(counters + COUNTER_ABSENT, missing)
    return missing


@host_function
def _addresses(keys, out):
    at, to = array_address(keys), array_address(out)
    return at, to, at < to + out.size * out.itemsize and to < at + keys.size * keys.itemsize


@host_kernel
def host_addresses(keys, out):
    """Addresses of two contiguous arrays, and whether they share memory; Python takes ten times as long to get them."""
    return _addresses(keys, out)


@host_kernel
def host_contains(header, keys, n, found, epoch, record):
    """Set ``found[i]`` (int64) to 1 where ``keys[i]`` has a row, else to 0. Returns n, or -1 if the store is closed.

    **Writes:** found.
    """
    enter_epoch(epoch, record)
    block = load_word_acquire(header)
    if block == 0:
        leave_epoch(record)
        return -1
    lines = load_word(block + META_LINES)
    end = end_of(block)
    for i in range(n + _AHEAD):
        if i < n:
            prefetch(primary_address(block, lines, load_word(keys + 8 * i)))
        j = i - _AHEAD
        if j >= 0:
            key = load_word(keys + 8 * j)
            word = find_entry(block, end, primary_address(block, lines, key), key)[1]
            store_word(found + 8 * j, np.int64(slot_of(word) >= 0))
    leave_epoch(record)
    return n
