"""Walk a host store: its keys and rows, chunk by chunk."""

from __future__ import annotations

from hps_numba.kernels.compile import host_kernel
from hps_numba.kernels.host_probe import slot_of
from hps_numba.kernels.memory_words import copy_row, load_word, load_word_acquire, store_word
from hps_numba.layout import ENTRIES_PER_LINE, ENTRY_BYTES, META_BYTES, META_LINES, META_ROW_BYTES, META_ROWS

__all__ = ["host_scan"]


@host_kernel
def host_scan(block, first, room, keys, rows):
    """Copy up to ``room`` live (key, row) pairs, from entry number ``first`` on. The caller stands in an epoch.

    Returns ``(pairs, next entry)``; all is read when next entry is the number of entries.   **Writes:** keys, rows.
    """
    source = load_word(block + META_ROWS)
    row_bytes = load_word(block + META_ROW_BYTES)
    entries = load_word(block + META_LINES) * ENTRIES_PER_LINE
    count = 0
    number = first
    while number < entries and count < room:
        entry = block + META_BYTES + number * ENTRY_BYTES
        slot = slot_of(load_word_acquire(entry + 8))
        if slot >= 0:
            store_word(keys + 8 * count, load_word(entry))
            copy_row(rows + count * row_bytes, source + slot * row_bytes, row_bytes)
            count += 1
        number += 1
    return count, number
