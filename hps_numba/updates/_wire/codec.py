"""Packed pairs of keys and rows, compiled: each kernel passes once over its input and holds no GIL.

Bytes are copied one by one in the source, which LLVM turns into copies of words and vectors: nothing in a message is aligned.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hps_numba.kernels.compiler.njit import host_function, host_kernel
from hps_numba.kernels.hashing import index_hash

__all__ = ["NOT_FINITE", "decode_keys", "decode_pairs", "encode_keys", "encode_pairs", "mark_last_writes"]

#: result of ``decode_pairs``: a value is NaN or infinite
NOT_FINITE = -1

_hash = host_function(index_hash)


@host_function
def _read_key(data: Any, at: Any, key_bytes: Any) -> Any:
    key = np.uint64(0)
    if key_bytes == 8:
        for i in range(8):
            key |= np.uint64(data[at + i]) << np.uint64(8 * i)
    else:
        for i in range(4):
            key |= np.uint64(data[at + i]) << np.uint64(8 * i)
    return np.int64(key)


@host_function
def _write_key(data: Any, at: Any, key: Any, key_bytes: Any) -> None:
    bits = np.uint64(key)
    if key_bytes == 8:
        for i in range(8):
            data[at + i] = np.uint8((bits >> np.uint64(8 * i)) & np.uint64(255))
    else:
        for i in range(4):
            data[at + i] = np.uint8((bits >> np.uint64(8 * i)) & np.uint64(255))


@host_kernel
def decode_pairs(
    data: Any, first: Any, n: Any, key_bytes: Any, finite: Any, keys: Any, row_bytes: Any, rows: Any, at: Any
) -> Any:
    """Decode ``n`` pairs from byte ``first`` of ``data`` on; the caller has checked that they are there.

    Args:
        data: uint8, read-only.   finite: whether NaN and infinity are refused.
        keys: int64.   row_bytes: uint8 ``[m, 4 * dim]``, the memory of ``rows``, float32 ``[m, dim]``.   at: of the first.

    Returns ``n`` or NOT_FINITE.   **Writes:** keys and rows, from ``at`` on.
    """
    size = row_bytes.shape[1]
    position = first
    for i in range(at, at + n):
        keys[i] = _read_key(data, position, key_bytes)
        position += key_bytes
        for b in range(size):
            row_bytes[i, b] = data[position + b]
        position += size
        if finite:
            for d in range(rows.shape[1]):
                if not np.isfinite(rows[i, d]):
                    return NOT_FINITE
    return n


@host_kernel
def decode_keys(data: Any, n: Any, key_bytes: Any, keys: Any, at: Any) -> None:
    """Decode ``n`` packed keys of ``data`` (uint8, read-only).   **Writes:** keys, from ``at`` on."""
    for i in range(n):
        keys[at + i] = _read_key(data, i * key_bytes, key_bytes)


@host_kernel
def encode_pairs(keys: Any, row_bytes: Any, order: Any, start: Any, stop: Any, key_bytes: Any, out: Any, at: Any) -> Any:
    """Write the pairs at ``order[start:stop]``; returns where they end in ``out``.

    Args:
        keys: int64 ``[n]``.   row_bytes: uint8 ``[n, 4 * dim]``.   order: int64.   out: uint8.

    **Writes:** out, from ``at`` on.
    """
    size = row_bytes.shape[1]
    for position in range(start, stop):
        i = order[position]
        _write_key(out, at, keys[i], key_bytes)
        at += key_bytes
        for b in range(size):
            out[at + b] = row_bytes[i, b]
        at += size
    return at


@host_kernel
def encode_keys(keys: Any, order: Any, start: Any, stop: Any, key_bytes: Any, out: Any, at: Any) -> Any:
    """Write the keys at ``order[start:stop]``; returns where they end in ``out``.   **Writes:** out, from ``at`` on."""
    for position in range(start, stop):
        _write_key(out, at, keys[order[position]], key_bytes)
        at += key_bytes
    return at


@host_kernel
def mark_last_writes(keys: Any, slots: Any, kept: Any) -> Any:
    """Which of several writes of a key is the last one; returns how many are.

    Args:
        keys: int64 ``[n]``, in the order of writing.   slots: int64 of a power of two of at least ``2 * n``, all -1.

    **Writes:** slots; kept, bool ``[n]``.
    """
    mask = np.uint64(len(slots) - 1)
    count = 0
    for i in range(len(keys) - 1, -1, -1):
        at = _hash(np.uint64(keys[i])) & mask
        while slots[at] >= 0 and keys[slots[at]] != keys[i]:
            at = (at + np.uint64(1)) & mask
        kept[i] = slots[at] < 0
        if kept[i]:
            slots[at] = i
            count += 1
    return count
