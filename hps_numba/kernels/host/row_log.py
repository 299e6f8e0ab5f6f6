"""Write and check the bytes of a ``row_log`` (``kernels.layouts.row_log``).

Addresses, sizes and locations are int64.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_function, host_kernel
from hps_numba.kernels.host.atomics import array_address, copy_row, load_word, load_word_acquire, store_word
from hps_numba.kernels.host.checksums import sum_words
from hps_numba.kernels.host.probe import end_of, find_entry, primary_address, slot_of
from hps_numba.kernels.layouts.host_store import META_LINES, META_ROW_BYTES, META_ROWS
from hps_numba.kernels.layouts.row_log import ERASURE, PUT, RECORD_WORDS, SLOT_HEADER_BYTES

__all__ = ["row_log_encode", "row_log_find_record", "row_log_move", "row_log_record", "row_log_valid_slots", "take_row"]

_UNIT_SEED = np.int64(0x2545F4914F6CDD1D)


@host_function
def _slot_sum(slot, slot_size, seed, unit):
    return sum_words(slot + 8, slot_size // 8 - 1, seed + unit * _UNIT_SEED)


@host_function
def take_row(slot, key, slot_size, row_bytes, seed, unit, target):
    """Copy the row in the slot at ``slot`` to ``target`` if it is whole and that of ``key``; returns whether it is.

    **Writes:** target.
    """
    if load_word(slot + 8) != key or load_word(slot) != _slot_sum(slot, slot_size, seed, unit):
        return False
    copy_row(target, slot + SLOT_HEADER_BYTES, row_bytes)
    return True


@host_kernel
def row_log_encode(keys, rows, slot_size, row_bytes, seed, unit, out):
    """Write the slots of a group, the first of which is at ``unit``.

    Args:
        keys: int64 ``[n]``.   rows: address of the float32 rows, ``row_bytes`` apart.
        out: int64 words, zero, with room for n slots of ``slot_size`` bytes.

    **Writes:** out.
    """
    at = array_address(out)
    for i in range(len(keys)):
        slot = at + i * slot_size
        store_word(slot + 8, keys[i])
        copy_row(slot + SLOT_HEADER_BYTES, rows + i * row_bytes, row_bytes)
        store_word(slot, _slot_sum(slot, slot_size, seed, unit + i * (slot_size // 8)))


@host_kernel
def row_log_valid_slots(buffer, slot_size, seed, unit, most, keys):
    """The keys of the slots in ``buffer`` (int64 words), whose first one is at ``unit``, up to one that is damaged.

    Returns their number, at most ``most``.   **Writes:** keys.
    """
    at = array_address(buffer)
    words = slot_size // 8
    n = min(most, len(buffer) // words)
    for i in range(n):
        slot = at + i * slot_size
        if load_word(slot) != _slot_sum(slot, slot_size, seed, unit + i * words):
            return i
        keys[i] = load_word(slot + 8)
    return n


@host_kernel
def row_log_record(record, position, seed):
    """Put the checksums in a record (int64 words) that will be at word ``position`` of its file.   **Writes:** record."""
    at = array_address(record)
    record[4] = sum_words(at + 8 * RECORD_WORDS, len(record) - RECORD_WORDS, seed + position)
    record[5] = sum_words(at, RECORD_WORDS - 1, seed + position)


@host_kernel
def row_log_find_record(words, start, seed):
    """Find the first record from word ``start`` on whose header is whole.

    Returns its position, or -1, and whether its keys are there and whole.
    """
    at = array_address(words)
    for position in range(start, len(words) - RECORD_WORDS + 1):
        mark = words[position]
        if mark != PUT and mark != ERASURE:
            continue
        if words[position + 5] != sum_words(at + 8 * position, RECORD_WORDS - 1, seed + position):
            continue
        count = words[position + 3]
        first = position + RECORD_WORDS
        if count < 0 or count > len(words) - first:
            return position, False
        return position, words[position + 4] == sum_words(at + 8 * first, count, seed + position)
    return -1, False


@host_kernel
def row_log_move(block, keys, old, new):
    """Point the index at ``block`` to the ``new`` locations of those ``keys`` that still have the ``old`` ones.

    The row of a key in that index is its location, one aligned word: readers see one of the two, whose rows are the same. The
    caller keeps other writers away. Returns how many moved.   **Writes:** locations.
    """
    rows = load_word(block + META_ROWS)
    row_bytes = load_word(block + META_ROW_BYTES)
    lines = load_word(block + META_LINES)
    end = end_of(block)
    moved = 0
    for i in range(len(keys)):
        slot = slot_of(find_entry(block, end, primary_address(block, lines, keys[i]), keys[i])[1])
        if slot >= 0 and load_word_acquire(rows + slot * row_bytes) == old[i]:
            store_word(rows + slot * row_bytes, new[i])
            moved += 1
    return moved
