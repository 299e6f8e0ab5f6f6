"""What the arrays of a sparse model may look like, and how a piece of one becomes int64 keys or float32 rows.

``key`` and ``meta``: any integer dtype whose values fit int64. A uint64 above the largest int64 is an error and never a
negative key. ``emb_vector``: float32, or float16, bfloat16 and float64 which are converted piece by piece; a finite float64
beyond float32 is an error. Rows of int8 come with ``scale``, one float a row: a value is ``emb_vector[i, j] * scale[i]``.

NumPy has no bfloat16: its two bytes are ``V2`` here, as ``np.save`` calls the dtype of ml_dtypes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hps_numba.errors import ModelFileError
from hps_numba.storage.urls import Place

__all__ = [
    "BFLOAT16",
    "NAMES",
    "PIECE_BYTES",
    "ROW_DTYPES",
    "Filler",
    "StoredArray",
    "assign",
    "check_arrays",
    "check_dim",
    "is_stored_as",
    "others",
    "piece_rows",
    "row_dtype",
    "with_scales",
]

BFLOAT16: np.dtype[Any] = np.dtype("V2")
"""The upper half of a float32."""

ROW_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": BFLOAT16,
    "int8": np.dtype("i1"),
}
"""Name -> what a row of a model file may be stored as."""

NAMES = ("key", "emb_vector", "meta", "scale")
"""Arrays of a sparse model."""

PIECE_BYTES = 1 << 20
"""Size of the intermediate where bytes cannot go straight to their place."""

_SHOWN_NAMES = 12
_INT64_MAX = np.iinfo(np.int64).max


class StoredArray(Protocol):
    """An array in a file, as far as its header tells."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...


class Filler(StoredArray, Protocol):
    """An array that can be read from first to last row."""

    def read_into(self, start: int, out: npt.NDArray[Any]) -> None: ...


class _ScaledRows:
    """int8 rows times their scales, as float32."""

    dtype = np.dtype(np.float32)

    def __init__(self, path: Place, rows: Filler, scales: Filler) -> None:
        self._path, self._rows, self._scales = path, rows, scales
        self.shape = rows.shape

    def read_into(self, start: int, out: npt.NDArray[Any]) -> None:
        step = min(len(out), piece_rows(self.shape[1]))
        rows, scales = np.empty((step, self.shape[1]), np.int8), np.empty(step, np.float32)
        for first in range(0, len(out), step):
            count = min(step, len(out) - first)
            self._rows.read_into(start + first, rows[:count])
            self._scales.read_into(start + first, scales[:count])
            wrong = np.flatnonzero(~np.isfinite(scales[:count]))
            if len(wrong):
                row = start + first + int(wrong[0])
                raise ModelFileError(f"{self._path}: scale: expected finite numbers, got {scales[wrong[0]]} at row {row}")
            with np.errstate(over="ignore"):
                np.multiply(rows[:count], scales[:count, None], out=out[first : first + count])


def with_scales(path: Place, arrays: Mapping[str, Filler]) -> dict[str, Filler]:
    """The arrays to read: int8 rows through their scales; a ``scale`` that nothing needs is left out."""
    used = {name: array for name, array in arrays.items() if name != "scale"}
    if "scale" in arrays and "emb_vector" in arrays and _is_int8(arrays["emb_vector"].dtype):
        used["emb_vector"] = _ScaledRows(path, arrays["emb_vector"], arrays["scale"])
    return used


def row_dtype(arrays: Mapping[str, StoredArray]) -> str:
    """What the rows are stored as, e.g. ``bfloat16``."""
    dtype = arrays["emb_vector"].dtype
    return "bfloat16" if dtype == BFLOAT16 else dtype.name


