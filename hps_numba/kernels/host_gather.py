"""Gather rows of a host store for a device: those of a list of keys, and the index words under which they were read."""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compile import host_kernel
from hps_numba.kernels.host_lookup import copy_found_rows, find_words
from hps_numba.kernels.memory_words import full_fence, load_word, store_word
from hps_numba.layout import META_ROW_BYTES

__all__ = ["host_gather"]

_BATCH = 1024  # keys whose words are found before their rows are copied, as in ``host_lookup``


@host_kernel
def host_gather(block, keys, start, stop, rows, default, words, now, streamed):
    """``host_lookup`` of ``keys[start:stop]`` that keeps the index words; in an epoch of the caller's.

    Args (addresses and counts are int64):
        block: address of the index block in force.   keys: of int64 keys.   rows: of float32 rows, row_bytes apart.
        words: of int64, as many as keys.   default, now, streamed: as for ``host_lookup``.

    Returns the number of keys without a row.   **Writes:** rows, words, recency words.
    """
    row_bytes = load_word(block + META_ROW_BYTES)
    room = min(_BATCH, stop - start)
    found = np.empty(room, np.int64)
    late = np.empty(room, np.int64)
    missing = 0
    for first in range(start, stop, _BATCH):
        n = min(_BATCH, stop - first)
        find_words(block, keys + 8 * first, n, found, late)
        for i in range(n):
            store_word(words + 8 * (first + i), found[i])
        missing += copy_found_rows(block, found, n, first, rows + first * row_bytes, default, 0, now, streamed)
    if streamed:
        full_fence()
    return missing
