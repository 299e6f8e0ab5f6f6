"""Packed pairs of keys and rows, compiled: each kernel passes once over its input and holds no GIL.

Keys and rows are copied as rows of float32 are, whatever their bits mean: LLVM does not know that arrays do not overlap, and
turns loops over bytes into something that takes ten times as long. All parts of a message are multiples of 4 bytes, and so is
where it begins in memory. Machines are little-endian, as messages are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hps_numba.kernels.compiler.njit import host_function, host_kernel
from hps_numba.kernels.hashing import index_hash
from hps_numba.kernels.host.atomics import array_address, copy_row

__all__ = ["NOT_FINITE", "decode_messages", "encode_keys", "encode_pairs", "mark_last_writes", "take_last_writes"]

#: instead of the place of a message: a value is NaN or infinite
NOT_FINITE = -1

_hash = host_function(index_hash)


@host_kernel
def decode_messages(
    parts: Any,
    key_bytes: Any,
    finite: Any,
    keys: Any,
    row_bytes: Any,
    rows: Any,
    erased: Any,
    times: Any,
    at: Any,
    places: Any,
) -> Any:
    """Decode messages one after the other, rows before deletions; the caller has checked that all of it is there.

    One call for all of them: of many threads, one that calls kernels in turn asks for the GIL after each.

    Args:
        parts: int64 ``[m, 5]``, of each message the address of its pairs, how many, the address of keys to delete, how many,
            and its time.
        finite: whether a message with NaN or infinity is left out.
        keys: int64.   row_bytes: uint8 ``[n, 4 * dim]``, the memory of ``rows``, float32 ``[n, dim]``.   erased: bool.
        times: int64.   at: where the first one goes.

    Returns where they end.   **Writes:** keys, rows, erased, times, from ``at`` on; places, int64 ``[m]``: where each begins,
    or NOT_FINITE.
    """
    size = row_bytes.shape[1]
    to_keys, to_rows = array_address(keys), array_address(row_bytes)
    for m in range(len(parts)):
        source, end = parts[m, 0], at + parts[m, 1]
        places[m] = at
        for i in range(at, end):
            keys[i] = 0
            copy_row(to_keys + 8 * i, source, key_bytes)
            copy_row(to_rows + size * i, source + key_bytes, size)
            source += key_bytes + size
            erased[i] = False
            times[i] = parts[m, 4]
            if finite:
                for d in range(rows.shape[1]):
                    if not np.isfinite(rows[i, d]):
                        places[m] = NOT_FINITE
        if places[m] == NOT_FINITE:
            continue
        source = parts[m, 2]
        for i in range(end, end + parts[m, 3]):
            keys[i] = 0
            copy_row(to_keys + 8 * i, source, key_bytes)
            source += key_bytes
            erased[i] = True
            times[i] = parts[m, 4]
        at = end + parts[m, 3]
    return at


@host_kernel
def encode_pairs(keys: Any, row_bytes: Any, order: Any, start: Any, stop: Any, key_bytes: Any, out: Any, at: Any) -> Any:
    """Write the pairs at ``order[start:stop]``; returns where they end in ``out``.

    Args:
        keys: int64 ``[n]``.   row_bytes: uint8 ``[n, 4 * dim]``.   order: int64.   out: uint8.

    **Writes:** out, from ``at`` on.
    """
    size = row_bytes.shape[1]
    target, from_keys, from_rows = array_address(out), array_address(keys), array_address(row_bytes)
    for position in range(start, stop):
        i = order[position]
        copy_row(target + at, from_keys + 8 * i, key_bytes)
        copy_row(target + at + key_bytes, from_rows + size * i, size)
        at += key_bytes + size
    return at


@host_kernel
def encode_keys(keys: Any, order: Any, start: Any, stop: Any, key_bytes: Any, out: Any, at: Any) -> Any:
    """Write the keys at ``order[start:stop]``; returns where they end in ``out``.   **Writes:** out, from ``at`` on."""
    target, source = array_address(out), array_address(keys)
    for position in range(start, stop):
        copy_row(target + at, source + 8 * order[position], key_bytes)
        at += key_bytes
    return at


@host_kernel
def mark_last_writes(keys: Any, erased: Any, slots: Any, kept: Any) -> Any:
    """Which of several writes of a key is the last one; returns how many are, how many of those delete, and how many do of all.

    Args:
        keys: int64 ``[n]``, in the order of writing.   erased: bool ``[n]``.
        slots: int64 of a power of two of at least ``2 * n``, all -1.

    **Writes:** slots; kept, bool ``[n]``.
    """
    mask = np.uint64(len(slots) - 1)
    count = deleting = deletions = 0
    for i in range(len(keys) - 1, -1, -1):
        at = _hash(np.uint64(keys[i])) & mask
        while slots[at] >= 0 and keys[slots[at]] != keys[i]:
            at = (at + np.uint64(1)) & mask
        kept[i] = slots[at] < 0
        deletions += erased[i]
        if kept[i]:
            slots[at] = i
            count += 1
            deleting += erased[i]
    return count, deleting, deletions


@host_kernel
def take_last_writes(
    keys: Any, row_bytes: Any, erased: Any, times: Any, kept: Any, out_keys: Any, out_row_bytes: Any, out_times: Any
) -> None:
    """Take what is ``kept``, in order: first all rows, then all deletions.

    Args:
        keys, times: int64 ``[n]``.   row_bytes: uint8 ``[n, 4 * dim]``.   erased, kept: bool ``[n]``.

    **Writes:** out_keys and out_times, int64 ``[r + d]``; out_row_bytes, uint8 ``[r, 4 * dim]``.
    """
    size, rows, deletions = row_bytes.shape[1], 0, len(out_row_bytes)
    source, target = array_address(row_bytes), array_address(out_row_bytes)
    for i in range(len(keys)):
        if not kept[i]:
            continue
        if erased[i]:
            at = deletions
            deletions += 1
        else:
            at = rows
            rows += 1
            copy_row(target + size * at, source + size * i, size)
        out_keys[at] = keys[i]
        out_times[at] = times[i]
