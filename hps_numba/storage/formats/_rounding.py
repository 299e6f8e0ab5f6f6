"""Rows of fewer bytes: how float32 becomes float16, bfloat16 or int8 with a scale a row, and how much is lost.

Half types are rounded to nearest even. An int8 row is ``rint(row / scale)`` with ``scale = max(abs(row)) / 127``, so a value is
off by about half a scale at most. What cannot be represented (a finite value beyond float16, NaN in int8) is an error and never
another number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from hps_numba.errors import ModelFileError
from hps_numba.storage.formats._arrays import BFLOAT16, assign
from hps_numba.storage.formats._format import Chunk, Rows
from hps_numba.storage.urls import Place

__all__ = ["as_stored", "checked_rounding"]

_LARGEST_INT8 = 127


def as_stored(rows: Rows, dtype: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32] | None]:
    """float32 ``[n, dim]`` as the dtype, a name of ``ROW_DTYPES``, and the scales float32 ``[n]`` of int8 rows.

    Values that the dtype cannot hold become infinite, or 0 in int8.
    """
    if dtype == "float32":
        return rows, None
    if dtype == "float16":
        with np.errstate(over="ignore", under="ignore"):
            return rows.astype("<f2"), None
    if dtype == "bfloat16":
        return _bfloat16(rows), None
    scales = np.abs(rows).max(axis=1, initial=0.0).astype(np.float32) / np.float32(_LARGEST_INT8)
    usable = np.isfinite(scales) & (scales > 0)
    divisors = np.where(usable, scales, np.float32(1))[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        quotients = np.where(usable[:, None], np.rint(rows / divisors), np.float32(0))
    return np.clip(quotients, -_LARGEST_INT8, _LARGEST_INT8).astype(np.int8), np.where(usable, scales, np.float32(0))


def _bfloat16(rows: Rows) -> npt.NDArray[Any]:
    bits = np.ascontiguousarray(rows).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16
    quiet_nan = bits >> 16 | 0x40  # rounding would carry some NaN to infinity
    return np.where(np.isnan(rows), quiet_nan, rounded).astype("<u2").view(BFLOAT16)


def _restored(stored: npt.NDArray[Any], scales: npt.NDArray[np.float32] | None, path: Place) -> Rows:
    rows = np.empty(stored.shape, np.float32)
    if scales is None:
        assign(rows, stored, path, "emb_vector")
    else:
        np.multiply(stored, scales[:, None], out=rows)
    return rows


def checked_rounding(
    path: Place, chunks: Iterable[Chunk], dtype: str, on_loss: Callable[[float], None] | None
) -> Iterator[Chunk]:
    """The chunks again, once it is known that their rows fit the dtype.

    Args:
        on_loss: called once, after the last chunk, with the largest absolute error of a value.

    Raises:
        ModelFileError: a row holds what the dtype cannot.
    """
    loss, done = 0.0, 0
    for keys, rows, meta in chunks:
        if dtype != "float32" and len(rows):
            restored = _restored(*as_stored(rows, dtype), path)
            wrong = np.argwhere(np.isfinite(rows) != np.isfinite(restored) if dtype != "int8" else ~np.isfinite(rows))
            if len(wrong):
                row, column = wrong[0]
                expected = "finite values" if dtype == "int8" else f"values in the range of {dtype}"
                raise ModelFileError(f"{path}: row {done + row}: expected {expected}, got {rows[row, column]}")
            with np.errstate(invalid="ignore"):
                errors = np.abs(rows.astype(np.float64) - restored)
            loss = max(loss, float(np.nan_to_num(errors, nan=0.0).max()))
        yield keys, rows, meta
        done += len(rows)
    if on_loss is not None:
        on_loss(loss)
