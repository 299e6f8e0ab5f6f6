"""Gather rows of a host store for a device: those of a list of keys, and the index words under which they were read."""

from __future__ import annotations

from hps_numba.kernels.compiler.njit import host_kernel
from hps_numba.kernels.host.lookup import copy_rows_of

__all__ = ["host_gather"]


@host_kernel
def host_gather(block, keys, start, stop, rows, default, words, now, streamed):
    """``kernels.host.lookup`` of ``keys[start:stop]`` that also returns the index words; inside an epoch of the caller's.

    Args (addresses and counts are int64):
        block: address of the index block in force.   keys: of int64 keys.   rows: of float32 rows, row_bytes apart.
        words: of int64, as many as keys.   default, now, streamed: as for ``kernels.host.lookup``.

    Returns the number of keys without a row.   **Writes:** rows, words, recency words.
    """
    return copy_rows_of(block, keys, start, stop, rows, default, 0, words, now, streamed)
