"""Rows that tell their key, and how rows are compared: shared by the contract suites."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["assert_same_bits", "ints", "rows_of"]


def ints(*keys: int) -> np.ndarray:
    """int64 ``[n]``."""
    return np.array(keys, np.int64)


def rows_of(keys: Any, dim: int, stamp: int = 0) -> np.ndarray:
    """float32 ``[n, dim]``: rows that tell key and column exactly, times ``2**stamp``."""
    base = (np.asarray(keys).astype(np.int64) % 65521 + 1).astype(np.float32)
    return (base[..., None] + np.arange(dim, dtype=np.float32) / 128) * np.float32(2.0**stamp)


def assert_same_bits(got: Any, expected: Any) -> None:
    """float32 arrays of equal shape and bits, so that NaN equals NaN and -0 does not equal 0."""
    got, expected = np.ascontiguousarray(got), np.ascontiguousarray(expected)
    assert got.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32), strict=True)
