"""The checks on chunks of keys and rows before they are written to any file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from hps_numba.config.messages import show
from hps_numba.errors import HpsError, KeyDtypeError, ModelFileError
from hps_numba.storage.formats._arrays import assign
from hps_numba.storage.formats._format import Chunk, Keys, Progress, Rows
from hps_numba.storage.urls import Place

__all__ = ["checked_chunks", "writing"]


def checked_chunks(
    path: Place, dim: int, chunks: Iterable[tuple[Any, ...]], rows: int | None = None, on_progress: Progress | None = None
) -> Iterator[Chunk]:
    """Each ``(keys, rows)`` or ``(keys, rows, meta)`` as C-contiguous int64, float32 and int64 arrays that fit together.

    Args:
        rows: the announced number of rows of all chunks; None if unknown.
        on_progress: called with (rows done, announced rows or rows done) once a chunk was used up.

    Raises:
        KeyDtypeError: keys or meta are not integers.
        ModelFileError: a wrong shape or dtype, a value that does not fit, meta in some chunks only, or another number
            of rows than ``rows`` in all.
    """
    if not isinstance(chunks, Iterable):
        raise ModelFileError(f"{path}: chunks: expected an iterable of (keys, rows), got {show(chunks)}")
    done = 0
    first_has_meta: bool | None = None
    for number, chunk in enumerate(chunks):
        where = f"chunk {number}"
        checked = _checked(path, where, dim, chunk)
        has_meta = checked[2] is not None
        if first_has_meta is None:
            first_has_meta = has_meta
        if has_meta != first_has_meta:
            raise ModelFileError(
                f"{path}: {where}: expected meta in all chunks or none, got {'one with' if has_meta else 'one without'}"
            )
        yield checked
        done += len(checked[0])
        if rows is not None and done > rows:
            raise ModelFileError(f"{path}: expected {rows} rows, as announced, got {done} up to {where}")
        if on_progress is not None:
            on_progress(done, done if rows is None else rows)
    if rows is not None and done != rows:
        raise ModelFileError(f"{path}: expected {rows} rows, as announced, got {done}")


@contextmanager
def writing(path: Place, chunks: Iterable[Chunk]) -> Iterator[Iterator[Chunk]]:
    """The chunks again, for a block that writes them: an error of the disk or of a library becomes a ``ModelFileError``.

    What the chunks themselves raise is the caller's and passes as it is.
    """
    of_the_caller: list[Exception] = []

    def passing() -> Iterator[Chunk]:
        try:
            yield from chunks
        except Exception as problem:
            of_the_caller.append(problem)
            raise

    try:
        yield passing()
    except HpsError:
        raise
    except Exception as problem:
        if any(problem is own for own in of_the_caller):
            raise
        raise ModelFileError(f"{path}: cannot be written: {' '.join(str(problem).split())}") from problem


def _checked(path: Place, where: str, dim: int, chunk: tuple[Any, ...]) -> Chunk:
    if not isinstance(chunk, (tuple, list)) or len(chunk) not in (2, 3):
        got = f"{len(chunk)} parts" if isinstance(chunk, (tuple, list)) else show(chunk)
        raise ModelFileError(f"{path}: {where}: expected (keys, rows) or (keys, rows, meta), got {got}")
    keys = _integers(path, f"{where}: keys", chunk[0])
    rows = _rows(path, f"{where}: rows", chunk[1], (len(keys), dim))
    if len(chunk) == 2 or chunk[2] is None:
        return keys, rows, None
    meta = _integers(path, f"{where}: meta", chunk[2])
    if meta.shape != keys.shape:
        raise ModelFileError(f"{path}: {where}: meta: expected {len(keys)} elements, as many as keys, got {len(meta)}")
    return keys, rows, meta


def _array(path: Place, where: str, given: npt.ArrayLike) -> npt.NDArray[Any]:
    try:
        return np.asarray(given)
    except Exception as problem:  # ragged lists, or whatever a foreign object raises
        raise ModelFileError(f"{path}: {where}: expected an array, got {show(given)}: {problem}") from problem


def _integers(path: Place, where: str, given: npt.ArrayLike) -> Keys:
    array = _array(path, where, given)
    if array.dtype.kind not in "iu":
        raise KeyDtypeError(f"{path}: {where}: expected integers, got {array.dtype}")
    if array.ndim != 1:
        raise ModelFileError(f"{path}: {where}: expected one dimension, got shape {list(array.shape)}")
    if array.dtype == np.int64 and array.flags.c_contiguous:
        return array
    out = np.empty(array.shape, np.int64)
    assign(out, array, path, where)
    return out


def _rows(path: Place, where: str, given: npt.ArrayLike, shape: tuple[int, int]) -> Rows:
    array = _array(path, where, given)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ModelFileError(f"{path}: {where}: expected float32, got {array.dtype}")
    if array.shape != shape:
        raise ModelFileError(f"{path}: {where}: expected shape {list(shape)}, got {list(array.shape)}")
    if array.dtype == np.float32 and array.flags.c_contiguous:
        return array
    out = np.empty(shape, np.float32)
    assign(out, array, path, where)
    return out
