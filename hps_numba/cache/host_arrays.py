"""Checks of NumPy arrays that callers of the synchronous methods give: one message for each kind of array."""

from __future__ import annotations

import numpy as np

from hps_numba.errors import ArrayError, ConfigError, KeyDtypeError

__all__ = ["contiguous_keys", "contiguous_offsets", "contiguous_rows", "contiguous_weights", "float32_output"]


def contiguous_keys(name: str, keys: np.ndarray) -> np.ndarray:
    """Contiguous keys, int64 ``[n]``.

    Raises:
        KeyDtypeError: another dtype or rank.
    """
    if keys.dtype != np.int64 or keys.ndim != 1:
        raise KeyDtypeError(f"{name}: keys: expected int64[n], got {keys.dtype}{list(keys.shape)}")
    return np.ascontiguousarray(keys)


def contiguous_rows(name: str, rows: np.ndarray, n: int, dim: int) -> np.ndarray:
    """Contiguous rows, float32 ``[n, dim]``.

    Raises:
        ArrayError: another dtype or shape.
    """
    if rows.dtype != np.float32 or rows.shape != (n, dim):
        raise ArrayError(f"{name}: rows: expected float32[{n}, {dim}], got {rows.dtype}{list(rows.shape)}")
    return np.ascontiguousarray(rows)


def float32_output(name: str, out: np.ndarray | None, n: int, dim: int) -> np.ndarray:
    """``out``, or a new array: float32 ``[n, dim]``, contiguous.

    Raises:
        ArrayError: ``out`` has another dtype or shape, or is not contiguous.
    """
    if out is None:
        return np.empty((n, dim), np.float32)
    if out.dtype != np.float32 or out.shape != (n, dim) or not out.flags.c_contiguous:
        order = "" if out.flags.c_contiguous else ", not contiguous"
        raise ArrayError(f"{name}: out: expected contiguous float32[{n}, {dim}], got {out.dtype}{list(out.shape)}{order}")
    return out


def contiguous_offsets(name: str, offsets: np.ndarray, n: int) -> np.ndarray:
    """Contiguous offsets of bags, int64 ``[bags + 1]``, of int64 or int32 that ascend from 0 to ``n``.

    Raises:
        ConfigError: they are something else.
    """
    if offsets.dtype not in (np.int64, np.int32) or offsets.ndim != 1 or len(offsets) == 0:
        raise ConfigError(f"{name}: offsets: expected int64[bags + 1], got {offsets.dtype}{list(offsets.shape)}")
    if offsets[0] != 0 or offsets[-1] != n:
        raise ConfigError(f"{name}: offsets: expected from 0 to {n}, the number of keys, got {offsets[0]} to {offsets[-1]}")
    falls = np.flatnonzero(offsets[1:] < offsets[:-1])
    if len(falls):
        raise ConfigError(f"{name}: offsets: expected ascending ones, got one at {falls[0] + 1} less than the one before")
    return np.ascontiguousarray(offsets, np.int64)


def contiguous_weights(name: str, weights: np.ndarray, n: int) -> np.ndarray:
    """Contiguous weights, float32 ``[n]``.

    Raises:
        ConfigError: another dtype or shape.
    """
    if weights.dtype != np.float32 or weights.shape != (n,):
        raise ConfigError(f"{name}: weights: expected float32[{n}], got {weights.dtype}{list(weights.shape)}")
    return np.ascontiguousarray(weights)