def _is_int8(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "i" and dtype.itemsize == 1


def check_arrays(
    path: Place, arrays: Mapping[str, StoredArray], dim: int | None, names: Iterable[str] | None = None
) -> tuple[int, int]:
    """Rows and width of the model whose arrays have these shapes and dtypes.

    Args:
        names: of everything in the file, for the message if an array is missing; None: ``arrays`` are all.

    Raises:
        ModelFileError: an array is missing, or has a wrong rank, dtype, number of rows or width.
    """
    for name in ("key", "emb_vector"):
        if name not in arrays:
            raise ModelFileError(f"{path}: has no array {name!r}, found {_listed(arrays if names is None else names)}")
    if _is_int8(arrays["emb_vector"].dtype) and "scale" not in arrays:
        raise ModelFileError(f"{path}: emb_vector: expected an array scale, float32 [rows], beside int8 rows, found none")
    if not _is_int8(arrays["emb_vector"].dtype):
        arrays = {name: array for name, array in arrays.items() if name != "scale"}
    for name, array in arrays.items():
        _check_dtype(path, name, array.dtype)
        rank = 2 if name == "emb_vector" else 1
        if len(array.shape) != rank or min(array.shape) < 0:
            expected = "sizes of 0 or more" if len(array.shape) == rank else f"{rank} dimension{'s' * (rank > 1)}"
            raise ModelFileError(f"{path}: {name}: expected {expected}, got shape {list(array.shape)}")
    rows, width = arrays["emb_vector"].shape
    for name in ("key", "meta", "scale"):
        if name in arrays and arrays[name].shape[0] != rows:
            raise ModelFileError(f"{path}: {name} has {arrays[name].shape[0]} elements, emb_vector has {rows} rows")
    check_dim(path, width, dim)
    return rows, width


def _listed(names: Iterable[str]) -> str:
    """Some names for a message, on one line."""
    found = sorted(name if name.isprintable() else repr(name) for name in names)
    shown = ", ".join(found[:_SHOWN_NAMES])
    return shown[:400] + (f" and {len(found) - _SHOWN_NAMES} more" if len(found) > _SHOWN_NAMES else "") or "none"


def others(names: Iterable[str], used: Mapping[str, object] | None = None) -> tuple[str, ...]:
    """Those of the names in a file that are not arrays of a sparse model, sorted; ``scale`` is one where it was ``used``."""
    scaled = used is not None and isinstance(used.get("emb_vector"), _ScaledRows)
    return tuple(sorted(set(names) - {"key", "emb_vector", "meta"} - ({"scale"} if scaled else set())))


def check_dim(path: Place, found: int, expected: int | None) -> None:
    """Raise ``ModelFileError`` unless the width that was found is the expected one and at least 1."""
    if found < 1 or (expected is not None and found != expected):
        raise ModelFileError(f"{path}: emb_vector: expected rows of width {expected or 'at least 1'}, got {found}")


def _check_dtype(path: Place, name: str, dtype: np.dtype[Any]) -> None:
    if name == "emb_vector":
        if not (dtype == BFLOAT16 or _is_int8(dtype) or (dtype.kind == "f" and dtype.itemsize in (2, 4, 8))):
            expected = "float32 (float16, bfloat16 and float64 are converted, int8 with scale)"
            raise ModelFileError(f"{path}: emb_vector: expected {expected}, got {dtype}")
    elif name == "scale":
        if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
            raise ModelFileError(f"{path}: scale: expected float32, got {dtype}")
    elif dtype.kind not in "iu":
        raise ModelFileError(f"{path}: {name}: expected int64 or another integer dtype, got {dtype}")


def is_stored_as(stored: np.dtype[Any], target: np.dtype[Any]) -> bool:
    """True if the bytes of ``stored``, once in native order, are those of ``target``."""
    return stored.kind == target.kind and stored.itemsize == target.itemsize


def piece_rows(row_bytes: int) -> int:
    """Rows of an intermediate of about ``PIECE_BYTES``; at least 1."""
    return max(1, PIECE_BYTES // max(1, row_bytes))


def assign(out: npt.NDArray[Any], source: npt.NDArray[Any], path: Place, name: str) -> None:
    """Copy ``source`` into ``out`` (int64, float32 or int8 of the same shape), exactly or rounded to the nearest float32.

    **Writes:** out.

    Raises:
        ModelFileError: an integer does not fit int64, or a finite float does not fit float32.
    """
    if source.dtype == BFLOAT16:
        halves = np.ascontiguousarray(source).view("<u2")
        np.left_shift(halves, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
        return
    if out.dtype.kind == "i":
        _assign_integers(out, source, path, name)
        return
    try:
        with np.errstate(over="raise", under="ignore", invalid="ignore"):
            out[...] = source
    except FloatingPointError:
        raise ModelFileError(f"{path}: {name} holds a {source.dtype} value beyond the range of float32") from None


def _assign_integers(out: npt.NDArray[Any], source: npt.NDArray[Any], path: Place, name: str) -> None:
    if source.dtype.kind == "u" and source.dtype.itemsize == 8 and source.size and (top := int(source.max())) > _INT64_MAX:
        raise ModelFileError(f"{path}: {name} holds {top}, which does not fit int64; store the bits as int64 if that is meant")
    out[...] = source
